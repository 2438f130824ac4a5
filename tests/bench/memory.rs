// SPDX-License-Identifier: Apache-2.0
//! What a process and a control group hold in memory, as the kernel tells it.

use std::fs;
use std::path::Path;

use crate::bundle::GUEST_MEM_SIZE_MIB;
use crate::error::BenchError;
use crate::stage;

/// Memory of one process in KiB, with the guest's RAM apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProcessMemory {
    /// The program's name.
    pub(crate) name: String,
    /// Resident beside the guest's RAM.
    pub(crate) rss_kib: u64,
    /// The same, with shared pages divided among those that share them.
    pub(crate) pss_kib: u64,
    /// Size of the mapping taken for the guest's RAM; 0 without one.
    pub(crate) guest_size_kib: u64,
    /// How much of it the guest has touched.
    pub(crate) guest_rss_kib: u64,
}

/// Reads the memory of process `pid`.
///
/// # Errors
///
/// The process is gone, or not ours to look at.
pub(crate) fn of_process(pid: u32) -> Result<ProcessMemory, BenchError> {
    let name = stage::read(format!("/proc/{pid}/comm"))?.trim().to_owned();
    Ok(ProcessMemory { name, ..sum_smaps(&stage::read(format!("/proc/{pid}/smaps"))?) })
}

/// Adds up the mappings of an smaps file. Mappings of at least half the guest's memory are taken for its RAM.
fn sum_smaps(smaps: &str) -> ProcessMemory {
    let mut sum = ProcessMemory::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), value) = (words.next(), words.next()) else { continue };
        let kib = value.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0);
        match key {
            "Size:" => {
                is_guest = kib >= GUEST_MEM_SIZE_MIB * 1024 / 2;
                sum.guest_size_kib += if is_guest { kib } else { 0 };
            }
            "Rss:" if is_guest => sum.guest_rss_kib += kib,
            "Rss:" => sum.rss_kib += kib,
            "Pss:" if !is_guest => sum.pss_kib += kib,
            _ => {}
        }
    }
    // A mapping that is only reserved (a heap's arena) is nobody's RAM.
    if sum.guest_rss_kib == 0 {
        sum.guest_size_kib = 0;
    }
    sum
}

/// The process `pid` and all that descend from it.
pub(crate) fn family(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(parent) = family.get(next) {
        let tasks = fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
        let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children: Vec<u32> = children
            .flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
            .collect();
        family.extend(children);
        next += 1;
    }
    family
}

/// The value in KiB of a `Name:  value kB` line of /proc/meminfo or /proc/PID/status.
pub(crate) fn field_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What the guest's first process holds in KiB, by what its kernel tells when memory is used up: all that is in memory for
/// processes, less what the listed ones hold. The first process is never listed, since it is never killed. Pages that
/// listed processes share are taken off twice, which is a few.
pub(crate) fn unlisted_rss_kib(messages: &str) -> Option<u64> {
    const PAGE_KIB: u64 = 4;
    let pages = |name: &str| {
        let mut words = messages.lines().flat_map(str::split_whitespace);
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix(':')?.parse::<u64>().ok())
    };
    let anon = (pages("active_anon")? + pages("inactive_anon")?).checked_sub(pages("shmem")?)?;
    // Lines of `[time] [  PID  ]  uid tgid total_vm rss …`.
    let tasks = messages.lines().filter_map(|line| line.split_once("] [")?.1.split_once(']'));
    let listed = tasks.filter(|(id, _)| id.trim().parse::<u32>().is_ok());
    let listed: u64 = listed.filter_map(|(_, columns)| columns.split_whitespace().nth(3)?.parse::<u64>().ok()).sum();
    Some((anon + pages("mapped")?).checked_sub(listed)? * PAGE_KIB)
}

/// What the kernel charges to a control group, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupMemory {
    /// Private memory of its processes, the guest's RAM among it.
    pub(crate) anon_kib: u64,
    /// Files in memory, tmpfs and memfds among them.
    pub(crate) file_kib: u64,
    /// The kernel's own: page tables, sockets, stacks, KVM's structures.
    pub(crate) kernel_kib: u64,
}

impl GroupMemory {
    /// Everything.
    pub(crate) fn total_kib(self) -> u64 {
        self.anon_kib + self.file_kib + self.kernel_kib
    }
}

/// Reads what the control group at `folder` is charged.
///
/// # Errors
///
/// The group has no memory controller, or a kernel older than 5.18 that does not tell its own share.
pub(crate) fn of_group(folder: &Path) -> Result<GroupMemory, BenchError> {
    let path = folder.join("memory.stat");
    let text = stage::read(&path)?;
    let value = |name: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok());
        found
            .map(|bytes| bytes / 1024)
            .ok_or_else(|| BenchError::Content { path: path.clone(), why: format!("no {name}") })
    };
    Ok(GroupMemory { anon_kib: value("anon")?, file_kib: value("file")?, kernel_kib: value("kernel")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "7f00-7f80 rw-p 00000000 00:00 0 \nSize:  131072 kB\nRss:  20000 kB\nPss:  20000 kB\n\
                         5600-5610 r-xp 00000000 08:01 42 /bin/vmm\nSize:  2000 kB\nRss:  1500 kB\nPss:  700 kB\n";

    #[test]
    fn guest_ram_is_told_apart() {
        let sum = sum_smaps(SMAPS);

        assert_eq!((sum.rss_kib, sum.pss_kib), (1500, 700));
        assert_eq!((sum.guest_size_kib, sum.guest_rss_kib), (131_072, 20_000));
    }

    #[test]
    fn reserved_address_space_is_no_ram() {
        let sum = sum_smaps("7f00-7f80 ---p 00000000 00:00 0 \nSize:  131072 kB\nRss:  0 kB\nPss:  0 kB\n");

        assert_eq!(sum.guest_size_kib, 0);
    }

    #[test]
    fn what_no_listed_task_holds_is_the_first_ones() {
        let messages = "[    1.50] active_anon:237 inactive_anon:27092 isolated_anon:0\n\
                        [    1.50]  mapped:356 shmem:397 pagetables:149\n\
                        [    1.51] [  pid  ]   uid  tgid total_vm      rss rss_anon name\n\
                        [    1.52] [     36]     0    36      565       14        0 sh\n\
                        [    1.53] [     37]     0    37    27394    26871    26848 tail\n";

        assert_eq!(unlisted_rss_kib(messages), Some(4 * (237 + 27092 - 397 + 356 - 14 - 26871)));
        assert_eq!(unlisted_rss_kib("nothing"), None);
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "MemTotal:  100 kB\nMemAvailable:   70 kB\nCmaTotal: 0 kB\n";

        assert_eq!(field_kib(text, "MemAvailable"), Some(70));
        assert_eq!(field_kib(text, "MemAvail"), None);
    }
}
