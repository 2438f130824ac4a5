// SPDX-License-Identifier: Apache-2.0
//! Users and groups of a container that are others outside: user namespaces, and mounts with mapped ids.

use std::fs;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;

use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(users_are_others_outside),
    case!(exec_is_in_the_user_namespace),
    case!(read_only_root_of_a_user_namespace),
    case!(mounts_have_mapped_ids),
    case!(mount_has_its_own_mapping),
    case!(network_of_a_created_container),
];

/// What the container's root is outside.
const FIRST: u32 = 100_000;

fn mapping(inside: u32, outside: u32, size: u32) -> Value {
    json!({ "containerID": inside, "hostID": outside, "size": size })
}

/// A bundle with a user namespace, its files those of the namespace's root.
pub(super) fn bundle(env: &Env) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup", "user"];
    bundle.set("/linux/namespaces", namespaces.iter().map(|name| json!({ "type": name })).collect());
    for list in ["uidMappings", "gidMappings"] {
        bundle.set(&format!("/linux/{list}"), json!([mapping(0, FIRST, 10_000)]));
    }
    give(&bundle.rootfs(), FIRST)?;
    Ok(bundle)
}

/// Gives all files of a folder to somebody.
fn give(path: &Path, owner: u32) -> Result {
    lchown(path, Some(owner), Some(owner)).context(|| format!("giving away {}", path.display()))?;
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), owner)?;
        }
    }
    Ok(())
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let metadata = fs::symlink_metadata(path).context(|| format!("looking at {}", path.display()))?;
    Ok((metadata.uid(), metadata.gid()))
}

fn users_are_others_outside(env: &Env) -> Result {
    let mut bundle = bundle(env)?;
    let stranger = bundle.add_file("strange", "", 0o644)?;
    bundle.sh("id -u; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; stat -c '%u:%g' /bin/busybox; \
               stat -c '%u:%g %n' /strange; touch /tmp/made; chown 7:8 /tmp/made; stat -c '%u:%g' /tmp/made; \
               echo x >/dev/null && head -c 3 /dev/zero | wc -c; mkdir /root/deep; (echo x >/strange) 2>&1; \
               ulimit -n; cat /proc/self/oom_score_adj; ls -d /sys/class/net; hostname");
    bundle.set("/process/rlimits", json!([{ "type": "RLIMIT_NOFILE", "soft": 2000, "hard": 1_000_000 }]));
    bundle.set("/process/oomScoreAdj", json!(-5));

    let output = env.run(&bundle)?.output()?;

    output.expect_stdout(
        "0\n 0 100000 10000\n 0 100000 10000\n0:0\n65534:65534 /strange\n7:8\n3\n\
         sh: can't create /strange: Permission denied\n2000\n-5\n/sys/class/net\nbulkhead-test\n",
    )?;
    ensure_eq!(owner(&bundle.path("/tmp/made"))?, (FIRST + 7, FIRST + 8), "the owner of what was given away");
    ensure_eq!(owner(&bundle.path("/root/deep"))?, (FIRST, FIRST), "the owner of a new folder");
    ensure_eq!(owner(&stranger)?, (0, 0), "the owner of a file of nobody's");
    Ok(())
}

fn exec_is_in_the_user_namespace(env: &Env) -> Result {
    let mut bundle = bundle(env)?;
    bundle.sh("echo started; sleep 1000");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("started")?;

    let look = "id -u; id -g; tr -s ' ' </proc/self/uid_map; [ $(readlink /proc/1/ns/user) = $(readlink /proc/self/ns/user) ] && echo same; \
                cat /proc/self/cgroup; touch /tmp/by-exec; ulimit -n";
    container.exec(look).output()?.expect_stdout("0\n0\n 0 100000 10000\nsame\n0::/\n1024\n")?;
    let user =
        container.verb_with(&["exec", "--user", "5:6"], &["sh", "-c", "id -u; id -g; echo x 2>/dev/null >/tmp/no"]);
    ensure_eq!(user.output()?.stdout(), "5\n6\n", "the user of an exec'd process");

    ensure_eq!(owner(&bundle.path("/tmp/by-exec"))?, (FIRST, FIRST), "the owner of its file");
    Ok(())
}

fn read_only_root_of_a_user_namespace(env: &Env) -> Result {
    let mut bundle = bundle(env)?;
    bundle.set("/root/readonly", json!(true)).mount("tmpfs", "tmpfs", "/absent/place", &["size=1m"]);
    bundle.sh("stat -c '%u:%g' /absent/place; touch /absent/place/x && stat -c '%u' /absent/place/x; touch /x 2>&1");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(1)?;
    ensure_eq!(output.stdout(), "0:0\n0\ntouch: /x: Read-only file system\n", "stdout");
    Ok(())
}

/// A folder with a file of root's and one of user 5's.
fn owned(env: &Env) -> Result<std::path::PathBuf> {
    let folder = env.folder("owned")?;
    for (name, owner) in [("root", 0), ("five", 5)] {
        fs::write(folder.join(name), name)?;
        give(&folder.join(name), owner)?;
    }
    Ok(folder)
}

fn mounts_have_mapped_ids(env: &Env) -> Result {
    env.only_bulkhead()?; // Since 1.2 of runc.
    let mut bundle = bundle(env)?;
    let folder = owned(env)?;
    bundle.bind(&folder, "/mapped", &["idmap"]).bind(&folder, "/plain", &[]);
    bundle.bind(&folder.join("five"), "/file", &["ridmap", "ro"]);
    bundle.sh("stat -c '%u:%g' /mapped/root /mapped/five /plain/root /file; cat /mapped/five; echo; \
               echo new >/mapped/new; mkdir /mapped/folder; echo changed >/mapped/root; ln -s x /mapped/link; \
               cp /mapped/new /mapped/folder/sixth; chown 6:7 /mapped/folder/sixth; stat -c '%u:%g' /mapped/folder/sixth; \
               touch /file 2>/dev/null || echo read-only; (echo x >/plain/x) 2>/dev/null || echo not mine");

    let output = env.run(&bundle)?.output()?;

    output.expect_stdout("0:0\n5:5\n65534:65534\n5:5\nfive\n6:7\nread-only\nnot mine\n")?;
    for (name, expected) in [("new", (0, 0)), ("folder", (0, 0)), ("link", (0, 0)), ("folder/sixth", (6, 7))] {
        ensure_eq!(owner(&folder.join(name))?, expected, "the owner of {name} on the host");
    }
    ensure_eq!(fs::read_to_string(folder.join("root"))?, "changed\n", "a file on the host");
    Ok(())
}

fn mount_has_its_own_mapping(env: &Env) -> Result {
    env.only_bulkhead()?; // Since 1.2 of runc.
    let mut bundle = Bundle::busybox(env)?;
    let folder = owned(env)?;
    give(&folder, 0)?;
    bundle.bind(&folder, "/mapped", &[]);
    if let Some(mount) = bundle.spec["mounts"].as_array_mut().and_then(|mounts| mounts.last_mut()) {
        for list in ["uidMappings", "gidMappings"] {
            mount[list] = json!([mapping(0, 1000, 5), mapping(5, 2000, 1)]);
        }
    }
    bundle.user(1000, 1000).set("/process/capabilities", json!({}));
    bundle.sh("stat -c '%u:%g' /mapped/root; echo mine >/mapped/mine; stat -c '%u:%g' /mapped/mine");

    env.run(&bundle)?.output()?.expect_stdout("1000:1000\n1000:1000\n")?;

    ensure_eq!(owner(&folder.join("mine"))?, (0, 0), "the owner on the host");
    Ok(())
}

/// Its network is the guest's, as somebody may still put an interface there: not the container's to change, but set up.
fn network_of_a_created_container(env: &Env) -> Result {
    let mut bundle = bundle(env)?;
    bundle.set("/linux/sysctl", json!({ "net.ipv4.ip_unprivileged_port_start": "0", "kernel.shmmax": "1234567" }));
    bundle.sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmax; echo hello | nc -l -p 80 & \
               until nc 127.0.0.1 80 </dev/null 2>/dev/null; do sleep 0.1; done");
    let container = Detached::create(env, &bundle)?;
    container.must(&["start"])?;

    ensure_eq!(container.wait()?, 0, "the status");
    ensure_eq!(container.output()?, "0\n1234567\nhello\n", "the output");
    Ok(())
}
