// SPDX-License-Identifier: Apache-2.0
//! `regex`, as far as the crates here need it.
//!
//! One expression is looked for in the whole runtime: `oci-spec` checks `execCPUAffinity` by it. The `regex` crate brings 0.6 MB of
//! code and tables for that, which every supervisor then has in its address space. `regex-lite`, by the same authors, has the same
//! interface, knows ASCII's classes alone, which is what such a list is made of, and is a tenth of the size.

pub use regex_lite::*;
