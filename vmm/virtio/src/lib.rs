// SPDX-License-Identifier: Apache-2.0
//! Virtio devices over MMIO (virtio 1.2). Knows no KVM: guest memory, notifications and interrupts come in from outside.

pub mod blk;
mod buffers;
pub mod device;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod rng;
pub mod thread;
pub mod vsock;
pub mod worker;
