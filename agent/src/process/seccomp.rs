// SPDX-License-Identifier: Apache-2.0
//! The filter of a process's system calls. The host has compiled it.

use bulkhead_protocol::agent as wire;
use libc::sock_filter;

use crate::container::{Failure, SpecError, Stage};
use crate::sys;

/// Most instructions that the kernel takes.
const MAX_INSTRUCTIONS: usize = 4096;

/// A filter, ready for the kernel, which checks it.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    instructions: Vec<sock_filter>,
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: u32,
}

impl Filter {
    pub(crate) fn from_wire(wire: &wire::Seccomp) -> Result<Self, SpecError> {
        let (instructions, rest) = wire.filter.as_chunks::<8>();
        if !rest.is_empty() || instructions.is_empty() || instructions.len() > MAX_INSTRUCTIONS {
            let value = i64::try_from(wire.filter.len()).unwrap_or(i64::MAX);
            return Err(SpecError::OutOfRange { what: "length of the seccomp filter", value });
        }
        let decode = |[a, b, jt, jf, k @ ..]: &[u8; 8]| sock_filter {
            code: u16::from_le_bytes([*a, *b]),
            jt: *jt,
            jf: *jf,
            k: u32::from_le_bytes(*k),
        };
        Ok(Self { instructions: instructions.iter().map(decode).collect(), flags: wire.flags })
    }

    /// Puts the calling process under the filter. Needs no-new-privileges or CAP_SYS_ADMIN.
    pub(crate) fn install(&self) -> Result<(), Failure> {
        sys::set_seccomp_filter(&self.instructions, self.flags).map_err(|error| {
            let subject = format!("of {} instructions with flags {:#x}", self.instructions.len(), self.flags);
            Failure::new(Stage::Seccomp, subject, error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(bytes: &[u8]) -> Result<Filter, SpecError> {
        Filter::from_wire(&wire::Seccomp { filter: bytes.to_vec(), ..Default::default() })
    }

    #[test]
    fn instructions_are_little_endian() {
        let filter = filter(&[0x15, 0, 1, 2, 0x3e, 0, 0, 0xc0]).unwrap();

        let sock_filter { code, jt, jf, k } = filter.instructions[0];
        assert_eq!((code, jt, jf, k), (0x15, 1, 2, 0xc000_003e));
    }

    #[test]
    fn parts_of_instructions_and_too_many_are_refused() {
        for length in [0, 7, 9, 8 * 4097] {
            assert!(matches!(filter(&vec![0; length]), Err(SpecError::OutOfRange { .. })), "{length}");
        }
        assert!(filter(&[0; 8 * 4096]).is_ok());
    }
}
