// SPDX-License-Identifier: Apache-2.0
//! How the C library's allocator keeps memory for this program: mallopt(3).

/// Allocations of this many bytes are mappings of their own.
const LARGE: libc::c_int = 128 << 10;

/// Has all threads, which do little, share one heap, and keeps what is large out of it, however large what was freed before is: else
/// a buffer of 16 MiB, of which a page is ever used (that of FUSE), comes to lie where the kernel backs it by a huge page.
pub(crate) fn keep_small() {
    // SAFETY: mallopt(3) takes two numbers and touches no memory of the caller's. There is no other thread yet which might allocate.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}
