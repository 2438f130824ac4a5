// SPDX-License-Identifier: Apache-2.0
//! Sockets that stand for the host's. The case is the client, by the container's root in /proc.

use std::sync::Arc;

use bulkhead_agent::container::{ContainerSpec, Engine};
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::fixture::{DEADLINE, World, mount, request};

/// A socket that the container has as /run/NUMBER.
fn socket(number: u32) -> wire::Mount {
    let socket = wire::HostSocket { number, mode: 0o640, uid: 5, gid: 6, ..Default::default() };
    wire::Mount { socket: Some(socket).into(), ..mount(&format!("/run/{number}"), "", 0, "") }
}

/// Makes a container that waits, with these sockets. Returns where its root is.
async fn waiting(world: &World, sockets: &[u32]) -> String {
    let mut request = request(&["sleep", "1000"]);
    request.mounts.extend(sockets.iter().map(|number| socket(*number)));
    let spec = ContainerSpec::from_wire(request).unwrap();
    let pid = world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();
    format!("/proc/{pid}/root")
}

async fn next(engine: &Arc<Engine>, stream: u32) -> Option<u32> {
    timeout(DEADLINE, engine.wait_connection("case", stream)).await.unwrap().unwrap()
}

async fn end(world: &World) {
    timeout(DEADLINE, world.engine.delete("case", false)).await.unwrap().unwrap();
    let left: Vec<_> = std::fs::read_dir(world.folder.path().join("sockets")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

pub(crate) async fn connections_are_told_and_joined_with_the_hosts_streams() {
    let world = World::new();
    let root = waiting(&world, &[3, 7]).await;

    let mut client = UnixStream::connect(format!("{root}/run/7")).await.unwrap();
    assert_eq!(next(&world.engine, 100).await, Some(7));
    let mut host = world.open_stream(100);
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let (mut question, mut answer) = (String::new(), String::new());
    timeout(DEADLINE, host.read_to_string(&mut question)).await.unwrap().unwrap();
    host.write_all(b"answer").await.unwrap();
    drop(host);
    timeout(DEADLINE, client.read_to_string(&mut answer)).await.unwrap().unwrap();

    assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
    end(&world).await;
}

pub(crate) async fn connections_to_all_sockets_have_their_turn() {
    let world = World::new();
    let root = waiting(&world, &[1, 2]).await;
    let engine = Arc::clone(&world.engine);
    let first = tokio::spawn(async move { next(&engine, 100).await });
    tokio::task::yield_now().await;

    let mut clients = Vec::new();
    for number in [1, 1, 1, 2] {
        clients.push(UnixStream::connect(format!("{root}/run/{number}")).await.unwrap());
    }

    let told = [first.await.unwrap(), next(&world.engine, 101).await];
    assert!(told.contains(&Some(1)) && told.contains(&Some(2)), "{told:?}");
    end(&world).await;
}

pub(crate) async fn socket_is_owned_as_the_hosts() {
    let world = World::new();
    let script = "stat -c '%F %a %u %g' /run/4";
    let seen = world.script(script, |request| request.mounts.push(socket(4))).await;
    assert_eq!(seen, "socket 640 5 6");
}

pub(crate) async fn what_was_sent_last_is_told_after_the_containers_end() {
    let world = World::new();
    let root = waiting(&world, &[9]).await;
    let mut client = UnixStream::connect(format!("{root}/run/9")).await.unwrap();
    client.write_all(b"last words").await.unwrap();
    drop(client);
    world.engine.signal("case", "", 9, false).unwrap();
    timeout(DEADLINE, world.engine.wait("case", "")).await.unwrap().unwrap();

    assert_eq!(next(&world.engine, 100).await, Some(9));
    let mut words = String::new();
    timeout(DEADLINE, world.open_stream(100).read_to_string(&mut words)).await.unwrap().unwrap();
    assert_eq!(words, "last words");
    assert_eq!(next(&world.engine, 101).await, None);
    end(&world).await;
}

pub(crate) async fn stream_that_the_host_closes_at_once_closes_the_connection() {
    let world = World::new();
    let root = waiting(&world, &[1]).await;
    let mut client = UnixStream::connect(format!("{root}/run/1")).await.unwrap();
    assert_eq!(next(&world.engine, 100).await, Some(1));

    drop(world.open_stream(100));

    let mut nothing = String::new();
    timeout(DEADLINE, client.read_to_string(&mut nothing)).await.unwrap().unwrap();
    assert_eq!(nothing, "");
    end(&world).await;
}
