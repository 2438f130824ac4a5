// SPDX-License-Identifier: Apache-2.0
//! Processes that are exec'd in a running container.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::container::{
    ContainerSpec, DeleteProcessError, ExecError, FindError, LaunchError, ProcessSpec, SignalError, Stage, TerminalSize,
};
use bulkhead_agent::process::FdStream;
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::stdio::read_until;
use crate::fixture::{DEADLINE, Output, World, process, request};

/// The streams of the exec'd process; init has others.
const STREAMS: [u32; 3] = [11, 12, 13];

/// Starts a container whose init sleeps.
pub(super) async fn sleeping(world: &World) {
    sleeping_with(world, |_| {}).await;
}

async fn sleeping_with(world: &World, change: impl FnOnce(&mut wire::CreateContainerRequest)) {
    let mut request = request(&["sleep", "1000"]);
    change(&mut request);
    let spec = ContainerSpec::from_wire(request).unwrap();
    world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();
}

/// A process as most are.
fn plain(args: &[&str]) -> wire::Process {
    process(&mut request(args)).clone()
}

/// Execs a process as `one`: its pid and its streams.
pub(super) async fn exec(world: &World, process: wire::Process) -> Result<(i32, [FdStream; 3]), ExecError> {
    exec_as(world, "one", process).await
}

async fn exec_as(world: &World, exec_id: &str, mut process: wire::Process) -> Result<(i32, [FdStream; 3]), ExecError> {
    (process.stdin_stream, process.stdout_stream, process.stderr_stream) = STREAMS.into();
    let used = if process.terminal { &STREAMS[..2] } else { &STREAMS[..] };
    let mut streams: Vec<_> = used.iter().map(|id| world.open_stream(*id)).collect();
    if process.terminal {
        // Stands in for the stream that a terminal does not have.
        streams.push(FdStream::new(std::fs::File::open("/dev/ptmx").unwrap().into()).unwrap());
    }
    let spec = ProcessSpec::from_wire(process)?;
    let pid = world.engine.exec("case", exec_id, &spec, &mut Trace::default()).await?;
    Ok((pid, streams.try_into().unwrap()))
}

/// Its exit code; it is forgotten.
async fn end(world: &World, exec_id: &str) -> u8 {
    let exit = timeout(DEADLINE, world.engine.wait("case", exec_id)).await.expect("it ends in time").unwrap();
    world.engine.delete_process("case", exec_id).unwrap();
    exit.code
}

/// Runs a process to its end.
async fn run(world: &World, process: wire::Process) -> Output {
    let (_, [stdin, mut stdout, mut stderr]) = exec(world, process).await.unwrap();
    drop(stdin);
    let (mut out, mut err) = (String::new(), String::new());
    let read = async { tokio::try_join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err)) };
    timeout(DEADLINE, read).await.expect("the output ends in time").unwrap();
    Output { code: end(world, "one").await, stdout: out, stderr: err }
}

/// What a script prints, in a process that `change` has adapted.
async fn script(world: &World, script: &str, change: impl FnOnce(&mut wire::Process)) -> String {
    let mut process = plain(&["sh", "-c", script]);
    change(&mut process);
    let output = run(world, process).await;
    assert_eq!((output.code, output.stderr.as_str()), (0, ""), "stdout: {}", output.stdout);
    output.stdout.trim_end().to_owned()
}

pub(crate) async fn exit_codes_are_kept_until_they_are_deleted() {
    let world = World::new();
    sleeping(&world).await;
    for (args, code) in
        [(&["true"][..], 0), (&["false"], 1), (&["sh", "-c", "exit 77"], 77), (&["sh", "-c", "kill -9 $$"], 137)]
    {
        let (pid, _streams) = exec(&world, plain(args)).await.unwrap();
        assert!(pid > 1);
        let again = exec(&world, plain(args)).await;
        assert!(matches!(again, Err(ExecError::IdInUse { .. })), "{again:?}");
        let exit = timeout(DEADLINE, world.engine.wait("case", "one")).await.unwrap().unwrap();
        assert_eq!(exit.code, code, "{args:?}");
        assert_eq!(end(&world, "one").await, code);
        let unknown = world.engine.wait("case", "one").await;
        assert!(matches!(unknown, Err(FindError::Process(_))), "{unknown:?}");
    }
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn exec_is_in_the_containers_namespaces_and_cgroup() {
    let world = World::new();
    sleeping_with(&world, |request| request.hostname = "inside".into()).await;
    // The exec'd sh is not 1, and sees init as 1 and nobody of the host.
    assert_eq!(
        script(&world, "hostname; ps -o args | grep -c '^sleep 1000'; test $$ -ne 1; ls /", |_| {}).await,
        "inside\n1\nbin\ndev\netc\nhome\nproc\nsys\ntmp"
    );
    let links = "for kind in mnt pid ipc uts cgroup net user time; do readlink /proc/self/ns/$kind; done";
    let own = script(&world, links, |_| {}).await;
    let of_init = script(&world, &links.replace("self", "1"), |_| {}).await;
    assert_eq!(own, of_init);
    assert_eq!(script(&world, "cat /proc/self/cgroup | grep '^0:'", |_| {}).await, "0::/");
    let (pid, streams) = exec(&world, plain(&["cat"])).await.unwrap();
    if world.has_cgroups() {
        let inside = std::fs::read_to_string(world.cgroup_file("case/cgroup.procs")).unwrap();
        assert!(inside.lines().any(|line| line == pid.to_string()), "{inside}");
    }
    drop(streams);
    end(&world, "one").await;
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn exec_has_its_own_attributes() {
    let world = World::new();
    sleeping(&world).await;
    let user = |process: &mut wire::Process| {
        (process.uid, process.gid, process.additional_gids) = (1000, 1001, vec![5, 6]);
        process.umask = Some(0o027);
        process.cwd = "/home/user".into();
        process.env.push("A=b".into());
        process.no_new_privileges = true;
        process.oom_score_adj = Some(321);
        process.rlimits =
            vec![wire::Rlimit { resource: libc::RLIMIT_NOFILE, soft: 100, hard: 200, ..Default::default() }];
        process.capabilities = Some(wire::Capabilities { bounding: vec![0, 10], ..Default::default() }).into();
    };
    let text = "echo by name > /dev/stdout; id -u; id -g; id -G; umask; pwd; echo $A $HOME; ulimit -n; cat /proc/self/oom_score_adj; \
                grep -E 'NoNewPrivs|CapBnd|CapEff' /proc/self/status | while read name value; do echo $value; done";
    assert_eq!(
        script(&world, text, user).await,
        "by name\n1000\n1001\n1001 5 6\n0027\n/home/user\nb /home/user\n100\n321\n0000000000000000\n0000000000000401\n1"
    );
    // Neither a signal's disposition nor a descriptor of the agent's is left, and it can be looked at as any other.
    let output = run(&world, plain(&["ls", "/proc/self/fd"])).await;
    assert_eq!(output.stdout.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"]);
    let output = run(&world, plain(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"])).await;
    assert_eq!(output.stdout, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
    world.engine.delete("case", false).await.unwrap();
}

/// Why an exec fails to execute.
async fn failure(world: &World, process: wire::Process) -> (Stage, String) {
    match exec(world, process).await {
        Err(ExecError::Launch(LaunchError::Failed(failure))) => (failure.stage, failure.to_string()),
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn programs_and_folders_that_are_missing_are_told() {
    let world = World::new();
    sleeping(&world).await;
    let missing = "exec: \"nothing\": executable file not found in $PATH".to_owned();
    assert_eq!(failure(&world, plain(&["nothing"])).await, (Stage::ProgramNotFound, missing));
    let (stage, _) = failure(&world, plain(&["/etc/passwd"])).await;
    assert_eq!(stage, Stage::ProgramNotExecutable);
    std::fs::write(world.rootfs("bin/unknown"), "no format").unwrap();
    std::fs::set_permissions(world.rootfs("bin/unknown"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let (stage, text) = failure(&world, plain(&["unknown"])).await;
    assert_eq!((stage, text.as_str()), (Stage::ProgramNotExecutable, "exec /bin/unknown: exec format error"));
    let mut nowhere = plain(&["true"]);
    nowhere.cwd = "/no/where".into();
    let (stage, text) = failure(&world, nowhere).await;
    assert_eq!(stage, Stage::WorkingDirectory);
    assert!(text.starts_with("cannot use working directory /no/where: No such file"), "{text}");
    // The id is free again.
    assert_eq!(run(&world, plain(&["true"])).await.code, 0);
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn created_container_takes_execs() {
    let world = World::new();
    let spec = ContainerSpec::from_wire(request(&["sh", "-c", "exit 6"])).unwrap();
    world.engine.create(&spec, false, &mut Trace::default()).await.unwrap();
    assert_eq!(script(&world, "pwd", |_| {}).await, "/");
    world.engine.start("case", &mut Trace::default()).await.unwrap();
    assert_eq!(world.engine.wait("case", "").await.unwrap().code, 6);
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn unknown_names_and_states_are_told() {
    let world = World::new();
    let spec = ProcessSpec::from_wire(plain(&["true"])).unwrap();
    let mut trace = Trace::default();
    let nobody = world.engine.exec("case", "one", &spec, &mut trace).await;
    assert!(matches!(nobody, Err(ExecError::NoSuchContainer(_))), "{nobody:?}");
    sleeping(&world).await;
    assert!(matches!(world.engine.exec("case", "", &spec, &mut trace).await, Err(ExecError::NoId)));
    assert!(matches!(world.engine.signal("case", "one", 9, false), Err(SignalError::Find(FindError::Process(_)))));
    assert!(matches!(world.engine.delete_process("case", "one"), Err(DeleteProcessError::Find(_))));
    assert!(matches!(world.engine.delete_process("case", ""), Err(DeleteProcessError::Init(_))));
    let (_, _streams) = exec(&world, plain(&["sleep", "1000"])).await.unwrap();
    assert!(matches!(world.engine.delete_process("case", "one"), Err(DeleteProcessError::Running { .. })));
    world.engine.signal("case", "", 9, false).unwrap();
    world.engine.wait("case", "").await.unwrap();
    let stopped = world.engine.exec("case", "two", &spec, &mut trace).await;
    assert!(matches!(stopped, Err(ExecError::Stopped(_))), "{stopped:?}");
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn a_megabyte_goes_in_and_out() {
    let world = World::new();
    sleeping(&world).await;
    let (_, [stdin, mut stdout, _stderr]) = exec(&world, plain(&["cat"])).await.unwrap();
    let sent: Vec<u8> = (0..1_000_000_u32).map(|number| (number / 7) as u8).collect();
    let expected = sent.clone();
    tokio::spawn(async move {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown_write().unwrap();
    });
    let mut received = Vec::new();
    timeout(DEADLINE, stdout.read_to_end(&mut received)).await.unwrap().unwrap();
    assert!(received == expected, "{} bytes came back", received.len());
    assert_eq!(end(&world, "one").await, 0);
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn exec_has_a_terminal_of_its_own() {
    let world = World::new();
    sleeping(&world).await;
    let text = "trap 'stty size; exit 9' WINCH; tty; stty size; echo there > /dev/tty; stat -c %u /dev/pts/0; \
                read line; echo got $line; while :; do sleep 0.02; done";
    let mut process = plain(&["sh", "-c", text]);
    (process.terminal, process.terminal_rows, process.terminal_columns, process.uid) = (true, 30, 100, 1000);
    let (_, [stdin, stdout, _]) = exec(&world, process).await.unwrap();
    assert_eq!(read_until(&stdout, "1000\r\n").await, "/dev/pts/0\r\n30 100\r\nthere\r\n1000\r\n");
    stdin.write_all(b"words\n").await.unwrap();
    read_until(&stdout, "got words").await;
    world.engine.resize("case", "one", TerminalSize { rows: 50, columns: 120 }).unwrap();
    read_until(&stdout, "50 120").await;
    assert_eq!(end(&world, "one").await, 9);
    assert!(world.engine.resize("case", "", TerminalSize { rows: 1, columns: 1 }).is_err());
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn signals_reach_an_execd_process_alone() {
    let world = World::new();
    sleeping(&world).await;
    let trap = plain(&["sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done"]);
    let (_, [_stdin, stdout, _stderr]) = exec(&world, trap).await.unwrap();
    read_until(&stdout, "ready").await;
    world.engine.signal("case", "one", 15, false).unwrap();
    let exit = timeout(DEADLINE, world.engine.wait("case", "one")).await.unwrap().unwrap();
    assert_eq!(exit.code, 3);
    assert!(matches!(world.engine.signal("case", "one", 15, false), Err(SignalError::Finished)));
    world.engine.signal("case", "", 0, false).unwrap_err();
    world.engine.signal("case", "", 18, false).unwrap();
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn inits_end_is_the_execd_processes_too_and_their_output_comes() {
    let world = World::new();
    sleeping(&world).await;
    let script = plain(&["sh", "-c", "echo first; exec sleep 1000"]);
    let (_, [_stdin, mut stdout, _stderr]) = exec(&world, script).await.unwrap();
    let engine = Arc::clone(&world.engine);
    let waiting = tokio::spawn(async move { engine.wait("case", "one").await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    world.engine.signal("case", "", 9, false).unwrap();
    assert_eq!(timeout(DEADLINE, world.engine.wait("case", "")).await.unwrap().unwrap().code, 137);
    assert_eq!(timeout(DEADLINE, waiting).await.unwrap().unwrap().unwrap().code, 137);
    let mut text = String::new();
    timeout(DEADLINE, stdout.read_to_string(&mut text)).await.unwrap().unwrap();
    assert_eq!(text, "first\n");
    world.engine.delete("case", false).await.unwrap();
    assert!(world.engine.wait("case", "one").await.is_err());
}

pub(crate) async fn wait_does_not_wait_for_what_was_left_behind() {
    let world = World::new();
    sleeping(&world).await;
    let (_, [_stdin, stdout, _stderr]) = exec(&world, plain(&["sh", "-c", "sleep 1000 & echo started"])).await.unwrap();
    let exit = timeout(DEADLINE, world.engine.wait("case", "one")).await.expect("sleep is not waited for").unwrap();
    assert_eq!(exit.code, 0);
    let mut buffer = [0; 100];
    let len = stdout.read_now(&mut buffer).unwrap();
    assert_eq!(len, Some(8), "the output is there when the end is told");
    assert_eq!(stdout.read_now(&mut buffer).unwrap(), None, "and the stream has not ended");
    world.engine.delete_process("case", "one").unwrap();
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn wait_ends_though_what_was_left_behind_writes_on() {
    let world = World::new();
    sleeping(&world).await;
    let (_, [_stdin, mut stdout, _stderr]) =
        exec(&world, plain(&["sh", "-c", "echo first; yes & exit 3"])).await.unwrap();
    let reader = tokio::spawn(async move {
        let mut all = vec![0; 6];
        stdout.read_exact(&mut all).await.unwrap();
        while stdout.read(&mut [0; 4096]).await.unwrap() > 0 {}
        all
    });

    let exit = timeout(DEADLINE, world.engine.wait("case", "one")).await.expect("yes is not waited for").unwrap();

    assert_eq!(exit.code, 3);
    world.engine.delete_process("case", "one").unwrap();
    assert_eq!(timeout(DEADLINE, reader).await.unwrap().unwrap(), b"first\n");
    world.engine.delete("case", false).await.unwrap();
}

/// The descriptors of this process, and its children.
fn possessions() -> (usize, String) {
    let children = std::fs::read_to_string(format!("/proc/self/task/{}/children", std::process::id())).unwrap();
    (std::fs::read_dir("/proc/self/fd").unwrap().count(), children)
}

pub(crate) async fn many_execs_leave_nothing() {
    let world = World::new();
    sleeping(&world).await;
    run(&world, plain(&["true"])).await;
    let before = possessions();
    for number in 0..50 {
        match number % 3 {
            0 => assert!(exec(&world, plain(&["nothing"])).await.is_err()),
            1 => assert_eq!(run(&world, plain(&["true"])).await.code, 0),
            _ => {
                let mut process = plain(&["tty"]);
                process.terminal = true;
                let (_, [_stdin, mut stdout, _]) = exec(&world, process).await.unwrap();
                let mut text = String::new();
                timeout(DEADLINE, stdout.read_to_string(&mut text)).await.unwrap().unwrap();
                assert_eq!((text.as_str(), end(&world, "one").await), ("/dev/pts/0\r\n", 0));
            }
        }
    }
    // Helpers and failed processes are reaped, and streams closed, a moment later.
    for _ in 0..100 {
        if possessions() == before {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(possessions(), before);
    world.engine.delete("case", false).await.unwrap();
}

pub(crate) async fn execs_run_beside_each_other() {
    let world = World::new();
    sleeping(&world).await;
    let spec = ProcessSpec::from_wire(plain(&["sh", "-c", "sleep 0.2; exit 4"])).unwrap();
    let ids: Vec<String> = (0..8).map(|number| format!("number-{number}")).collect();
    let tasks = ids.iter().map(|id| {
        let (engine, spec) =
            (Arc::clone(&world.engine), ProcessSpec::from_wire(plain(&["sh", "-c", "sleep 0.2; exit 4"])));
        let id = id.clone();
        tokio::spawn(async move { engine.exec("case", &id, &spec.unwrap(), &mut Trace::default()).await.map(drop) })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap().unwrap();
    }
    for id in &ids {
        assert_eq!(end(&world, id).await, 4);
    }
    // Nobody waits for this one to be made: it is taken back.
    let abandoned = timeout(Duration::ZERO, world.engine.exec("case", "late", &spec, &mut Trace::default())).await;
    assert!(abandoned.is_err());
    assert!(matches!(world.engine.wait("case", "late").await, Err(FindError::Process(_))));
    world.engine.delete("case", false).await.unwrap();
}
