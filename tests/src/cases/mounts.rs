// SPDX-License-Identifier: Apache-2.0
//! The mounts of the configuration.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use nix::mount::MsFlags;
use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(usual_mounts_are_there),
    case!(tmpfs_has_its_size_and_mode),
    case!(tmpfs_with_a_copy_of_what_it_hides),
    case!(message_queues),
    case!(bind_of_a_folder),
    case!(bind_of_a_file),
    case!(read_only_binds_are_enforced),
    case!(read_only_bind_against_an_administrator),
    case!(bind_options),
    case!(binds_have_what_their_sources_mount_has),
    case!(bind_makes_its_destination),
    case!(bind_inside_a_bind),
    case!(bind_with_and_without_what_is_mounted_below),
    case!(mounts_whose_names_are_no_text),
    case!(bind_of_a_relative_source),
    case!(bind_through_a_symlink_at_the_source),
    case!(host_changes_are_seen),
    case!(container_changes_are_seen_at_once),
    case!(read_only_root),
    case!(masked_and_read_only_paths),
    case!(symlink_out_of_the_root_is_followed_inside),
    case!(later_mounts_lie_over_earlier_ones),
];

fn usual_mounts_are_there(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("while read source place kind options rest; do echo \"$place $kind $options,\"; done </proc/mounts");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    let expected: [(&str, &[&str]); 7] = [
        ("/proc proc ", &["rw,"]),
        ("/dev tmpfs ", &["rw,", "nosuid,", "mode=755,", "size=65536k,"]),
        ("/dev/pts devpts ", &["rw,", "nosuid,", "noexec,", "gid=5,", "mode=620,", "ptmxmode=666,"]),
        ("/dev/shm tmpfs ", &["nosuid,", "nodev,", "noexec,"]),
        ("/dev/mqueue mqueue ", &["nosuid,", "nodev,", "noexec,"]),
        ("/sys sysfs ", &["ro,", "nosuid,", "nodev,", "noexec,"]),
        ("/sys/fs/cgroup ", &["ro,", "nosuid,", "nodev,", "noexec,"]),
    ];
    for (start, options) in expected {
        let line = text.lines().find(|line| line.starts_with(start));
        let has_all = line.is_some_and(|line| options.iter().all(|option| line.contains(option)));
        ensure!(has_all, "expected a line {start:?} with {options:?}, seen {line:?} in {text}");
    }
    Ok(())
}

fn tmpfs_has_its_size_and_mode(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.mount("tmpfs", "tmpfs", "/scratch", &["size=1m", "mode=1700", "nosuid"]);
    bundle.sh("stat -c %a /scratch; head -c 900000 /dev/zero >/scratch/fits && echo fits; \
               head -c 900000 /dev/zero >/scratch/not 2>/dev/null || echo full; touch /scratch/../beside");

    env.run(&bundle)?.output()?.expect_stdout("1700\nfits\nfull\n")?;

    ensure!(bundle.path("beside").exists(), "what lies beside the mount is not in the root file system");
    ensure!(fs::read_dir(bundle.path("scratch"))?.next().is_none(), "what lies in the tmpfs is on the host");
    Ok(())
}

fn tmpfs_with_a_copy_of_what_it_hides(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("srv/dir/file", "content\n", 0o640)?;
    bundle
        .mount("tmpfs", "tmpfs", "/srv", &["tmpcopyup"])
        .sh("cat /srv/dir/file; stat -c %a /srv/dir/file; echo new >/srv/dir/file");

    env.run(&bundle)?.output()?.expect_stdout("content\n640\n")?;

    ensure_eq!(fs::read_to_string(bundle.path("srv/dir/file"))?, "content\n", "the file that is hidden");
    Ok(())
}

fn message_queues(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("touch /dev/mqueue/queue && cat /dev/mqueue/queue | grep -o QSIZE:0");

    env.run(&bundle)?.output()?.expect_stdout("QSIZE:0\n")
}

fn bind_of_a_folder(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let shared = env.folder("shared")?;
    fs::write(shared.join("from-host"), "hello from the host\n")?;
    bundle.bind(&shared, "/mnt/shared", &["rw"]);
    bundle.sh("cat /mnt/shared/from-host; mkdir /mnt/shared/dir; echo back >/mnt/shared/dir/from-container; rm /mnt/shared/from-host");

    env.run(&bundle)?.output()?.expect_stdout("hello from the host\n")?;

    ensure_eq!(fs::read_to_string(shared.join("dir/from-container"))?, "back\n", "the container's file");
    ensure!(!shared.join("from-host").exists(), "the file that the container removed is there");
    Ok(())
}

fn bind_of_a_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let file = env.work.join("one-file");
    fs::write(&file, "first\n")?;
    fs::write(env.work.join("another-file"), "hidden\n")?;
    bundle.bind(&file, "/etc/one-file", &["rw"]).sh("cat /etc/one-file; echo second >>/etc/one-file; ls /etc");

    env.run(&bundle)?.output()?.expect_stdout("first\ngroup\none-file\npasswd\n")?;

    ensure_eq!(fs::read_to_string(&file)?, "first\nsecond\n", "the file");
    Ok(())
}

fn read_only_binds_are_enforced(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    fs::write(folder.join("file"), "kept\n")?;
    fs::set_permissions(folder.join("file"), fs::Permissions::from_mode(0o666))?;
    bundle.bind(&folder, "/folder", &["ro"]).bind(&folder.join("file"), "/file", &["ro"]);
    bundle.sh("for try in 'echo x >/folder/file' 'echo x >/folder/new' 'rm /folder/file' 'mkdir /folder/dir' 'chmod 600 /folder/file' \
               'mv /folder/file /folder/other' 'ln /folder/file /folder/link' 'touch /folder/file' 'echo x >/file' 'chown 5 /file' \
               'truncate -s 0 /file'; \
               do sh -c \"$try\" 2>/dev/null && echo \"could: $try\"; done; cat /folder/file /file");

    env.run(&bundle)?.output()?.expect_stdout("kept\nkept\n")?;

    ensure_eq!(fs::read_dir(&folder)?.count(), 1, "files in the folder");
    ensure_eq!(folder.join("file").metadata()?.mode() & 0o7777, 0o666, "the file's mode");
    Ok(())
}

/// Whatever the container may do in its own kernel, the host does not write.
fn read_only_bind_against_an_administrator(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    fs::write(folder.join("file"), "kept\n")?;
    let all = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_CHOWN", "CAP_FOWNER"]);
    bundle.bind(&folder, "/folder", &["ro"]);
    bundle.set("/process/capabilities", json!({ "bounding": all, "effective": all, "permitted": all }));
    bundle.sh(
        "mount -o remount,bind,rw /folder || mount -o remount,rw /folder; echo x >/folder/file; echo x >/folder/new; \
               mv /folder/file /folder/moved; rm -f /folder/file; cat /folder/file",
    );

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(output.stdout(), "kept\n", "stdout");
    ensure_eq!(fs::read_to_string(folder.join("file"))?, "kept\n", "the file");
    ensure_eq!(fs::read_dir(&folder)?.count(), 1, "files in the folder");
    Ok(())
}

fn bind_options(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    fs::write(folder.join("tool"), "#!/bin/sh\necho ran\n")?;
    fs::set_permissions(folder.join("tool"), fs::Permissions::from_mode(0o755))?;
    bundle.bind(&folder, "/plain", &["rw"]).bind(&folder, "/bare", &["rw", "noexec", "nosuid", "nodev"]);
    bundle.sh("/plain/tool; /bare/tool 2>/dev/null || echo refused; grep ' /bare ' /proc/mounts | grep -o 'nosuid,nodev,noexec'");

    env.run(&bundle)?.output()?.expect_stdout("ran\nrefused\nnosuid,nodev,noexec\n")
}

fn binds_have_what_their_sources_mount_has(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let volume = env.folder("volume")?;
    env.mount("tmpfs", "tmpfs", &volume, "size=4m")?;
    env.remount(&volume, MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID)?;
    fs::copy(bundle.path("bin/busybox"), volume.join("true"))?;
    let source = volume.display().to_string();
    bundle.mount("bind", &source, "/kept", &["bind"]).mount("bind", &source, "/cleared", &["bind", "exec", "suid"]);
    bundle.sh("/kept/true 2>/dev/null && echo executed || echo refused; /cleared/true 2>/dev/null && echo executed; \
               grep ' /kept ' /proc/mounts | grep -c nosuid.*noexec");

    // runc 1.1 does not change the mount where options only take flags away.
    let cleared = if env.kind == Kind::Bulkhead { "executed\n" } else { "" };
    env.run(&bundle)?.output()?.expect_stdout(&format!("refused\n{cleared}1\n"))
}

fn bind_makes_its_destination(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    fs::write(folder.join("file"), "content\n")?;
    bundle.bind(&folder, "/new/deep/folder", &[]).bind(&folder.join("file"), "/new/other/file", &[]);
    bundle.sh("cat /new/deep/folder/file /new/other/file");

    env.run(&bundle)?.output()?.expect_stdout("content\ncontent\n")?;

    ensure!(
        bundle.path("new/deep/folder").is_dir() && bundle.path("new/other/file").is_file(),
        "no destination on the host"
    );
    Ok(())
}

fn bind_inside_a_bind(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let outer = env.folder("outer")?;
    let inner = env.folder("inner")?;
    fs::create_dir(outer.join("place"))?;
    fs::write(outer.join("file"), "outer\n")?;
    fs::write(inner.join("file"), "inner\n")?;
    bundle.bind(&outer, "/data", &["ro"]).bind(&inner, "/data/place", &["rw"]);
    bundle.sh(
        "cat /data/file /data/place/file; echo new >/data/place/new; echo new 2>/dev/null >/data/new || echo refused",
    );

    env.run(&bundle)?.output()?.expect_stdout("outer\ninner\nrefused\n")?;

    ensure_eq!(fs::read_to_string(inner.join("new"))?, "new\n", "the new file");
    Ok(())
}

fn bind_with_and_without_what_is_mounted_below(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    let below = env.folder("folder/below")?;
    fs::write(below.join("hidden"), "")?;
    env.mount("tmpfs", "tmpfs", &below, "size=1m")?;
    fs::write(below.join("mounted"), "")?;
    bundle.mount("bind", &folder.display().to_string(), "/with", &["rbind"]).bind(&folder, "/without", &[]);
    bundle.sh("ls /with/below /without/below");

    env.run(&bundle)?.output()?.expect_stdout("/with/below:\nmounted\n\n/without/below:\nhidden\n")
}

fn mounts_whose_names_are_no_text(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    let below = folder.join(OsStr::from_bytes(b"caf\xe9"));
    fs::create_dir(&below)?;
    env.mount("tmpfs", "tmpfs", &below, "size=1m")?;
    fs::write(below.join("file"), "content\n")?;
    bundle.mount("bind", &folder.display().to_string(), "/data", &["rbind"]).sh("cat /data/caf*/file");

    env.run(&bundle)?.output()?.expect_stdout("content\n")
}

fn bind_of_a_relative_source(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    fs::create_dir(bundle.folder.join("data"))?;
    fs::write(bundle.folder.join("data/file"), "relative\n")?;
    bundle.mount("bind", "data", "/data", &["bind"]).sh("cat /data/file");

    env.run(&bundle)?.output()?.expect_stdout("relative\n")
}

fn bind_through_a_symlink_at_the_source(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    fs::write(folder.join("file"), "content\n")?;
    symlink(&folder, env.work.join("link"))?;
    bundle.bind(&env.work.join("link"), "/data", &[]).sh("cat /data/file");

    env.run(&bundle)?.output()?.expect_stdout("content\n")
}

fn host_changes_are_seen(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let shared = env.folder("shared")?;
    fs::write(shared.join("file"), "old\n")?;
    bundle.bind(&shared, "/shared", &["rw"]);
    bundle.sh("cat /shared/file; ls /shared; read line; cat /shared/file; ls /shared; cat /shared/new");

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("old\nfile\n")?;
    fs::write(shared.join("file"), "changed, and longer\n")?;
    fs::write(shared.join("new"), "new\n")?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("old\nfile\nchanged, and longer\nfile\nnew\nnew\n")
}

fn container_changes_are_seen_at_once(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let shared = env.folder("shared")?;
    bundle.bind(&shared, "/shared", &["rw"]).sh("echo written >/shared/file; echo ready; read line; cat /shared/file");

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    ensure_eq!(fs::read_to_string(shared.join("file"))?, "written\n", "the file, while the container runs");
    fs::write(shared.join("file"), "answered\n")?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\nanswered\n")
}

fn read_only_root(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/root/readonly", json!(true)).mount("tmpfs", "tmpfs", "/tmp", &["size=1m"]);
    bundle.sh("touch /file 2>&1; rm /etc/passwd 2>&1; echo fine >/tmp/file && cat /tmp/file; echo fine >/dev/null && echo null");

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(output.stdout().matches("Read-only file system").count(), 2, "refusals ({})", output.describe());
    ensure!(output.stdout().ends_with("fine\nnull\n"), "{}", output.describe());
    ensure!(!bundle.path("file").exists() && bundle.path("etc/passwd").exists(), "the root file system was changed");
    Ok(())
}

fn masked_and_read_only_paths(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("secret/folder/file", "hidden\n", 0o644)?;
    bundle.add_file("secret-file", "hidden\n", 0o644)?;
    bundle.add_file("fixed/file", "fixed\n", 0o644)?;
    bundle.set("/linux/maskedPaths", json!(["/secret", "/secret-file", "/proc/version", "/not-there"]));
    bundle.set("/linux/readonlyPaths", json!(["/fixed", "/proc/sys", "/not-there"]));
    bundle.sh("ls /secret; cat /secret-file; wc -c </proc/version; cat /fixed/file; echo x >/fixed/file || echo x >/fixed/new || \
               echo x >/proc/sys/kernel/msgmax || touch /secret/new || echo refused");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    ensure_eq!(output.stdout(), "0\nfixed\nrefused\n", "stdout");
    ensure_eq!(fs::read_to_string(bundle.path("fixed/file"))?, "fixed\n", "the file");
    Ok(())
}

/// A destination is resolved as the container sees it: nothing is made or mounted outside of the root file system.
fn symlink_out_of_the_root_is_followed_inside(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let outside = env.folder("outside")?;
    let data = env.folder("data")?;
    fs::write(data.join("file"), "content\n")?;
    symlink("../../outside", bundle.path("relative"))?;
    symlink(&outside, bundle.path("absolute"))?;
    bundle.bind(&data, "/relative/one", &[]).bind(&data, "/absolute/two", &[]);
    bundle.sh("cat /outside/one/file /absolute/two/file");

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(fs::read_dir(&outside)?.count(), 0, "things made outside of the root file system");
    output.expect_stdout("content\ncontent\n")
}

fn later_mounts_lie_over_earlier_ones(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let [first, second] = [env.folder("first")?, env.folder("second")?];
    fs::write(first.join("a"), "")?;
    fs::write(second.join("b"), "")?;
    bundle.bind(&first, "/data", &[]).bind(&second, "/data", &[]).sh("ls /data");

    env.run(&bundle)?.output()?.expect_stdout("b\n")
}
