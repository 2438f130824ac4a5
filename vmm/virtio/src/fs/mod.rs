// SPDX-License-Identifier: Apache-2.0
//! The file system device (virtio 1.2, section 5.11) and its file server: the guest mounts a directory of the host.
//!
//! | part | what it does |
//! | --- | --- |
//! | [`device`](self) | the virtio side: configuration, start and stop |
//! | `worker` | the thread that owns the queues |
//! | [`request`] | bytes become a typed request; the guest's lengths and names are checked there |
//! | `server` | carries requests out on the host's files |
//! | `reply` | an answer's bytes |
//! | [`trees`](AddedTrees) | trees that come and go while the device runs |
//! | `submounts` | what the host mounts below them meanwhile |
//! | [`wire`] | the protocol's numbers |
//!
//! # What the guest may do wrong
//!
//! | what | its fate |
//! | --- | --- |
//! | a request that is malformed, unknown, or asks for what is not allowed | answered with an error number |
//! | no room for an answer, or no header | the device needs a reset, and does nothing until it gets one |
//! | a ring or a descriptor chain that breaks the rules of virtio | the same |
//! | more open files than there are descriptors | `ENFILE` to the request |
//!
//! Should the worker itself panic, the process aborts, and so that machine ends: nothing can be said about the files it
//! was working on.

pub mod request;
pub mod wire;

mod device;
mod reply;
mod server;
mod submounts;
mod trees;
mod worker;

/// At the beginning of a tree's name: the guest is to see the tree as a part of the device's own file system, not as one of
/// its own. Only there can Linux map ids (`MOUNT_ATTR_IDMAP`).
pub const PART_PREFIX: &str = "part-";

pub use device::{CachePolicy, FsConfig, FsDevice, TagError};
pub use submounts::MAX_SUBMOUNTS;
pub use trees::{AddedTrees, MAX_ADDED_TREES, MAX_TREE_NAME_LEN, TreeError, is_tree_name};

/// Decodes a request as the device does, touching nothing: the entry of fuzz tests. Returns whether it was well-formed.
#[must_use]
pub fn decode_request(bytes: &[u8]) -> bool {
    request::Header::decode(bytes).is_some_and(|header| {
        let body = bytes.get(wire::IN_HEADER_LEN..).unwrap_or_default();
        request::decode(&header, body, bytes.len()).is_ok()
    })
}
