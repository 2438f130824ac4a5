// SPDX-License-Identifier: Apache-2.0
//! `/dev` of a container.

use std::fs;

use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(default_devices),
    case!(default_links),
    case!(devices_work),
    case!(devices_work_for_a_user),
    case!(standard_streams_can_be_reopened),
    case!(standard_streams_can_be_reopened_by_a_user),
    case!(configured_device),
    case!(devices_of_the_guests_own_kernel),
    case!(device_that_the_guest_does_not_have),
    case!(device_folder_is_not_the_hosts),
    case!(device_rules_hold),
    case!(device_rules_are_changed),
];

fn default_devices(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /dev; for name in null zero full random urandom tty; do stat -c '%n %F %a %u:%g %t:%T' $name; done");

    let expected: String =
        [("null", "1:3"), ("zero", "1:5"), ("full", "1:7"), ("random", "1:8"), ("urandom", "1:9"), ("tty", "5:0")]
            .iter()
            .map(|(name, number)| format!("{name} character special file 666 0:0 {number}\n"))
            .collect();
    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    // The group of a terminal is a matter of taste.
    ensure_eq!(output.stdout().replace("666 0:5", "666 0:0"), expected, "stdout");
    Ok(())
}

fn default_links(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /dev; for name in fd stdin stdout stderr ptmx; do readlink $name; done");

    env.run(&bundle)?
        .output()?
        .expect_stdout("/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n")
}

const DEVICES: &str = "echo x >/dev/null && cat /dev/null; head -c 5 /dev/zero | wc -c; echo x 2>/dev/null >/dev/full || echo full; \
                       head -c 7 /dev/urandom | wc -c; head -c 3 /dev/random | wc -c";

fn devices_work(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(DEVICES);

    env.run(&bundle)?.output()?.expect_stdout("5\nfull\n7\n3\n")
}

fn devices_work_for_a_user(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(DEVICES).user(1000, 1000).set("/process/capabilities", json!({}));

    env.run(&bundle)?.output()?.expect_stdout("5\nfull\n7\n3\n")
}

const REOPEN: &str =
    "echo one >/dev/stdout; echo two >/dev/stderr; cat /dev/stdin; echo three >/proc/self/fd/1; echo four >/dev/fd/2";

fn standard_streams_can_be_reopened(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(REOPEN);

    let output = env.run(&bundle)?.input("given\n").output()?;

    output.expect_code(0)?;
    ensure_eq!(
        (output.stdout().as_str(), output.stderr().as_str()),
        ("one\ngiven\nthree\n", "two\nfour\n"),
        "the streams"
    );
    Ok(())
}

fn standard_streams_can_be_reopened_by_a_user(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(REOPEN).user(1000, 1000).set("/process/capabilities", json!({}));

    let output = env.run(&bundle)?.input("given\n").output()?;

    output.expect_code(0)?;
    ensure_eq!(
        (output.stdout().as_str(), output.stderr().as_str()),
        ("one\ngiven\nthree\n", "two\nfour\n"),
        "the streams"
    );
    Ok(())
}

fn configured_device(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let device =
        json!({ "path": "/dev/deep/sink", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 7, "gid": 8 });
    bundle
        .set("/linux/devices", json!([device]))
        .sh("stat -c '%F %a %u:%g %t:%T' /dev/deep/sink; echo x >/dev/deep/sink && cat /dev/deep/sink");

    env.run(&bundle)?.output()?.expect_stdout("character special file 640 7:8 1:3\n")
}

/// What engines pass on for tunnels and file systems in user space.
fn devices_of_the_guests_own_kernel(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.bind("/dev/net/tun".as_ref(), "/dev/net/tun", &["bind"]).bind("/dev/fuse".as_ref(), "/dev/fuse", &["bind"]);
    let allowed = json!([{ "allow": true, "type": "c", "access": "rwm" }]);
    bundle.set("/linux/resources", json!({ "devices": allowed }));
    bundle.sh("stat -c '%F %t:%T' /dev/net/tun /dev/fuse; exec 3<>/dev/net/tun 4<>/dev/fuse && echo opened");

    let expected = "character special file a:c8\ncharacter special file a:e5\nopened\n";
    env.run(&bundle)?.output()?.expect_stdout(expected)
}

fn device_that_the_guest_does_not_have(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/linux/devices", json!([{ "path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0 }]));
    bundle.args(&["true"]);

    env.run(&bundle)?.output()?.expect_error(&["/dev/nvidia0", "no character device 195:0"])
}

fn device_folder_is_not_the_hosts(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("touch /dev/made; ls /dev");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    ensure!(text.contains("made\n"), "{}", output.describe());
    ensure!(
        !["kvm", "mem", "vsock", "vda", "sda", "kmsg"].iter().any(|name| text.lines().any(|line| line == *name)),
        "{text}"
    );
    ensure_eq!(
        fs::read_dir(bundle.path("dev"))?
            .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name() == "made"))
            .count(),
        0,
        "files of the tmpfs on the host"
    );
    Ok(())
}

/// Uses a device to read and to write; each line tells of one that cannot.
const TRY: &str = "cd /dev; [ -e fuse ] || { mknod fuse c 10 229; mknod kmsg c 1 11; }; (: <fuse) 2>&1; (: >>fuse) 2>&1; \
                   (: >>kmsg) 2>&1; (: >null) && (: <urandom) && (: <>ptmx) && echo default";

fn refusals(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("sh: can't {line}: Operation not permitted\n")).collect()
}

fn device_rules_hold(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(TRY);
    let rules = json!([
        { "allow": true, "type": "c", "major": 1, "minor": 11, "access": "rwm" },
        { "allow": false, "access": "rwm" },
        { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "r" },
        { "allow": false, "type": "c", "major": 1, "minor": 3, "access": "rwm" },
    ]);
    bundle.set("/linux/resources", json!({ "devices": rules }));

    let output = env.run(&bundle)?.output()?;

    output.expect_stdout(&format!("{}default\n", refusals(&["create fuse", "create kmsg"])))?;
    // What every container may use is all there is without rules.
    bundle.set("/linux/resources", json!({}));
    let output = env.run(&bundle)?.output()?;
    output.expect_stdout(&format!("{}default\n", refusals(&["open fuse", "create fuse", "create kmsg"])))
}

fn device_rules_are_changed(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo started; sleep 1000");
    bundle.set("/linux/resources", json!({ "devices": [{ "allow": true, "access": "rwm" }] }));
    let container = Detached::run(env, &bundle)?;
    container.wait_for("started")?;
    container.exec(TRY).output()?.expect_stdout("default\n")?;
    // Other limits leave them as they are.
    container.must(&["update", "--pids-limit", "50"])?;
    container.exec(TRY).output()?.expect_stdout("default\n")?;
    // runc takes no new rules.
    if env.kind == Kind::Bulkhead {
        let change = |devices: serde_json::Value| {
            let resources = json!({ "devices": devices }).to_string();
            container.verb(&["update", "--resources", "-"]).input(resources).output()
        };
        change(json!([{ "allow": true, "type": "c", "major": 1, "access": "w" }]))?.expect_code(0)?;
        container
            .exec(TRY)
            .output()?
            .expect_stdout(&format!("{}default\n", refusals(&["open fuse", "create fuse"])))?;
        change(json!([{ "allow": true, "access": "q" }]))?.expect_error(&["linux.resources.devices[0].access"])?;
    }
    Ok(())
}
