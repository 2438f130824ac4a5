// SPDX-License-Identifier: Apache-2.0
//! Shared trees, mounts, and what a container sees of them.

pub(crate) mod copy_up;
pub(crate) mod flags;
pub(crate) mod hidden;
pub(crate) mod mounts;
pub(crate) mod resolve;
pub(crate) mod rootfs;
pub(crate) mod shares;
pub(crate) mod tree;

pub use shares::{Device, ShareError, ShareRoots, SharedTree};
