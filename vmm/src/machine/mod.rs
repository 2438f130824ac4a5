// SPDX-License-Identifier: Apache-2.0
//! Building the machine and running it to its end.
//!
//! ```text
//! main thread       open descriptors, jail, devices, then waits: for the machine's end, or the supervisor's; and
//!                   carries out what the supervisor asks for meanwhile
//!   set-up threads  KVM's objects; guest memory and boot code. They end before the guest runs
//!   vcpu-N          runs a vCPU; answers its accesses. Of one that the guest does not use yet, it sleeps in KVM
//!   fs-TAG, vsock   a device's worker, from its activation on
//!   blk             as above, of a block device
//!   net-N           that of a pair of queues, as long as the guest uses it
//! ```

pub mod bus;
pub mod console;
mod disks;
mod nets;
mod orders;
mod run;
mod setup;

use std::sync::{Arc, Mutex};

use bulkhead_kvm::{Kvm, KvmError, MemoryError, Vcpu, Vm};
use bulkhead_virtio::net::{Notice, Port};

use crate::arch::x86_64::boot::BootError;
use crate::config::{MAX_DISKS, MAX_NET_PAIRS, MAX_NETS, MAX_VCPUS, MIN_MEM_SIZE_MIB, MachineConfig};
use crate::jail::JailError;
use bus::Bus;
use console::Console;
use orders::Orders;

pub use run::{describe, run};
pub use setup::build;

/// A machine that could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration asks for something that no machine has.
    #[error("{what} is {value}; it must be {allowed}")]
    Config {
        /// The setting.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        allowed: String,
    },
    /// The VMM could not lock itself in.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest could not be put into memory.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A host resource could not be had.
    #[error("cannot {doing}")]
    Host {
        /// Completes "cannot …".
        doing: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The VMM would have to move frames that are vhost-net's by the configuration.
    #[error("vhost-net does not serve a network device, as it is asked to: {reason}")]
    NoVhost {
        /// Why it does not.
        reason: String,
    },
    /// There is no window for one more device.
    #[error("the machine has no room for one more {0} device")]
    NoRoom(&'static str),
    /// Two devices are not to be taken for each other.
    #[error("there is a disk {serial:?} already")]
    DiskThere {
        /// Its serial number.
        serial: String,
    },
    /// There is no such device, or it is there for good.
    #[error("there is no disk {serial:?} that was added")]
    NoDisk {
        /// Its serial number.
        serial: String,
    },
    /// A device could not be made.
    #[error("cannot make the {device} device")]
    Device {
        /// The device.
        device: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A machine that is ready to run.
#[derive(Debug)]
pub struct Machine {
    /// Kept for its memory and interrupt controller, which the vCPUs use.
    _vm: Arc<Vm>,
    vcpus: Vec<Vcpu>,
    bus: Bus,
    console: Arc<Mutex<Console>>,
    orders: Orders,
    network: NetworkWatch,
}

/// What is to be known of the network devices.
#[derive(Debug)]
struct NetworkWatch {
    /// That one does without vhost-net.
    fallback: Notice,
    /// Whether none may.
    needs_vhost: bool,
    /// Those on sockets.
    streams: Vec<StreamWatch>,
}

/// What is to be known of a network device on a socket.
#[derive(Debug)]
struct StreamWatch {
    /// The device's host side, to be taken off when the socket is of no use any more.
    port: Port,
    /// That it is not.
    lost: Notice,
}

/// Checks what the type of the configuration does not.
fn check(config: &MachineConfig) -> Result<(), MachineError> {
    if config.vcpus == 0 || config.possible_vcpus() > MAX_VCPUS {
        let (value, allowed) = (config.possible_vcpus().into(), format!("1 to {MAX_VCPUS}"));
        return Err(MachineError::Config { what: "the number of vCPUs", value, allowed });
    }
    if config.mem_size_mib < MIN_MEM_SIZE_MIB {
        let allowed = format!("{MIN_MEM_SIZE_MIB} MiB or more");
        return Err(MachineError::Config { what: "guest memory in MiB", value: config.mem_size_mib, allowed });
    }
    let nets = config.nets.len().saturating_add(config.spare_nets);
    if nets > MAX_NETS {
        let value = nets as u64;
        let allowed = format!("at most {MAX_NETS}");
        return Err(MachineError::Config { what: "the number of network devices", value, allowed });
    }
    let disks = config.disks.len().saturating_add(config.spare_disks);
    if disks > MAX_DISKS {
        let (value, allowed) = (disks as u64, format!("at most {MAX_DISKS}"));
        return Err(MachineError::Config { what: "the number of block devices", value, allowed });
    }
    if let Some(net) = config.nets.iter().find(|net| !(1..=MAX_NET_PAIRS).contains(&net.link.pairs())) {
        let value = net.link.pairs() as u64;
        let allowed = format!("1 to {MAX_NET_PAIRS}");
        return Err(MachineError::Config { what: "the number of a network device's queue pairs", value, allowed });
    }
    Ok(())
}

/// What the set-up threads bring back.
type Parts = (Kvm, Vm, Vec<Vcpu>);
