// SPDX-License-Identifier: Apache-2.0
//! What a container asks a resolver that an engine has in its network namespace on the host: the agent takes the questions in the
//! guest, and here they are asked.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::agent::{Agent, AgentError};
use crate::logging;
use crate::network::Resolver;
use crate::text;

/// How many are asked at once: the agent keeps the others.
const AT_ONCE: usize = 32;

/// How long nothing is asked for after that has failed.
const PAUSE: Duration = Duration::from_secs(1);

/// How long an answer may take; whoever asked does not wait for longer, and asks again.
const LIMIT: Duration = Duration::from_secs(15);

/// Asks what the guest asks, as long as the machine is there.
pub(super) async fn serve(agent: Agent, resolver: Resolver) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut asking = JoinSet::new();
    let mut is_warned = false;
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&room).acquire_owned().await {
        while asking.try_join_next().is_some() {}
        let question = match agent.next_question().await {
            Ok(question) => question,
            // The machine's end is told of elsewhere.
            Err(AgentError::Lost) => return,
            Err(error) => {
                if !is_warned {
                    let why = text::chain(&error);
                    logging::warn(format_args!("the container's questions for names are not asked at present: {why}"));
                }
                is_warned = true;
                sleep(PAUSE).await;
                continue;
            }
        };
        is_warned = false;
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::Mutex;

    use async_trait::async_trait;
    use bulkhead_protocol::agent::{Answer, Empty, Question};
    use bulkhead_protocol::agent_ttrpc::{self, create_agent};
    use tokio::net::UnixListener;
    use tokio::sync::oneshot;
    use ttrpc::asynchronous::transport::Listener;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;
    use crate::network::NetworkNamespace;

    /// An agent that says no, asks one question, and then no more.
    struct Guest {
        calls: Mutex<u64>,
        answered: Mutex<Option<oneshot::Sender<u64>>>,
    }

    #[async_trait]
    impl agent_ttrpc::Agent for Guest {
        async fn wait_question(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Question> {
            let call = {
                let mut calls = self.calls.lock().unwrap();
                *calls += 1;
                *calls
            };
            match call {
                1 => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, "not now"))),
                // The datagram fails at once, if not for want of a resolver: it is too long.
                2 => Ok(Question { id: 7, message: vec![0; 65_530], ..Default::default() }),
                _ => std::future::pending().await,
            }
        }

        async fn answer_question(&self, _: &TtrpcContext, answer: Answer) -> ttrpc::Result<Empty> {
            let asker = self.answered.lock().unwrap().take();
            let _: Result<(), _> = asker.unwrap().send(answer.id);
            Ok(Empty::default())
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_call_that_fails_is_not_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().join("agent");
        let (answered, is_answered) = oneshot::channel();
        let guest = Guest { calls: Mutex::default(), answered: Mutex::new(Some(answered)) };
        let listener = Listener::from(UnixListener::bind(&address).unwrap());
        let mut server = Server::new().add_listener(listener).register_service(create_agent(Arc::new(guest)));
        server.start().await.unwrap();
        let agent = Agent::new(UnixStream::connect(&address).unwrap(), "box".to_owned()).unwrap();
        let namespace = NetworkNamespace::open(Path::new("/proc/self/ns/net")).unwrap();
        let serving = tokio::spawn(serve(agent, Resolver::new(Arc::new(namespace))));

        assert_eq!(is_answered.await.unwrap(), 7);

        serving.abort();
    }
}
