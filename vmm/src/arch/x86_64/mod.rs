// SPDX-License-Identifier: Apache-2.0
//! x86-64: the memory map, and everything that a kernel finds in memory when it is entered at its 64-bit entry.

pub mod boot;
pub mod layout;
pub mod mptable;
pub mod paging;
