// SPDX-License-Identifier: Apache-2.0
//! The VMM's process: started with everything that it needs as inherited descriptors, watched through its report and its
//! pidfd, killed when dropped.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use bulkhead_protocol::AGENT_PORT;
use bulkhead_vmm::config::{DiskConfig, MacAddress, MachineConfig, NetConfig, NetLink, VsockConfig};
use bulkhead_vmm::control;
use bulkhead_vmm::report::{End, Report};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, pidfd_send_signal};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::sync::mpsc::UnboundedSender;

use super::disks;
use super::oom_score;
use super::vmm_control::VmmControl;
use crate::hooks::ContainerNamespaces;
use crate::install::{Install, OpenParts};
use crate::logging;
use crate::network::{Device, DeviceLink};
use crate::pidfd;
use crate::said::Said;
use crate::spec::{BlockDevice, Machine};
use crate::storage::Shares;
use crate::storage::block_device::Opened;
use crate::text;

/// Longest line of the report.
const MAX_REPORT_LINE: u64 = 64 * 1024;

/// Console output that an error quotes.
const CONSOLE_TAIL: usize = 1024;

/// A VMM that cannot be started.
#[derive(Debug, Error)]
pub(crate) enum SpawnVmmError {
    #[error("cannot start the VMM {} (is Bulkhead installed completely? `bulkhead check` says)", .0.display())]
    Spawn(PathBuf, #[source] io::Error),
    #[error("cannot {0} for the VMM")]
    Prepare(&'static str, #[source] io::Error),
    #[error("cannot restrict the sandbox to the CPUs of linux.resources.cpu.cpus")]
    Affinity(#[source] io::Error),
}

/// What the VMM is made from besides the parts.
#[derive(Debug)]
pub(crate) struct VmmOptions<'a> {
    pub(crate) id: &'a str,
    pub(crate) machine: &'a Machine,
    pub(crate) shares: &'a Shares,
    /// Where these are to be looked for, if not here.
    pub(crate) namespaces: Option<ContainerNamespaces>,
    /// Whether trees can be added later.
    pub(crate) trees_grow: bool,
    pub(crate) nets: &'a [Device],
    /// How many network devices can be added later.
    pub(crate) spare_nets: usize,
    /// The block devices of the host that it has.
    pub(crate) disks: &'a [BlockDevice],
    /// How many there can be besides later.
    pub(crate) spare_disks: usize,
    pub(crate) vsock: UnixListener,
    pub(crate) console: File,
    pub(crate) trace: bool,
}

/// A running VMM.
#[derive(Debug)]
pub(crate) struct Vmm {
    child: Child,
    pidfd: OwnedFd,
    console: File,
    /// It writes there only when it cannot report.
    stderr: Said,
    /// It ends with the thread that has started it.
    _namespaces: Option<ContainerNamespaces>,
}

/// The supervisor's ends of the VMM's sockets.
#[derive(Debug)]
pub(crate) struct VmmSockets {
    /// Becomes the connection to the agent.
    pub(crate) agent: UnixStream,
    /// Carries the report.
    pub(crate) report: UnixStream,
    /// Carries requests.
    pub(crate) control: OwnedFd,
}

impl Vmm {
    /// Starts the VMM. Its machine boots from here on.
    pub(crate) fn spawn(
        install: &Install,
        parts: OpenParts,
        options: VmmOptions<'_>,
    ) -> Result<(Self, VmmSockets), SpawnVmmError> {
        let prepare = |doing| move |error: io::Error| SpawnVmmError::Prepare(doing, error);
        let (agent, vmm_agent) = UnixStream::pair().map_err(prepare("make a socket"))?;
        let (report, vmm_report) = UnixStream::pair().map_err(prepare("make a socket"))?;
        let (control, vmm_control) = control::pair().map_err(prepare("make a socket"))?;
        let stderr = Said::new("vmm-stderr").map_err(prepare("make a file in memory"))?;
        let console = options.console.try_clone().map_err(prepare("duplicate a descriptor"))?;
        let vmm_stderr = stderr.to_stdio().map_err(prepare("duplicate a descriptor"))?;
        let config = MachineConfig {
            id: options.id.to_owned(),
            vcpus: options.machine.vcpus,
            max_vcpus: options.machine.max_vcpus,
            mem_size_mib: options.machine.mem_size_mib,
            max_mem_size_mib: options.machine.max_mem_size_mib,
            kvm_fd: parts.kvm.as_raw_fd(),
            kernel_fd: parts.kernel.as_raw_fd(),
            initramfs_fd: parts.initramfs.as_raw_fd(),
            kernel_args: options.machine.kernel_args.clone(),
            vsock: VsockConfig {
                listener_fd: options.vsock.as_raw_fd(),
                agent_fd: vmm_agent.as_raw_fd(),
                agent_port: AGENT_PORT,
            },
            private_trees: options.shares.private.clone(),
            shared_trees: options.shares.shared.clone(),
            trees_grow: options.trees_grow,
            nets: options.nets.iter().map(net_config).collect(),
            spare_nets: options.spare_nets,
            disks: options.disks.iter().enumerate().map(disk_config).collect(),
            spare_disks: options.spare_disks,
            needs_vhost: options.machine.net.vhost == Some(true),
            console_fd: options.console.as_raw_fd(),
            report_fd: vmm_report.as_raw_fd(),
            control_fd: vmm_control.as_raw_fd(),
            trace: options.trace,
        };
        let config_file = config_memfd(&config).map_err(prepare("describe the machine"))?;
        let mut inherited = vec![
            config_file.as_fd(),
            parts.kvm.as_fd(),
            parts.kernel.as_fd(),
            parts.initramfs.as_fd(),
            options.vsock.as_fd(),
            vmm_agent.as_fd(),
            options.console.as_fd(),
            vmm_report.as_fd(),
            vmm_control.as_fd(),
        ];
        inherited.extend(options.nets.iter().flat_map(Device::descriptors));
        inherited.extend(options.disks.iter().map(|disk| disk.opened.file.as_fd()));
        // All of these are this function's own, or its caller's for this, and are closed soon. Nothing else in the process starts
        // programs meanwhile, so no other child inherits them.
        for fd in inherited {
            fcntl_setfd(fd, FdFlags::empty())
                .map_err(|error| SpawnVmmError::Prepare("pass a descriptor", error.into()))?;
        }
        let mut command = Command::new(&install.vmm);
        command
            .arg("--config-fd")
            .arg(config_file.as_raw_fd().to_string())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(vmm_stderr)
            // Ctrl-C on the terminal is for the container.
            .process_group(0);
        let child = start(command, &options.machine.host_cpus, options.namespaces.as_ref())?;
        if let Some(score) = options.machine.oom_score_adj {
            oom_score::set_of(child.id(), score);
        }
        match pidfd::open(child.id()) {
            Ok(pidfd) => {
                let vmm = Self { child, pidfd, console, stderr, _namespaces: options.namespaces };
                Ok((vmm, VmmSockets { agent, report, control }))
            }
            Err(error) => {
                let mut child = child;
                let _ = child.kill();
                let _ = child.wait();
                Err(SpawnVmmError::Prepare("watch the process", error))
            }
        }
    }

    /// The process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A second descriptor of the process, for watching it.
    pub(crate) fn watch(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Ends the process at once, without waiting until the kernel has taken the machine apart.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// How the process ended; call it when the pidfd is readable.
    pub(crate) fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// The end of what the guest's kernel said, in one line; empty if it said nothing.
    pub(crate) fn console_tail(&self) -> String {
        text::one_line(&String::from_utf8_lossy(&read_tail(&self.console, CONSOLE_TAIL)))
    }

    /// What the VMM said before it could report, in one line.
    pub(crate) fn stderr(&self) -> String {
        text::one_line(&self.stderr.text())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        if let Ok(pidfd) = self.watch() {
            pidfd::reap(pidfd);
        }
    }
}

fn net_config(device: &Device) -> NetConfig {
    let raw = |fds: &[OwnedFd]| fds.iter().map(AsRawFd::as_raw_fd).collect();
    let link = match &device.link {
        DeviceLink::Tap { taps, vhosts } => NetLink::Tap { tap_fds: raw(taps), vhost_fds: raw(vhosts) },
        DeviceLink::Stream(socket) => NetLink::Stream { socket_fd: socket.as_raw_fd() },
    };
    let Device { limits, mac, id, carrier, .. } = *device;
    NetConfig { id: id.cast_unsigned(), link, limits, mac: MacAddress(mac), carrier }
}

fn disk_config((index, device): (usize, &BlockDevice)) -> DiskConfig {
    let Opened { file, read_only } = &device.opened;
    DiskConfig { fd: file.as_raw_fd(), read_only: *read_only, serial: disks::serial(index) }
}

/// The last `max` bytes of a file; what cannot be read is left out.
fn read_tail(file: &File, max: usize) -> Vec<u8> {
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let start = length.saturating_sub(max as u64);
    let mut tail = vec![0; max];
    let read = file.read_at(&mut tail, start).unwrap_or(0);
    tail.truncate(read);
    tail
}

fn config_memfd(config: &MachineConfig) -> io::Result<File> {
    let mut file = File::from(memfd_create("machine-config", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(config)?)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Starts the VMM on those CPUs of the host, from where it is to see its files.
fn start(
    mut command: Command,
    cpus: &[usize],
    namespaces: Option<&ContainerNamespaces>,
) -> Result<Child, SpawnVmmError> {
    let program = PathBuf::from(command.get_program());
    restrict_cpus(cpus).map_err(SpawnVmmError::Affinity)?;
    let started = match namespaces {
        None => command.spawn(),
        Some(namespaces) => {
            let cpus = cpus.to_vec();
            // It has the CPUs of the thread that starts it.
            let start = move || restrict_cpus(&cpus).and_then(|()| command.spawn());
            namespaces.run(start).flatten()
        }
    };
    started.map_err(|source| SpawnVmmError::Spawn(program, source))
}

/// Restricts this thread, and what it starts, to some CPUs of the host.
fn restrict_cpus(cpus: &[usize]) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = rustix::thread::CpuSet::new();
    for cpu in cpus.iter().filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU) {
        set.set(*cpu);
    }
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// What the report says as it comes in.
#[derive(Debug)]
pub(crate) enum VmmEvent {
    /// A phase of the start.
    Trace { name: String, begin_ns: u64, end_ns: u64 },
    /// The process is gone; with its last word, if it had one.
    Gone(Option<End>),
}

/// Follows a VMM until it is gone, which is the last event; answers go to who waits for them, and `without_vhost` is called when
/// the VMM moves frames that vhost-net was to move. Lines that cannot be understood are skipped: the VMM is not trusted.
pub(crate) async fn follow(
    report: tokio::net::UnixStream,
    pidfd: OwnedFd,
    control: VmmControl,
    events: UnboundedSender<VmmEvent>,
    without_vhost: impl Fn(),
) {
    let mut lines = BufReader::new(report);
    let (mut end, mut has_vhost, mut has_link) = (None, true, true);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(MAX_REPORT_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        match serde_json::from_slice(&line) {
            // The receiver is gone only when nobody cares any more.
            Ok(Report::Trace { name, begin_ns, end_ns }) => {
                let _ = events.send(VmmEvent::Trace { name, begin_ns, end_ns });
            }
            // Told once: more of them are no news.
            Ok(Report::NoVhost { reason }) if has_vhost => {
                has_vhost = false;
                let reason = text::one_line(&reason);
                logging::warn(format_args!("the VMM moves the network's frames instead of vhost-net: {reason}"));
                without_vhost();
            }
            // There is one such device.
            Ok(Report::LinkDown { mac, reason }) if has_link => {
                has_link = false;
                let reason = text::one_line(&reason);
                logging::warn(format_args!("the link of the network device {mac} is down: {reason}"));
            }
            Ok(Report::Answer { sequence, failure, window }) => {
                control.answered(sequence, failure.map_or(Ok(window), Err));
            }
            Ok(Report::End(said)) => end = Some(said),
            Ok(Report::NoVhost { .. } | Report::LinkDown { .. }) | Err(_) => {}
        }
    }
    control.gone();
    // The report has ended because the process has, or is about to.
    let _ = pidfd::ended(pidfd).await;
    let _ = events.send(VmmEvent::Gone(end));
}

/// The end of a VMM in words.
pub(crate) fn describe_end(end: Option<End>, status: io::Result<ExitStatus>, stderr: &str) -> String {
    match (end, status) {
        (Some(End::Shutdown), _) => "the guest shut its machine down".to_owned(),
        (Some(End::GuestPanic { message }), _) => format!("the guest's kernel panicked: {}", text::one_line(&message)),
        (Some(End::TripleFault), _) => "the guest's processor shut down (triple fault)".to_owned(),
        (Some(End::KvmError { message }), _) => {
            format!(
                "KVM could not run the guest: {} (`bulkhead check` examines this host's KVM)",
                text::one_line(&message)
            )
        }
        (Some(End::VmmError { message }), _) => format!("the VMM failed: {}", text::one_line(&message)),
        (Some(End::Abandoned), _) => "the VMM lost its supervisor".to_owned(),
        (None, Ok(status)) if !stderr.is_empty() => format!("the sandbox's VMM ended ({status}): {stderr}"),
        (None, Ok(status)) => match status.signal() {
            Some(libc::SIGSYS) => {
                "the sandbox's VMM was killed for a system call that it may not make (its number is in the log of the \
                 kernel, or of its audit daemon)"
                    .to_owned()
            }
            Some(signal) => format!("the sandbox's VMM was killed by signal {signal}"),
            None => format!("the sandbox's VMM ended without a word ({status})"),
        },
        (None, Err(error)) => format!("the sandbox's VMM is gone, and its exit status cannot be had: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn the_tail_of_a_file_is_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();

        assert_eq!(read_tail(&file, 4), b"6789");
        assert_eq!(read_tail(&file, 40), b"0123456789");
    }

    #[test]
    fn each_end_is_one_clean_line() {
        let killed = || Ok(ExitStatus::from_raw(9));

        assert_eq!(describe_end(None, killed(), ""), "the sandbox's VMM was killed by signal 9");
        let filtered = describe_end(None, Ok(ExitStatus::from_raw(libc::SIGSYS)), "");
        assert!(filtered.contains("a system call that it may not make"), "{filtered}");
        assert_eq!(
            describe_end(None, Ok(ExitStatus::from_raw(256)), "no"),
            "the sandbox's VMM ended (exit status: 1): no"
        );
        let panic = End::GuestPanic { message: "a\x1b[2J\nb".to_owned() };
        assert_eq!(describe_end(Some(panic), killed(), ""), "the guest's kernel panicked: a\u{fffd}[2J | b");
    }

    #[tokio::test]
    async fn a_report_is_followed_to_the_end_of_its_process() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut child = Command::new("true").spawn().unwrap();
        let pidfd = pidfd::open(child.id()).unwrap();
        let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
        theirs.write_all(b"{\"report\":\"trace\",\"name\":\"x\",\"begin_ns\":1,\"end_ns\":2}\nnonsense\n").unwrap();
        theirs.write_all(b"{\"report\":\"no-vhost\",\"reason\":\"x\"}\n").unwrap();
        theirs.write_all(b"{\"report\":\"end\",\"reason\":\"triple-fault\"}\n").unwrap();
        drop(theirs);

        let (control, _vmm) = control::pair().unwrap();

        let report = tokio::net::UnixStream::from_std(ours).unwrap();
        let fallbacks = Cell::new(0);
        follow(report, pidfd, VmmControl::new(control), sender, || fallbacks.set(fallbacks.get() + 1)).await;

        assert!(matches!(events.recv().await, Some(VmmEvent::Trace { name, .. }) if name == "x"));
        assert!(matches!(events.recv().await, Some(VmmEvent::Gone(Some(End::TripleFault)))));
        assert!(events.recv().await.is_none());
        assert_eq!(fallbacks.get(), 1);
        child.wait().unwrap();
    }
}
