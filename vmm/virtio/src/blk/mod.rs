// SPDX-License-Identifier: Apache-2.0
//! The block device (virtio 1.2, section 5.2), on an open block device of the host.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `device` | the device as the transport sees it |
//! | `request` | bytes become a typed request; every sector and length is checked there |
//! | `disk` | carries requests out on the host's device |
//! | `engine` | the queue, on a thread of its own |
//! | `wire` | the specification's numbers |
//!
//! Data goes between the guest's buffers and the host's page cache by `preadv` and `pwritev`, uncopied and not looked at. The
//! cache is the one that the host's own programs see, so that both sides find what the other has written, as far as the guest's
//! own cache lets them. A flush is `fdatasync`; a driver that cannot ask for one has each write flushed.
//!
//! # What the guest may do wrong
//!
//! | what | its fate |
//! | --- | --- |
//! | a request of an unknown type, or that this disk cannot do | the status is `VIRTIO_BLK_S_UNSUPP` |
//! | sectors beyond the disk, a length that is none or too long, a write to a disk that is read-only | the status is `VIRTIO_BLK_S_IOERR` |
//! | no room for a status, or no header | the device needs a reset, and does nothing until it gets one |
//! | a ring or a descriptor chain that breaks the rules of virtio | the same |
//!
//! What the host's device fails is `VIRTIO_BLK_S_IOERR` too. While it does not answer, the requests behind it wait, and a reset waits
//! for the one that is under way; vCPUs that only ask do not.

mod device;
mod disk;
mod engine;
mod request;
mod wire;

pub use device::{Blk, MAX_SERIAL_LEN, Serial, SerialError};
pub use disk::Disk;
pub use engine::Engine;

#[cfg(test)]
mod tests;
