// SPDX-License-Identifier: Apache-2.0
//! Streams, pipes and terminals.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::container::{ContainerSpec, TerminalSize};
use bulkhead_agent::process::FdStream;
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use crate::fixture::{DEADLINE, STDERR, STDIN, STDOUT, World, process, request};

/// Starts a program with all three streams.
async fn start(world: &World, args: &[&str]) -> [FdStream; 3] {
    let mut request = request(args);
    let process = process(&mut request);
    (process.stdin_stream, process.stdout_stream, process.stderr_stream) = (STDIN, STDOUT, STDERR);
    let streams = [STDIN, STDOUT, STDERR].map(|id| world.open_stream(id));
    let spec = ContainerSpec::from_wire(request).unwrap();
    world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();
    streams
}

async fn end(world: &World) -> u8 {
    let exit = timeout(DEADLINE, world.engine.wait("case", "")).await.unwrap().unwrap();
    world.engine.delete("case", false).await.unwrap();
    exit.code
}

pub(crate) async fn input_reaches_output_and_ends() {
    let world = World::new();
    let [stdin, mut stdout, _stderr] = start(&world, &["cat"]).await;
    let sent: Vec<u8> = (0..8_000_000_u32).map(|number| (number / 7) as u8).collect();

    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown_write().unwrap();
        stdin
    });
    let mut received = Vec::new();
    timeout(DEADLINE, stdout.read_to_end(&mut received)).await.unwrap().unwrap();

    assert!(received == expected, "{} bytes came back of {}", received.len(), expected.len());
    writer.await.unwrap();
    assert_eq!(end(&world).await, 0);
}

pub(crate) async fn preserved_descriptors_are_three_and_on() {
    let world = World::new();
    let script = "cat <&3; echo to four >&4; read line <&5; echo \"heard $line\" >&5; echo lost >&6; ls /proc/self/fd";
    let mut request = request(&["sh", "-c", script]);
    let process = process(&mut request);
    process.stdout_stream = STDOUT;
    let kinds = [wire::DescriptorKind::INPUT, wire::DescriptorKind::OUTPUT, wire::DescriptorKind::CONNECTION];
    process.preserved = (20..)
        .zip(kinds)
        .chain([(0, wire::DescriptorKind::NULL_DEVICE)])
        .map(|(stream, kind)| wire::PreservedDescriptor { kind: kind.into(), stream, ..Default::default() })
        .collect();
    let [mut stdout, input, mut output, mut connection] = [STDOUT, 20, 21, 22].map(|id| world.open_stream(id));
    let spec = ContainerSpec::from_wire(request).unwrap();
    world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();

    input.write_all(b"from three\n").await.unwrap();
    input.shutdown_write().unwrap();
    connection.write_all(b"five\n").await.unwrap();
    let [mut out, mut four, mut five] = [const { String::new() }; 3];
    timeout(DEADLINE, stdout.read_to_string(&mut out)).await.unwrap().unwrap();
    timeout(DEADLINE, output.read_to_string(&mut four)).await.unwrap().unwrap();
    timeout(DEADLINE, connection.read_to_string(&mut five)).await.unwrap().unwrap();

    // `ls` has the folder open beside what it was given.
    assert_eq!(out, "from three\n0\n1\n2\n3\n4\n5\n6\n7\n");
    assert_eq!((four.as_str(), five.as_str()), ("to four\n", "heard five\n"));
    assert_eq!(end(&world).await, 0);
}

pub(crate) async fn too_many_or_wrong_descriptors_are_refused() {
    let refused = |kind: wire::DescriptorKind, stream, count| {
        let mut request = request(&["true"]);
        let one = wire::PreservedDescriptor { kind: kind.into(), stream, ..Default::default() };
        process(&mut request).preserved = vec![one; count];
        ContainerSpec::from_wire(request).unwrap_err().to_string()
    };
    assert!(refused(wire::DescriptorKind::INPUT, 20, 33).contains("33"));
    assert!(refused(wire::DescriptorKind::INPUT, 0, 1).contains("descriptor 3"));
    assert!(refused(wire::DescriptorKind::NULL_DEVICE, 20, 1).contains("descriptor 3"));
    assert!(refused(wire::DescriptorKind::DESCRIPTOR_KIND_UNSPECIFIED, 0, 1).contains("descriptor 3"));
}

pub(crate) async fn absent_streams_are_dev_null() {
    let world = World::new();
    let script = "cat; readlink /proc/self/fd/0; echo lost >&2; echo lost";
    let spec = ContainerSpec::from_wire(request(&["sh", "-c", script])).unwrap();
    world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();
    assert_eq!(end(&world).await, 0);
}

pub(crate) async fn reader_that_goes_away_ends_the_writer() {
    let world = World::new();
    let [_stdin, stdout, _stderr] = start(&world, &["sh", "-c", "sh -c 'while :; do echo y; done'; exit $?"]).await;
    drop(stdout);
    // SIGPIPE: 128 + 13.
    assert_eq!(end(&world).await, 141);
}

pub(crate) async fn end_is_told_before_the_output_is_read() {
    let world = World::new();
    let [_stdin, mut stdout, _stderr] = start(&world, &["yes"]).await;
    let mut held = 0;
    // Until nothing more fits on the way.
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = rustix::io::ioctl_fionread(&stdout).unwrap();
        if now > 0 && now == held {
            break;
        }
        held = now;
    }
    let engine = Arc::clone(&world.engine);
    let waiting = tokio::spawn(async move { engine.wait("case", "").await.unwrap().code });
    world.engine.signal("case", "", 9, false).unwrap();

    timeout(DEADLINE, world.engine.ended("case", "")).await.expect("the end is told").unwrap();

    assert!(!waiting.is_finished(), "there is output that has not been handed on");
    let mut all = String::new();
    timeout(DEADLINE, stdout.read_to_string(&mut all)).await.unwrap().unwrap();
    assert!(all.len() as u64 > held && all.trim_end().split('\n').all(|line| line == "y"), "{} bytes", all.len());
    assert_eq!(timeout(DEADLINE, waiting).await.unwrap().unwrap(), 137);
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn process_that_does_not_read_ends_all_the_same() {
    let world = World::new();
    let [stdin, _stdout, _stderr] = start(&world, &["sh", "-c", "exit 6"]).await;
    let writer = tokio::spawn(async move { stdin.write_all(&vec![0; 4 << 20]).await });
    assert_eq!(end(&world).await, 6);
    timeout(DEADLINE, writer).await.unwrap().unwrap().unwrap_err();
}

pub(crate) async fn users_can_open_their_streams_by_name() {
    let script = "echo by name > /dev/stdout; echo and error > /dev/stderr";
    let mut request = request(&["sh", "-c", script]);
    process(&mut request).uid = 1000;
    let output = World::new().run(request).await.unwrap();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("by name\n", "and error\n"));
}

pub(crate) async fn streams_may_come_late() {
    let world = World::new();
    let mut request = request(&["echo", "late"]);
    process(&mut request).stdout_stream = STDOUT;
    let spec = ContainerSpec::from_wire(request).unwrap();
    let engine = Arc::clone(&world.engine);
    let creation = tokio::spawn(async move { engine.create(&spec, true, &mut Trace::default()).await.map(drop) });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut stdout = world.open_stream(STDOUT);
    creation.await.unwrap().unwrap();
    let mut text = String::new();
    stdout.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "late\n");
    assert_eq!(end(&world).await, 0);
}

/// A program on a terminal of 30 lines and 100 columns: input and output.
async fn start_terminal(world: &World, script: &str, uid: u32) -> [FdStream; 2] {
    let mut request = request(&["sh", "-c", script]);
    let process = process(&mut request);
    (process.terminal, process.terminal_rows, process.terminal_columns) = (true, 30, 100);
    (process.stdin_stream, process.stdout_stream, process.uid) = (STDIN, STDOUT, uid);
    let streams = [STDIN, STDOUT].map(|id| world.open_stream(id));
    let spec = ContainerSpec::from_wire(request).unwrap();
    world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();
    streams
}

pub(super) async fn read_until(stream: &FdStream, wanted: &str) -> String {
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !text.contains(wanted) {
        let len = timeout(DEADLINE, stream.read(&mut buffer)).await.expect(&text).unwrap();
        assert_ne!(len, 0, "the terminal ended after: {text}");
        text.push_str(std::str::from_utf8(&buffer[..len]).unwrap());
    }
    text
}

pub(crate) async fn terminal_is_a_terminal_of_the_right_size() {
    let world = World::new();
    let script = "tty; stty size; stat -c %u /proc/self/fd/0; readlink /dev/ptmx; echo there > /dev/tty; \
                  echo console > /dev/console; test -t 0 && test -t 1 && test -t 2 && exit 8";
    let [_stdin, mut stdout] = start_terminal(&world, script, 1000).await;
    let mut text = String::new();
    timeout(DEADLINE, stdout.read_to_string(&mut text)).await.unwrap().unwrap();
    assert_eq!(text, "/dev/pts/0\r\n30 100\r\n1000\r\npts/ptmx\r\nthere\r\nconsole\r\n");
    assert_eq!(end(&world).await, 8);
}

pub(crate) async fn terminal_is_resized_and_the_process_told() {
    let world = World::new();
    let script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.02; done";
    let [_stdin, stdout] = start_terminal(&world, script, 0).await;
    read_until(&stdout, "ready").await;
    world.engine.resize("case", "", TerminalSize { rows: 50, columns: 120 }).unwrap();
    read_until(&stdout, "50 120").await;
    assert_eq!(end(&world).await, 0);
}

pub(crate) async fn keys_reach_the_process_as_input_and_as_signals() {
    let world = World::new();
    let script = "trap 'exit 7' INT; echo ready; read line; echo got $line; while :; do sleep 0.02; done";
    let [stdin, stdout] = start_terminal(&world, script, 0).await;
    read_until(&stdout, "ready").await;
    stdin.write_all(b"words\n").await.unwrap();
    read_until(&stdout, "got words").await;
    stdin.write_all(b"\x03").await.unwrap();
    assert_eq!(end(&world).await, 7);
}

pub(crate) async fn end_of_input_leaves_the_terminal_alone() {
    let world = World::new();
    let [stdin, stdout] = start_terminal(&world, "sleep 0.3; echo still here", 0).await;
    drop(stdin);
    read_until(&stdout, "still here").await;
    assert_eq!(end(&world).await, 0);
}

pub(crate) async fn waiting_container_does_not_hold_others_pipes() {
    let world = World::new();
    let mut other = request(&["true"]);
    let [stdin, mut stdout, _stderr] = start(&world, &["cat"]).await;
    other.id = "other".to_owned();
    let spec = ContainerSpec::from_wire(other).unwrap();
    world.engine.create(&spec, false, &mut Trace::default()).await.unwrap();

    drop(stdin);

    let mut text = String::new();
    timeout(DEADLINE, stdout.read_to_string(&mut text)).await.expect("cat sees the end of its input").unwrap();
    assert_eq!(end(&world).await, 0);
    world.engine.delete("other", false).await.unwrap();
}
