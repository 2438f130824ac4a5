// SPDX-License-Identifier: Apache-2.0
//! How readily the host's kernel ends which process when the host's memory runs out (`oom_score_adj` of proc(5)).
//!
//! Engines say it of a container. Here that is its VMM, which has the guest's memory, and its supervisor; a server of containerd's
//! has a score of its own. A pod's machine ends with all that is in it: its VMM has the lowest score of those that its containers
//! are to have.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::logging;

/// Of what goes first.
const HIGHEST: i32 = 1000;

fn path(process: &str) -> String {
    format!("/proc/{process}/oom_score_adj")
}

fn read(process: &str) -> io::Result<i32> {
    fs::read_to_string(path(process))?.trim().parse().map_err(io::Error::other)
}

/// Has this process go before the one that has made it.
pub(crate) fn raise_own() {
    let raised = read("self").and_then(|score| fs::write(path("self"), raised(score).to_string()));
    if let Err(error) = raised {
        logging::warn(format_args!("cannot raise the shim's oom_score_adj: {error}"));
    }
}

fn raised(score: i32) -> i32 {
    (score + 1).min(HIGHEST)
}

/// Gives this process a score, and what it starts from here on.
pub(super) fn set_own(score: i32) {
    set("self", score);
}

/// Gives a process that was just started a score.
pub(super) fn set_of(process: u32, score: i32) {
    set(&process.to_string(), score);
}

/// It is a matter of the host's memory, not of the container: that it cannot be is told, and no more.
fn set(process: &str, score: i32) {
    // Whoever has it already needs no right to it.
    if read(process).is_ok_and(|own| own == score) {
        return;
    }
    if let Err(error) = fs::write(path(process), score.to_string()) {
        logging::warn(format_args!("process.oomScoreAdj: cannot have {score} on the host: {error}"));
    }
}

/// That of a pod's VMM.
#[derive(Debug)]
pub(super) struct VmmScore {
    /// Names that process, and none that comes to have its id later.
    file: Option<File>,
    /// Until a container names one.
    first: i32,
    of_containers: Mutex<Vec<i32>>,
}

impl VmmScore {
    /// That of the VMM which is that process.
    pub(super) fn of(vmm: u32) -> Arc<Self> {
        let vmm = vmm.to_string();
        let file = File::options().write(true).open(path(&vmm)).ok();
        Arc::new(Self { file, first: read(&vmm).unwrap_or(0), of_containers: Mutex::default() })
    }

    fn of_containers(&self) -> MutexGuard<'_, Vec<i32>> {
        // Nothing panics while the lock is held.
        self.of_containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container has come whose score that is to be, until what is returned is dropped.
    pub(super) fn claim(self: &Arc<Self>, score: Option<i32>) -> ScoreClaim {
        if let Some(score) = score {
            let mut scores = self.of_containers();
            scores.push(score);
            self.write(&scores);
        }
        ScoreClaim { vmm: Arc::clone(self), score }
    }

    fn write(&self, scores: &[i32]) {
        let score = lowest(scores).unwrap_or(self.first).to_string();
        // Without a file, or with a VMM that is gone, there is nothing to protect.
        let written = self.file.as_ref().map(|file| file.write_all_at(score.as_bytes(), 0));
        if let Some(Err(error)) = written.filter(|written| !is_gone(written)) {
            logging::warn(format_args!("process.oomScoreAdj: the VMM cannot have {score} on the host: {error}"));
        }
    }
}

fn is_gone(written: &io::Result<()>) -> bool {
    written.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ESRCH))
}

fn lowest(scores: &[i32]) -> Option<i32> {
    scores.iter().min().copied()
}

/// One container's share of it.
#[derive(Debug)]
pub(super) struct ScoreClaim {
    vmm: Arc<VmmScore>,
    score: Option<i32>,
}

impl Drop for ScoreClaim {
    fn drop(&mut self) {
        let Some(score) = self.score else { return };
        let mut scores = self.vmm.of_containers();
        if let Some(place) = scores.iter().position(|other| *other == score) {
            scores.swap_remove(place);
        }
        self.vmm.write(&scores);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_goes_before_containerd_and_not_beyond_the_highest() {
        assert_eq!((raised(-999), raised(0), raised(HIGHEST)), (-998, 1, HIGHEST));
    }

    #[test]
    fn a_pods_vmm_has_the_lowest_score_of_the_containers_that_are_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let score = VmmScore { file: Some(file.reopen().unwrap()), first: 900, of_containers: Mutex::default() };
        let score = Arc::new(score);
        let written = || fs::read_to_string(file.path()).unwrap();

        let silent = score.claim(None);
        assert_eq!(written(), "");
        let first = score.claim(Some(500));
        assert_eq!(written(), "500");
        let (lower, higher) = (score.claim(Some(200)), score.claim(Some(800)));
        assert_eq!(written(), "200");
        drop((lower, silent));
        assert_eq!(written(), "500");
        drop(first);
        assert_eq!(written(), "800");
        drop(higher);
        assert_eq!(written(), "900");
    }
}
