// SPDX-License-Identifier: Apache-2.0
//! A running machine's network follows that of the host: further interfaces get devices, and the guest is told.

use std::io;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::agent::{Agent, AgentError};
use super::container::Container;
use super::forward::forward;
use super::questions;
use super::vmm_control::{ControlError, VmmControl};
use crate::logging;
use crate::network::{Carrier, Change, Follower, Following};
use crate::text;
use crate::trace::now_ns;

/// Whoever wants to know that the guest has what the host has by now, or why not.
pub(crate) type Settler = mpsc::Sender<Asker>;
type Asker = oneshot::Sender<Result<(), String>>;

/// How many may ask at once.
const ASKERS: usize = 8;

/// How often what has failed is tried again, unless something changes: the first time soon, and then after twice as long each time.
/// Who starts the container waits for that, some 13 s in all.
const TRIES: u32 = 7;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// How long who asks waits where changes have it tried ever again: twice as long as for all tries.
const PATIENCE: Duration = FIRST_PAUSE.saturating_mul(2 << TRIES);

/// What follows needs beside what is followed.
pub(super) struct NetworkTask {
    pub(super) container: Arc<Container>,
    pub(super) agent: Agent,
    pub(super) control: VmmControl,
    /// Whether the connections to the network's loopback addresses on the host are to be taken, too.
    pub(super) forwards: bool,
}

impl NetworkTask {
    /// Follows the network until the machine is gone, as one of `tasks`. Who starts the container waits from here on for
    /// what has come until then.
    pub(super) fn start(self, follower: Follower, tasks: &mut JoinSet<()>) -> io::Result<()> {
        let following = follower.follow()?;
        let (settler, asked) = mpsc::channel(ASKERS);
        self.container.network_settles_by(settler);
        tasks.spawn(self.run(following, asked));
        Ok(())
    }

    async fn run(self, following: Following, asked: mpsc::Receiver<Asker>) {
        // Not before: nobody who has the container made waits for this, but who starts it then does.
        let listening = if self.forwards { following.loopback().listen() } else { None };
        let container = Arc::clone(&self.container);
        let forwarding = async {
            if let Some(listening) = listening {
                forward(listening, container).await;
            }
        };
        tokio::join!(self.follow(following, asked), forwarding);
    }

    async fn follow(self, mut following: Following, mut asked: mpsc::Receiver<Asker>) {
        let mut asking = JoinSet::new();
        let mut attempts = Attempts::default();
        let mut askers = Vec::new();
        // Those of the devices that have come since the machine runs; some tens at most.
        let mut windows = Vec::new();
        // What the kernel tells can be heard.
        let mut is_heard = true;
        loop {
            // It ends only with the machine, or by a fault.
            while asking.try_join_next().is_some() {}
            if asking.is_empty()
                && let Some(resolver) = following.resolver()
            {
                asking.spawn(questions::serve(self.agent.clone(), resolver));
            }
            let mut has_changed = false;
            let changed = tokio::select! {
                changed = following.changed(), if is_heard => {
                    has_changed = changed.is_ok();
                    changed
                }
                Some(asker) = asked.recv() => {
                    askers.push((Instant::now() + PATIENCE, asker));
                    Ok(())
                }
                () = attempts.next() => {
                    attempts.begin();
                    Ok(())
                }
            };
            is_heard = changed.is_ok();
            let result = match changed {
                Ok(()) => self.catch_up(&mut following, &mut attempts, &mut windows).await,
                Err(error) => Err(error.into()),
            };
            // What has changed could not be seen.
            if has_changed && attempts.are_over() && matches!(result, Err(CatchUpError::Host(_))) {
                attempts.begin_anew();
            }
            let told = match result {
                Ok(()) => Ok(()),
                // The machine has gone, and whoever waits for it says so.
                Err(CatchUpError::Agent(AgentError::Lost)) => return,
                Err(CatchUpError::Host(error)) => Err(format!("it cannot be looked at: {error}")),
                Err(CatchUpError::Link(error)) => Err(text::chain(&error)),
                Err(CatchUpError::Agent(error)) => Err(text::chain(&error)),
            };
            match &told {
                Ok(()) => attempts.succeeded(),
                Err(why) => {
                    following.was_not_told();
                    let log = if attempts.failed(why) { logging::warn } else { logging::debug };
                    log(format_args!("a change of the network was not passed on in full: {why}"));
                }
            }
            answer(&mut askers, &told, told.is_ok() || attempts.are_over());
        }
    }

    async fn catch_up(
        &self,
        following: &mut Following,
        attempts: &mut Attempts,
        windows: &mut Vec<u32>,
    ) -> Result<(), CatchUpError> {
        let begin_ns = now_ns();
        let mut unchanged = None;
        // Each round does without an interface that was new in the one before.
        let request = loop {
            let Change { late, mut carriers, request, is_news } = following.look()?;
            if is_news {
                attempts.begin_anew();
            }
            let mut are_attached = true;
            for late in late {
                match self.control.attach_net(&late.device, &late.name).await {
                    Ok(window) => {
                        windows.push(window);
                        self.container.network_is_served_by(late.device.backend(), begin_ns);
                    }
                    Err(error) => {
                        following.give_up(&late, &text::chain(&error));
                        carriers.retain(|carrier| carrier.name != late.name);
                        are_attached = false;
                    }
                }
            }
            for carrier in &carriers {
                unchanged = self.change_link(following, carrier).await.err().or(unchanged);
            }
            if are_attached {
                break request;
            }
            following.was_not_told();
        };
        if let Some(mut request) = request {
            request.windows.clone_from(windows);
            self.agent.change_network(&request).await?;
            logging::debug(format_args!("the guest's network has been changed"));
        }
        unchanged.map_or(Ok(()), |error| Err(CatchUpError::Link(error)))
    }

    /// Has the link of a device follow the carrier of its interface.
    async fn change_link(&self, following: &mut Following, carrier: &Carrier) -> Result<(), ControlError> {
        match self.control.set_carrier(carrier).await {
            // The machine has gone, and whoever waits for it says so.
            Ok(()) | Err(ControlError::Gone { .. } | ControlError::Send { .. }) => Ok(()),
            Err(error) => {
                following.was_not_changed(carrier);
                Err(error)
            }
        }
    }
}

/// Why the guest does not have what the host has.
#[derive(Debug)]
enum CatchUpError {
    Host(io::Error),
    Link(ControlError),
    Agent(AgentError),
}

impl From<io::Error> for CatchUpError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl From<AgentError> for CatchUpError {
    fn from(error: AgentError) -> Self {
        Self::Agent(error)
    }
}

/// Tells those who ask how it has ended, or, if it is tried again, how it has gone until now where they have waited to their end.
fn answer(askers: &mut Vec<(Instant, Asker)>, told: &Result<(), String>, has_ended: bool) {
    let now = Instant::now();
    for (end, asker) in mem::take(askers) {
        if has_ended || end <= now {
            // It may not wait any more.
            let _: Result<(), _> = asker.send(told.clone());
        } else if !asker.is_closed() {
            askers.push((end, asker));
        }
    }
}

/// What has failed is tried again, a few times.
#[derive(Debug, Default)]
struct Attempts {
    /// How often it has failed since something else is to be done, as far as that was its turn.
    failed: u32,
    /// When it is tried again.
    next: Option<Instant>,
    /// What has been said of it.
    told: Option<String>,
}

impl Attempts {
    /// What is to be done is something else now, so that it is worth trying as often again.
    fn begin_anew(&mut self) {
        (self.failed, self.next) = (0, None);
    }

    /// The next one begins.
    fn begin(&mut self) {
        self.next = None;
    }

    fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Whether that is to be told: what is good in a moment is not, and nothing is twice.
    fn failed(&mut self, why: &str) -> bool {
        if self.next.is_some() {
            // It was done besides, for a change that was none.
            return false;
        }
        self.next = pause(self.failed).map(|pause| Instant::now() + pause);
        self.failed = self.failed.saturating_add(1);
        let is_news = self.are_over() && self.told.as_deref() != Some(why);
        if is_news {
            self.told = Some(why.to_owned());
        }
        is_news
    }

    fn are_over(&self) -> bool {
        self.failed > TRIES
    }

    /// Waits for the next; without end if there is none.
    async fn next(&self) {
        match self.next {
            Some(next) => sleep_until(next).await,
            None => std::future::pending().await,
        }
    }
}

/// How long nothing is tried after so many failures and one more; `None` if nothing is tried any more.
fn pause(failed: u32) -> Option<Duration> {
    (failed < TRIES).then(|| FIRST_PAUSE * (1 << failed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_tried_again_ever_later_and_not_for_ever() {
        let pauses: Vec<_> = (0..).map_while(pause).collect();
        assert!(pauses.is_sorted() && pauses[0] < Duration::from_secs(1), "{pauses:?}");
        assert!(pauses.iter().sum::<Duration>() < Duration::from_secs(20), "{pauses:?}");

        let mut attempts = Attempts::default();
        for _ in &pauses {
            attempts.begin();
            attempts.failed("no");
            assert!(!attempts.are_over());
        }
        // It stays so until something changes.
        for _ in 0..2 {
            attempts.begin();
            attempts.failed("no");
            assert!(attempts.are_over());
        }
        attempts.begin_anew();
        attempts.failed("no");
        assert!(!attempts.are_over());
    }

    #[test]
    fn what_is_no_change_neither_uses_up_tries_nor_puts_them_off() {
        let mut attempts = Attempts::default();
        attempts.failed("no");
        let next = attempts.next;
        for _ in 0..100 {
            assert!(!attempts.failed("no"));
        }
        assert_eq!((attempts.failed, attempts.next), (1, next));
    }

    #[test]
    fn a_failure_is_told_once_when_all_tries_are_over() {
        let mut attempts = Attempts::default();
        for _ in 0..TRIES {
            assert!(!attempts.failed("no"));
            attempts.begin();
        }
        let news = ["no", "no", "never", "never"].map(|why| attempts.failed(why));
        assert_eq!(news, [true, false, true, false]);
        attempts.succeeded();
        assert!(!attempts.failed("never") && !attempts.are_over());
    }

    #[test]
    fn who_asks_is_told_how_it_goes_when_it_has_waited_long() {
        let (told, now) = (Err("no".to_owned()), Instant::now());
        let (mut askers, mut answers) = (Vec::new(), Vec::new());
        for end in [now, now + PATIENCE] {
            let (asker, answer) = oneshot::channel();
            askers.push((end, asker));
            answers.push(answer);
        }

        answer(&mut askers, &told, false);
        assert_eq!(answers[0].try_recv(), Ok(told.clone()));
        assert_eq!(answers[1].try_recv(), Err(oneshot::error::TryRecvError::Empty));

        answer(&mut askers, &told, true);
        assert_eq!((answers[1].try_recv(), askers.len()), (Ok(told), 0));
    }
}
