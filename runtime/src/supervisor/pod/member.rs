// SPDX-License-Identifier: Apache-2.0
//! A container in a pod's machine, from its making until nothing is left of it.

use std::mem;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::Ordering;

use bulkhead_protocol::agent::{CreateContainerRequest, ShareDevice, WaitProcessResponse};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::disks::TakenDisks;
use super::trees::Taken;
use super::{LOST, Pod};
use crate::apart::apart;
use crate::hooks::{self, ContainerNamespaces, Hook};
use crate::logging;
use crate::spec::{self, Role, Translated};
use crate::supervisor::agent::Agent;
use crate::supervisor::connections::Connections;
use crate::supervisor::container::{Container, DEFIANT};
use crate::supervisor::disks::localize;
use crate::supervisor::error::{Phase, RunError};
use crate::supervisor::groundwork;
use crate::supervisor::launch::Options;
use crate::supervisor::machine_cpus::CpuClaim;
use crate::supervisor::machine_memory::Claim;
use crate::supervisor::oom_score::ScoreClaim;
use crate::supervisor::sandbox::GONE_TIMEOUT;
use crate::supervisor::state::{self, Record, StateDir, Status};
use crate::supervisor::streams::{self, Ends, GivenEnds, Outputs};
use crate::supervisor::task_service::TaskServer;
use crate::text;

/// A container that has been created.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) container: Arc<Container>,
    /// Whether nothing is left of it, on the host and in the guest.
    pub(crate) gone: watch::Receiver<bool>,
}

/// What there is of a container besides itself.
struct Held {
    pod: Arc<Pod>,
    taken: Taken,
    disks: TakenDisks,
    state: StateDir,
    outputs: Outputs,
    connections: Connections,
    server: TaskServer,
    poststop: Vec<Hook>,
    gone: watch::Sender<bool>,
    _own_pids: Option<Arc<()>>,
    _oom_score: ScoreClaim,
    _alive: mpsc::Sender<()>,
}

impl Pod {
    /// Makes a container in the machine; its streams are the given ones.
    ///
    /// # Errors
    ///
    /// Why it could not be made; nothing is left of it.
    pub(crate) async fn create(self: &Arc<Self>, options: &Options, ends: GivenEnds) -> Result<Member, RunError> {
        state::check_id(&options.id)?;
        let alive = self.alive.upgrade().ok_or(RunError::PodGone)?;
        let first_stream = self.numbers.fetch_add(3, Ordering::Relaxed);
        // What lies on the host may be slow, and the pod's other containers have their calls.
        let (pod, bundle) = (Arc::clone(self), options.bundle.clone());
        let loaded = apart("bundle", move || pod.load(&bundle, first_stream)).await;
        let (mut translated, own_pids) = loaded.map_err(RunError::Thread)??;
        let sockets = mem::take(&mut translated.sockets);
        let state = StateDir::create(&self.root, &options.id)?;
        state.link_vsock(self.sandbox.id())?;
        // At once: whoever removes what a killed server has left finds the sandbox's containers by their records.
        let record = self.record(options, &translated);
        state.record(&record)?;
        let (poststop, hook_state) = (record.poststop.clone(), record.hook_state());
        let memory = Claim::new(Arc::clone(&self.memory));
        memory.note(translated.memory_limit_mib);
        if self.grows {
            memory.make_room().await?;
        }
        let cpus = CpuClaim::new(Arc::clone(&self.cpus), translated.cpu_limit);
        cpus.make_room().await?;
        let oom_score = self.oom_score.claim(translated.request.process.oom_score_adj);
        // Closed here in any case: they are open in the VMM from then on.
        let block_devices = mem::take(&mut translated.block_devices);
        let disks = self.disks.give(&block_devices).await?;
        drop(block_devices);
        let taken = match self.trees.give(&translated.shares).await {
            Ok(taken) => taken,
            Err(error) => {
                self.disks.take_back(disks).await;
                return Err(error.into());
            }
        };
        let made = self.make(record, translated, (&taken, &disks), (memory, cpus), &state, (first_stream, ends)).await;
        let (container, outputs, server) = match made {
            Ok(made) => made,
            Err(error) => {
                self.disks.take_back(disks).await;
                self.trees.take_back(taken).await;
                // As with a container alone: they undo what its first hooks have made.
                hooks::run_all(&poststop, &hook_state.at(hooks::Status::Stopped, None)).await;
                return Err(error);
            }
        };
        let (gone, is_gone) = watch::channel(false);
        let pod = Arc::clone(self);
        let connections = Connections::serve(Arc::clone(&container), sockets, pod.connections.clone());
        let held = Held {
            pod,
            taken,
            disks,
            state,
            outputs,
            connections,
            server,
            poststop,
            gone,
            _own_pids: own_pids,
            _oom_score: oom_score,
            _alive: alive,
        };
        tokio::spawn(live(Arc::clone(&container), held));
        Ok(Member { container, gone: is_gone })
    }

    /// Reads a container's configuration, and prepares its root file system.
    fn load(&self, bundle: &Path, first_stream: u32) -> Result<(Translated, Option<Arc<()>>), RunError> {
        // Unique in the machine: a name is not used a second time.
        let prefix = format!("c{first_stream}-");
        let role = Role::Member { namespaces: &self.namespaces, mounts: &self.mounts, prefix: &prefix };
        let translated = spec::load_as(bundle, role)?;
        let own_pids = self.own_pids(&translated.request)?;
        groundwork::make_mount_points(&translated.request, &translated.shares)?;
        Ok((translated, own_pids))
    }

    /// Marks a container that has its processes to itself, unless it is to see those of the pod.
    ///
    /// Engines name another container's processes by the same path, since all have one process on the host. But where
    /// containers see each other's processes, all of them do: one that has its own tells that such a one is meant.
    fn own_pids(&self, request: &CreateContainerRequest) -> Result<Option<Arc<()>>, RunError> {
        if !request.common_pids {
            return Ok(Some(Arc::clone(&self.own_pids)));
        }
        if Arc::strong_count(&self.own_pids) > 1 { Err(RunError::ForeignPids) } else { Ok(None) }
    }

    fn record(&self, options: &Options, translated: &Translated) -> Record {
        Record {
            id: options.id.clone(),
            pid: process::id(),
            status: Status::Creating,
            bundle: translated.bundle.clone(),
            rootfs: translated.shares.private.first().map_or(Path::new(""), |tree| &tree.source).to_owned(),
            created: state::now(),
            annotations: translated.annotations.clone(),
            kept: false,
            exit_status: None,
            net_backend: self.sandbox.record().net_backend,
            poststop: translated.hooks.poststop.clone(),
            sandbox: Some(self.sandbox.id().to_owned()),
            notifies: false,
        }
    }

    async fn make(
        &self,
        record: Record,
        translated: Translated,
        (taken, disks): (&Taken, &TakenDisks),
        (memory, cpus): (Claim, CpuClaim),
        state: &StateDir,
        (first_stream, ends): (u32, GivenEnds),
    ) -> Result<(Arc<Container>, Outputs, TaskServer), RunError> {
        let Translated { mut request, device_rules, hooks, bundle, annotations, cgroup, .. } = translated;
        let id = record.id.clone();
        let ends = Ends::Given(ends);
        let terminal = request.process.terminal;
        let ids = ends.ids(terminal).shifted(first_stream - 1);
        request.id.clone_from(&id);
        if let Some(process) = request.process.as_mut() {
            ids.name_in(process);
        }
        rename(&mut request, &taken.renamed);
        localize(&mut request, &device_rules, &disks.disks);
        let hook_state = hooks::State::new(&id, &bundle, annotations);
        let creating = hook_state.at(hooks::Status::Creating, Some(process::id()));
        if !request.start_hooks.is_empty() {
            request.start_hook_state = creating.at(hooks::Status::Created, Some(process::id())).to_text();
        }
        let (task, dir) = (state.bind_task()?, state.handle()?);
        hooks::run(&hooks.create, &creating).await?;
        if !hooks.create_container.is_empty() {
            // This process is not in the pod's network. The trees are the machine's already.
            let namespaces = ContainerNamespaces::make(&request, self.namespaces.network());
            let namespaces = namespaces.map_err(RunError::HookNamespaces)?;
            hooks::run_inside(&namespaces, &hooks.create_container, &creating).await?;
        }
        let agent = self.agent.for_container(&id);
        let vsock = state.vsock_path();
        let created = async {
            tokio::try_join!(async { Ok(streams::open(&vsock, ids).await?.pump(ends)?) }, async {
                agent.create(&request).await.map_err(RunError::Create)
            })
        };
        let outputs = tokio::select! {
            created = timeout(self.boot_timeout, created) => match created {
                Ok(Ok((outputs, _))) => outputs,
                Ok(Err(error)) => {
                    discard(&agent, &error).await;
                    return Err(error);
                }
                Err(_) => {
                    let error = RunError::Deadline {
                        phase: Phase::Starting,
                        timeout: self.boot_timeout,
                        console: String::new(),
                    };
                    discard(&agent, &error).await;
                    return Err(error);
                }
            },
            () = self.machine_gone() => return Err(RunError::PodGone),
        };
        let container = Container::new(agent, record, &request.process, hooks.poststart.clone(), Weak::new(), dir);
        let container = container.numbering_streams(Arc::clone(&self.numbers)).claiming(memory, cpus);
        let container = Arc::new(container.claiming_host_cpus(self.host_cpus.claim(cgroup.limits.cpus)));
        container.has_disks(disks.disks.clone());
        let server = match TaskServer::of_container(task, &container).await.map_err(RunError::EventLoop) {
            Ok(server) => server,
            Err(error) => {
                discard(&container.agent, &error).await;
                return Err(error);
            }
        };
        container.enter(Status::Created);
        Ok((container, outputs, server))
    }
}

/// Removes what the agent may have made of a container that did not come to be.
async fn discard(agent: &Agent, error: &RunError) {
    // What the agent refused, it has taken back itself.
    if !matches!(error, RunError::Create(_)) {
        let _ = agent.delete(true).await;
    }
}

/// Gives mounts the names that other containers have given their sources.
fn rename(request: &mut CreateContainerRequest, renamed: &[(String, String)]) {
    for mount in &mut request.mounts {
        let Some(share) = mount.share.as_mut().filter(|share| share.device == ShareDevice::SHARED.into()) else {
            continue;
        };
        if let Some((_, name)) = renamed.iter().find(|(own, _)| *own == share.tree) {
            share.tree.clone_from(name);
        }
    }
}

/// How init has ended; `None` once it is gone with the machine, which ends here where its agent does not do its part.
async fn until_exit(container: &Container, pod: &Pod, outputs: &Outputs) -> Option<WaitProcessResponse> {
    let streams = outputs.streams();
    let why = tokio::select! {
        exit = container.exit(&streams) => match exit {
            Ok(exit) => return Some(exit),
            Err(error) => {
                // The connection is lost a moment before the machine is known to be.
                if timeout(GONE_TIMEOUT, pod.machine_gone()).await.is_ok() {
                    return None;
                }
                text::chain(&error)
            }
        },
        () = container.defies_kill(&streams) => DEFIANT.to_owned(),
        () = pod.machine_gone() => return None,
    };
    logging::error(format_args!("{}: {why}; the pod's machine is ended", container.id()));
    pod.sandbox.end(LOST);
    pod.machine_gone().await;
    None
}

/// Has the guest forget a container, and write its files back. A guest that does not, when SIGKILL has said that nobody waits
/// for more of it, loses its machine.
async fn delete(container: &Container, pod: &Pod) {
    let why = tokio::select! {
        deleted = container.agent.delete(true) => match deleted {
            Ok(()) => return,
            Err(error) => {
                let (id, why) = (container.id(), text::chain(&error));
                return logging::error(format_args!("cannot write the files of {id} back to the host: {why}"));
            }
        },
        () = container.defies_deletion() => "the guest did not write its files back after SIGKILL",
        () = pod.machine_gone() => return,
    };
    logging::error(format_args!("{}: {why}; the pod's machine is ended", container.id()));
    pod.sandbox.end(LOST);
    pod.machine_gone().await;
}

/// From a created container to its end.
async fn live(container: Arc<Container>, held: Held) {
    let Held {
        pod,
        taken,
        disks,
        state,
        mut outputs,
        mut connections,
        server,
        poststop,
        gone,
        _own_pids,
        _oom_score,
        _alive,
    } = held;
    let status = match until_exit(&container, &pod, &outputs).await {
        Some(exit) => {
            if exit.oom_kills > 0 {
                logging::warn(format_args!("{}: the guest's kernel killed a process: out of memory", container.id()));
            }
            let drained = async {
                tokio::select! {
                    () = outputs.drained() => {}
                    () = container.output_given_up() => {}
                    () = pod.machine_gone() => {}
                }
            };
            let deleted = async {
                tokio::join!(container.farewell(), connections.finish());
                delete(&container, &pod).await;
            };
            tokio::join!(drained, deleted);
            // The guest's word is only believed as far as an exit status goes.
            u8::try_from(exit.exit_status).unwrap_or(u8::MAX)
        }
        None => LOST,
    };
    pod.disks.take_back(disks).await;
    pod.trees.take_back(taken).await;
    container.release_host_cpus();
    let hook_state = container.record().hook_state();
    drop(state);
    container.stopped(status, false);
    server.stop().await;
    hooks::run_all(&poststop, &hook_state.at(hooks::Status::Stopped, None)).await;
    gone.send_replace(true);
}
