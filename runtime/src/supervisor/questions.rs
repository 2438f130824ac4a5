// SPDX-License-Identifier: Apache-2.0
//! What a container asks a resolver that an engine has in its network namespace on the host: the agent takes the questions in the
//! guest, and here they are asked.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::agent::{Agent, AgentError};
use crate::logging;
use crate::network::Resolver;
use crate::text;

/// How many are asked at once: the agent keeps the others.
const AT_ONCE: usize = 32;

/// How long an answer may take; whoever asked does not wait for longer, and asks again.
const LIMIT: Duration = Duration::from_secs(15);

/// Asks what the guest asks, as long as the machine is there.
pub(super) async fn serve(agent: Agent, resolver: Resolver) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut asking = JoinSet::new();
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&room).acquire_owned().await {
        while asking.try_join_next().is_some() {}
        let question = match agent.next_question().await {
            Ok(question) => question,
            // The machine's end is told of elsewhere.
            Err(AgentError::Lost) => return,
            Err(error) => {
                let why = text::chain(&error);
                return logging::warn(format_args!("the container's questions for names are no longer asked: {why}"));
            }
        };
        let (agent, resolver) = (agent.clone(), resolver.clone());
        asking.spawn(async move {
            let answer = match timeout(LIMIT, resolver.ask(&question.message, question.over_tcp)).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(error)) => {
                    logging::debug(format_args!("a question for a name was not answered: {error}"));
                    Vec::new()
                }
                Err(_) => Vec::new(),
            };
            // It fails only when the machine is gone.
            let _ = agent.answer_question(question.id, answer).await;
            drop(place);
        });
    }
}
