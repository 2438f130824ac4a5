// SPDX-License-Identifier: Apache-2.0
//! What the processes of a pod hold, each page divided among those that share it.

use std::fs;

use crate::failure::{Context as _, Result, ensure};
use crate::processes;

/// A mapping of the VMM's from this size on is the guest's RAM.
const GUEST_RAM_MIN_KIB: u64 = 64 << 10;

/// The VMM's name, as far as the kernel keeps it.
const VMM: &str = "bulkhead-vmm";

/// Proportional set sizes in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PodMemory {
    /// Shim, VMM or the container's processes, and whatever else there is.
    pub(super) processes: u64,
    /// What the guest has touched of its RAM; nothing where there is no guest.
    pub(super) guest: u64,
}

/// Of the only pod: all that is below this process, which shims fall to as orphans, but the daemon.
pub(super) fn of_pod() -> Result<PodMemory> {
    let all = processes::descendants(std::process::id().cast_signed());
    let mut sum = PodMemory::default();
    let mut shims = 0;
    for process in all.iter().filter(|process| process.state != 'Z' && process.name != "containerd") {
        let path = format!("/proc/{}/smaps", process.pid);
        let smaps = fs::read_to_string(&path).context(|| format!("reading {path}"))?;
        let one = of_smaps(&smaps, process.name == VMM);
        sum.processes += one.processes;
        sum.guest += one.guest;
        shims += u32::from(process.name.starts_with("containerd-shim"));
    }
    ensure!(shims > 0, "a pod without a shim: {all:?}");
    Ok(sum)
}

fn of_smaps(smaps: &str, is_vmm: bool) -> PodMemory {
    let mut sum = PodMemory::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), value) = (words.next(), words.next()) else { continue };
        let kib = value.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0);
        match key {
            "Size:" => is_guest = is_vmm && kib >= GUEST_RAM_MIN_KIB,
            "Pss:" if is_guest => sum.guest += kib,
            "Pss:" => sum.processes += kib,
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "7f00-7f80 rw-p 00000000 00:00 0 \nSize:  131072 kB\nPss:  20000 kB\n\
                         5600-5610 r-xp 00000000 08:01 42 /bin/x\nSize:  2000 kB\nPss:  700 kB\nPss_Dirty:  9 kB\n";

    #[test]
    fn only_a_vmm_has_a_guest() {
        assert_eq!(of_smaps(SMAPS, true), PodMemory { processes: 700, guest: 20000 });
        assert_eq!(of_smaps(SMAPS, false), PodMemory { processes: 20700, guest: 0 });
    }
}
