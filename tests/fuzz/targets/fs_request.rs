// SPDX-License-Identifier: Apache-2.0
//! The bytes of a file request, as the share devices decode them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = bulkhead_virtio::fs::decode_request(bytes);
});
