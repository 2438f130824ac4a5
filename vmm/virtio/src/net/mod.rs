// SPDX-License-Identifier: Apache-2.0
//! The network device (virtio 1.2, section 5.1), on a tap of the host or a stream socket.
//!
//! Frames go between the guest's buffers and the tap by `readv` and `writev`, so the VMM neither copies nor looks at them.
//! The header in front of each frame, which says how far its checksum and segmentation are left to the receiver, has the
//! same layout on both sides. Nothing is buffered here: frames for a guest that gives no buffers wait in the tap's own
//! queue, whose length the host's kernel bounds, and frames that the tap has no room for wait in the guest's ring. On a stream
//! socket, which takes and gives any piece of a frame, frames are copied by way of two buffers whose size is fixed.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `device` | the device as the transport sees it |
//! | `port`, `backend` | the host's side: which pairs of queues run, and on what |
//! | `pair` | a pair of queues on its thread: [`engine`](Engine), or `vhost`, which is the host's kernel in its stead |
//! | `notice` | that the kernel does not do what it was to do, or that there is no host's side any more |
//! | `receive`, `transmit`, `pieces`, `used` | frames in each direction |
//! | `limit` | bytes and frames per second |
//! | `control`, `command`, `filter` | what the guest asks for: its address, the frames that it wants, the pairs that it uses |
//! | `link`, `tap`, `stream` | what a pair of queues hangs on: a queue of the tap, or the socket |
//!
//! | the driver | fate |
//! | --- | --- |
//! | breaks a ring, or posts a chain that is not within memory, of the wrong direction, shorter than a header, or of more than [`MAX_PIECES`] pieces | the device needs a reset |
//! | accepts a feature without another that it needs | `FEATURES_OK` stays clear |
//! | sends a control command that is unknown, has another length than it needs, or a table of more than [`TABLE_MAX`] addresses | it fails, and changes nothing |
//! | sends a control command without room for the answer | the device needs a reset |
//! | sends a frame longer than [`FRAME_MAX`], or one that the host's kernel refuses | the frame is dropped |
//! | gives no buffers | frames wait in the tap, then the host's kernel drops them; or in the socket, then the other end has to wait |
//!
//! When the tap or the other end of the socket goes away, or that announces a frame longer than one can be, the guest's frames
//! are dropped, and the device goes on without it; of a socket, the VMM is told. What the host's kernel does not
//! like about a queue that it serves is for the queue's own thread to find out: it goes on in the kernel's stead, and tells.

mod backend;
mod command;
mod control;
mod device;
mod engine;
mod features;
mod filter;
mod limit;
mod link;
mod mac;
mod notice;
mod pair;
mod pieces;
mod port;
mod receive;
mod stream;
mod tap;
mod transmit;
mod used;
mod vhost;

pub use backend::{AttachError, Backend, LinkKind};
pub use command::TABLE_MAX;
pub use device::{Net, NetConfig};
pub use engine::Engine;
pub use filter::Filter;
pub use limit::{Limits, Rate};
pub use link::Link;
pub use mac::MacAddress;
pub use notice::Notice;
pub use pieces::MAX_PIECES;
pub use port::{NetState, Port};
pub use stream::Stream;
pub use tap::Tap;
pub use vhost::VhostNet;

/// Bytes of the header in front of each frame (`struct virtio_net_hdr_v1`).
pub const HEADER_LEN: usize = 12;

/// Most bytes of a frame with its header: 64 KiB of segments to come, their packet's headers, and vlan tags.
pub const FRAME_MAX: usize = 65_536 + 128;

/// Most pairs of queues of a device.
pub const MAX_PAIRS: u16 = 8;

/// Why a queue cannot be served any more.
#[derive(Debug, thiserror::Error)]
enum QueueError {
    #[error("the driver broke a queue's rings")]
    Ring(#[from] virtio_queue::Error),
    #[error("a descriptor chain names memory that is not the guest's")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("a descriptor chain has a buffer of the wrong direction")]
    Direction,
    #[error("a descriptor chain names more than {MAX_PIECES} pieces of memory")]
    TooManyPieces,
    #[error("a descriptor chain has no room for a frame's header, or a command's answer")]
    TooShort,
    #[error("a command's memory cannot be read, or its answer not be written")]
    Command(#[from] std::io::Error),
}

#[cfg(test)]
mod tests;
