// SPDX-License-Identifier: Apache-2.0
//! The system-call interfaces of an x86-64 kernel, and the numbers that names have in each.

use std::str::FromStr;

use oci_spec::runtime::Arch as OciArch;

/// The bit that marks a number as one of the x32 interface's.
pub(crate) const X32_BIT: u32 = 0x4000_0000;

/// A system-call interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interface {
    X86_64,
    X32,
    X86,
}

/// System calls that x32 has under numbers of its own, from 512 on.
const X32_OWN: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];

/// The first of them.
const X32_OWN_FIRST: u32 = 512;

/// Calls that 32-bit programs can make through socketcall(2) as well, in the order of its first argument, from 1 on.
const SOCKET_CALLS: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

/// Those that they can make through ipc(2), with the lower half of its first argument.
const IPC_CALLS: [(&str, u32); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// A call that is made through another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Multiplexed {
    /// The number of the other one.
    pub(crate) number: u32,
    /// What its first argument has under `mask`.
    pub(crate) call: u32,
    pub(crate) mask: u32,
}

impl Interface {
    /// The interface of that name, if the guest's processor could have it.
    pub(crate) fn from_oci(arch: OciArch) -> Option<Self> {
        match arch {
            OciArch::ScmpArchNative | OciArch::ScmpArchX86_64 => Some(Self::X86_64),
            OciArch::ScmpArchX32 => Some(Self::X32),
            OciArch::ScmpArchX86 => Some(Self::X86),
            _ => None,
        }
    }

    /// Whether arguments have 64 bits.
    pub(crate) fn is_wide(self) -> bool {
        self == Self::X86_64
    }

    /// The number of a system call.
    pub(crate) fn number(self, name: &str) -> Option<u32> {
        match self {
            Self::X86_64 => syscalls::x86_64::Sysno::from_str(name).ok().map(|call| call.id().cast_unsigned()),
            Self::X86 => syscalls::x86::Sysno::from_str(name).ok().map(|call| call.id().cast_unsigned()),
            Self::X32 => {
                let own = (X32_OWN_FIRST..).zip(X32_OWN).find(|(_, own)| *own == name).map(|(number, _)| number);
                own.or_else(|| Self::X86_64.number(name)).map(|number| number | X32_BIT)
            }
        }
    }

    /// The second way to a system call, if it has one here.
    pub(crate) fn multiplexed(self, name: &str) -> Option<Multiplexed> {
        if self != Self::X86 {
            return None;
        }
        if let Some((call, _)) = (1..).zip(SOCKET_CALLS).find(|(_, known)| *known == name) {
            return Some(Multiplexed { number: self.number("socketcall")?, call, mask: u32::MAX });
        }
        let (_, call) = IPC_CALLS.into_iter().find(|(known, _)| *known == name)?;
        Some(Multiplexed { number: self.number("ipc")?, call, mask: 0xffff })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_interface() {
        for (name, x86_64, x32, x86) in [
            ("read", Some(0), Some(X32_BIT), Some(3)),
            ("ioctl", Some(16), Some(X32_BIT | 514), Some(54)),
            ("pwritev2", Some(328), Some(X32_BIT | 547), Some(379)),
            ("clone3", Some(435), Some(X32_BIT | 435), Some(435)),
            ("waitpid", None, None, Some(7)),
            ("no_such_call", None, None, None),
        ] {
            assert_eq!(Interface::X86_64.number(name), x86_64, "{name}");
            assert_eq!(Interface::X32.number(name), x32, "{name}");
            assert_eq!(Interface::X86.number(name), x86, "{name}");
        }
        assert_eq!(Interface::X86_64.number("close_range"), Some(libc::SYS_close_range as u32));
    }

    #[test]
    fn only_32_bit_programs_have_a_second_way() {
        let socket = Interface::X86.multiplexed("socket").unwrap();

        assert_eq!((socket.number, socket.call), (102, 1));
        assert_eq!(Interface::X86.multiplexed("sendmmsg").unwrap().call, 20);
        assert_eq!(Interface::X86.multiplexed("shmctl").unwrap(), Multiplexed { number: 117, call: 24, mask: 0xffff });
        assert_eq!(Interface::X86_64.multiplexed("socket"), None);
        assert_eq!(Interface::X86.multiplexed("read"), None);
    }
}
