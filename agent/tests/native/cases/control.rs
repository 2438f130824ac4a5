// SPDX-License-Identifier: Apache-2.0
//! Pausing, changing and looking at a running container.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::container::{CgroupError, ContainerSpec, ControlError, ProcessSpec};
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;
use tokio::time::timeout;

use super::exec::sleeping;
use super::stdio::read_until;
use crate::fixture::{DEADLINE, World, process, request};

fn setting(file: &str, value: &str) -> wire::CgroupSetting {
    wire::CgroupSetting { file: file.to_owned(), value: value.to_owned(), ..Default::default() }
}

/// Whether the case can be run: with cgroup v2 and this controller (empty for none).
fn has(world: &World, controller: &str) -> bool {
    let controllers = std::fs::read_to_string(world.cgroup_file("cgroup.controllers")).unwrap_or_default();
    if world.has_cgroups() && controllers.contains(controller) {
        return true;
    }
    println!("skipped: needs cgroup v2 with the {controller} controller");
    false
}

fn is_frozen(world: &World) -> bool {
    std::fs::read_to_string(world.cgroup_file("case/cgroup.events")).unwrap().contains("frozen 1")
}

pub(crate) async fn paused_container_stands_still_until_it_is_resumed() {
    let world = World::new();
    if !has(&world, "") {
        return;
    }
    let [stdout, _stderr] =
        world.start(request(&["sh", "-c", "while :; do echo tick; sleep 0.01; done"])).await.unwrap();
    read_until(&stdout, "tick").await;
    timeout(DEADLINE, world.engine.pause("case")).await.unwrap().unwrap();
    assert!(is_frozen(&world));
    // Pausing again is no error.
    timeout(DEADLINE, world.engine.pause("case")).await.unwrap().unwrap();
    let mut buffer = [0; 4096];
    tokio::time::sleep(Duration::from_millis(50)).await;
    while stdout.read_now(&mut buffer).unwrap().is_some() {}
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(stdout.read_now(&mut buffer).unwrap(), None);

    world.engine.resume("case").await.unwrap();
    read_until(&stdout, "tick").await;
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn exec_in_a_paused_container_waits_without_holding_up_the_rest() {
    let world = World::new();
    if !has(&world, "") {
        return;
    }
    sleeping(&world).await;
    world.engine.pause("case").await.unwrap();
    let spec = ProcessSpec::from_wire(process(&mut request(&["sh", "-c", "exit 5"])).clone()).unwrap();
    let engine = Arc::clone(&world.engine);
    let exec = tokio::spawn(async move { engine.exec("case", "one", &spec, &mut Trace::default()).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!exec.is_finished());
    // Others are served in the meantime.
    assert_eq!(world.engine.processes("case").await.unwrap().len(), 2);
    world.engine.resume("case").await.unwrap();
    timeout(DEADLINE, exec).await.unwrap().unwrap().unwrap();
    assert_eq!(timeout(DEADLINE, world.engine.wait("case", "one")).await.unwrap().unwrap().code, 5);
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn paused_container_can_be_killed_and_deleted() {
    let world = World::new();
    if !has(&world, "") {
        return;
    }
    for kill_first in [true, false] {
        sleeping(&world).await;
        world.engine.pause("case").await.unwrap();
        let spec = ProcessSpec::from_wire(process(&mut request(&["true"])).clone()).unwrap();
        let engine = Arc::clone(&world.engine);
        let exec = tokio::spawn(async move { engine.exec("case", "one", &spec, &mut Trace::default()).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        if kill_first {
            world.engine.signal("case", "", 9, false).unwrap();
            assert_eq!(timeout(DEADLINE, world.engine.wait("case", "")).await.unwrap().unwrap().code, 137);
            assert!(matches!(world.engine.resume("case").await, Err(ControlError::Stopped { .. })));
        }
        timeout(DEADLINE, world.engine.delete("case", false)).await.unwrap().unwrap();
        timeout(DEADLINE, exec).await.unwrap().unwrap().unwrap_err();
    }
}

fn update(cgroup_settings: Vec<wire::CgroupSetting>) -> wire::UpdateContainerRequest {
    wire::UpdateContainerRequest { container_id: "case".to_owned(), cgroup_settings, ..Default::default() }
}

pub(crate) async fn update_changes_settings_and_names_those_refused() {
    let world = World::new();
    if !has(&world, "pids") {
        return;
    }
    sleeping(&world).await;
    let file = || std::fs::read_to_string(world.cgroup_file("case/pids.max")).unwrap();
    world.engine.update(update(vec![setting("pids.max", "9")])).await.unwrap();
    assert_eq!(file(), "9\n");

    // What comes before one that is refused is taken back.
    let bad = vec![setting("pids.max", "7"), setting("pids.max", "8"), setting("pids.max", "several")];
    let error = world.engine.update(update(bad)).await.unwrap_err();
    let text = bulkhead_agent::rpc::error_chain(&error);
    assert!(text.starts_with("cannot set pids.max of the container's cgroup to \"several\": Invalid"), "{text}");
    assert_eq!(file(), "9\n");
    assert!(matches!(
        world.engine.update(update(vec![setting("no.such", "1")])).await,
        Err(ControlError::Cgroup(CgroupError::Set { .. }))
    ));
    assert!(matches!(world.engine.update(update(vec![setting("../x", "1")])).await, Err(ControlError::Spec(_))));
    // A full container takes no more: the exec says so.
    world.engine.update(update(vec![setting("pids.max", "1")])).await.unwrap();
    let spec = ProcessSpec::from_wire(process(&mut request(&["true"])).clone()).unwrap();
    let error = world.engine.exec("case", "one", &spec, &mut Trace::default()).await.unwrap_err();
    let text = bulkhead_agent::rpc::error_chain(&error);
    assert!(text.starts_with("cannot prepare the process: make it in the container: Resource"), "{text}");
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn refused_update_leaves_quota_and_memory() {
    let world = World::new();
    if !has(&world, "cpu") || !has(&world, "memory") {
        return;
    }
    sleeping(&world).await;
    let read = |file: &str| std::fs::read_to_string(world.cgroup_file(&format!("case/{file}"))).unwrap();
    let period = |value: &str| wire::CgroupSetting { keep_first_word: true, ..setting("cpu.max", value) };
    let good = vec![setting("memory.max", "67108864"), setting("cpu.max", "50000"), period("200000")];
    world.engine.update(update(good)).await.unwrap();
    assert_eq!((read("cpu.max").as_str(), read("memory.max").as_str()), ("50000 200000\n", "67108864\n"));
    world.engine.update(update(vec![setting("cpu.max", "60000")])).await.unwrap();
    assert_eq!(read("cpu.max"), "60000 200000\n");

    let bad = vec![setting("memory.max", "33554432"), setting("cpu.max", "max 100000"), period("1")];
    world.engine.update(update(bad)).await.unwrap_err();
    assert_eq!((read("cpu.max").as_str(), read("memory.max").as_str()), ("60000 200000\n", "67108864\n"));
    // Neither does what the container cannot have.
    let filter = vec![0; bulkhead_bpf::INSTRUCTION_LEN];
    let bad = wire::UpdateContainerRequest { device_filter: filter, ..update(vec![setting("cpu.max", "max")]) };
    world.engine.update(bad).await.unwrap_err();
    assert_eq!(read("cpu.max"), "60000 200000\n");
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn statistics_tell_what_was_used() {
    let world = World::new();
    if !has(&world, "memory") {
        return;
    }
    let mut request = request(&["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 1000"]);
    request.cgroup_settings = vec![setting("memory.max", "67108864")];
    let [stdout, _stderr] = world.start(request).await.unwrap();
    read_until(&stdout, "done").await;
    let stats = world.engine.stats("case").unwrap();
    assert!(stats.cpu["usage_usec"] > 0, "{:?}", stats.cpu);
    assert!(stats.memory["anon"] > 0);
    assert!((1..67_108_864).contains(&stats.memory_current.unwrap()));
    assert_eq!((stats.memory_max, stats.memory_events["oom_kill"]), (Some(67_108_864), 0));
    assert!(stats.pids_current.is_some_and(|count| (1..=2).contains(&count)), "{:?}", stats.pids_current);
    assert!(stats.guest_memory_total > stats.guest_memory_available);
    world.engine.delete("case", false).await.unwrap();
    assert!(matches!(world.engine.stats("case"), Err(ControlError::NoSuchContainer(_))));
}

pub(crate) async fn oom_kills_are_told_as_they_happen_and_the_end_is() {
    let world = World::new();
    if !has(&world, "memory") {
        return;
    }
    // The shell survives its child, which is killed; then it is asked to end.
    let script = "dd if=/dev/zero of=/dev/null bs=100M count=1; echo killed; read line";
    let mut request = request(&["sh", "-c", script]);
    request.cgroup_settings = vec![setting("memory.max", "20971520")];
    if world.cgroup_file("memory.swap.max").exists() {
        request.cgroup_settings.push(setting("memory.swap.max", "0"));
    }
    let spec = ContainerSpec::from_wire(request).unwrap();
    world.engine.create(&spec, false, &mut Trace::default()).await.unwrap();
    let wait = |seen| {
        let engine = Arc::clone(&world.engine);
        tokio::spawn(async move { engine.wait_oom("case", seen).await.unwrap() })
    };
    let first = wait(0);
    world.engine.start("case", &mut Trace::default()).await.unwrap();
    let kills = timeout(DEADLINE, first).await.unwrap().unwrap();
    assert_eq!(kills.count, 1);
    let second = wait(1);
    world.engine.signal("case", "", 9, true).ok();
    let kills = timeout(DEADLINE, second).await.unwrap().unwrap();
    assert_eq!((kills.count, kills.ended), (1, true));
    assert!(timeout(DEADLINE, wait(0)).await.unwrap().unwrap().count == 1);
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn oom_wait_ends_with_the_container_where_nothing_is_counted() {
    let world = World::new();
    sleeping(&world).await;
    let engine = Arc::clone(&world.engine);
    let waiting = tokio::spawn(async move { engine.wait_oom("case", 0).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(50)).await;
    world.engine.delete("case", false).await.unwrap();
    assert!(timeout(DEADLINE, waiting).await.unwrap().unwrap().ended);
}

pub(crate) async fn list_shows_the_tree_of_processes() {
    let world = World::new();
    if !has(&world, "") {
        return;
    }
    // The child is the shell still, for a moment.
    let script = "sleep 1000 & until grep -q ^sleep /proc/$!/cmdline; do :; done; echo ready; wait";
    let [stdout, _stderr] = world.start(request(&["sh", "-c", script])).await.unwrap();
    read_until(&stdout, "ready").await;
    let spec = ProcessSpec::from_wire({
        let mut request = request(&["sleep", "2000"]);
        process(&mut request).uid = 1000;
        process(&mut request).terminal = true;
        process(&mut request).clone()
    });
    let pid = world.engine.exec("case", "one", &spec.unwrap(), &mut Trace::default()).await.unwrap();

    let mut list = world.engine.processes("case").await.unwrap();
    list.sort_by_key(|process| process.container_pid);
    let [init, child, exec] = list.as_slice() else { panic!("{list:?}") };
    assert_eq!((init.container_pid, init.command.clone(), init.uid), (1, format!("sh -c {script}"), 0));
    assert_eq!((child.parent_pid, child.command.as_str()), (init.pid, "sleep 1000"));
    assert_eq!((exec.pid, exec.exec_id.as_str(), exec.uid), (pid, "one", 1000));
    assert_eq!(exec.terminal, "pts/0");
    assert!(["R", "S", "D"].contains(&exec.state.as_str()), "{}", exec.state);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(exec.started_s) < 30, "{} is not about {now}", exec.started_s);
    world.engine.delete("case", false).await.unwrap();
}
