// SPDX-License-Identifier: Apache-2.0
//! A running machine's network follows that of the host: further interfaces get devices, and the guest is told.

use std::io;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

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
        loop {
            if asking.is_empty()
                && let Some(resolver) = following.resolver()
            {
                asking.spawn(questions::serve(self.agent.clone(), resolver));
            }
            let asker = tokio::select! {
                changed = following.changed() => match changed {
                    Ok(()) => None,
                    Err(error) => return given_up(&error),
                },
                Some(asker) = asked.recv() => Some(asker),
            };
            let result = self.catch_up(&mut following).await;
            let told = match &result {
                Ok(()) => Ok(()),
                Err(CatchUpError::Host(error)) => Err(error.to_string()),
                // The machine has gone, and whoever waits for it says so.
                Err(CatchUpError::Agent(AgentError::Lost)) => return,
                Err(CatchUpError::Agent(error)) => {
                    following.was_not_told();
                    Err(text::chain(error))
                }
            };
            if let (Err(why), None) = (&told, &asker) {
                logging::warn(format_args!("a change of the network was not passed on: {why}"));
            }
            if let Some(asker) = asker {
                // It may not wait any more.
                let _ = asker.send(told);
            }
            if let Err(CatchUpError::Host(error)) = result {
                return given_up(&error);
            }
        }
    }

    async fn catch_up(&self, following: &mut Following) -> Result<(), CatchUpError> {
        let begin_ns = now_ns();
        let Change { late, mut carriers, mut request } = following.look()?;
        for late in late {
            match self.control.attach_net(&late.device, &late.name).await {
                Ok(()) => self.container.network_is_served_by(late.device.backend(), begin_ns),
                Err(error) => {
                    request = following.give_up(&late, &text::chain(&error))?.or(request);
                    carriers.retain(|carrier| carrier.name != late.name);
                }
            }
        }
        for carrier in &carriers {
            self.change_link(following, carrier).await;
        }
        if let Some(request) = request {
            self.agent.change_network(&request).await?;
            logging::debug(format_args!("the guest's network has been changed"));
        }
        Ok(())
    }

    /// Has the link of a device follow the carrier of its interface.
    async fn change_link(&self, following: &mut Following, carrier: &Carrier) {
        match self.control.set_carrier(carrier).await {
            // The machine has gone, and whoever waits for it says so.
            Ok(()) | Err(ControlError::Gone { .. } | ControlError::Send { .. }) => {}
            Err(error) => {
                following.was_not_changed(carrier);
                logging::warn(format_args!("{}", text::chain(&error)));
            }
        }
    }
}

/// Why the guest does not have what the host has.
#[derive(Debug)]
enum CatchUpError {
    Host(io::Error),
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

fn given_up(error: &io::Error) {
    logging::warn(format_args!("the network is no longer followed: {error}"));
}
