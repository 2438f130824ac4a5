// SPDX-License-Identifier: Apache-2.0
//! What a container sees of the machine, and what it does not.

use std::fs;

use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(kernel_is_not_the_hosts),
    case!(hostname),
    case!(processes_are_its_own),
    case!(network_is_a_loopback),
    case!(cgroup_is_the_root_of_what_it_sees),
    case!(host_files_are_not_there),
    case!(mount_table_shows_the_container_only),
    case!(kernel_settings_are_read_only),
    case!(two_containers_do_not_see_each_other),
];

fn kernel_is_not_the_hosts(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("uname -r; cat /proc/cmdline /proc/sys/kernel/random/boot_id");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    for file in ["/proc/sys/kernel/osrelease", "/proc/cmdline", "/proc/sys/kernel/random/boot_id"] {
        let of_host = fs::read_to_string(file)?;
        ensure!(!text.lines().any(|line| line == of_host.trim_end()), "{file} is the host's: {text:?}");
    }
    Ok(())
}

fn hostname(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("hostname; cat /proc/sys/kernel/domainname");
    bundle.set("/hostname", json!("some-name")).set("/domainname", json!("example.test"));
    let before = fs::read_to_string("/proc/sys/kernel/hostname")?;

    let output = env.run(&bundle)?.output()?;
    // An older runc knows no domain name.
    let domain = if env.kind == Kind::Bulkhead { "example.test" } else { "(none)" };
    output.expect_stdout(&format!("some-name\n{domain}\n"))?;

    ensure_eq!(fs::read_to_string("/proc/sys/kernel/hostname")?, before, "the host's own name");
    Ok(())
}

fn processes_are_its_own(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo $$; cd /proc; ls -d [0-9]*; cat 1/comm; true");

    let output = env.run(&bundle)?.output()?;

    output.expect_stdout("1\n1\nsh\n")
}

fn network_is_a_loopback(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("ls /sys/class/net; ip -o address show dev lo; (sleep 5 | nc -l -p 4000 >/got) & \
               for n in 1 2 3 4 5 6 7 8 9 10; do echo through | nc -w 1 127.0.0.1 4000 2>/dev/null && break; sleep 0.2; done; \
               sleep 0.2; cat /got");

    let output = env.run(&bundle)?.output()?;

    output.expect_in_stdout(&["lo\n", "127.0.0.1/8", "through\n"])?;
    ensure!(!output.stdout().contains("eth"), "another interface: {}", output.describe());
    Ok(())
}

fn cgroup_is_the_root_of_what_it_sees(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle
        .sh("cat /proc/self/cgroup; test -f /sys/fs/cgroup/cgroup.procs && echo mounted; mkdir /sys/fs/cgroup/x 2>&1");

    let output = env.run(&bundle)?.output()?;

    ensure!(output.stdout().starts_with("0::/\nmounted\n"), "{}", output.describe());
    ensure!(output.stdout().contains("Read-only"), "{}", output.describe());
    Ok(())
}

fn host_files_are_not_there(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let marker = env.work.join("marker-of-the-host");
    fs::write(&marker, "secret\n")?;
    let path = marker.display();
    let up = "../".repeat(30);
    bundle.sh(&format!(
        "for file in {path} /{up}{path} /proc/1/root{path} /proc/1/cwd/{up}{path} /proc/self/root/{up}{path}; do \
         cat $file 2>/dev/null && echo \"found as $file\"; done; ls -d /proc/1/root/{up}*; ls /.. "
    ));
    bundle.set("/process/capabilities/bounding", json!(["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]));

    let output = env.run(&bundle)?.output()?;

    let text = output.stdout();
    ensure!(!text.contains("secret") && !text.contains("found as"), "{}", output.describe());
    ensure!(!text.contains("marker-of-the-host") && !text.contains("/home"), "{}", output.describe());
    Ok(())
}

fn mount_table_shows_the_container_only(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["cat", "/proc/self/mountinfo"]);

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    for line in text.lines() {
        let place = line.split(' ').nth(4).unwrap_or_default();
        let known = place == "/" || ["/proc", "/dev", "/sys"].iter().any(|top| place.starts_with(top));
        ensure!(known, "a mount that was not asked for: {line}");
    }
    let work = env.work.display().to_string();
    ensure!(!text.contains(&work), "a path of the host in the mount table: {text}");
    Ok(())
}

fn kernel_settings_are_read_only(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo 1 >/proc/sys/vm/drop_caches || echo c >/proc/sysrq-trigger || mount -o remount,rw /proc/sys || echo refused");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    ensure_eq!(output.stdout(), "refused\n", "stdout");
    Ok(())
}

fn two_containers_do_not_see_each_other(env: &Env) -> Result {
    let mut first = Bundle::busybox(env)?;
    first.sh("echo mine >/tmp/mine; sleep 300 & echo ready; read line; cat /tmp/mine").set("/hostname", json!("first"));
    let mut second = Bundle::busybox(env)?;
    second.sh("ls /tmp; ps; hostname").set("/hostname", json!("second"));

    let mut running = env.run(&first)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let output = env.run(&second)?.output()?;
    running.write(b"end\n")?;

    running.finish()?.expect_stdout("ready\nmine\n")?;
    output.expect_code(0)?;
    let text = output.stdout();
    ensure!(!text.contains("mine") && !text.contains("sleep") && text.ends_with("second\n"), "{}", output.describe());
    Ok(())
}
