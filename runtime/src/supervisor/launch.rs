// SPDX-License-Identifier: Apache-2.0
//! From the command line to a booting sandbox: in this process, or in one that lives on.

use std::path::{PathBuf, absolute};
use std::{io, mem, process};

use bulkhead_protocol::agent::{
    ConfigureNetworkRequest, ConfigureSandboxRequest, CreateContainerRequest, NamespaceKind,
};

use super::caller::Caller;
use super::console;
use super::daemon::{self, DetachError};
use super::disks::Disks;
use super::error::RunError;
use super::face::Face;
use super::groundwork::Groundwork;
use super::proc_view::ProcPlace;
use super::sandbox::{Launched, Sandbox, Start};
use super::signals::BlockedSignals;
use super::state::{StateDir, check_id, sweep};
use super::streams::{Asked, Ends, Preserved};
use super::terminal;
use super::vmm::{Vmm, VmmOptions, VmmSockets};
use crate::event_loop;
use crate::hooks::{self, ContainerNamespaces};
use crate::install::{Install, OpenParts};
use crate::logging;
use crate::network::user::{Passt, Started};
use crate::network::{self, Connected, Device, DeviceOptions, Follower, Network, NetworkError, NetworkNamespace};
use crate::notify::{self, Notice, NotifySocket};
use crate::spec::{self, BlockDevice, Translated};
use crate::storage::Shares;
use crate::text;
use crate::trace::{Trace, now_ns};

/// Whether the caller waits for the container's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// It does; the state is removed at the end, unless it is to be kept.
    Foreground { keep: bool },
    /// It does not; the state is kept until the container is deleted.
    Detached { start: bool },
    /// It waits by calls to this process, which outlives the container.
    Served,
}

impl Mode {
    /// Whether the state stays after the container's end.
    pub(super) fn keeps(self) -> bool {
        matches!(self, Self::Foreground { keep: true } | Self::Detached { .. })
    }

    /// Whether the program is executed without being asked for.
    pub(super) fn starts(self) -> bool {
        matches!(self, Self::Foreground { .. } | Self::Detached { start: true })
    }
}

/// What a container is made from.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) root: PathBuf,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) console_socket: Option<PathBuf>,
    pub(crate) trace: Option<PathBuf>,
    /// How many descriptors from 3 on are the container's.
    pub(crate) preserve_fds: u32,
    pub(crate) mode: Mode,
}

impl Options {
    /// With absolute paths: the supervisor leaves the folder that it was called in.
    fn absolute(mut self) -> io::Result<Self> {
        self.bundle = absolute(self.bundle)?;
        self.root = absolute(self.root)?;
        for path in [&mut self.pid_file, &mut self.console_socket, &mut self.trace].into_iter().flatten() {
            *path = absolute(&*path)?;
        }
        Ok(self)
    }
}

/// A container that could not be made by a process of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Detach(#[from] DetachError),
}

impl CreateError {
    /// The exit status that says so.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::Run(error) => error.exit_status(),
            Self::Detach(error) => error.exit_status(),
        }
    }
}

/// What is known before anything exists.
struct Plan {
    translated: Translated,
    install: Install,
    parts: OpenParts,
    /// passt's program, if the network is to be that.
    passt: Option<PathBuf>,
    preserved: Preserved,
}

/// Runs a container in a sandbox of its own and returns its exit status.
///
/// # Errors
///
/// Why it could not be started, or was lost; nothing of it is left on the host.
pub(crate) fn run(options: Options) -> Result<u8, RunError> {
    let options = options.absolute().map_err(RunError::Paths)?;
    traced(&options, |trace| {
        let begin_ns = now_ns();
        // Until something is made, a signal may end this as any program: what it reads may be a pipe.
        let plan = check(&options)?;
        let signals = BlockedSignals::block().map_err(RunError::Signals)?;
        trace.since("spec", begin_ns);
        supervise(&options, plan, signals, &mut None, trace)
    })
}

/// Makes a container whose supervisor is a process that lives on; returns once it is created, or started.
///
/// # Errors
///
/// Why it could not; nothing of it is left on the host.
pub(crate) fn create(options: Options) -> Result<(), CreateError> {
    let options = options.absolute().map_err(RunError::Paths)?;
    let plan = check(&options)?;
    let detached = daemon::detach_and_hear(|reporter| {
        let mut caller = Some(Caller::Parent(reporter));
        let result = traced(&options, |trace| create_in_child(&options, plan, &mut caller, trace));
        report(result, caller)
    })?;
    if let Some(line) = &detached.ready
        && let Err(error) = tell_manager(line, detached.pid)
    {
        logging::warn(format_args!("{}", text::chain(&error)));
    }
    Ok(())
}

/// Tells the service manager that has called that a container is ready. It knows this process, and not the one that lives on.
fn tell_manager(line: &str, main_pid: u32) -> Result<(), RunError> {
    let Some(socket) = NotifySocket::of_caller()? else { return Ok(()) };
    let event_loop = event_loop::new().map_err(RunError::EventLoop)?;
    Ok(event_loop.block_on(async { socket.connect()?.tell(line, Some(main_pid)).await })?)
}

/// Makes a container for a call that this process serves, and supervises it to its end; within an event loop. Streams are
/// the given ones. The caller is told, and the exit status is the container's; a failure after that is logged.
pub(crate) async fn serve(options: &Options, ends: Ends, caller: Caller) -> u8 {
    let mut caller = Some(caller);
    let result = async {
        let signals = BlockedSignals::block().map_err(RunError::Signals)?;
        let plan = check(options)?;
        let mut trace = Trace::create(None).map_err(|source| RunError::Trace { path: PathBuf::new(), source })?;
        let Plan { translated, install, parts, passt, preserved: _ } = plan;
        let mut ground = Groundwork::lay(options, translated, passt.as_deref())?;
        if ground.hooks_first() {
            ground.run_hooks().await?;
        }
        let (last_hooks, ended) = ground.last_hooks();
        let (sandbox, launched) = match launch(options, ground, (install, parts), signals, ends, &mut trace) {
            Ok(launched) => launched,
            Err(error) => {
                hooks::run_all(&last_hooks, &ended).await;
                return Err(error);
            }
        };
        sandbox.supervise(options, launched, &mut caller, &mut trace).await
    };
    let result = result.await;
    report(result, caller)
}

/// Tells a failure to the caller, or, if that has been told of a success, to the log; the exit status.
fn report(result: Result<u8, RunError>, caller: Option<Caller>) -> u8 {
    result.unwrap_or_else(|error| {
        let (message, status) = (text::chain(&error), error.exit_status());
        match caller {
            Some(caller) => caller.failed(message, status),
            None => logging::error(format_args!("{message}")),
        }
        status
    })
}

fn create_in_child(
    options: &Options,
    plan: Plan,
    caller: &mut Option<Caller>,
    trace: &mut Trace,
) -> Result<u8, RunError> {
    let signals = BlockedSignals::block().map_err(RunError::Signals)?;
    if let Some(socket) = &options.console_socket {
        console::attach(socket)?;
    }
    supervise(options, plan, signals, caller, trace)
}

fn traced(options: &Options, work: impl FnOnce(&mut Trace) -> Result<u8, RunError>) -> Result<u8, RunError> {
    let mut trace = Trace::create(options.trace.clone())
        .map_err(|source| RunError::Trace { path: options.trace.clone().unwrap_or_default(), source })?;
    let result = work(&mut trace);
    if let Err((path, error)) = trace.write() {
        logging::warn(format_args!("cannot write the trace {}: {error}", path.display()));
    }
    result
}

/// Looks at everything that can be wrong before anything is made.
fn check(options: &Options) -> Result<Plan, RunError> {
    check_id(&options.id)?;
    let mut translated = spec::load(&options.bundle)?;
    let terminal = translated.request.process.terminal;
    if options.mode != Mode::Served {
        let detached = matches!(options.mode, Mode::Detached { .. });
        console::check(terminal, detached, options.console_socket.as_deref())?;
        if terminal && !detached {
            terminal::require()?;
        }
    }
    let install = Install::find()?;
    let parts = install.open()?;
    let passt = translated.machine.user_network.as_ref().map(|_| install.passt()).transpose()?;
    give_notify_socket(options, &mut translated)?;
    let preserved = preserved(options, &mut translated)?;
    Ok(Plan { translated, install, parts, passt, preserved })
}

/// Gives the container a socket at which it tells that it is ready, where the caller's environment has one.
fn give_notify_socket(options: &Options, translated: &mut Translated) -> Result<(), RunError> {
    // What serves calls has its own caller's environment.
    if options.mode == Mode::Served {
        return Ok(());
    }
    let Some(socket) = NotifySocket::of_caller()? else { return Ok(()) };
    if let Some(process) = translated.request.process.as_mut() {
        notify::give(&mut translated.request.mounts, &mut process.env);
    }
    translated.notice = match (options.mode, options.mode.starts().then(|| socket.connect())) {
        (Mode::Foreground { .. }, Some(Ok(manager))) => Some(Notice::Supervisor { manager, with_pid: true }),
        (_, Some(Ok(_))) => Some(Notice::Caller),
        // The container is run all the same, as with runc.
        (_, Some(Err(error))) => {
            logging::warn(format_args!("{}", text::chain(&error)));
            None
        }
        // `start` waits for it.
        (_, None) => None,
    };
    Ok(())
}

/// Takes the caller's descriptors that are the container's; its environment tells of those that the caller's has told of.
fn preserved(options: &Options, translated: &mut Translated) -> Result<Preserved, RunError> {
    // What serves calls has its own caller's environment.
    if options.mode == Mode::Served {
        return Ok(Preserved::default());
    }
    let asked = Asked::with_environment(options.preserve_fds);
    if let (1.., Some(process)) = (asked.environment, translated.request.process.as_mut()) {
        process.env.extend([format!("LISTEN_FDS={}", asked.environment), "LISTEN_PID=1".to_owned()]);
    }
    Ok(Preserved::take(asked)?)
}

fn supervise(
    options: &Options,
    plan: Plan,
    signals: BlockedSignals,
    caller: &mut Option<Caller>,
    trace: &mut Trace,
) -> Result<u8, RunError> {
    let Plan { translated, install, parts, passt, preserved } = plan;
    let ground = Groundwork::lay(options, translated, passt.as_deref())?;
    let (parts, ends) = ((install, parts), Ends::Own(preserved));
    if matches!(options.mode, Mode::Foreground { .. }) {
        return supervise_from(options, ground, parts, (signals, ends), None, caller, trace);
    }
    // Engines look for what lives on.
    let face = Face::new(&ground.translated.request, &ground.translated.shares).map_err(RunError::Face)?;
    face.show(|processes| supervise_from(options, ground, parts, (signals, ends), processes, caller, trace))
}

fn supervise_from(
    options: &Options,
    mut ground: Groundwork,
    parts: (Install, OpenParts),
    (signals, ends): (BlockedSignals, Ends),
    processes: Option<ProcPlace>,
    caller: &mut Option<Caller>,
    trace: &mut Trace,
) -> Result<u8, RunError> {
    let event_loop = || event_loop::new().map_err(RunError::EventLoop);
    // Where nothing is to be waited for, the guest boots before there is a loop.
    let early_loop = if ground.hooks_first() {
        let runtime = event_loop()?;
        runtime.block_on(ground.run_hooks())?;
        Some(runtime)
    } else {
        None
    };
    let (last_hooks, ended) = ground.last_hooks();
    let (mut sandbox, launched) = match (launch(options, ground, parts, signals, ends, trace), &early_loop) {
        (Ok(launched), _) => launched,
        (Err(error), None) => return Err(error),
        (Err(error), Some(runtime)) => {
            runtime.block_on(hooks::run_all(&last_hooks, &ended));
            return Err(error);
        }
    };
    sandbox.show_processes_in(processes);
    let runtime = early_loop.map_or_else(event_loop, Ok)?;
    runtime.block_on(sandbox.supervise(options, launched, caller, trace))
}

/// Starts the machine; a sandbox whose guest boots.
fn launch(
    options: &Options,
    ground: Groundwork,
    (install, parts): (Install, OpenParts),
    signals: BlockedSignals,
    ends: Ends,
    trace: &mut Trace,
) -> Result<(Sandbox, Launched), RunError> {
    let Groundwork { translated, state, cgroup, resctrl, mut record, user_network, namespaces, begin_ns, .. } = ground;
    let Translated {
        mut request,
        shares,
        block_devices,
        device_rules,
        machine,
        cpu_limit,
        network,
        hooks,
        notice,
        sockets: host_sockets,
        ..
    } = translated;
    let of_one = Machine {
        spec: &machine,
        shares: &shares,
        namespaces,
        network,
        user_network,
        trees_grow: false,
        disks: &block_devices,
        spare_disks: 0,
    };
    let booted = boot(options, &install, parts, of_one, &state, trace)?;
    let disks = Disks::new(&block_devices, device_rules);
    // From here on, they are open in the VMM alone.
    drop(block_devices);
    let Booted { vmm, network, passt, net_backend, network_request, follower, sockets } = booted;
    let followed = shares.shared.iter().filter(|tree| tree.follows).cloned().collect();
    let shared = if network_request.is_some() { share_network(&mut request) } else { None };
    record.net_backend = net_backend;
    trace.since("vmm spawn", begin_ns);

    let terminal = request.process.terminal;
    let streams = ends.ids(terminal);
    request.id.clone_from(&options.id);
    request.start = options.mode.starts();
    let hook_state = record.hook_state().at(hooks::Status::Creating, Some(process::id()));
    if !request.start_hooks.is_empty() {
        request.start_hook_state = hook_state.at(hooks::Status::Created, Some(process::id())).to_text();
    }
    // A given end of a terminal is no terminal: its size comes by calls.
    let own_terminal = terminal && options.mode != Mode::Served;
    let size = terminal::size().filter(|_| own_terminal);
    if let Some(process) = request.process.as_mut() {
        process.preserved = ends.preserved();
        streams.name_in(process);
        if let Some(size) = size {
            (process.terminal_rows, process.terminal_columns) = (size.rows, size.columns);
        }
    }
    // The guest boots; what is done meanwhile costs nothing.
    state.record(&record)?;
    let task = state.bind_task()?;
    sweep(&options.root);
    let boot_timeout = install.boot_timeout;
    let start = Start { request, disks, followed, network: network_request, shared, hooks, hook_state, boot_timeout };
    let launched = Launched {
        start,
        record,
        machine,
        cpu_limit,
        sockets,
        host_sockets,
        resctrl,
        signals,
        task,
        ends,
        follower,
        passt,
        notice,
    };
    let sandbox = Sandbox::new(vmm, cgroup, network, state, own_terminal, size, streams);
    Ok((sandbox, launched))
}

/// Has the container in the guest's own network namespace, where the interfaces are. With a user namespace, it may not change
/// what is there: that is to be done before it is made.
fn share_network(request: &mut CreateContainerRequest) -> Option<ConfigureSandboxRequest> {
    request.namespaces.retain(|namespace| namespace.kind != NamespaceKind::NETWORK.into());
    if !request.namespaces.iter().any(|namespace| namespace.kind == NamespaceKind::USER.into()) {
        return None;
    }
    let is_of_network = |key: &str| key.starts_with("net.") || key.starts_with("net/");
    let (sysctls, own) = mem::take(&mut request.sysctls).into_iter().partition(|(key, _)| is_of_network(key));
    request.sysctls = own;
    Some(ConfigureSandboxRequest { sysctls, ..Default::default() })
}

/// What a machine is made from.
pub(super) struct Machine<'a> {
    pub(super) spec: &'a spec::Machine,
    pub(super) shares: &'a Shares,
    /// Where its files are as it is to have them, if that is not here.
    pub(super) namespaces: Option<ContainerNamespaces>,
    pub(super) network: Option<NetworkNamespace>,
    /// What its network is instead, so that nothing is to be in that namespace.
    pub(super) user_network: Option<Started>,
    /// Whether it can be given further trees.
    pub(super) trees_grow: bool,
    /// The block devices of the host that it has, and how many it can be given besides.
    pub(super) disks: &'a [BlockDevice],
    pub(super) spare_disks: usize,
}

/// A machine whose guest boots, in the order in which it is undone.
pub(super) struct Booted {
    pub(super) vmm: Vmm,
    pub(super) network: Option<Network>,
    /// What the guest's network is instead.
    pub(super) passt: Option<Passt>,
    /// Who moves the frames of its network devices.
    pub(super) net_backend: Option<String>,
    pub(super) network_request: Option<ConfigureNetworkRequest>,
    /// What changes in the network.
    pub(super) follower: Option<Follower>,
    pub(super) sockets: VmmSockets,
}

/// Starts a machine, with its network; `state` is the sandbox's.
pub(super) fn boot(
    options: &Options,
    install: &Install,
    parts: OpenParts,
    machine: Machine<'_>,
    state: &StateDir,
    trace: &mut Trace,
) -> Result<Booted, RunError> {
    let Machine { spec, shares, namespaces, network, user_network, trees_grow, disks, spare_disks } = machine;
    let wiring = match (user_network, network) {
        (Some(started), namespace) => Wiring::of_user_network(started, namespace.as_ref())?,
        (None, Some(namespace)) => connect(namespace, DeviceOptions::new(spec.net, spec.vcpus), state, trace)?.into(),
        (None, None) => Wiring::default(),
    };
    let Wiring { network, passt, devices: nets, net_backend, network_request, follower, spare_nets } = wiring;
    let vmm_options = VmmOptions {
        id: &options.id,
        machine: spec,
        shares,
        namespaces,
        trees_grow,
        nets: &nets,
        spare_nets,
        disks,
        spare_disks,
        vsock: state.bind_vsock()?,
        console: state.create_console_log()?,
        trace: trace.enabled(),
    };
    let (vmm, sockets) = Vmm::spawn(install, parts, vmm_options)?;
    // A tap lives as long as a descriptor of it: from here on as long as the VMM.
    drop(nets);
    state.record_vmm(vmm.pid())?;
    Ok(Booted { vmm, network, passt, net_backend, network_request, follower, sockets })
}

/// What there is of a machine's network before the machine.
#[derive(Default)]
struct Wiring {
    network: Option<Network>,
    passt: Option<Passt>,
    devices: Vec<Device>,
    net_backend: Option<String>,
    network_request: Option<ConfigureNetworkRequest>,
    follower: Option<Follower>,
    /// How many devices the machine is to have room for besides.
    spare_nets: usize,
}

impl Wiring {
    /// `namespace` was made for hooks and engines, which may have had other plans.
    fn of_user_network(started: Started, namespace: Option<&NetworkNamespace>) -> Result<Self, NetworkError> {
        namespace.map_or(Ok(()), network::expect_none)?;
        let Started { passt, device, request } = started;
        let net_backend = Some(device.backend().to_owned());
        let (passt, devices, network_request) = (Some(passt), vec![device], Some(request));
        Ok(Self { passt, devices, net_backend, network_request, ..Self::default() })
    }
}

impl From<Connected> for Wiring {
    fn from(connected: Connected) -> Self {
        let (net_backend, spare_nets) = (connected.backend().map(str::to_owned), connected.spare_nets());
        let Connected { network, devices, request, follower } = connected;
        let (network, network_request, follower) = (Some(network), Some(request), Some(follower));
        Self { network, devices, net_backend, network_request, follower, spare_nets, passt: None }
    }
}

/// Joins the interfaces of a network namespace; what is to be undone is written down.
fn connect(
    namespace: NetworkNamespace,
    options: DeviceOptions,
    state: &StateDir,
    trace: &mut Trace,
) -> Result<Connected, RunError> {
    let begin_ns = now_ns();
    let connected = Network::connect(namespace, options, state.network_recorder()?)?;
    trace.since(&format!("network ({})", connected.backend().unwrap_or("empty")), begin_ns);
    Ok(connected)
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::Namespace;

    use super::*;

    fn request(kinds: &[NamespaceKind]) -> CreateContainerRequest {
        let namespace = |kind: &NamespaceKind| Namespace { kind: (*kind).into(), ..Default::default() };
        let sysctls = ["net.core.somaxconn", "net/ipv4/ip_forward", "kernel.sem"].map(|key| (key.into(), "1".into()));
        CreateContainerRequest {
            namespaces: kinds.iter().map(namespace).collect(),
            sysctls: sysctls.into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_a_user_namespace_may_not_change_is_set_before() {
        let mut plain = request(&[NamespaceKind::NETWORK, NamespaceKind::IPC]);
        assert!(share_network(&mut plain).is_none());
        assert_eq!((plain.namespaces.len(), plain.sysctls.len()), (1, 3));

        let mut with_user = request(&[NamespaceKind::NETWORK, NamespaceKind::USER]);
        let shared = share_network(&mut with_user).unwrap();
        assert_eq!(shared.sysctls.len(), 2);
        assert!(with_user.sysctls.keys().eq(["kernel.sem"]));
    }
}
