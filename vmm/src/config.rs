// SPDX-License-Identifier: Apache-2.0
//! The one description of a machine: what the supervisor hands to the VMM, as JSON on a descriptor.
//!
//! Every file and socket comes as the number of a descriptor that the VMM inherits, so that it opens nothing once it is
//! jailed. Only the shared trees come as paths: the VMM binds them into its own mount namespace before it locks itself in.

use std::os::fd::RawFd;
use std::path::PathBuf;

pub use bulkhead_kvm::ReserveLayout;
pub use bulkhead_virtio::blk::MAX_SERIAL_LEN;
pub use bulkhead_virtio::fs::PART_PREFIX;
pub use bulkhead_virtio::net::{Limits, MacAddress, Rate, VhostNet};
use serde::{Deserialize, Serialize};

/// Everything that a machine is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// The sandbox's id; names the process, nothing else.
    pub id: String,
    /// Those that the guest's kernel begins with; 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// How many it may come to use while the machine runs, at most [`MAX_VCPUS`]; no others if it is no more than that.
    #[serde(default)]
    pub max_vcpus: u8,
    /// Guest memory, [`MIN_MEM_SIZE_MIB`] or more.
    pub mem_size_mib: u64,
    /// How much it may become while the machine runs (see [`crate::control::Order::GrantMemory`]); not to grow if it is no
    /// more than that. Addresses cost nothing.
    #[serde(default)]
    pub max_mem_size_mib: u64,
    /// `/dev/kvm`, open for reading and writing.
    pub kvm_fd: RawFd,
    /// The guest kernel, an uncompressed x86-64 ELF.
    pub kernel_fd: RawFd,
    /// The guest image, an initramfs.
    pub initramfs_fd: RawFd,
    /// Words added to the kernel's command line.
    #[serde(default)]
    pub kernel_args: Vec<String>,
    /// The vsock device's host side.
    pub vsock: VsockConfig,
    /// The shared trees of each share device; a device without trees is not made, unless some can be added.
    #[serde(default)]
    pub private_trees: Vec<ShareTree>,
    /// As above, for trees that the host may change.
    #[serde(default)]
    pub shared_trees: Vec<ShareTree>,
    /// Whether trees can be added while the machine runs. Files of the private device are opened one by one then.
    #[serde(default)]
    pub trees_grow: bool,
    /// The network devices, at most [`MAX_NETS`].
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// How many network devices can be added while the machine runs; with those of the beginning, at most [`MAX_NETS`].
    #[serde(default)]
    pub spare_nets: usize,
    /// The block devices, at most [`MAX_DISKS`].
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// How many block devices there can be besides while the machine runs; with those of the beginning, at most [`MAX_DISKS`].
    #[serde(default)]
    pub spare_disks: usize,
    /// Whether the machine is to end rather than have the VMM move frames that vhost-net was to move.
    #[serde(default)]
    pub needs_vhost: bool,
    /// A file that receives the guest's console output, at most [`CONSOLE_LOG_MAX`] bytes of it.
    pub console_fd: RawFd,
    /// A pipe or socket that receives one [`crate::report::Report`] a line, as JSON. When its other end closes, the
    /// supervisor is gone and the VMM ends.
    pub report_fd: RawFd,
    /// A socket on which a [`crate::control::Request`] may come, a packet each.
    pub control_fd: RawFd,
    /// Whether to report trace points.
    #[serde(default)]
    pub trace: bool,
}

impl MachineConfig {
    /// How many vCPUs there are: those too that nobody uses yet.
    pub(crate) fn possible_vcpus(&self) -> u8 {
        self.vcpus.max(self.max_vcpus)
    }

    /// Whether there is a device for private trees.
    pub(crate) fn has_private(&self) -> bool {
        self.trees_grow || !self.private_trees.is_empty()
    }

    /// Whether there is a device for shared trees.
    pub(crate) fn has_shared(&self) -> bool {
        self.trees_grow || !self.shared_trees.is_empty()
    }
}

/// The host side of the vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// A listening Unix stream socket: a client writes `CONNECT <port>\n`, reads `OK <host port>\n`, and is connected to
    /// that port of the guest.
    pub listener_fd: RawFd,
    /// A connected Unix stream socket: what the guest gets when it connects to `agent_port`. Given once; a second
    /// connection to that port is refused.
    pub agent_fd: RawFd,
    /// The host's port that the agent connects to.
    pub agent_port: u32,
}

/// The host side of a network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// By which the supervisor knows it, and no other device of the machine.
    pub id: u32,
    /// What it hangs on.
    pub link: NetLink,
    /// How much may go; not with vhost-net.
    #[serde(default)]
    pub limits: Limits,
    /// The guest's address, by which the agent knows the device.
    pub mac: MacAddress,
    /// Whether what it hangs on leads somewhere: whether the guest's link is up.
    pub carrier: bool,
}

/// What a network device hangs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum NetLink {
    /// A tap.
    Tap {
        /// It is open, with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, in whichever network namespace: a descriptor for each pair of
        /// queues, 1 to [`MAX_NET_PAIRS`]. If there are several, it has `IFF_MULTI_QUEUE`, and the queues of all but the first
        /// are detached.
        tap_fds: Vec<RawFd>,
        /// An open `/dev/vhost-net` for each pair of queues, or none.
        #[serde(default)]
        vhost_fds: Vec<RawFd>,
    },
    /// A connected stream socket, on which each frame comes behind its length: 4 bytes, the most significant first.
    Stream {
        /// It.
        socket_fd: RawFd,
    },
}

impl NetLink {
    /// How many pairs of queues the device has.
    #[must_use]
    pub fn pairs(&self) -> usize {
        match self {
            Self::Tap { tap_fds, .. } => tap_fds.len(),
            Self::Stream { .. } => 1,
        }
    }

    /// All of its descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let (fds, more) = match self {
            Self::Tap { tap_fds, vhost_fds } => (tap_fds.as_slice(), vhost_fds.as_slice()),
            Self::Stream { socket_fd } => (std::slice::from_ref(socket_fd), [].as_slice()),
        };
        fds.iter().chain(more).copied()
    }
}

/// A block device of the host that the guest has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// It is open, for writing too unless it is `read_only`.
    pub fd: RawFd,
    /// Whether the guest may not write to it.
    pub read_only: bool,
    /// By which the agent knows the device; 1 to [`MAX_SERIAL_LEN`] bytes, and no other device's.
    pub serial: String,
}

/// A directory or a file of the host that the guest sees at the top of a share device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareTree {
    /// Its name in the share: 1 to 64 of `[A-Za-z0-9_-]`. With [`PART_PREFIX`] at its beginning, the guest sees it as a
    /// part of the device's file system.
    pub name: String,
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Enforced by the host's kernel on the VMM's own mount of the tree.
    pub read_only: bool,
    /// Whether what is mounted below is part of the tree.
    pub recursive: bool,
    /// Whether what is mounted below comes and goes as on the host: it is told by [`crate::control::Order::AddMount`], also what is
    /// there at the beginning.
    #[serde(default)]
    pub follows: bool,
}

/// Most vCPUs of a machine, as far as the guest kernel is configured.
pub const MAX_VCPUS: u8 = 64;

/// Least guest memory that boots.
pub const MIN_MEM_SIZE_MIB: u64 = 64;

/// Most network devices: as many interrupt lines as the other devices leave.
pub const MAX_NETS: usize = 8;

/// Most block devices: as many interrupt lines as are left then.
pub const MAX_DISKS: usize = 7;

/// Most pairs of queues of a network device.
pub const MAX_NET_PAIRS: usize = bulkhead_virtio::net::MAX_PAIRS as usize;

/// Most bytes of console output that are kept: the first ones, and behind them the last 4 KiB.
pub const CONSOLE_LOG_MAX: usize = 256 * 1024;

/// The tag of the share device whose trees nobody else writes: cached hard, with write-back.
pub const PRIVATE_TAG: &str = "private";

/// The tag of the share device whose trees the host may change.
pub const SHARED_TAG: &str = "shared";
