// SPDX-License-Identifier: Apache-2.0
//! A container as the engine makes it: the wire's request, checked and in types that cannot be wrong.

use std::ffi::CString;

use bulkhead_bpf::INSTRUCTION_LEN;
use bulkhead_protocol::{MAX_PRESERVED, agent as wire};
use rustix::fs::FileType;

use super::cgroup::Setting;
use super::hook::StartHooks;
use super::id_map::IdMappings;
use crate::process::preserved::PreservedSpec;
use crate::process::scheduling::Scheduling;
use crate::process::seccomp::Filter;
use crate::storage::{Device as ShareDevice, ShareError, SharedTree};

/// Why a request does not describe a container.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The id cannot name a cgroup.
    #[error("container id {0:?} is not one path component")]
    BadId(String),
    /// A tmpfs whose name cannot be a folder's.
    #[error("tmpfs {0:?} is not one path component")]
    TmpfsName(String),
    /// A message that every container needs is not in the request.
    #[error("the request has no {0}")]
    Missing(&'static str),
    /// A place in a shared tree is wrong.
    #[error("{what} cannot be used")]
    Share {
        /// What the place is for.
        what: String,
        /// What is wrong.
        source: ShareError,
    },
    /// A string has a NUL byte in it, which no system call can carry.
    #[error("{what} {value:?} has a NUL byte in it")]
    NulByte {
        /// What the string is for.
        what: &'static str,
        /// The string.
        value: String,
    },
    /// A path is not absolute.
    #[error("{what} {path:?} is not an absolute path")]
    NotAbsolute {
        /// What the path is for.
        what: &'static str,
        /// The path.
        path: String,
    },
    /// No program to execute.
    #[error("the process has no args")]
    NoArgs,
    /// A namespace that the agent does not make.
    #[error("{0} namespaces are not supported in the guest")]
    Namespace(String),
    /// A device of a kind that there is not.
    #[error("device {path:?} has unknown kind {kind:?}: expected c, u, b or p")]
    DeviceKind {
        /// The device.
        path: String,
        /// Its kind.
        kind: String,
    },
    /// A number out of its range.
    #[error("{what} {value} is out of range")]
    OutOfRange {
        /// What the number is for.
        what: &'static str,
        /// The number.
        value: i64,
    },
    /// A sysctl that would change the whole guest.
    #[error("sysctl {0:?} is not in a namespace of the container")]
    Sysctl(String),
    /// A cgroup file name with a path in it.
    #[error("cgroup file {0:?} is not a file name")]
    CgroupFile(String),
    /// Mappings of ids that the kernel would not take.
    #[error("a mapping of ids has {lines} lines, not 1 to {max}")]
    IdMappings {
        /// How many.
        lines: usize,
        /// Most that there can be.
        max: usize,
    },
    /// A user namespace without mappings, or the other way round.
    #[error("a user namespace and mappings of ids need each other")]
    UserNamespace,
    /// A list of CPUs that is none.
    #[error("{0:?} is no list of CPUs")]
    Cpus(String),
    /// More descriptors than a process can be given.
    #[error("the process is given {0} descriptors, of at most {MAX_PRESERVED}")]
    PreservedDescriptors(usize),
    /// A descriptor of no kind that there is, or one that should have a stream and does not.
    #[error("the kind of the process's descriptor {0} does not go with its stream")]
    PreservedDescriptor(usize),
    /// A filter of devices that is no list of instructions.
    #[error("the filter of devices has {0} bytes, which are no instructions")]
    DeviceFilter(usize),
}

/// A container to be made.
#[derive(Debug)]
pub struct ContainerSpec {
    pub(crate) id: String,
    pub(crate) rootfs: SharedTree,
    pub(crate) rootfs_readonly: bool,
    pub(crate) rootfs_propagation: u64,
    pub(crate) hostname: String,
    pub(crate) domainname: String,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) devices: Vec<Device>,
    pub(crate) namespaces: Namespaces,
    /// Those of the user namespace, if the container has one.
    pub(crate) id_mappings: Option<IdMappings>,
    /// As /proc/self/timens_offsets takes them: clock, seconds, nanoseconds.
    pub(crate) time_offsets: String,
    pub(crate) masked_paths: Vec<String>,
    pub(crate) readonly_paths: Vec<String>,
    /// Path under /proc/sys, value.
    pub(crate) sysctls: Vec<(String, String)>,
    pub(crate) cgroup_settings: Vec<Setting>,
    /// `struct bpf_insn`s that decide over access to devices; empty for none.
    pub(crate) device_filter: Vec<u8>,
    pub(crate) process: ProcessSpec,
    pub(crate) start_hooks: StartHooks,
}

/// CLONE_NEWPID.
pub(super) const NEW_PIDS: u64 = 0x2000_0000;

/// Which namespaces are the container's own, beside mount, which always is, and pid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Namespaces {
    /// Its pid namespace is not its own but the one that containers share.
    pub(crate) common_pids: bool,
    pub(crate) ipc: bool,
    pub(crate) uts: bool,
    pub(crate) cgroup: bool,
    pub(crate) network: bool,
    pub(crate) time: bool,
    pub(crate) user: bool,
}

impl Namespaces {
    /// CLONE_NEW* for clone3(2). The cgroup namespace is not among them: it is rooted where its maker is, so it is made
    /// once the process is in its cgroup. Nor is the time namespace, which a process enters by execve(2) only.
    ///
    /// The user namespace is the first that the kernel makes: the others are its own.
    pub(crate) fn clone_flags(self) -> u64 {
        let pids = if self.common_pids { 0 } else { NEW_PIDS };
        self.own_flags() | pids | if self.user { u64::from(libc::CLONE_NEWUSER.cast_unsigned()) } else { 0 }
    }

    fn own_flags(self) -> u64 {
        let mut flags = libc::CLONE_NEWNS;
        for (wanted, flag) in
            [(self.ipc, libc::CLONE_NEWIPC), (self.uts, libc::CLONE_NEWUTS), (self.network, libc::CLONE_NEWNET)]
        {
            if wanted {
                flags |= flag;
            }
        }
        // None of these flags is the sign bit.
        u64::from(flags.cast_unsigned())
    }

    /// CLONE_NEW* by which an exec'd process enters what init is in, but for the cgroup and the user namespace.
    pub(crate) fn join_flags(self) -> u64 {
        let time = if self.time { libc::CLONE_NEWTIME } else { 0 };
        self.own_flags() | NEW_PIDS | u64::from(time.cast_unsigned())
    }

    /// CLONE_NEWCGROUP if the container has a cgroup namespace of its own, else 0.
    pub(crate) fn cgroup_flag(self) -> u64 {
        if self.cgroup { u64::from(libc::CLONE_NEWCGROUP.cast_unsigned()) } else { 0 }
    }
}

/// One mount of the spec.
#[derive(Debug)]
pub(crate) struct Mount {
    pub(crate) destination: String,
    pub(crate) source: MountSource,
    pub(crate) flags: u64,
    pub(crate) propagation: u64,
    pub(crate) recursive_set: u64,
    pub(crate) recursive_clear: u64,
    pub(crate) data: String,
    pub(crate) copy_up: bool,
    /// How the ids of a bind mount's files are mapped.
    pub(crate) id_mappings: Option<IdMappings>,
}

/// What is mounted.
#[derive(Debug)]
pub(crate) enum MountSource {
    /// A place in a shared tree (a bind mount).
    Share { place: SharedTree, is_directory: bool },
    /// A file system.
    FileSystem { fs_type: String, source: String },
    /// A tmpfs that containers have in common.
    SandboxTmpfs(TmpfsSpec),
    /// A socket at which the agent listens for the host.
    Socket(SocketSpec),
    /// The socket at which the container tells that it is ready, or the folder that it is in.
    NotifySocket { is_directory: bool },
    /// What is mounted at the destination, to be changed.
    Remount,
}

/// A tmpfs that containers have in common.
#[derive(Debug)]
pub(crate) struct TmpfsSpec {
    /// One component of a path.
    pub(crate) name: String,
    pub(crate) flags: u64,
    pub(crate) options: String,
    /// What is bound of it; empty for its top.
    pub(crate) folder: String,
}

impl TmpfsSpec {
    fn from_wire(wire: wire::SandboxTmpfs) -> Result<Self, SpecError> {
        let wire::SandboxTmpfs { name, flags, options, folder, .. } = wire;
        if matches!(name.as_str(), "" | "." | "..") || name.contains('/') {
            return Err(SpecError::TmpfsName(name));
        }
        for value in [&name, &options, &folder] {
            without_nul("tmpfs", value)?;
        }
        Ok(Self { name, flags, options, folder })
    }
}

/// A socket in the place of one of the host's.
#[derive(Debug)]
pub(crate) struct SocketSpec {
    /// The host's number for it.
    pub(crate) number: u32,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A device node to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) path: String,
    pub(crate) kind: FileType,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A process to be started.
#[derive(Debug)]
pub struct ProcessSpec {
    pub(crate) args: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
    pub(crate) umask: u32,
    pub(crate) capabilities: Capabilities,
    /// RLIMIT_* number, soft limit, hard limit.
    pub(crate) rlimits: Vec<(u32, u64, u64)>,
    pub(crate) no_new_privileges: bool,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) scheduling: Scheduling,
    pub(crate) seccomp: Option<Filter>,
    pub(crate) stdio: StdioSpec,
    /// What it has from descriptor 3 on.
    pub(crate) preserved: Vec<PreservedSpec>,
    /// A cgroup below the container's, for a further process.
    pub(crate) cgroup: String,
}

/// The five sets, as bit masks by capability number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub(crate) bounding: u64,
    pub(crate) effective: u64,
    pub(crate) inheritable: u64,
    pub(crate) permitted: u64,
    pub(crate) ambient: u64,
}

/// What a process reads from and writes to. Streams are the host's names; `None` is `/dev/null`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StdioSpec {
    pub(crate) terminal: Option<TerminalSize>,
    pub(crate) stdin: Option<u32>,
    pub(crate) stdout: Option<u32>,
    pub(crate) stderr: Option<u32>,
}

/// A terminal's size in characters; 0 by 0 if unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

impl TerminalSize {
    /// The size that a request names, checked.
    pub fn from_wire(rows: u32, columns: u32) -> Result<Self, SpecError> {
        let narrow = |what, value: u32| {
            u16::try_from(value).map_err(|_| SpecError::OutOfRange { what, value: i64::from(value) })
        };
        Ok(Self { rows: narrow("terminal rows", rows)?, columns: narrow("terminal columns", columns)? })
    }
}

impl ContainerSpec {
    /// The container that a request describes, checked.
    pub fn from_wire(request: wire::CreateContainerRequest) -> Result<Self, SpecError> {
        if matches!(request.id.as_str(), "" | "." | "..") || request.id.contains(['/', '\0']) {
            return Err(SpecError::BadId(request.id));
        }
        let share = |what: &str, place: &wire::SharePath| {
            SharedTree::from_wire(place).map_err(|source| SpecError::Share { what: what.to_owned(), source })
        };
        let rootfs = share("the rootfs", request.rootfs.as_ref().ok_or(SpecError::Missing("rootfs"))?)?;
        let process = request.process.into_option().ok_or(SpecError::Missing("process"))?;
        for path in request.masked_paths.iter().chain(&request.readonly_paths) {
            absolute("masked or read-only path", path)?;
        }
        let namespaces = Namespaces { common_pids: request.common_pids, ..namespaces(&request.namespaces)? };
        let id_mappings = IdMappings::from_wire(&request.uid_mappings, &request.gid_mappings)?;
        if namespaces.user != id_mappings.is_some() {
            return Err(SpecError::UserNamespace);
        }
        Ok(Self {
            id: request.id,
            rootfs,
            rootfs_readonly: request.rootfs_readonly,
            rootfs_propagation: request.rootfs_propagation,
            hostname: request.hostname,
            domainname: request.domainname,
            mounts: request.mounts.into_iter().map(Mount::from_wire).collect::<Result<_, _>>()?,
            devices: request.devices.into_iter().map(Device::from_wire).collect::<Result<_, _>>()?,
            namespaces,
            id_mappings,
            time_offsets: time_offsets(&request.time_offsets),
            masked_paths: request.masked_paths,
            readonly_paths: request.readonly_paths,
            sysctls: request.sysctls.into_iter().map(super::sysctl::check).collect::<Result<_, _>>()?,
            cgroup_settings: request.cgroup_settings.into_iter().map(cgroup_setting).collect::<Result<_, _>>()?,
            device_filter: device_filter(request.device_filter)?,
            process: ProcessSpec::from_wire(process)?,
            start_hooks: StartHooks::from_wire(request.start_hooks, request.start_hook_state)?,
        })
    }

    /// Every place in a shared tree that the container uses.
    pub(crate) fn shared_trees(&self) -> Vec<SharedTree> {
        let binds = self.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::Share { place, .. } => Some(place.clone()),
            MountSource::FileSystem { .. }
            | MountSource::SandboxTmpfs(_)
            | MountSource::Socket(_)
            | MountSource::NotifySocket { .. }
            | MountSource::Remount => None,
        });
        std::iter::once(self.rootfs.clone()).chain(binds).collect()
    }

    /// Those that it has in common with other containers.
    pub(crate) fn sandbox_tmpfs(&self) -> impl Iterator<Item = &TmpfsSpec> {
        self.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::SandboxTmpfs(tmpfs) => Some(tmpfs),
            _ => None,
        })
    }

    /// Whether any of them comes through the device that is not cached.
    pub(crate) fn uses_shared_device(&self) -> bool {
        self.shared_trees().iter().any(|tree| tree.device == ShareDevice::Shared)
    }
}

fn namespaces(wire: &[wire::Namespace]) -> Result<Namespaces, SpecError> {
    let mut namespaces = Namespaces::default();
    for namespace in wire {
        match namespace.kind.enum_value() {
            Ok(wire::NamespaceKind::MOUNT | wire::NamespaceKind::PID) => {}
            Ok(wire::NamespaceKind::IPC) => namespaces.ipc = true,
            Ok(wire::NamespaceKind::UTS) => namespaces.uts = true,
            Ok(wire::NamespaceKind::CGROUP) => namespaces.cgroup = true,
            Ok(wire::NamespaceKind::NETWORK) => namespaces.network = true,
            Ok(wire::NamespaceKind::USER) => namespaces.user = true,
            Ok(wire::NamespaceKind::TIME) => namespaces.time = true,
            Ok(wire::NamespaceKind::NAMESPACE_KIND_UNSPECIFIED) => {
                return Err(SpecError::Namespace("unspecified".to_owned()));
            }
            Err(number) => return Err(SpecError::Namespace(format!("number {number}"))),
        }
    }
    Ok(namespaces)
}

fn time_offsets(wire: &[wire::TimeOffset]) -> String {
    let lines = wire.iter().map(|offset| format!("{} {} {}\n", offset.clock, offset.seconds, offset.nanoseconds));
    lines.collect()
}

/// A request's cgroup setting, its file checked.
pub(crate) fn cgroup_setting(setting: wire::CgroupSetting) -> Result<Setting, SpecError> {
    if setting.file.is_empty() || setting.file.starts_with('.') || setting.file.contains(['/', '\0']) {
        return Err(SpecError::CgroupFile(setting.file));
    }
    Ok(Setting { file: setting.file, value: setting.value, keep_first_word: setting.keep_first_word })
}

/// A request's filter of devices, checked as far as the kernel does not.
pub(crate) fn device_filter(filter: Vec<u8>) -> Result<Vec<u8>, SpecError> {
    if !filter.len().is_multiple_of(INSTRUCTION_LEN) {
        return Err(SpecError::DeviceFilter(filter.len()));
    }
    Ok(filter)
}

impl Mount {
    fn from_wire(wire: wire::Mount) -> Result<Self, SpecError> {
        absolute("mount destination", &wire.destination)?;
        for value in [&wire.fs_type, &wire.source, &wire.data] {
            without_nul("mount option", value)?;
        }
        let source = match wire.share.as_ref() {
            Some(place) => MountSource::Share {
                place: SharedTree::from_wire(place).map_err(|source| SpecError::Share {
                    what: format!("the source of the mount at {}", wire.destination),
                    source,
                })?,
                is_directory: wire.source_is_dir,
            },
            None if wire.remount => MountSource::Remount,
            None if wire.sandbox_tmpfs.is_some() => {
                MountSource::SandboxTmpfs(TmpfsSpec::from_wire(wire.sandbox_tmpfs.unwrap_or_default())?)
            }
            None if wire.socket.is_some() => {
                let wire::HostSocket { number, mode, uid, gid, .. } = wire.socket.unwrap_or_default();
                MountSource::Socket(SocketSpec { number, mode: mode & 0o777, uid, gid })
            }
            None if wire.notify_socket => MountSource::NotifySocket { is_directory: wire.source_is_dir },
            None if wire.fs_type.is_empty() => return Err(SpecError::Missing("mount source")),
            None => MountSource::FileSystem { fs_type: wire.fs_type, source: wire.source },
        };
        Ok(Self {
            destination: wire.destination,
            source,
            flags: wire.flags,
            propagation: wire.propagation,
            recursive_set: wire.recursive_set,
            recursive_clear: wire.recursive_clear,
            data: wire.data,
            copy_up: wire.tmpcopyup,
            id_mappings: IdMappings::from_wire(&wire.uid_mappings, &wire.gid_mappings)?,
        })
    }
}

impl Device {
    fn from_wire(wire: wire::Device) -> Result<Self, SpecError> {
        absolute("device", &wire.path)?;
        let kind = match wire.kind.as_str() {
            "c" | "u" => FileType::CharacterDevice,
            "b" => FileType::BlockDevice,
            "p" => FileType::Fifo,
            _ => return Err(SpecError::DeviceKind { path: wire.path, kind: wire.kind }),
        };
        let number = |what, value: i64| u32::try_from(value).map_err(|_| SpecError::OutOfRange { what, value });
        Ok(Self {
            kind,
            major: number("device major number", wire.major)?,
            minor: number("device minor number", wire.minor)?,
            mode: wire.mode & 0o7777,
            uid: wire.uid,
            gid: wire.gid,
            path: wire.path,
        })
    }
}

impl ProcessSpec {
    /// The process that a request describes, checked.
    pub fn from_wire(wire: wire::Process) -> Result<Self, SpecError> {
        if wire.args.first().is_none_or(String::is_empty) {
            return Err(SpecError::NoArgs);
        }
        absolute("working directory", &wire.cwd)?;
        for id in [wire.uid, wire.gid].iter().chain(&wire.additional_gids) {
            // The kernel takes this number for "unchanged".
            if *id == u32::MAX {
                return Err(SpecError::OutOfRange { what: "user or group id", value: i64::from(*id) });
            }
        }
        let stream = |id: u32| (id != 0).then_some(id);
        let terminal = match wire.terminal {
            true => Some(TerminalSize::from_wire(wire.terminal_rows, wire.terminal_columns)?),
            false => None,
        };
        let stdio = StdioSpec {
            terminal,
            stdin: stream(wire.stdin_stream),
            stdout: stream(wire.stdout_stream),
            stderr: if wire.terminal { None } else { stream(wire.stderr_stream) },
        };
        let scheduling = Scheduling::from_wire(&wire)?;
        Ok(Self {
            args: c_strings("argument", wire.args)?,
            env: c_strings("environment variable", wire.env)?,
            cwd: wire.cwd,
            uid: wire.uid,
            gid: wire.gid,
            additional_gids: wire.additional_gids,
            umask: wire.umask.unwrap_or(0o022) & 0o777,
            capabilities: capabilities(wire.capabilities.as_ref())?,
            rlimits: wire.rlimits.into_iter().map(|limit| (limit.resource, limit.soft, limit.hard)).collect(),
            no_new_privileges: wire.no_new_privileges,
            oom_score_adj: wire.oom_score_adj,
            scheduling,
            seccomp: wire.seccomp.as_ref().map(Filter::from_wire).transpose()?,
            stdio,
            preserved: preserved(&wire.preserved)?,
            cgroup: wire.cgroup,
        })
    }
}

fn preserved(wire: &[wire::PreservedDescriptor]) -> Result<Vec<PreservedSpec>, SpecError> {
    if wire.len() > MAX_PRESERVED as usize {
        return Err(SpecError::PreservedDescriptors(wire.len()));
    }
    let read = |(number, wire): (usize, &wire::PreservedDescriptor)| match (wire.kind.enum_value(), wire.stream) {
        (Ok(wire::DescriptorKind::NULL_DEVICE), 0) => Ok(PreservedSpec::Null),
        (Ok(wire::DescriptorKind::INPUT), stream @ 1..) => Ok(PreservedSpec::Input(stream)),
        (Ok(wire::DescriptorKind::OUTPUT), stream @ 1..) => Ok(PreservedSpec::Output(stream)),
        (Ok(wire::DescriptorKind::CONNECTION), stream @ 1..) => Ok(PreservedSpec::Connection(stream)),
        _ => Err(SpecError::PreservedDescriptor(number + 3)),
    };
    wire.iter().enumerate().map(read).collect()
}

fn capabilities(wire: Option<&wire::Capabilities>) -> Result<Capabilities, SpecError> {
    let Some(wire) = wire else { return Ok(Capabilities::default()) };
    let mask = |numbers: &[u32]| {
        numbers.iter().try_fold(0_u64, |mask, number| {
            let bit = 1_u64.checked_shl(*number);
            let value = i64::from(*number);
            bit.map(|bit| mask | bit).ok_or(SpecError::OutOfRange { what: "capability", value })
        })
    };
    Ok(Capabilities {
        bounding: mask(&wire.bounding)?,
        effective: mask(&wire.effective)?,
        inheritable: mask(&wire.inheritable)?,
        permitted: mask(&wire.permitted)?,
        ambient: mask(&wire.ambient)?,
    })
}

pub(super) fn c_strings(what: &'static str, values: Vec<String>) -> Result<Vec<CString>, SpecError> {
    let convert = |value: String| {
        CString::new(value).map_err(|error| SpecError::NulByte {
            what,
            value: String::from_utf8_lossy(&error.into_vec()).into_owned(),
        })
    };
    values.into_iter().map(convert).collect()
}

fn without_nul(what: &'static str, value: &str) -> Result<(), SpecError> {
    if value.contains('\0') {
        return Err(SpecError::NulByte { what, value: value.to_owned() });
    }
    Ok(())
}

pub(super) fn absolute(what: &'static str, path: &str) -> Result<(), SpecError> {
    without_nul(what, path)?;
    if !path.starts_with('/') {
        return Err(SpecError::NotAbsolute { what, path: path.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> wire::CreateContainerRequest {
        let rootfs = wire::SharePath {
            device: wire::ShareDevice::PRIVATE.into(),
            tree: "rootfs".to_owned(),
            ..Default::default()
        };
        let process = wire::Process { args: vec!["sh".to_owned()], cwd: "/".to_owned(), ..Default::default() };
        wire::CreateContainerRequest {
            id: "one".to_owned(),
            rootfs: Some(rootfs).into(),
            process: Some(process).into(),
            ..Default::default()
        }
    }

    fn parse(change: impl FnOnce(&mut wire::CreateContainerRequest)) -> Result<ContainerSpec, SpecError> {
        let mut request = request();
        change(&mut request);
        ContainerSpec::from_wire(request)
    }

    fn parse_process(change: impl FnOnce(&mut wire::Process)) -> Result<ContainerSpec, SpecError> {
        parse(|request| change(request.process.as_mut().unwrap()))
    }

    #[test]
    fn least_request_is_accepted_with_defaults() {
        let spec = parse(|_| {}).unwrap();
        assert_eq!(spec.process.umask, 0o022);
        assert_eq!(spec.process.capabilities, Capabilities::default());
        assert_eq!(spec.process.stdio.stdin, None);
        assert_eq!(spec.shared_trees(), [spec.rootfs]);
    }

    #[test]
    fn ids_that_are_paths_are_refused() {
        for id in ["", ".", "..", "a/b", "a\0"] {
            assert!(matches!(parse(|request| request.id = id.to_owned()), Err(SpecError::BadId(_))), "{id:?}");
        }
    }

    #[test]
    fn user_namespaces_and_mappings_need_each_other() {
        let namespace = || wire::Namespace { kind: wire::NamespaceKind::USER.into(), ..Default::default() };
        let mapping = || wire::IdMapping { outside: 1000, count: 1, ..Default::default() };
        assert!(matches!(parse(|request| request.namespaces.push(namespace())), Err(SpecError::UserNamespace)));
        let spec = parse(|request| {
            request.namespaces.push(namespace());
            request.uid_mappings.push(mapping());
            request.gid_mappings.push(mapping());
        });
        let spec = spec.unwrap();
        let flag = u64::from(libc::CLONE_NEWUSER.cast_unsigned());
        assert_eq!(spec.namespaces.clone_flags() & flag, flag);
        assert_eq!(spec.namespaces.join_flags() & flag, 0);
        assert_eq!(spec.id_mappings.unwrap().user_outside(0), Some(1000));
    }

    #[test]
    fn time_offsets_become_lines() {
        let offset = wire::TimeOffset { clock: 7, seconds: -3, nanoseconds: 5, ..Default::default() };
        let spec = parse(|request| request.time_offsets.push(offset)).unwrap();
        assert_eq!(spec.time_offsets, "7 -3 5\n");
    }

    #[test]
    fn asked_namespaces_become_clone_flags() {
        let namespaces = Namespaces { network: true, cgroup: true, ..Default::default() };
        let expected = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET;
        assert_eq!(namespaces.clone_flags(), u64::from(expected.cast_unsigned()));
        let common = Namespaces { common_pids: true, ..Default::default() };
        assert_eq!(common.clone_flags(), u64::from(libc::CLONE_NEWNS.cast_unsigned()));
        let joined = libc::CLONE_NEWNS | libc::CLONE_NEWPID;
        assert_eq!(common.join_flags(), u64::from(joined.cast_unsigned()));
    }

    #[test]
    fn bad_process_fields_are_refused() {
        assert!(matches!(parse_process(|process| process.args.clear()), Err(SpecError::NoArgs)));
        assert!(matches!(parse_process(|process| process.args[0].clear()), Err(SpecError::NoArgs)));
        assert!(matches!(parse_process(|process| process.args[0] = "a\0".into()), Err(SpecError::NulByte { .. })));
        assert!(matches!(parse_process(|process| process.cwd = "tmp".into()), Err(SpecError::NotAbsolute { .. })));
        assert!(matches!(parse_process(|process| process.uid = u32::MAX), Err(SpecError::OutOfRange { .. })));
        let capabilities = wire::Capabilities { bounding: vec![64], ..Default::default() };
        let result = parse_process(|process| process.capabilities = Some(capabilities).into());
        assert!(matches!(result, Err(SpecError::OutOfRange { .. })));
    }

    #[test]
    fn capability_numbers_become_masks() {
        let wire = wire::Capabilities { effective: vec![0, 21], ..Default::default() };
        assert_eq!(capabilities(Some(&wire)).unwrap().effective, 1 | 1 << 21);
    }

    #[test]
    fn mounts_without_a_source_and_relative_destinations_are_refused() {
        let mount = wire::Mount { destination: "/x".to_owned(), ..Default::default() };
        assert!(matches!(parse(|request| request.mounts.push(mount)), Err(SpecError::Missing(_))));
        let mount = wire::Mount { destination: "x".to_owned(), fs_type: "tmpfs".to_owned(), ..Default::default() };
        assert!(matches!(parse(|request| request.mounts.push(mount)), Err(SpecError::NotAbsolute { .. })));
    }

    #[test]
    fn unknown_device_kind_is_refused() {
        let device = wire::Device { path: "/dev/x".to_owned(), kind: "z".to_owned(), ..Default::default() };
        assert!(matches!(parse(|request| request.devices.push(device)), Err(SpecError::DeviceKind { .. })));
    }

    #[test]
    fn cgroup_files_with_paths_are_refused() {
        for file in ["", "../cgroup.procs", "a/b", ".."] {
            let setting = wire::CgroupSetting { file: file.to_owned(), ..Default::default() };
            let result = parse(|request| request.cgroup_settings.push(setting));
            assert!(matches!(result, Err(SpecError::CgroupFile(_))), "{file:?}");
        }
    }
}
