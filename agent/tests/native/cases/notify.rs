// SPDX-License-Identifier: Apache-2.0
//! The socket at which a container tells that it is ready. The case sends, by the container's root in /proc.

use std::os::unix::net::UnixDatagram;

use bulkhead_agent::container::ContainerSpec;
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;
use tokio::time::timeout;

use crate::fixture::{DEADLINE, World, mount, request};

/// Makes a container that waits. Returns where its socket is, which it has by two mounts.
async fn waiting(world: &World) -> String {
    let mut request = request(&["sleep", "1000"]);
    let notify = |place, folder| wire::Mount { notify_socket: true, source_is_dir: folder, ..mount(place, "", 0, "") };
    request.mounts.extend([notify("/run/notify", true), notify("/other", false)]);
    let spec = ContainerSpec::from_wire(request).unwrap();
    let pid = world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();
    format!("/proc/{pid}/root")
}

async fn ready(world: &World) -> Option<String> {
    timeout(DEADLINE, world.engine.wait_ready("case")).await.unwrap().unwrap()
}

async fn end(world: &World) {
    timeout(DEADLINE, world.engine.delete("case", false)).await.unwrap().unwrap();
    let left: Vec<_> = std::fs::read_dir(world.folder.path().join("sockets")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

pub(crate) async fn readiness_is_told_whenever_it_is_asked_for() {
    let world = World::new();
    let root = waiting(&world).await;
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    let send = async |place: &str, message: &[u8]| {
        while sender.send_to(message, format!("{root}{place}")).is_err() {
            tokio::task::yield_now().await;
        }
    };

    // More than the kernel lets wait.
    for _ in 0..2000 {
        send("/run/notify/notify.sock", b"STATUS=not yet").await;
    }
    send("/other", b"STATUS=up\nREADY=1").await;
    send("/run/notify/notify.sock", b"READY=2").await;

    assert_eq!(ready(&world).await.as_deref(), Some("READY=1"));
    assert_eq!(ready(&world).await.as_deref(), Some("READY=1"));
    end(&world).await;
}

pub(crate) async fn end_without_readiness_is_told() {
    let world = World::new();
    waiting(&world).await;
    world.engine.signal("case", "", 9, false).unwrap();
    assert_eq!(ready(&world).await, None);
    end(&world).await;

    let root = waiting(&world).await;
    let sender = UnixDatagram::unbound().unwrap();
    sender.send_to(b"READY=1", format!("{root}/other")).unwrap();
    world.engine.signal("case", "", 9, false).unwrap();
    assert_eq!(ready(&world).await.as_deref(), Some("READY=1"));
    end(&world).await;
}
