// SPDX-License-Identifier: Apache-2.0
//! Events for containerd, sent one after the other in the order in which they happened.

use std::env;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use tokio::net::UnixStream;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use super::arguments::Arguments;
use crate::logging;
use crate::text;

/// Most events that wait for containerd to come back.
const QUEUE: usize = 1024;

/// How long containerd may take to be connected to. It may take any time to acknowledge an event: one that was sent again
/// meanwhile would arrive twice.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait before containerd is tried again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long the last events may take.
const LAST_EVENTS: Duration = Duration::from_secs(3);

/// Where containerd takes events.
pub(super) fn address(arguments: &Arguments) -> PathBuf {
    let of_environment = || env::var_os("TTRPC_ADDRESS").filter(|address| !address.is_empty()).map(PathBuf::from);
    let named = arguments.events.clone().or_else(of_environment);
    named.unwrap_or_else(|| format!("{}.ttrpc", arguments.address).into())
}

/// Takes events for containerd.
#[derive(Debug)]
pub(super) struct Publisher {
    namespace: String,
    queue: Sender<Item>,
}

/// What waits in the queue.
#[derive(Debug)]
enum Item {
    Event(Envelope),
    /// What was before it has been sent.
    Flush(oneshot::Sender<()>),
}

impl Publisher {
    /// A publisher of a namespace's events to the socket at that address, within an event loop.
    pub(super) fn new(address: PathBuf, namespace: &str) -> Self {
        let (queue, items) = channel(QUEUE);
        tokio::spawn(forward_all(address, items));
        Self { namespace: namespace.to_owned(), queue }
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns when what was published has been sent, or has had the time.
    pub(super) async fn flush(&self) {
        let (sent, flushed) = oneshot::channel();
        let _ = timeout(LAST_EVENTS, async {
            let _ = self.queue.send(Item::Flush(sent)).await;
            let _ = flushed.await;
        })
        .await;
    }

    /// Publishes an event of containerd's under a topic. Nobody waits for its arrival.
    pub(super) fn publish<M: Message>(&self, topic: &str, event: &M) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = Timestamp {
            seconds: now.as_secs().cast_signed(),
            nanos: now.subsec_nanos().cast_signed(),
            ..Timestamp::default()
        };
        let Ok(value) = event.write_to_bytes() else {
            return;
        };
        let event = Any { type_url: format!("containerd.events.{}", M::NAME), value, ..Any::default() };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Envelope::default()
        };
        if self.queue.try_send(Item::Event(envelope)).is_err() {
            logging::warn(format_args!("an event of {topic} is lost: containerd takes none"));
        }
    }
}

async fn forward_all(address: PathBuf, mut items: Receiver<Item>) {
    let mut connection = None;
    while let Some(item) = items.recv().await {
        let envelope = match item {
            Item::Event(envelope) => envelope,
            Item::Flush(sent) => {
                let _ = sent.send(());
                continue;
            }
        };
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
        let mut pause = FIRST_PAUSE;
        while let Err(error) = forward(&mut connection, &address, &request).await {
            connection = None;
            logging::debug(format_args!("containerd does not take events at {}: {error}", address.display()));
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Sends one event. That containerd refuses it is no reason to send it again.
async fn forward(
    connection: &mut Option<EventsClient>,
    address: &Path,
    request: &ForwardRequest,
) -> Result<(), ttrpc::Error> {
    let client = match connection {
        Some(client) => client,
        None => connection.insert(connect(address).await?),
    };
    match client.forward(Context::default(), request).await {
        Err(ttrpc::Error::RpcStatus(status)) => {
            let why = text::one_line(status.message());
            logging::warn(format_args!("containerd refused an event of {}: {why}", request.envelope.topic));
            Ok(())
        }
        result => result.map(drop),
    }
}

async fn connect(address: &Path) -> Result<EventsClient, ttrpc::Error> {
    let failed = |error: std::io::Error| ttrpc::Error::Socket(error.to_string());
    let connected = timeout(CONNECT_TIMEOUT, UnixStream::connect(address)).await;
    let stream = connected.map_err(|elapsed| failed(elapsed.into()))?.map_err(failed)?;
    Ok(EventsClient::new(Client::new(Socket::new(stream))))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::well_known_types::empty::Empty;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixListener;
    use ttrpc::asynchronous::transport::Listener;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    /// Takes events; with each, how long whoever sent it waits for the answer.
    #[derive(Default)]
    struct Containerd(Mutex<Vec<(Envelope, i64)>>);

    impl Containerd {
        async fn serve(address: &Path) -> (Arc<Self>, Server) {
            let containerd = Arc::new(Self::default());
            let listener = Listener::from(UnixListener::bind(address).unwrap());
            let mut server = Server::new().add_listener(listener).register_service(create_events(containerd.clone()));
            server.start().await.unwrap();
            (containerd, server)
        }
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, context: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.lock().unwrap().push((request.envelope.unwrap(), context.timeout_nano));
            Ok(Empty::default())
        }
    }

    #[tokio::test]
    async fn events_arrive_once_and_in_order_also_if_containerd_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("c.ttrpc");
        let publisher = Publisher::new(address.clone(), "ns");
        publisher.publish("/tasks/oom", &TaskOOM { container_id: "c1".into(), ..TaskOOM::default() });
        for status in 0..3 {
            publisher.publish("/tasks/exit", &TaskExit { exit_status: status, ..TaskExit::default() });
        }
        tokio::time::sleep(FIRST_PAUSE).await;

        let (containerd, _server) = Containerd::serve(&address).await;
        publisher.flush().await;

        let (received, patience): (Vec<_>, Vec<_>) = containerd.0.lock().unwrap().iter().cloned().unzip();
        let topics: Vec<_> = received.iter().map(|envelope| envelope.topic.as_str()).collect();
        assert_eq!(topics, ["/tasks/oom", "/tasks/exit", "/tasks/exit", "/tasks/exit"]);
        assert_eq!(
            (received[0].namespace.as_str(), received[0].event.type_url.as_str()),
            ("ns", "containerd.events.TaskOOM")
        );
        let last = TaskExit::parse_from_bytes(&received[3].event.value).unwrap();
        assert_eq!(last.exit_status, 2);
        // Were there a limit, one that takes longer would come twice.
        assert_eq!(patience, [0; 4]);
    }

    #[tokio::test]
    async fn what_containerd_did_not_acknowledge_before_it_was_gone_comes_again() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("c.ttrpc");
        let listener = UnixListener::bind(&address).unwrap();
        let publisher = Publisher::new(address.clone(), "ns");
        publisher.publish("/tasks/oom", &TaskOOM { container_id: "c1".into(), ..TaskOOM::default() });
        let (mut connection, _) = listener.accept().await.unwrap();
        connection.read_u8().await.unwrap();

        std::fs::remove_file(&address).unwrap();
        let (back, _server) = Containerd::serve(&address).await;
        drop((connection, listener));
        publisher.flush().await;

        assert_eq!(back.0.lock().unwrap().len(), 1);
    }
}
