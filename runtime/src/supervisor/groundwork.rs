// SPDX-License-Identifier: Apache-2.0
//! What there is of a sandbox before its machine: its folder, its cgroup, and the network namespace that this process is in,
//! where engines look for the container's.

use std::mem;
use std::path::Path;
use std::process;

use bulkhead_protocol::agent::{CreateContainerRequest, IdMapping, Mount};

use super::error::RunError;
use super::launch::{Mode, Options};
use super::oom_score;
use super::signals::{self, BlockedSignals};
use super::state::{self, Record, StateDir, Status};
use crate::cgroup::{CgroupSpec, HostCgroup};
use crate::hooks::{self, ContainerNamespaces, Hook, Hooks, State};
use crate::network::NetworkNamespace;
use crate::network::user::{self, Started};
use crate::resctrl::{self, ResctrlGroup, ResctrlRecord, ResctrlSpec};
use crate::spec::{Machine, Translated};
use crate::storage::Shares;
use crate::storage::mount_points::{self, Kind};
use crate::trace::now_ns;

/// The sandbox so far. All of it is gone when this is dropped.
pub(super) struct Groundwork {
    pub(super) translated: Translated,
    /// A network that is none of a namespace's. Its process is in the cgroup, and goes before that.
    pub(super) user_network: Option<Started>,
    /// Goes before the folder, which stays as long as this is there.
    pub(super) cgroup: Option<HostCgroup>,
    pub(super) resctrl: Option<ResctrlGroup>,
    pub(super) state: StateDir,
    pub(super) record: Record,
    /// Whether hooks are run before there is a machine: they may put interfaces into the network namespace, or mount something.
    hooks_first: bool,
    /// Those that hooks were run in; the machine has its files as they are seen there.
    pub(super) namespaces: Option<ContainerNamespaces>,
    /// When this process' own work began.
    pub(super) begin_ns: u64,
}

impl Groundwork {
    /// Makes what there is; to be called by the first thread of the process.
    pub(super) fn lay(options: &Options, mut translated: Translated, passt: Option<&Path>) -> Result<Self, RunError> {
        let begin_ns = now_ns();
        let (state, cgroup) = places(options, &translated.cgroup)?;
        if cgroup.as_ref().is_some_and(HostCgroup::takes_cpus) {
            // The cgroup has them. From Linux 6.2 on, threads that were restricted themselves stay so when it is given others.
            translated.machine.host_cpus.clear();
        }
        if options.mode != Mode::Served
            && let Some(score) = translated.machine.oom_score_adj
        {
            oom_score::set_own(score);
        }
        let resctrl = translated.resctrl.as_ref().map(|spec| join_resctrl(options, spec, &state)).transpose()?;
        make_mount_points(&translated.request, &translated.shares)?;
        let Machine { user_network, net, .. } = &translated.machine;
        // While this process is in the host's network namespace.
        let user_network = match (user_network, passt) {
            (Some(wanted), Some(passt)) => Some(user::start(passt, wanted, net.limits)?),
            _ => None,
        };
        let Hooks { create, create_container, .. } = &translated.hooks;
        let hooks_first = !create_container.is_empty() || translated.network.is_none() && !create.is_empty();
        match &translated.network {
            Some(namespace) => namespace.enter().map_err(RunError::NetworkNamespace)?,
            // Also whoever has it created may set a network up, before it is started.
            None if hooks_first || !options.mode.starts() => {
                translated.network = Some(NetworkNamespace::enter_new().map_err(RunError::NetworkNamespace)?);
            }
            None => {}
        }
        let record = Record {
            id: options.id.clone(),
            pid: process::id(),
            status: Status::Creating,
            bundle: translated.bundle.clone(),
            rootfs: rootfs(&translated.shares).to_owned(),
            created: state::now(),
            annotations: translated.annotations.clone(),
            kept: options.mode.keeps(),
            exit_status: None,
            net_backend: None,
            poststop: translated.hooks.poststop.clone(),
            sandbox: None,
            notifies: translated.request.mounts.iter().any(|mount| mount.notify_socket),
        };
        Ok(Self { translated, state, cgroup, resctrl, record, user_network, hooks_first, namespaces: None, begin_ns })
    }

    /// Whether [`Self::run_hooks`] is to be called.
    pub(super) fn hooks_first(&self) -> bool {
        self.hooks_first
    }

    /// What is to be run when the machine cannot be started after [`Self::run_hooks`]: they undo what those have made.
    pub(super) fn last_hooks(&self) -> (Vec<Hook>, State) {
        let hooks = if self.hooks_first { self.translated.hooks.poststop.clone() } else { Vec::new() };
        (hooks, self.record.hook_state().at(hooks::Status::Stopped, None))
    }

    /// Runs the hooks that come before the machine; within an event loop.
    pub(super) async fn run_hooks(&mut self) -> Result<(), RunError> {
        // They may ask for the container's state.
        self.state.record(&self.record)?;
        let signals = BlockedSignals::block().and_then(BlockedSignals::into_stream).map_err(RunError::Signals)?;
        let state = self.record.hook_state();
        let creating = state.at(hooks::Status::Creating, Some(self.record.pid));
        let hooks = mem::take(&mut self.translated.hooks.create);
        let inside = mem::take(&mut self.translated.hooks.create_container);
        let request = &self.translated.request;
        let running = async {
            hooks::run(&hooks, &creating).await?;
            if inside.is_empty() {
                return Ok(None);
            }
            let namespaces = ContainerNamespaces::make(request, None).map_err(RunError::HookNamespaces)?;
            hooks::run_inside(&namespaces, &inside, &creating).await?;
            Ok::<_, RunError>(Some(namespaces))
        };
        tokio::pin!(running);
        let failed = loop {
            tokio::select! {
                result = &mut running => match result {
                    Ok(namespaces) => {
                        if namespaces.is_some() {
                            // What hooks have mounted below them is in their namespace alone, where nobody looks for more.
                            self.translated.shares.shared.iter_mut().for_each(|tree| tree.follows = false);
                        }
                        self.namespaces = namespaces;
                        self.begin_ns = now_ns();
                        return Ok(());
                    }
                    Err(error) => break error,
                },
                signal = signals.next() => match signal.map_err(RunError::Signals) {
                    Ok(signal) if signals::ends_a_start(signal) => break RunError::Interrupted(signal),
                    Ok(_) => {}
                    Err(error) => break error,
                }
            }
        };
        hooks::run_all(&self.translated.hooks.poststop, &state.at(hooks::Status::Stopped, None)).await;
        Err(failed)
    }
}

/// Makes a sandbox's folder and its cgroup on the host, and joins that.
pub(super) fn places(options: &Options, cgroup: &CgroupSpec) -> Result<(StateDir, Option<HostCgroup>), RunError> {
    let state = StateDir::create(&options.root, &options.id)?;
    let cgroup = HostCgroup::create(cgroup, &options.id, |path| Ok(state.note_cgroup(path)?))?;
    if let Some(cgroup) = &cgroup {
        cgroup.join()?;
    }
    Ok((state, cgroup))
}

/// Makes a sandbox's resctrl group, and joins that.
fn join_resctrl(options: &Options, spec: &ResctrlSpec, state: &StateDir) -> Result<ResctrlGroup, RunError> {
    let note = |record: &ResctrlRecord| Ok(state.note_resctrl(record)?);
    let group = ResctrlGroup::create(Path::new(resctrl::ROOT), spec, &options.id, note)?;
    group.join()?;
    Ok(group)
}

fn rootfs(shares: &Shares) -> &Path {
    shares.private.first().map_or(Path::new(""), |tree| &tree.source)
}

/// In a root file system that is read-only for the guest, the host makes the mount points, and the working directory.
pub(super) fn make_mount_points(request: &CreateContainerRequest, shares: &Shares) -> Result<(), RunError> {
    let Some(rootfs) = shares.private.first().filter(|tree| tree.read_only) else {
        return Ok(());
    };
    // Where the notification socket alone is mounted, it is over an engine's.
    let is_made = |mount: &&Mount| !mount.remount && (!mount.notify_socket || mount.source_is_dir);
    let mounts = request.mounts.iter().filter(is_made).map(|mount| {
        let file = mount.socket.is_some() || mount.share.is_some() && !mount.source_is_dir;
        (mount.destination.as_str(), if file { Kind::File } else { Kind::Folder })
    });
    // What the container's root is on the host.
    let root = |mappings: &[IdMapping]| mappings.iter().find(|line| line.inside == 0).map_or(0, |line| line.outside);
    let owner = (root(&request.uid_mappings), root(&request.gid_mappings));
    let points = mounts.chain([(request.process.cwd.as_str(), Kind::Folder)]);
    mount_points::make(&rootfs.source, owner, points).map_err(|(path, source)| RunError::MountPoint {
        path,
        rootfs: rootfs.source.clone(),
        source,
    })
}
