// SPDX-License-Identifier: Apache-2.0
//! Containers that have one pid namespace in common.

use bulkhead_agent::container::ContainerSpec;
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;
use tokio::time::timeout;

use super::stdio::read_until;
use crate::fixture::{DEADLINE, World, request};

/// A container of that id that has the common namespace.
fn common(id: &str, script: &str) -> wire::CreateContainerRequest {
    wire::CreateContainerRequest { id: id.to_owned(), common_pids: true, ..request(&["sh", "-c", script]) }
}

/// The commands of the processes that a further container sees.
async fn seen(world: &World) -> String {
    world.script("ps -o args", |request| request.common_pids = true).await
}

pub(crate) async fn containers_see_each_other_and_end_alone() {
    let world = World::new();
    if !world.has_cgroups() {
        println!("skipped: needs cgroup v2");
        return;
    }
    let script = "sleep 1001 & echo there; wait";
    let [stdout, _stderr] = world.start(common("one", script)).await.unwrap();
    read_until(&stdout, "there").await;
    let spec = ContainerSpec::from_wire(common("two", "sleep 1002; true")).unwrap();
    world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();

    let all = seen(&world).await;
    assert!(all.contains("sleep 1001") && all.contains("sleep 1002"), "{all}");
    let own = world.script("ps -o args", |_| {}).await;
    assert!(!own.contains("sleep"), "{own}");

    world.engine.signal("one", "", 9, false).unwrap();
    let exit = timeout(DEADLINE, world.engine.wait("one", "")).await.unwrap().unwrap();
    assert_eq!(exit.code, 137);
    world.engine.delete("one", true).await.unwrap();
    let left = seen(&world).await;
    assert!(!left.contains("sleep 1001") && left.contains("sleep 1002"), "{left}");
    world.engine.delete("two", true).await.unwrap();
}

pub(crate) async fn first_process_shows_nothing_of_the_agent() {
    let world = World::new();
    let script = "cat /proc/1/comm; ls /proc/1/root 2>&1; kill -9 1; cat /proc/1/comm";

    let seen = world.script(script, |request| request.common_pids = true).await;

    assert_eq!(seen, "pause\nls: /proc/1/root: Permission denied\npause");
}
