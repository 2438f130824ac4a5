// SPDX-License-Identifier: Apache-2.0
//! The system calls that a VMM may make once its guest runs.
//!
//! Everything that takes more is done before: opening the machine's parts, mounting, making namespaces, giving up
//! capabilities. What is left is to serve files below directories that are open, to move bytes between descriptors that
//! are open, to wait, and to start threads. A call that is not on the list ends the process with `SIGSYS`: it is a fault of
//! the VMM's, or a guest that has taken it over.
//!
//! The list was compared with the `syscall` instructions of the linked program, so that it does not hang on the paths that
//! tests happen to take.

use std::collections::BTreeMap;
use std::{io, process};

use libc::{c_int, c_long};
use nix::sched::CloneFlags;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::JailError;

/// Calls that are allowed whatever their arguments are.
const ALLOWED: &[c_long] = &[
    // Descriptors that are open.
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
    // Files, for the file server and the disks. Paths lead from descriptors, and cannot leave the jail.
    libc::SYS_copy_file_range,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_truncate,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    // The file server does without CAP_FSETID where an ordinary user's write clears set-id bits.
    libc::SYS_capget,
    libc::SYS_capset,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads and time; clone3 is one more, see `no_clone3`.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// Requests of fcntl(2) that are allowed. Those that have a descriptor's owner sent a signal are not.
const FCNTLS: [c_int; 3] = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL];

/// Requests of ioctl(2) that are allowed by their type, bits 8 to 15 (asm-generic/ioctl.h): KVM's, and vhost's.
const IOCTL_TYPES: [u64; 2] = [0xae, 0xaf];

/// Further ones, by number: those of taps, of descriptors that are not to block, and of disks.
const IOCTLS: [u64; 6] =
    [libc::TUNSETVNETHDRSZ, libc::TUNSETOFFLOAD, libc::TUNSETQUEUE, libc::TUNSETTXFILTER, libc::FIONBIO, BLKSSZGET];

/// A disk's block size (linux/fs.h).
const BLKSSZGET: u64 = 0x1268;

/// Installs the filter for the calling thread and all that it starts from here on. No other thread may run.
///
/// # Errors
///
/// When the kernel knows no filters; the guest must not run then.
pub fn filter_system_calls() -> Result<(), JailError> {
    let programs =
        programs().map_err(|error| JailError::new("make the filter of system calls", io::Error::other(error)))?;
    for program in &programs {
        seccompiler::apply_filter(program).map_err(|error| {
            JailError::new(
                "install the filter of system calls (the kernel needs CONFIG_SECCOMP_FILTER)",
                io::Error::other(error),
            )
        })?;
    }
    Ok(())
}

/// The filters, all of which are asked for each call; the strictest answer counts (seccomp(2)).
fn programs() -> Result<[BpfProgram; 2], BackendError> {
    Ok([no_clone3()?.try_into()?, allowed()?.try_into()?])
}

/// clone3(2) has its flags in memory, where a filter cannot look: it is not there, and the C library takes clone(2) instead.
fn no_clone3() -> Result<SeccompFilter, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32), TargetArch::x86_64)
}

fn allowed() -> Result<SeccompFilter, BackendError> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = ALLOWED.iter().map(|number| (*number, Vec::new())).collect();
    let only = |argument, operator, value| -> Result<SeccompRule, BackendError> {
        SeccompRule::new(vec![SeccompCondition::new(argument, Len::Dword, operator, value)?])
    };
    let ioctls = IOCTL_TYPES.iter().map(|of| only(1, Op::MaskedEq(0xff00), of << 8));
    let ioctls = ioctls.chain(IOCTLS.iter().map(|number| only(1, Op::Eq, *number)));
    rules.insert(libc::SYS_ioctl, ioctls.collect::<Result<_, _>>()?);
    let fcntls = FCNTLS.iter().map(|request| only(1, Op::Eq, u64::from(request.unsigned_abs())));
    rules.insert(libc::SYS_fcntl, fcntls.collect::<Result<_, _>>()?);
    // abort(3), at a panic: no signal for others, which may be root's too.
    rules.insert(libc::SYS_tgkill, vec![only(0, Op::Eq, process::id().into())?]);
    // A thread of this process, in the namespaces that it has.
    let thread = CloneFlags::CLONE_THREAD.bits() as u64;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET;
    rules.insert(libc::SYS_clone, vec![only(0, Op::MaskedEq(thread | namespaces.bits() as u64), thread)?]);
    // A worker of the file server has a working directory and a mask of its own.
    rules.insert(libc::SYS_unshare, vec![only(0, Op::Eq, CloneFlags::CLONE_FS.bits() as u64)?]);
    // No memory becomes code.
    let not_executable = || only(2, Op::MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    // The name of a thread, and (of newer C libraries) of memory.
    let names = [libc::PR_SET_NAME, libc::PR_SET_VMA].map(|option| only(0, Op::Eq, option as u64));
    rules.insert(libc::SYS_prctl, names.into_iter().collect::<Result<_, _>>()?);
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    use super::*;

    /// What the process of this test is to do, in its environment.
    const DEED: &str = "BULKHEAD_TEST_FILTERED_DEED";

    /// Does something in a process that has installed the filter.
    fn filtered(deed: &str) -> ExitStatus {
        let test = "jail::filter::tests::in_a_process_of_its_own";
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--test-threads=1"])
            .env(DEED, deed)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap()
    }

    /// Makes a system call whose outcome does not matter.
    fn call(number: c_long, first: u64, second: u64, third: u64) {
        // SAFETY: no call that the tests make takes a pointer to something that the kernel would write to or free.
        unsafe { libc::syscall(number, first, second, third, 0, 0, 0) };
    }

    #[test]
    #[ignore = "run by the others here, in a process of its own"]
    fn in_a_process_of_its_own() {
        let Ok(deed) = std::env::var(DEED) else { return };
        filter_system_calls().unwrap();
        match deed.as_str() {
            "work" => {
                let worker = std::thread::Builder::new().name("worker".to_owned()).spawn(|| {
                    nix::sched::unshare(CloneFlags::CLONE_FS).unwrap();
                    let file = std::fs::File::open("/proc/thread-self/status").unwrap();
                    std::io::read_to_string(file).unwrap()
                });
                let status = worker.unwrap().join().unwrap();
                assert!(status.contains("Seccomp:\t2\n"), "{status}");
            }
            "socket" => call(libc::SYS_socket, libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0),
            "execve" => call(libc::SYS_execve, 0, 0, 0),
            "ptrace" => call(libc::SYS_ptrace, 0, 0, 0),
            "fork" => call(libc::SYS_clone, libc::SIGCHLD as u64, 0, 0),
            "namespace" => call(libc::SYS_unshare, libc::CLONE_NEWUSER as u64, 0, 0),
            "code" => call(libc::SYS_mprotect, 0, 0, libc::PROT_EXEC as u64),
            "kill" => call(libc::SYS_tgkill, 1, 1, 0),
            "owner" => call(libc::SYS_fcntl, 0, libc::F_SETOWN as u64, 1),
            "abort" => std::process::abort(),
            "terminal" => call(libc::SYS_ioctl, 0, libc::TIOCSTI, 0),
            "dumpable" => call(libc::SYS_prctl, libc::PR_SET_DUMPABLE as u64, 1, 0),
            "clone3" => {
                // SAFETY: an empty structure is refused before it is looked at.
                let result = unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<u8>(), 0) };
                assert_eq!((result, nix::errno::Errno::last()), (-1, nix::errno::Errno::ENOSYS));
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn what_a_machine_needs_goes_on() {
        for deed in ["work", "clone3"] {
            assert!(filtered(deed).success(), "{deed}");
        }
    }

    #[test]
    fn a_panic_ends_the_process_in_its_own_way() {
        assert_eq!(filtered("abort").signal(), Some(libc::SIGABRT));
    }

    #[test]
    fn what_none_needs_ends_the_process() {
        for deed in ["socket", "execve", "ptrace", "fork", "namespace", "code", "kill", "owner", "terminal", "dumpable"]
        {
            assert_eq!(filtered(deed).signal(), Some(libc::SIGSYS), "{deed}");
        }
    }

    #[test]
    fn no_call_is_named_twice() {
        let mut numbers = ALLOWED.to_vec();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), ALLOWED.len());
    }
}
