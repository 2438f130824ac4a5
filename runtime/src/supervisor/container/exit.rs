// SPDX-License-Identifier: Apache-2.0
//! Init's end, and what becomes of what was written last.
//!
//! The guest tells twice: at the end itself, and once all that init wrote has been handed on. How long that takes is for the
//! readers to say. One that is there has all its time; one that has gone is given up at the end, and SIGKILL gives up the rest.

use std::time::Duration;

use bulkhead_protocol::agent::WaitProcessResponse;
use tokio::time::sleep;

use super::{CallError, Container, Ended};
use crate::supervisor::agent::AgentError;
use crate::supervisor::streams::OutputStreams;
use crate::trace::now_ns;

/// How long init may take to end after SIGKILL, and its container to be forgotten; and how long the guest may take to tell of
/// the end once its output is not waited for any more.
const KILL_PATIENCE: Duration = Duration::from_secs(30);
const LAST_PATIENCE: Duration = Duration::from_secs(5);

/// What is said of an init that was not seen to end in that time.
pub(in crate::supervisor) const DEFIANT: &str = "the guest did not tell of the container's end after SIGKILL";

/// How long, after init's end, the readers of other processes' output may take. What is on its way is less than a mebibyte:
/// one that needs longer has stopped, and is not to keep the container from ending.
const FAREWELL: Duration = Duration::from_secs(60);

/// What becomes of what a container has written last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LastOutput {
    /// Init lives.
    NotYet,
    /// Init has ended, and its readers take what is left.
    Delivered,
    /// Somebody does not want to wait for them.
    GivenUp,
}

impl Ended {
    /// An end of which the guest says when it was, on the host's `CLOCK_MONOTONIC`: not before `begin_ns`, and not after now.
    pub(in crate::supervisor) fn told(status: u8, at_ns: u64, begin_ns: u64) -> Self {
        let (now, now_ns) = (Self::now(status), now_ns());
        let ago = now_ns.saturating_sub(at_ns.max(begin_ns));
        Self { at: now.at.saturating_sub(Duration::from_nanos(ago)), ..now }
    }
}

impl Container {
    /// How init has ended, once all that it wrote has been handed on to `streams`.
    pub(in crate::supervisor) async fn exit(&self, streams: &OutputStreams) -> Result<WaitProcessResponse, AgentError> {
        let exit = tokio::select! {
            exit = self.agent.wait("") => exit?,
            never = self.agent.at_end("", || self.has_ended(streams)) => match never {},
        };
        self.has_ended(streams);
        let mut life = self.life();
        life.ended_ns = Some(self.agent.on_host_clock(exit.exited_at_ns));
        life.oom_kills = exit.oom_kills;
        drop(life);
        Ok(exit)
    }

    /// Init has ended: its last output is delivered from here on.
    fn has_ended(&self, streams: &OutputStreams) {
        streams.let_go();
        self.last_output.send_if_modified(|output| {
            let is_first = *output == LastOutput::NotYet;
            if is_first {
                *output = LastOutput::Delivered;
            }
            is_first
        });
    }

    /// Whether init is known to have ended.
    pub(in crate::supervisor) fn init_has_ended(&self) -> bool {
        *self.last_output.borrow() != LastOutput::NotYet
    }

    /// What the guest said to a call that is about living processes. It forgets the container as soon as nothing that was written
    /// is left in it, which may be long before that is read: what it refuses after init's end, it refuses for that end.
    pub(in crate::supervisor) fn heard<T>(&self, answer: Result<T, AgentError>) -> Result<T, CallError> {
        answer.map_err(|error| match error {
            AgentError::Refused { .. } if self.init_has_ended() => CallError::NotRunning,
            error => error.into(),
        })
    }

    /// Returns when the guest has had all its time to tell of an end that SIGKILL has made: of init's, or of that of its output
    /// once it is given up, which ends `streams`.
    pub(in crate::supervisor) async fn defies_kill(&self, streams: &OutputStreams) {
        // The senders are this very container's: they live.
        let survives = async {
            let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
            sleep(KILL_PATIENCE).await;
        };
        let mut last_output = self.last_output.subscribe();
        tokio::select! {
            biased;
            _ = last_output.wait_for(|output| *output != LastOutput::NotYet) => {}
            () = survives => return,
        }
        self.output_given_up().await;
        streams.give_up();
        sleep(LAST_PATIENCE).await;
    }

    /// Returns when the guest has had all its time to forget the container, whose output was given up: what it has to write back
    /// may be much.
    pub(in crate::supervisor) async fn defies_deletion(&self) {
        self.output_given_up().await;
        sleep(KILL_PATIENCE).await;
    }

    /// Returns when the last output is given up.
    pub(in crate::supervisor) async fn output_given_up(&self) {
        // The sender is this very container's: it lives.
        let _ = self.last_output.subscribe().wait_for(|output| *output == LastOutput::GivenUp).await;
    }

    /// Gives up, after init's end, what has not been taken of its output.
    pub(super) fn give_up_output(&self) {
        self.last_output.send_replace(LastOutput::GivenUp);
    }

    /// After init's end: returns when nobody has output of other processes to fetch any more, or has had the time to, or when it
    /// is given up.
    pub(in crate::supervisor) async fn farewell(&self) {
        tokio::select! {
            () = self.execs.farewell(FAREWELL) => {}
            () = self.output_given_up() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_put_an_end_before_the_begin_or_into_the_future() {
        let ago = |told: &Ended| Ended::now(0).at.saturating_sub(told.at);
        let [short, long, ages] = [1, 10, 100].map(Duration::from_secs);
        let now_ns = now_ns();
        let before = |age: Duration| now_ns.saturating_sub(age.as_nanos() as u64);
        let earliest = before(long);

        let told = ago(&Ended::told(7, before(short), earliest));
        assert!(told >= short && told < long, "{told:?}");
        for lie in [0, before(ages)] {
            let told = ago(&Ended::told(7, lie, earliest));
            assert!(told >= short && told < ages, "{told:?}");
        }
        for lie in [now_ns + ages.as_nanos() as u64, u64::MAX] {
            let told = Ended::told(7, lie, earliest);
            assert!(told.at <= Ended::now(0).at && ago(&told) < short, "{told:?}");
        }
    }
}
