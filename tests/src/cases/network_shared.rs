// SPDX-License-Identifier: Apache-2.0
//! Network namespaces that somebody else has, or had until just now.

use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::network::{Namespace, container};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, fail};
use crate::processes;

pub(super) const CASES: &[Case] =
    &[case!(a_machine_that_ends_is_waited_for), case!(the_network_of_another_runtimes_container)];

/// How long somebody may take who is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// The tap of one whose supervisor was killed goes with its VMM, a moment later.
fn a_machine_that_ends_is_waited_for(env: &Env) -> Result {
    let namespace = Namespace::new(env, "ends")?.with_addresses(75)?;
    let bundle = container(env, &namespace, "echo started")?;
    namespace.inside("ip tuntap add dev bh-99 mode tap")?;

    let running = env.run(&bundle)?.spawn()?;
    let end = Instant::now() + LIMIT;
    while !namespace.inside("cat /proc/net/unix")?.contains("@bulkhead-sandbox") {
        ensure!(Instant::now() < end, "nobody claims the namespace");
    }
    namespace.inside("ip link del bh-99")?;
    running.finish()?.expect_stdout("started\n")?;

    namespace.inside("ip tuntap add dev bh-99 mode tap")?;
    env.run(&bundle)?.output()?.expect_error(&["network namespace", "another virtual machine's"])
}

/// A process in namespaces of its own; it ends when dropped.
struct Holder(Child);

impl Holder {
    fn new(options: &[&str]) -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(options).args(["sleep", "1000"]);
        Ok(Self(command.spawn().context(|| "starting unshare".to_owned())?))
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        processes::kill_tree(self.pid());
        let _ = self.0.wait();
    }
}

/// A container with the network of a process.
fn with_network_of(env: &Env, pid: i32) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("ls /sys/class/net");
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
    let network = namespaces.into_iter().flatten().find(|namespace| namespace["type"] == "network");
    if let Some(network) = network {
        network["path"] = json!(format!("/proc/{pid}/ns/net"));
    }
    Ok(bundle)
}

fn the_network_of_another_runtimes_container(env: &Env) -> Result {
    env.only_bulkhead()?;
    let other = Holder::new(&["--net", "--pid", "--fork"])?;
    let Some(init) = processes::wait_for_descendant(other.pid(), "sleep", LIMIT) else { fail!("no container") };
    let keeper = Holder::new(&["--net"])?;
    let own = std::fs::read_link("/proc/self/ns/net")?;
    let end = Instant::now() + LIMIT;
    while std::fs::read_link(format!("/proc/{}/ns/net", keeper.pid()))? == own {
        ensure!(Instant::now() < end, "no network namespace");
        thread::sleep(Duration::from_millis(5));
    }

    let refused = env.run(&with_network_of(env, init.pid)?)?.output()?;
    let process = format!("(process {})", init.pid);
    refused.expect_error(&[
        "linux.namespaces",
        "the network of another runtime's container",
        &process,
        "--network bridge",
    ])?;
    // One that only keeps a network is none.
    env.run(&with_network_of(env, keeper.pid())?)?.output()?.expect_stdout("lo\n")
}
