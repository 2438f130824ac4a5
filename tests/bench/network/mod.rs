// SPDX-License-Identifier: Apache-2.0
//! Networks beside each other: what a container or machine and its host carry between them, and how fast one answers.
//!
//! | | |
//! | --- | --- |
//! | `peer` | starts containers and machines, each in the network that `link` makes |
//! | `client` | runs in each of them, and obeys orders that `measurement` names |
//! | `server` | runs on the host |
//! | `table` | the figures |
//!
//! All peers run all the time, each with the same programs in it, and measure in turns; those whose turn it is not wait for
//! an order.

mod client;
mod link;
mod measurement;
mod peer;
mod server;
mod table;

use std::env;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::Args;

pub(crate) use client::client;

use crate::cases::{self, Programs, Runtime};
use crate::error::{BenchError, file};
use crate::stage::{Stage, find_program};
use crate::{create, image, say, write};
use measurement::Measurement;
use peer::{Kind, Peer};
use server::Servers;
use table::PeerResult;

/// The root file system of all peers, and what is made of it for QEMU.
const ROOTFS: &str = "/network/rootfs";
const IMAGE: &str = "/network/initramfs.cpio";

/// This program in it.
const CLIENT: &str = "/bin/bulkhead-bench";

/// The first program of QEMU's guest. The kernel gives it the addresses as variables: words that it does not know itself.
const INIT: &str = "#!/bin/busybox sh
exec >/dev/kmsg 2>&1
/bin/busybox ip link set lo up
/bin/busybox ip addr add $own/24 dev eth0
/bin/busybox ip link set eth0 up
exec /bin/bulkhead-bench network-client $server
";

const VHOST_NET: &str = "/dev/vhost-net";

/// Measure networks of Bulkhead and its peers in turns, and print what each carries and how fast it answers
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct Options {
    /// Where Bulkhead is installed
    #[arg(long, value_name = "DIR")]
    tree: PathBuf,

    /// Rounds that count
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,

    /// How long each measurement takes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,

    /// Only these peers, by name; all when not given
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    peers: Vec<String>,

    /// Say this of the machine
    #[arg(long, value_name = "TEXT", default_value = "This machine.")]
    machine: String,

    /// Write the figures to FILE too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Gives whether all peers could be measured.
///
/// # Errors
///
/// What keeps all of them from being measured.
pub(crate) fn compare(options: &Options) -> Result<bool, BenchError> {
    let kinds = chosen(&options.peers)?;
    let json = options.json.as_deref().map(create).transpose()?;
    let stage = Stage::new()?;
    let mut programs = Programs::copy(&stage, &staged(&kinds), &options.tree, Path::new(""))?;
    for program in link::PROGRAMS {
        stage.program(program)?;
    }
    let iperf3 = stage.program("iperf3")?;
    write_rootfs(&stage)?;
    if kinds.iter().any(|kind| matches!(kind, Kind::Qemu { .. })) {
        programs.add_qemu(&stage, &options.tree)?;
        let initramfs = image::initramfs_of(&stage.at(ROOTFS)).map_err(file("make an initramfs of", ROOTFS))?;
        fs::write(stage.at(IMAGE), initramfs).map_err(file("write", IMAGE))?;
    }
    stage.enter()?;

    let servers = Servers::start(&iperf3)?;
    let results = measure(&programs, &kinds, options);
    drop(servers);
    let text = table::table(&options.machine, &results, options.rounds, options.seconds);
    std::io::stdout().write_all(text.as_bytes()).map_err(file("write", "standard output"))?;
    if let (Some(output), Some(path)) = (json, &options.json) {
        write(output, path, &format!("{:#}\n", table::json(&options.machine, &results, options.seconds)))?;
    }
    Ok(results.iter().all(|result| result.failure.is_none()))
}

/// The peers of those names, without those that this host has no vhost-net for.
fn chosen(names: &[String]) -> Result<Vec<Kind>, BenchError> {
    if let Some(unknown) = names.iter().find(|name| Kind::ALL.iter().all(|kind| kind.name() != **name)) {
        let known = Kind::ALL.map(Kind::name).join(", ");
        return Err(BenchError::Case { case: unknown.clone(), why: format!("no such peer; the peers are {known}") });
    }
    let has_vhost = Path::new(VHOST_NET).exists();
    if !has_vhost {
        say(&format!("bench: no {VHOST_NET} (module vhost_net), so nothing is measured with it\n"));
    }
    let is_chosen = |kind: &Kind| names.is_empty() || names.iter().any(|name| name == kind.name());
    Ok(Kind::ALL.into_iter().filter(|kind| is_chosen(kind) && (has_vhost || !kind.needs_vhost())).collect())
}

/// The runtimes that the peers need, as cases of starts.
fn staged(kinds: &[Kind]) -> Vec<cases::Kind> {
    let runtime = |kind: &Kind| match kind {
        Kind::Bulkhead { .. } => Some(cases::Kind::Exec(Runtime::Bulkhead)),
        Kind::Runc => Some(cases::Kind::Exec(Runtime::Runc)),
        Kind::Qemu { .. } => None,
    };
    kinds.iter().filter_map(runtime).collect()
}

/// Writes what all peers run: busybox, iperf3 and this program, with their libraries.
fn write_rootfs(stage: &Stage) -> Result<(), BenchError> {
    let root = Path::new(ROOTFS);
    let own = env::current_exe().map_err(file("find", "this program"))?;
    let programs =
        [(own, CLIENT), (find_program("iperf3")?, client::IPERF3), (find_program("busybox")?, "/bin/busybox")];
    for (from, to) in programs {
        stage.copy(&from, root.join(to.trim_start_matches('/')))?;
        stage.libraries_below(root, &from)?;
    }
    for folder in ["dev", "etc", "proc", "sys", "tmp"] {
        let path = stage.at(root.join(folder));
        fs::create_dir_all(&path).map_err(file("create", &path))?;
    }
    let init = stage.at(root.join("init"));
    fs::write(&init, INIT).map_err(file("write", &init))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).map_err(file("make executable", &init))
}

/// Starts all peers, and lets each measure once for nothing, then once a round. One that failed is not tried again.
fn measure(programs: &Programs, kinds: &[Kind], options: &Options) -> Vec<PeerResult> {
    let mut results: Vec<PeerResult> = kinds.iter().copied().map(PeerResult::new).collect();
    let mut peers: Vec<Option<Peer>> = Vec::new();
    for (number, result) in (1..).zip(&mut results) {
        say(&format!("bench: starting {}\n", result.kind.name()));
        let peer = Peer::start(programs, result.kind, number);
        peers.push(peer.map_err(|error| result.failure = Some(error.to_string())).ok());
    }
    for round in 0..=options.rounds {
        for (row, measurement) in Measurement::ALL.into_iter().enumerate() {
            say(&format!("bench: round {round} of {}: {}\n", options.rounds, measurement.name()));
            for (peer, result) in peers.iter_mut().zip(&mut results) {
                let Some(running) = peer else { continue };
                match running.measure(measurement, options.seconds) {
                    Ok(figure) if round > 0 => result.figures[row].push(figure),
                    Ok(_) => {}
                    Err(error) => {
                        result.failure = Some(error.to_string());
                        *peer = None;
                    }
                }
            }
        }
    }
    results
}
