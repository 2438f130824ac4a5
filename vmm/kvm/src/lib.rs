// SPDX-License-Identifier: Apache-2.0
//! KVM's ioctls, the guest's memory and the eventfds between them. The VMM's `unsafe` lives here.

mod cpuid;
mod memory;
mod msr;
mod reserve;
mod vcpu;
mod vm;

pub use cpuid::VcpuTopology;
pub use memory::{GuestMemory, MMIO_GAP_END, MMIO_GAP_START, MemoryError, allocate};
pub use reserve::{GrantError, Reserve, ReserveLayout};
pub use vcpu::{ExitIo, StartState, Stop, Vcpu, VcpuError};
pub use vm::{Kvm, KvmError, Vm};
