// SPDX-License-Identifier: Apache-2.0
//! The peers: what they are, how each is started, and how it is told to measure.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::link::{Link, TAP};
use super::measurement::Measurement;
use super::server::CONTROL_PORT;
use super::{CLIENT, IMAGE, ROOTFS};
use crate::bundle::Bundle;
use crate::cases::{Invocation, Programs, QemuMachine, Runtime};
use crate::error::{BenchError, file};

/// Memory of a guest.
const GUEST_MEM_SIZE_MIB: u64 = 256;

/// How long a peer may take to ask for orders.
const START_LIMIT: Duration = Duration::from_secs(120);

/// How long a measurement may take beyond its seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Bulkhead { vhost: bool },
    Runc,
    Qemu { vhost: bool },
}

impl Kind {
    /// In the order in which they take turns.
    pub(crate) const ALL: [Self; 5] = [
        Self::Bulkhead { vhost: true },
        Self::Bulkhead { vhost: false },
        Self::Qemu { vhost: true },
        Self::Qemu { vhost: false },
        Self::Runc,
    ];

    /// Unique, for people and for `--peers`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bulkhead { vhost: true } => "bulkhead-vhost",
            Self::Bulkhead { vhost: false } => "bulkhead",
            Self::Qemu { vhost: true } => "qemu-vhost",
            Self::Qemu { vhost: false } => "qemu",
            Self::Runc => "runc",
        }
    }

    pub(crate) fn needs_vhost(self) -> bool {
        matches!(self, Self::Bulkhead { vhost: true } | Self::Qemu { vhost: true })
    }
}

/// A peer that runs. Dropped, it ends.
#[derive(Debug)]
pub(super) struct Peer {
    name: &'static str,
    child: Child,
    /// How to end a container.
    delete: Option<Invocation>,
    control: BufReader<TcpStream>,
}

impl Peer {
    /// Starts a peer in a network of its own, and waits until it asks for orders.
    ///
    /// # Errors
    ///
    /// Its network cannot be made, or it does not start.
    pub(super) fn start(programs: &Programs, kind: Kind, number: u8) -> Result<Self, BenchError> {
        let name = kind.name();
        let link = Link::new(number)?;
        let listener = TcpListener::bind((link.host_address(), CONTROL_PORT))
            .map_err(file("listen on", link.host_address().to_string()))?;
        let (run, delete) = match kind {
            Kind::Bulkhead { .. } => container(programs, Runtime::Bulkhead, kind, &link)?,
            Kind::Runc => container(programs, Runtime::Runc, kind, &link)?,
            Kind::Qemu { vhost } => (qemu(programs, vhost, &link)?, None),
        };
        let log = log_path(name);
        let output = File::create(&log).map_err(file("create", &log))?;
        let errors = output.try_clone().map_err(file("open", &log))?;
        let mut child = run
            .command()
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(file("start", &run.program))?;
        match accept(&listener, &mut child, name) {
            Ok(control) => Ok(Self { name, child, delete, control: BufReader::new(control) }),
            Err(error) => {
                end(&mut child, delete.as_ref());
                Err(error)
            }
        }
    }

    /// One figure.
    ///
    /// # Errors
    ///
    /// What the peer says, or that it says nothing.
    pub(super) fn measure(&mut self, measurement: Measurement, seconds: u32) -> Result<f64, BenchError> {
        let order = measurement.order(seconds) + "\n";
        let limit = ANSWER_LIMIT + Duration::from_secs(seconds.into());
        let mut answer = String::new();
        let stream = self.control.get_mut();
        stream
            .set_read_timeout(Some(limit))
            .and_then(|()| stream.write_all(order.as_bytes()))
            .and_then(|()| self.control.read_line(&mut answer))
            .map_err(|error| failure(self.name, &format!("{}: {error}", order.trim_end())))?;
        answer.trim_end().parse().map_err(|_| failure(self.name, &format!("{}: {answer:?}", order.trim_end())))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        end(&mut self.child, self.delete.as_ref());
    }
}

/// Ends a peer; whatever comes of it, the stage goes with the machine.
fn end(child: &mut Child, delete: Option<&Invocation>) {
    match delete {
        Some(delete) => drop(delete.command().stdin(Stdio::null()).output()),
        None => drop(child.kill()),
    }
    let _ = child.wait();
}

/// The first connection of the peer that `child` runs.
fn accept(listener: &TcpListener, child: &mut Child, name: &str) -> Result<TcpStream, BenchError> {
    const STEP: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    let began = Instant::now();
    loop {
        let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
        if poll(&mut fds, Some(&STEP)).map_err(file("wait for", name))? > 0 {
            return listener.accept().map(|(stream, _)| stream).map_err(file("wait for", name));
        }
        if let Some(status) = child.try_wait().map_err(file("wait for", name))? {
            return Err(failure(name, &format!("ended with {status} before it asked for orders")));
        }
        if began.elapsed() > START_LIMIT {
            return Err(failure(name, &format!("did not ask for orders within {} s", START_LIMIT.as_secs())));
        }
    }
}

fn log_path(name: &str) -> PathBuf {
    format!("/tmp/{name}.log").into()
}

/// With the end of what the peer wrote.
fn failure(name: &str, why: &str) -> BenchError {
    let log = fs::read(log_path(name)).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let tail = log.lines().rev().take(5).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    BenchError::Case { case: name.to_owned(), why: format!("{why}; its last messages: {tail:?}") }
}

/// How a container of a runtime is run and deleted, its bundle being written.
fn container(
    programs: &Programs,
    runtime: Runtime,
    kind: Kind,
    link: &Link,
) -> Result<(Invocation, Option<Invocation>), BenchError> {
    link.set_address()?;
    let mut config = Bundle::Echo.config();
    config["root"]["path"] = json!(ROOTFS);
    config["process"]["args"] = json!([CLIENT, "network-client", link.host_address().to_string()]);
    config["annotations"]["io.bulkhead.memory_mib"] = json!(GUEST_MEM_SIZE_MIB.to_string());
    if let Kind::Bulkhead { vhost } = kind {
        config["annotations"]["io.bulkhead.net.vhost"] = json!(vhost.to_string());
    }
    for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
        if namespace["type"] == "network" {
            namespace["path"] = json!(link.namespace());
        }
    }
    // iperf3 keeps what it sends in a file.
    let tmp = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]});
    config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(tmp.clone()));

    let folder = Path::new("/bundles").join(kind.name());
    let path = folder.join("config.json");
    fs::create_dir_all(&folder).map_err(file("create", &folder))?;
    fs::write(&path, config.to_string()).map_err(file("write", &path))?;
    let run = programs.verb(runtime, &["run", kind.name()], &folder);
    Ok((run, Some(programs.verb(runtime, &["delete", "--force", kind.name()], &folder))))
}

/// QEMU's machine with a network device on a tap.
fn qemu(programs: &Programs, vhost: bool, link: &Link) -> Result<Invocation, BenchError> {
    link.join_tap()?;
    let backend = format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={}", if vhost { "on" } else { "off" });
    let device = format!("virtio-net-device,netdev=net,mac={}", link.mac());
    let words = format!("own={} server={}", link.peer_address(), link.host_address());
    let machine = QemuMachine {
        memory_mib: GUEST_MEM_SIZE_MIB,
        image: IMAGE,
        words: &words,
        devices: &["-netdev", &backend, "-device", &device, "-global", "virtio-mmio.force-legacy=false"],
    };
    Ok(programs.qemu_machine(&machine).inside(link.namespace()))
}
