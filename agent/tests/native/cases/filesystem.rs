// SPDX-License-Identifier: Apache-2.0
//! What a container sees of files.

use std::os::unix::fs::symlink;

use bulkhead_agent::container::{CreateError, LaunchError, Stage};
use bulkhead_protocol::agent as wire;

use crate::fixture::{World, bind, chain, mount, request};

type Request = wire::CreateContainerRequest;

/// Makes a tree `data` with `file` and `folder/inner` in it.
fn with_data(world: &World) {
    let data = world.folder.path().join("private/data");
    std::fs::create_dir_all(data.join("folder")).unwrap();
    std::fs::write(data.join("file"), "data").unwrap();
    std::fs::write(data.join("folder/inner"), "inner").unwrap();
}

async fn stage_of(world: &World, request: Request) -> (Stage, String) {
    match world.refused(request).await {
        CreateError::Launch(LaunchError::Failed(failure)) => (failure.stage, failure.to_string()),
        error => panic!("{}", chain(&error)),
    }
}

pub(crate) async fn only_the_containers_mounts_are_there() {
    let script = "while read id parent device root place rest; do echo $place; done < /proc/self/mountinfo";
    assert_eq!(World::new().script(script, |_| {}).await, "/\n/proc\n/dev\n/dev/pts\n/sys");
}

pub(crate) async fn default_devices_work() {
    let script = "ls -l /dev | while read mode links owner group major minor rest; do echo $mode $major$minor; done \
                  | grep ^c; echo x > /dev/null; head -c 8 /dev/urandom > /tmp/r; \
                  stat -c %s /tmp/r; echo x > /dev/full; for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done";
    let output = World::new().run(request(&["sh", "-c", script])).await.unwrap();
    let expected =
        ["crw-rw-rw- 1,7", "crw-rw-rw- 1,3", "crw-rw-rw- 1,8", "crw-rw-rw- 5,0", "crw-rw-rw- 1,9", "crw-rw-rw- 1,5"];
    for line in expected {
        assert!(output.stdout.contains(line), "{line} is not in {}", output.stdout);
    }
    assert!(output.stdout.ends_with("8\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n"));
    assert!(output.stderr.contains("No space left"), "{}", output.stderr);
}

pub(crate) async fn devices_of_the_spec_are_made() {
    let add = |request: &mut Request| {
        request.devices = vec![wire::Device {
            path: "/dev/inner/fuse".into(),
            kind: "c".into(),
            major: 10,
            minor: 229,
            mode: 0o640,
            uid: 3,
            gid: 4,
            ..Default::default()
        }];
    };
    assert_eq!(
        World::new().script("stat -c '%F %t:%T %a %u:%g' /dev/inner/fuse", add).await,
        "character special file a:e5 640 3:4"
    );
}

pub(crate) async fn devices_are_bound_where_files_are_in_the_way() {
    let world = World::new();
    std::fs::write(world.rootfs("dev/null"), "a file").unwrap();
    let without_dev = |request: &mut Request| request.mounts.retain(|mount| !mount.destination.starts_with("/dev"));
    assert_eq!(world.script("echo x > /dev/null; stat -c %F /dev/null", without_dev).await, "character special file");
    assert_eq!(std::fs::read(world.rootfs("dev/null")).unwrap(), b"a file");
}

pub(crate) async fn tmpfs_has_its_options() {
    let add = |request: &mut Request| {
        request.mounts.push(mount("/tmp", "tmpfs", libc::MS_NOEXEC | libc::MS_NODEV, "size=64k,mode=1770"));
        request.mounts.push(mount("/home", "tmpfs", libc::MS_RDONLY, ""));
    };
    let script = "stat -c %a /tmp; dd if=/dev/zero of=/tmp/x bs=1k count=100 2>/dev/null; stat -c %s /tmp/x; \
                  grep -E ' (/tmp|/home) ' /proc/mounts; stat -c %a /home; touch /home/x 2>&1";
    let output = World::new()
        .run({
            let mut request = request(&["sh", "-c", script]);
            add(&mut request);
            request
        })
        .await
        .unwrap();
    let lines: Vec<_> = output.stdout.lines().collect();
    assert_eq!(lines[..2], ["1770", "65536"]);
    assert!(lines[2].contains("nodev,noexec") && lines[2].contains("size=64k"), "{}", lines[2]);
    // It looks like the folder that it covers.
    assert!(lines[3].contains(" ro,") && lines[4] == "755", "{lines:?}");
    assert!(lines[5].contains("Read-only"), "{lines:?}");
}

pub(crate) async fn tmpfs_takes_up_what_it_covers() {
    let world = World::new();
    std::fs::write(world.rootfs("home/user/note"), "kept").unwrap();
    let add = |request: &mut Request| {
        let mut mount = mount("/home", "tmpfs", 0, "");
        mount.tmpcopyup = true;
        request.mounts.push(mount);
    };
    assert_eq!(world.script("cat /home/user/note; echo changed > /home/user/note", add).await, "kept");
    assert_eq!(std::fs::read(world.rootfs("home/user/note")).unwrap(), b"kept");
}

pub(crate) async fn unknown_types_and_bad_options_are_told() {
    let world = World::new();
    let mut unknown = request(&["true"]);
    unknown.mounts.push(mount("/x", "nofs", 0, ""));
    let (stage, text) = stage_of(&world, unknown).await;
    assert_eq!(stage, Stage::Mount);
    assert!(text.starts_with("cannot mount nofs at /x: the guest's kernel does not know"), "{text}");

    let mut bad = request(&["true"]);
    bad.mounts.push(mount("/x", "tmpfs", 0, "size=lots"));
    let (_, text) = stage_of(&world, bad).await;
    assert!(text.contains("tmpfs at /x") && text.contains("size=lots"), "{text}");
}

pub(crate) async fn mqueue_and_cgroup_are_mounted() {
    let world = World::new();
    let add = |request: &mut Request| {
        request.mounts.push(mount("/dev/mqueue", "mqueue", 0, ""));
        request.mounts.push(mount("/sys/fs/cgroup", "cgroup2", libc::MS_RDONLY, ""));
    };
    let script = "grep -c mqueue /proc/mounts; cat /proc/self/cgroup | grep '^0:'; test -e /sys/fs/cgroup/cgroup.procs";
    assert_eq!(world.script(script, add).await, "1\n0::/");
    if !world.has_cgroups() {
        return;
    }
    // Without a cgroup namespace, the container sees its own part all the same.
    let shared = |request: &mut Request| {
        add(request);
        request.namespaces.retain(|namespace| namespace.kind != wire::NamespaceKind::CGROUP.into());
    };
    assert_eq!(world.script("cat /sys/fs/cgroup/cgroup.procs | grep -c 1", shared).await, "1");
}

pub(crate) async fn binds_show_the_trees_content() {
    let world = World::new();
    with_data(&world);
    let add = |request: &mut Request| {
        request.mounts.push(bind("/made/on/the/way", "data", "", true, 0));
        request.mounts.push(bind("/etc/hosts", "data", "file", false, 0));
        request.mounts.push(bind("/inner", "data", "folder", true, 0));
    };
    let script = "cat /made/on/the/way/file /etc/hosts /inner/inner; echo new > /inner/new; echo changed > /etc/hosts";
    assert_eq!(world.script(script, add).await, "datadatainner");
    let data = world.folder.path().join("private/data");
    assert_eq!(std::fs::read(data.join("folder/new")).unwrap(), b"new\n");
    assert_eq!(std::fs::read(data.join("file")).unwrap(), b"changed\n");
}

pub(crate) async fn readonly_binds_cannot_be_written() {
    let world = World::new();
    with_data(&world);
    rustix::mount::mount(
        "tmpfs",
        world.folder.path().join("private/data/folder"),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    let add = |request: &mut Request| {
        request.mounts.push(bind("/top", "data", "", true, libc::MS_RDONLY | libc::MS_REC));
        let mut recursive = bind("/all", "data", "", true, libc::MS_REC);
        recursive.recursive_set = libc::MS_RDONLY;
        request.mounts.push(recursive);
    };
    let script = "for f in /top/x /top/folder/x /all/x /all/folder/y; do (touch $f) 2>/dev/null && echo $f; done; true";
    assert_eq!(world.script(script, add).await, "/top/folder/x");
}

pub(crate) async fn bind_of_a_missing_source_is_told() {
    let world = World::new();
    with_data(&world);
    let mut request = request(&["true"]);
    request.mounts.push(bind("/x", "data", "nothing", true, 0));
    let (stage, text) = stage_of(&world, request).await;
    assert_eq!(stage, Stage::Mount);
    assert_eq!(text, "cannot mount \"nothing\" of tree \"data\" at /x: No such file or directory (os error 2)");
}

pub(crate) async fn destinations_through_links_stay_in_the_rootfs() {
    let world = World::new();
    with_data(&world);
    let outside = world.folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    symlink(&outside, world.rootfs("absolute")).unwrap();
    symlink("../../../../../outside2", world.rootfs("relative")).unwrap();
    let add = |request: &mut Request| {
        request.mounts.push(bind("/absolute/new", "data", "", true, 0));
        request.mounts.push(mount("/relative", "tmpfs", 0, ""));
    };
    let script = "cat /absolute/new/file; grep -c ' /outside2 ' /proc/mounts";
    assert_eq!(world.script(script, add).await, "data1");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    assert!(!world.folder.path().join("outside2").exists());
}

pub(crate) async fn readonly_rootfs_cannot_be_written() {
    let world = World::new();
    let readonly = |request: &mut Request| {
        request.rootfs_readonly = true;
        request.mounts.push(mount("/tmp", "tmpfs", 0, ""));
        request.mounts.push(mount("/made", "tmpfs", 0, ""));
    };
    let script = "(echo x > /x) 2>/dev/null || echo refused; echo y > /tmp/y; cat /tmp/y; echo z > /dev/null";
    assert_eq!(world.script(script, readonly).await, "refused\ny");
    assert!(!world.rootfs("x").exists());
}

pub(crate) async fn readonly_tree_need_not_have_the_places_of_mounts() {
    use rustix::mount::{MountFlags, mount_bind_recursive, mount_remount};
    let world = World::new();
    with_data(&world);
    let tree = world.rootfs("");
    mount_bind_recursive(&tree, &tree).unwrap();
    mount_remount(&tree, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
    let readonly = |request: &mut Request| {
        request.rootfs_readonly = true;
        request.process.as_mut().unwrap().cwd = "/not/there".into();
        request.mounts.retain(|mount| !mount.destination.starts_with("/dev"));
        request.mounts.push(bind("/made", "data", "", true, 0));
    };
    let script = "cat /made/file; echo; pwd; stat -c %a /; echo x > /dev/null; cat /etc/passwd | head -n 1; \
                  (echo x > /x) 2>/dev/null || echo refused";
    let expected = "data\n/not/there\n755\nroot:x:0:0:root:/root:/bin/sh\nrefused";
    assert_eq!(world.script(script, readonly).await, expected);
    assert!(!world.rootfs("made").exists());
}

pub(crate) async fn masked_paths_are_empty_and_readonly_paths_readonly() {
    let world = World::new();
    let hide = |request: &mut Request| {
        request.masked_paths =
            ["/etc/passwd", "/home", "/proc/keys", "/nothing", "/etc/passwd/x"].map(str::to_owned).into();
        request.readonly_paths = ["/bin", "/proc/sys", "/nothing"].map(str::to_owned).into();
    };
    let script = "cat /etc/passwd; ls /home; (touch /home/x) 2>/dev/null || echo refused; \
                  (touch /bin/x) 2>/dev/null || echo refused; touch /tmp/x; \
                  (echo x > /proc/sys/kernel/hostname) 2>/dev/null || echo refused";
    assert_eq!(world.script(script, hide).await, "refused\nrefused\nrefused");
}

pub(crate) async fn sysctls_are_set_in_the_namespace() {
    let set = |request: &mut Request| {
        request.sysctls.insert("net.ipv4.ip_forward".into(), "1".into());
        request.sysctls.insert("kernel.shmmni".into(), "1234".into());
    };
    let script = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni";
    assert_eq!(World::new().script(script, set).await, "1\n1234");

    let mut bad = request(&["true"]);
    bad.sysctls.insert("kernel.shmmni".into(), "many".into());
    let (stage, text) = stage_of(&World::new(), bad).await;
    assert_eq!(stage, Stage::Sysctl);
    assert!(text.starts_with("cannot set sysctl kernel/shmmni to \"many\""), "{text}");
}

pub(crate) async fn loopback_is_up_and_alone() {
    let script = "ip -o link | grep -c .; ip addr show lo | grep -o '127.0.0.1/8'";
    assert_eq!(World::new().script(script, |_| {}).await, "1\n127.0.0.1/8");
}

pub(crate) async fn cgroup_settings_hold_and_refused_ones_are_told() {
    let world = World::new();
    let controllers = std::fs::read_to_string(world.cgroup_file("cgroup.controllers")).unwrap_or_default();
    if !controllers.contains("pids") {
        println!("skipped: needs cgroup v2 with the pids controller");
        return;
    }
    let setting = |file: &str, value: &str| wire::CgroupSetting {
        file: file.to_owned(),
        value: value.to_owned(),
        ..Default::default()
    };
    let limit = |request: &mut Request| {
        request.mounts.push(mount("/sys/fs/cgroup", "cgroup2", 0, ""));
        request.cgroup_settings = vec![setting("pids.max", "7")];
    };
    assert_eq!(world.script("cat /sys/fs/cgroup/pids.max", limit).await, "7");

    let mut bad = request(&["true"]);
    bad.cgroup_settings = vec![setting("pids.max", "several")];
    let error = chain(&world.refused(bad).await);
    assert!(error.starts_with("cannot set pids.max of the container's cgroup to \"several\""), "{error}");
}

pub(crate) async fn memory_limit_kills_and_is_told() {
    let world = World::new();
    let controllers = std::fs::read_to_string(world.cgroup_file("cgroup.controllers")).unwrap_or_default();
    if !controllers.contains("memory") {
        println!("skipped: needs cgroup v2 with the memory controller");
        return;
    }
    let mut request = request(&["sh", "-c", "exec dd if=/dev/zero of=/dev/null bs=100M count=1"]);
    request.cgroup_settings = [("memory.max", "20971520"), ("memory.swap.max", "0")]
        .into_iter()
        .map(|(file, value)| wire::CgroupSetting { file: file.into(), value: value.into(), ..Default::default() })
        .collect();
    world.start(request).await.unwrap();
    let exit = world.engine.wait("case", "").await.unwrap();
    assert_eq!((exit.code, exit.oom_kills > 0), (137, true));
    world.engine.delete("case", false).await.unwrap();
}
