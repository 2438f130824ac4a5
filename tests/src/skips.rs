// SPDX-License-Identifier: Apache-2.0
//! Which skips may be: on a machine that has been set up for the cases, nothing that they need is missing.

use std::fs;
use std::path::Path;

use crate::failure::{Context as _, Result};

/// The reasons that are good ones.
#[derive(Debug)]
pub(crate) struct GoodReasons(Vec<String>);

impl GoodReasons {
    /// Reads a file that has one in each line; lines that begin with `#` are comments.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).context(|| format!("reading {}", path.display()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let reasons = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(reasons.map(str::to_owned).collect())
    }

    /// Whether a skip for that reason may be: one of them is in it.
    pub(crate) fn have(&self, reason: &str) -> bool {
        self.0.iter().any(|good| reason.contains(good))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_good_that_has_a_line_in_it() {
        let reasons = GoodReasons::parse("# what a host may lack\nthis host has one processor\n\n  no resctrl\n");

        assert!(reasons.have("this host has one processor\n") && reasons.have("there is no resctrl"));
        assert!(!reasons.have("there is no /usr/bin/podman (package podman)"));
        assert!(!reasons.have("# what a host may lack"));
        assert!(!GoodReasons::parse("\n\n").have("anything"));
    }
}
