// SPDX-License-Identifier: Apache-2.0
//! How the VMM makes its threads.

use std::thread::Builder;

/// Bytes of a thread's stack.
///
/// Rust's own choice is 2 MiB, the size of a huge page: where the host gives these to anything that has room for one, the
/// first touch of a stack that happens to be aligned costs 2 MiB of memory. The deepest stack of a VMM that has started a
/// guest was seen to use 60 KiB, and nothing here recurses.
const STACK_LEN: usize = 256 << 10;

/// A thread of this name to be started; at most 15 bytes of it are shown.
pub fn builder(name: &str) -> Builder {
    Builder::new().name(name.to_owned()).stack_size(STACK_LEN)
}
