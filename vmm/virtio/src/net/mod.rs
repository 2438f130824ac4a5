// SPDX-License-Identifier: Apache-2.0
//! The network device (virtio 1.2, section 5.1), on a tap of the host.
//!
//! Frames go between the guest's buffers and the tap by `readv` and `writev`, so the VMM neither copies nor looks at them.
//! The header in front of each frame, which says how far its checksum and segmentation are left to the receiver, has the
//! same layout on both sides. Nothing is buffered here: frames for a guest that gives no buffers wait in the tap's own
//! queue, whose length the host's kernel bounds, and frames that the tap has no room for wait in the guest's ring.
//!
//! There is one pair of queues, and no control queue: what a driver would set by it (filters, a further address) only
//! narrows what it receives, and a tap that is joined to one link needs no filter.
//!
//! | the driver | fate |
//! | --- | --- |
//! | breaks a ring, or posts a chain that is not within memory, of the wrong direction, shorter than a header, or of more than [`MAX_PIECES`] pieces | the device needs a reset |
//! | accepts segmentation without the checksums that it needs | the device does not start |
//! | sends a frame longer than [`FRAME_MAX`], or one that the host's kernel refuses | the frame is dropped |
//! | gives no buffers | frames wait in the tap, then the host's kernel drops them |
//!
//! When the tap goes away, the guest's frames are dropped, and the device goes on without it.

mod device;
mod engine;
mod features;
mod pieces;
mod receive;
mod tap;
mod transmit;
mod used;

pub use device::{MacAddress, Net, NetConfig};
pub use engine::Engine;
pub use pieces::MAX_PIECES;
pub use tap::Tap;

/// Bytes of the header in front of each frame (`struct virtio_net_hdr_v1`).
pub const HEADER_LEN: usize = 12;

/// Most bytes of a frame with its header: 64 KiB of segments to come, their packet's headers, and vlan tags.
pub const FRAME_MAX: usize = 65_536 + 128;

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
    #[error("a descriptor chain has no room for a frame's header")]
    TooShort,
}

#[cfg(test)]
mod tests;
