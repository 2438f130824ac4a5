// SPDX-License-Identifier: Apache-2.0
//! A block device of the host that answers nothing for a time.

use std::path::Path;
use std::process::Command;
use std::thread;

use super::{Case, case};
use crate::cri::api::Device;
use crate::engines::Kubelet;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail};
use crate::loop_device::LoopDevice;

pub(super) const CASES: &[Case] = &[case!(others_of_the_pod_go_on).limit(600)];

const MIB: u64 = 1 << 20;

/// What a container is that waits.
const WAIT: &str = "while :; do sleep 0.2; done";

/// Has dmsetup make its nodes itself: udev may not be there.
const WITHOUT_UDEV: (&str, &str) = ("DM_DISABLE_UDEV", "1");

/// A device of the host's device mapper, by a name that no other case uses; removed when dropped.
struct Mapped {
    name: String,
    path: String,
}

impl Mapped {
    /// All of another device.
    fn new(env: &Env, device: &LoopDevice, length: u64) -> Result<Self> {
        env.tool(Path::new("modprobe"), ["dm_mod"]).output()?.expect_code(0)?;
        let name = format!("bulkhead-{}", env.id());
        let table = format!("0 {} linear {} 0", length / 512, device.path.display());
        dmsetup(env, ["create", &name, "--table", &table])?;
        Ok(Self { path: format!("/dev/mapper/{name}"), name })
    }

    /// Lets no request through, or those that wait and all others.
    fn suspend(&self, env: &Env, suspended: bool) -> Result {
        dmsetup(env, [if suspended { "suspend" } else { "resume" }, &self.name])
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        for verb in ["resume", "remove"] {
            let _ = Command::new("dmsetup").env(WITHOUT_UDEV.0, WITHOUT_UDEV.1).args([verb, &self.name]).output();
        }
    }
}

fn dmsetup<const N: usize>(env: &Env, words: [&str; N]) -> Result {
    env.tool(Path::new("dmsetup"), words).variable(WITHOUT_UDEV.0, WITHOUT_UDEV.1).output()?.expect_code(0)
}

/// The guest's kernel reads a disk when it comes upon it, and waits for it; the pod's other containers have their calls meanwhile.
fn others_of_the_pod_go_on(env: &Env) -> Result {
    env.only_bulkhead()?;
    let device = LoopDevice::new(env, 2 * MIB)?;
    let mapped = Mapped::new(env, &device, 2 * MIB)?;
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("waiting")?;
    let other = pod.script("other", WAIT)?;
    let start = |name: &str| {
        let mut config = pod.config(name, WAIT);
        let (container_path, host_path) = ("/dev/xvda".to_owned(), mapped.path.clone());
        config.devices = vec![Device { container_path, host_path, permissions: "rwm".to_owned(), ..Device::default() }];
        pod.start(config)
    };

    mapped.suspend(env, true)?;
    let others = thread::scope(|scope| {
        let creation = scope.spawn(|| start("first"));
        let others = || -> Result {
            while pod.exec(&other, "test -e /sys/block/vda")?.exit_code != 0 {
                ensure!(!creation.is_finished(), "the container was made, or given up, without its disk");
            }
            pod.output(&other, "echo called > /file")?;
            ensure!(!creation.is_finished(), "the container whose disk does not answer has been made, or given up");
            Ok(())
        };
        let others = others();
        // Also where that has failed: the creation is waited for.
        let resumed = mapped.suspend(env, false);
        let created = creation.join();
        others.and(resumed).and_then(|()| if created.is_ok() { Ok(()) } else { fail!("the thread has panicked") })
    });
    others?;

    let again = start("again")?;
    ensure_eq!(pod.output(&again, "blockdev --getsize64 /dev/xvda")?, "2097152\n", "the size when it answers again");
    pod.remove()?;
    kubelet.end()?;
    drop(mapped);
    device.end()
}
