// SPDX-License-Identifier: Apache-2.0
//! A block device of the host that answers nothing for a time.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Case, case};
use crate::cri::api::Device;
use crate::engines::{Kubelet, Pod};
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};
use crate::loop_device::LoopDevice;

pub(super) const CASES: &[Case] = &[case!(others_of_the_pod_go_on).limit(600)];

const MIB: u64 = 1 << 20;

/// What a container is that waits.
const WAIT: &str = "while :; do sleep 0.2; done";

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Prints the size of its disk.
const SIZE: &str = "blockdev --getsize64 /dev/xvda";

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

/// A read of a disk that does not answer waits for it. The pod's other containers have their calls meanwhile, and the pod others, with disks.
fn others_of_the_pod_go_on(env: &Env) -> Result {
    env.only_bulkhead()?;
    let (device, another) = (LoopDevice::new(env, 2 * MIB)?, LoopDevice::new(env, 3 * MIB)?);
    let mapped = Mapped::new(env, &device, 2 * MIB)?;
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("waiting")?;
    let other = pod.script("other", WAIT)?;
    let reader = start(&pod, "reader", &mapped.path)?;

    mapped.suspend(env, true)?;
    let meanwhile = || -> Result {
        pod.output(&reader, "(dd if=/dev/xvda of=/dev/null bs=4k skip=200 count=1 && touch /read) >/dev/null 2>&1 &")?;
        wait_until(&pod, &other, "read reads writes < /sys/block/vda/inflight; test $reads != 0")?;
        pod.output(&other, "echo called > /file")?;
        let further = start(&pod, "further", &another.path.display().to_string())?;
        ensure_eq!(pod.output(&further, SIZE)?, "3145728\n", "the size of another disk");
        // The disk that waits is there, for those who do not read it.
        let second = start(&pod, "second", &mapped.path)?;
        ensure_eq!(pod.output(&second, SIZE)?, "2097152\n", "the size of the disk that does not answer");
        for id in [further, second] {
            pod.stop(&id, 0)?;
            pod.remove_container(&id)?;
        }
        ensure!(pod.exec(&reader, "test -e /read")?.exit_code != 0, "a disk has answered that lets no request through");
        Ok(())
    };
    // Also where that has failed: what waits for the disk could not be ended.
    let meanwhile = meanwhile();
    mapped.suspend(env, false)?;
    meanwhile?;

    wait_until(&pod, &reader, "test -e /read")?;
    pod.remove()?;
    kubelet.end()?;
    drop(mapped);
    another.end()?;
    device.end()
}

/// Waits until a script succeeds in a container.
fn wait_until(pod: &Pod<'_>, id: &str, script: &str) -> Result {
    let end = Instant::now() + LIMIT;
    while pod.exec(id, script)?.exit_code != 0 {
        ensure!(Instant::now() < end, "{script}: not after {LIMIT:?}");
    }
    Ok(())
}

/// Starts a container that waits, and has a block device of the host; its id.
fn start(pod: &Pod<'_>, name: &str, host_path: &str) -> Result<String> {
    let mut config = pod.config(name, WAIT);
    let (container_path, host_path) = ("/dev/xvda".to_owned(), host_path.to_owned());
    config.devices = vec![Device { container_path, host_path, permissions: "rwm".to_owned(), ..Device::default() }];
    pod.start(config)
}
