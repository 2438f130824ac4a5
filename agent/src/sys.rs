// SPDX-License-Identifier: Apache-2.0
//! System calls that no safe wrapper offers in the form needed here. The agent's `unsafe` lives in this file.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::signal::{SigHandler, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What [`clone_process`] returns: once in the caller, once in the new process.
#[derive(Debug)]
pub(crate) enum Cloned {
    /// In the caller: the new process.
    Parent(Child),
    /// In the new process.
    Child,
}

/// A process that was made here.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: i32,
    /// Stands for the process even when its pid has become another's.
    pub(crate) pidfd: OwnedFd,
}

/// `struct clone_args` of <linux/sched.h>, as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Flag of clone3(2): signal handlers are not inherited.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
/// Flag of clone3(2): the new process starts in the cgroup named in the arguments.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Whose child a new process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// The caller's.
    Caller,
    /// The caller's parent's, which gets the signal that was meant for it at the caller's own end.
    CallersParent,
}

/// Makes a process, as fork(2) does, in new namespaces and in a cgroup.
///
/// `namespaces` are CLONE_NEW* flags. The process has no signal handlers.
///
/// The caller must be the only thread of its process: the child has only a copy of that thread, and a lock that
/// another thread held would stay locked in it for ever.
pub(crate) fn clone_process(parent: Parent, namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: namespaces | CLONE_CLEAR_SIGHAND | u64::from(libc::CLONE_PIDFD.cast_unsigned()),
        pidfd: (&raw mut pidfd).addr() as u64,
        ..CloneArgs::default()
    };
    match parent {
        Parent::Caller => args.exit_signal = libc::SIGCHLD as u64,
        Parent::CallersParent => args.flags |= u64::from(libc::CLONE_PARENT.cast_unsigned()),
    }
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `args` is a live, initialised `struct clone_args` of the size given, and its `pidfd` the address of a live
    // integer. Memory is not shared with the child (no CLONE_VM), so it runs on a copy of this stack, and nothing it does
    // is seen here.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match i32::try_from(result) {
        Ok(0) => Ok(Cloned::Child),
        Ok(pid) if pid > 0 => {
            // SAFETY: clone3 has succeeded, so it has put a new descriptor there, which nobody else knows of.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent(Child { pid, pidfd }))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Enters those namespaces of a process that the CLONE_NEW* flags name.
pub(crate) fn enter_namespaces(pidfd: BorrowedFd<'_>, namespaces: u64) -> io::Result<()> {
    // A flag beyond 32 bits does not exist.
    let flags = i32::try_from(namespaces).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: setns takes two numbers and touches no memory of this process.
    let result = unsafe { libc::setns(pidfd.as_raw_fd(), flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct mount_attr` of <linux/mount.h>.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MountAttributes {
    /// MOUNT_ATTR_* to set.
    pub(crate) set: u64,
    /// MOUNT_ATTR_* to clear.
    pub(crate) clear: u64,
    /// One of MS_SHARED, MS_SLAVE, MS_PRIVATE, MS_UNBINDABLE; 0 to leave it.
    pub(crate) propagation: u64,
    /// The user namespace that maps the ids of an idmapped mount.
    pub(crate) userns_fd: u64,
}

/// Changes the attributes of the mount whose root is `mount`, and with `recursive` of all below it.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attributes: MountAttributes) -> io::Result<()> {
    let recursive_flag = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated constant and `attributes` a live `struct mount_attr` of the size given; the
    // kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive_flag,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends signal number `signal` (1 to 64, real-time ones too) to `pid`.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two numbers and touches no memory of this process.
    let result = unsafe { libc::kill(pid, signal) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends signal number `signal` (1 to 64, real-time ones too) to a process.
pub(crate) fn pidfd_kill(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no signal information is given (null), so the kernel reads no memory of this process.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct sigaction` as the kernel has it on x86-64; all zero is the default action.
#[repr(C)]
#[derive(Default)]
struct KernelSignalAction {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

/// Gives every signal its default action and blocks none, as a program expects to find them.
pub(crate) fn reset_signals() -> io::Result<()> {
    let default = KernelSignalAction::default();
    for signal in (1..=64).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP)) {
        // SAFETY: the kernel reads one action of the layout given, and its mask has the length given. The default action
        // runs no code of this process. The C library's wrapper would leave out the two signals it keeps for itself.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                std::ptr::null_mut::<KernelSignalAction>(),
                size_of::<u64>(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// Lets the kernel forget children as they end: nobody waits for them.
pub(crate) fn ignore_children() -> io::Result<()> {
    // SAFETY: to ignore a signal runs no code of this process.
    let ignored = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    Ok(ignored.map(drop)?)
}

/// Sets the NIS domain name of this UTS namespace.
pub(crate) fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe `name`, which the kernel only reads.
    let result = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Ends this process at once, without running exit handlers or destructors.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit ends the process; there is nothing that it could leave in a bad state.
    unsafe { libc::_exit(status) }
}

/// Turns a network interface on.
pub(crate) fn set_interface_up(socket: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: an all-zero `ifreq` is valid: it is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = name.to_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    // SAFETY: both requests read and write one `ifreq`, and `request` is one, live and initialised.
    let result = unsafe {
        let result = libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request);
        if result < 0 {
            result
        } else {
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
            libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
        }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a descriptor with the current tokio runtime.
pub(crate) fn watch_descriptor(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor from its making to its drop.
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    Ok(watched?)
}

/// Marks every descriptor from `first` on to be closed by execve.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: the flag only marks descriptors; none is closed here.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes `number` a descriptor of the same open file, which execve does not close.
///
/// For a process that was just cloned and will never use what had that number: its owner is in its memory still.
pub(crate) fn put_at(descriptor: &OwnedFd, number: RawFd) -> io::Result<()> {
    // SAFETY: the caller is such a process, so that no owner of `number` reads, writes or closes what it is from here on.
    let result = unsafe { libc::dup2(descriptor.as_raw_fd(), number) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes every descriptor but 0, 1, 2 and those in `kept`.
///
/// For a process that was just cloned and will never drop what it got from its parent: the owners of the closed
/// descriptors are in its memory still.
pub(crate) fn close_all_but(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().map(|descriptor| descriptor.as_raw_fd().cast_unsigned()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for descriptor in kept {
        if descriptor > first {
            close_range(first, descriptor - 1)?;
        }
        first = first.max(descriptor + 1);
    }
    close_range(first, libc::c_uint::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the caller, `close_all_but`, is for processes that drop none of the descriptors' owners.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts the calling thread under a filter of its system calls.
pub(crate) fn set_seccomp_filter(instructions: &[libc::sock_filter], flags: u32) -> io::Result<()> {
    let len = u16::try_from(instructions.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let program = libc::sock_fprog { len, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: `program` describes a live slice by its pointer and length; the kernel copies it and writes nothing, though
    // the structure's pointer is a mutable one.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::c_ulong::from(flags),
            std::ptr::from_ref(&program),
        )
    };
    match result {
        0 => Ok(()),
        result if result < 0 => Err(io::Error::last_os_error()),
        // With a flag for it, the thread that could not be put under the filter as well.
        _ => Err(io::Error::from_raw_os_error(libc::EBUSY)),
    }
}

/// `struct sched_attr` of <linux/sched/types.h>, as of Linux 3.14.
#[repr(C)]
#[derive(Clone, Debug)]
pub(crate) struct SchedulingAttributes {
    /// Filled in when it is used.
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// Sets policy and priority of a thread, or, for 0, of the calling one.
pub(crate) fn set_scheduling(thread: i32, attributes: &SchedulingAttributes) -> io::Result<()> {
    // SAFETY: `attributes` is a live `struct sched_attr`, and its first field is replaced in a copy by its true size, so
    // that the kernel reads no more than it.
    let result = unsafe {
        let sized = SchedulingAttributes { size: size_of::<SchedulingAttributes>() as u32, ..attributes.clone() };
        libc::syscall(libc::SYS_sched_setattr, thread, &raw const sized, 0)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `IOPRIO_WHO_PROCESS` of <linux/ioprio.h>.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// Sets the I/O priority (class and level) of a thread, or, for 0, of the calling one.
pub(crate) fn set_io_priority(thread: i32, priority: u32) -> io::Result<()> {
    // SAFETY: ioprio_set takes three numbers and touches no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, thread, priority) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the execution domain of the calling thread.
pub(crate) fn set_personality(personality: u32) -> io::Result<()> {
    // SAFETY: personality takes a number; the domains change what system calls answer, not this process's memory.
    let result = unsafe { libc::personality(libc::c_ulong::from(personality)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
