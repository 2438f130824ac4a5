// SPDX-License-Identifier: Apache-2.0
//! What a process is, how it starts and how it ends.

use std::os::unix::fs::PermissionsExt;

use bulkhead_agent::container::{ContainerSpec, CreateError, LaunchError, SignalError, Stage, StartError};
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;
use tokio::io::AsyncReadExt;

use crate::fixture::{DEADLINE, Output, World, chain, process, request};

pub(crate) async fn echo() {
    let output = World::new().run(request(&["echo", "hello", "world"])).await.unwrap();
    assert_eq!(output, Output { code: 0, stdout: "hello world\n".to_owned(), stderr: String::new() });
}

pub(crate) async fn exit_codes() {
    let world = World::new();
    for (script, code) in [("exit 0", 0), ("exit 1", 1), ("exit 255", 255)] {
        assert_eq!(world.run(request(&["sh", "-c", script])).await.unwrap().code, code, "{script}");
    }
}

/// Runs a script that prints `ready` when it is, sends the signal, and returns the exit code.
async fn code_after_signal(script: &str, signal: u32, all: bool) -> u8 {
    let world = World::new();
    let [mut stdout, _stderr] = world.start(request(&["sh", "-c", script])).await.unwrap();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).await.unwrap();
    world.engine.signal("case", "", signal, all).unwrap();
    let exit = tokio::time::timeout(DEADLINE, world.engine.wait("case", "")).await.unwrap().unwrap();
    let again = world.engine.signal("case", "", signal, false);
    assert!(matches!(again, Err(SignalError::Finished)), "{again:?}");
    world.engine.delete("case", false).await.unwrap();
    exit.code
}

pub(crate) async fn signals_reach_the_first_process() {
    assert_eq!(code_after_signal("trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done", 15, false).await, 3);
    assert_eq!(code_after_signal("echo ready; exec sleep 100", 9, false).await, 137);
    // Real-time signals too.
    assert_eq!(code_after_signal("trap 'exit 4' 40; echo ready; while :; do sleep 0.02; done", 40, false).await, 4);
}

pub(crate) async fn signals_reach_all_processes() {
    assert_eq!(code_after_signal("sleep 100 & echo ready; wait; exit 1", 9, true).await, 137);
}

pub(crate) async fn signal_of_a_child_is_128_and_its_number() {
    let output = World::new().run(request(&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"])).await.unwrap();
    assert_eq!(output.code, 137);
}

pub(crate) async fn unknown_container_is_said() {
    let world = World::new();
    let error = world.engine.signal("nobody", "", 9, false).unwrap_err();
    assert!(error.to_string().starts_with("container does not exist"), "{error}");
    assert!(world.engine.wait("nobody", "").await.is_err());
    assert!(world.engine.delete("nobody", false).await.is_err());
}

pub(crate) async fn background_processes_end_with_the_first() {
    // The child has the pipes open: their end comes only with its own.
    let output = World::new().run(request(&["sh", "-c", "sleep 1000 & echo started"])).await.unwrap();
    assert_eq!((output.code, output.stdout.as_str()), (0, "started\n"));
}

pub(crate) async fn orphans_are_reaped_in_the_container() {
    let script = "sh -c 'sh -c \"exit 0\" & exit 0'; sleep 0.1; ps -o stat | grep -c Z; true";
    assert_eq!(World::new().script(script, |_| {}).await, "0");
}

pub(crate) async fn first_process_is_pid_1_and_alone() {
    assert_eq!(World::new().script("echo $$; ps -o pid | grep -c '[0-9]'", |_| {}).await, "1\n3");
}

pub(crate) async fn environment_is_the_specs_with_a_home() {
    let world = World::new();
    let set = |entries: &'static [&'static str]| {
        move |request: &mut wire::CreateContainerRequest| {
            process(request).env = entries.iter().map(|&entry| entry.to_owned()).collect();
        }
    };
    assert_eq!(
        world.script("env | grep -v PWD", set(&["PATH=/bin", "A=b=c"])).await,
        "SHLVL=1\nHOME=/root\nA=b=c\nPATH=/bin"
    );
    assert_eq!(world.script("echo $HOME", set(&["PATH=/bin", "HOME=/elsewhere"])).await, "/elsewhere");
    let repeated = set(&["PATH=/nowhere", "A=first", "AB=other", "PATH=/bin", "A=last"]);
    assert_eq!(world.script("env | grep -E '^(A|AB|PATH)=' | sort", repeated).await, "A=last\nAB=other\nPATH=/bin");
    assert_eq!(world.script("echo $HOME", |request| process(request).uid = 1000).await, "/home/user");
    assert_eq!(world.script("echo $HOME", |request| process(request).uid = 4711).await, "/");
}

pub(crate) async fn working_directory_is_entered_or_made() {
    let world = World::new();
    assert_eq!(world.script("pwd", |request| process(request).cwd = "/home/user".into()).await, "/home/user");
    let made = |request: &mut wire::CreateContainerRequest| {
        process(request).cwd = "/new/folder".into();
        process(request).uid = 1000;
    };
    assert_eq!(world.script("pwd; stat -c '%u %a' .", made).await, "/new/folder\n0 755");
}

pub(crate) async fn working_directory_that_is_a_file_is_refused() {
    let mut request = request(&["true"]);
    process(&mut request).cwd = "/etc/passwd".into();
    let error = World::new().refused(request).await;
    assert_eq!(chain(&error), "cannot use working directory /etc/passwd: Not a directory (os error 20)");
}

pub(crate) async fn user_groups_and_umask_are_set() {
    let user = |request: &mut wire::CreateContainerRequest| {
        let process = process(request);
        (process.uid, process.gid, process.additional_gids) = (1000, 1001, vec![5, 6]);
        process.umask = Some(0o027);
    };
    let script = "id -u; id -g; id -G; umask; touch /tmp/x 2>/dev/null || echo refused";
    assert_eq!(World::new().script(script, user).await, "1000\n1001\n1001 5 6\n0027\nrefused");
    assert_eq!(World::new().script("umask", |_| {}).await, "0022");
}

/// The capability sets, as /proc shows them.
const SETS: &str = "grep -E '^Cap' /proc/self/status | while read name set; do echo $set; done";

pub(crate) async fn capabilities_are_exactly_the_specs() {
    const CHOWN: u32 = 0;
    const KILL: u32 = 5;
    const NET_BIND_SERVICE: u32 = 10;
    let world = World::new();
    let root = |request: &mut wire::CreateContainerRequest| {
        process(request).capabilities = Some(wire::Capabilities {
            bounding: vec![CHOWN, KILL],
            effective: vec![CHOWN, KILL],
            permitted: vec![CHOWN, KILL],
            ..Default::default()
        })
        .into();
    };
    let (none, two) = ("0000000000000000", "0000000000000021");
    // Inheritable, permitted, effective, bounding, ambient.
    assert_eq!(world.script(SETS, root).await, [none, two, two, two, none].join("\n"));

    let user = |request: &mut wire::CreateContainerRequest| {
        let all = vec![NET_BIND_SERVICE];
        process(request).uid = 1000;
        process(request).capabilities = Some(wire::Capabilities {
            bounding: all.clone(),
            effective: all.clone(),
            permitted: all.clone(),
            inheritable: all.clone(),
            ambient: all,
            ..Default::default()
        })
        .into();
    };
    assert_eq!(world.script(SETS, user).await, ["0000000000000400"; 5].join("\n"));
    assert_eq!(world.script(SETS, |_| {}).await, [none; 5].join("\n"));
}

pub(crate) async fn limits_are_set() {
    let limited = |request: &mut wire::CreateContainerRequest| {
        let limit = |resource, soft, hard| wire::Rlimit { resource, soft, hard, ..Default::default() };
        process(request).rlimits = vec![limit(libc::RLIMIT_NOFILE, 100, 200), limit(libc::RLIMIT_CORE, 0, u64::MAX)];
    };
    let world = World::new();
    assert_eq!(world.script("ulimit -Sn; ulimit -Hn; ulimit -Hc", limited).await, "100\n200\nunlimited");
}

pub(crate) async fn no_new_privileges_and_oom_score_are_set() {
    let world = World::new();
    let script = "grep NoNewPrivs /proc/self/status; cat /proc/self/oom_score_adj";
    let set = |request: &mut wire::CreateContainerRequest| {
        process(request).no_new_privileges = true;
        process(request).oom_score_adj = Some(321);
    };
    assert_eq!(world.script(script, set).await, "NoNewPrivs:\t1\n321");
    assert_eq!(world.script("grep NoNewPrivs /proc/self/status", |_| {}).await, "NoNewPrivs:\t0");
}

pub(crate) async fn signals_have_their_default_actions() {
    // Not through a shell, which has signals of its own.
    let output = World::new().run(request(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"])).await.unwrap();
    assert_eq!(output.stdout, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
}

pub(crate) async fn no_descriptor_of_the_agents_is_left() {
    // 3 is the one by which ls reads the folder.
    let output = World::new().run(request(&["ls", "/proc/self/fd"])).await.unwrap();
    assert_eq!(output.stdout.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"]);
}

pub(crate) async fn names_are_set_in_the_containers_own_namespace() {
    let before = rustix::system::uname().nodename().to_owned();
    let name = |request: &mut wire::CreateContainerRequest| {
        request.hostname = "inside".into();
        request.domainname = "example".into();
    };
    let script = "hostname; cat /proc/sys/kernel/domainname";
    assert_eq!(World::new().script(script, name).await, "inside\nexample");
    assert_eq!(rustix::system::uname().nodename(), before.as_c_str());
}

async fn failure(change: impl FnOnce(&World) -> &'static str) -> (Stage, String) {
    let world = World::new();
    let program = change(&world);
    match world.refused(request(&[program])).await {
        CreateError::Launch(LaunchError::Failed(failure)) => {
            // Nothing is left: the id can be used again.
            world.run(request(&["true"])).await.unwrap();
            (failure.stage, failure.to_string())
        }
        error => panic!("{}", chain(&error)),
    }
}

pub(crate) async fn missing_programs_are_told() {
    assert_eq!(
        failure(|_| "nothing").await,
        (Stage::ProgramNotFound, "exec: \"nothing\": executable file not found in $PATH".to_owned())
    );
    assert_eq!(
        failure(|_| "/nothing").await,
        (Stage::ProgramNotFound, "exec: \"/nothing\": stat /nothing: no such file or directory".to_owned())
    );
}

/// Writes a file into the root file system.
fn write(world: &World, name: &str, content: &str, mode: u32) {
    let path = world.rootfs(name);
    std::fs::write(&path, content).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

pub(crate) async fn programs_that_cannot_be_executed_are_told() {
    let plain = failure(|world| {
        write(world, "bin/plain", "text", 0o644);
        "/bin/plain"
    });
    assert_eq!(plain.await, (Stage::ProgramNotExecutable, "exec: \"/bin/plain\": permission denied".to_owned()));
    assert_eq!(failure(|_| "/etc").await, (Stage::ProgramNotExecutable, "exec: \"/etc\": is a directory".to_owned()));
    let unknown = failure(|world| {
        write(world, "bin/unknown", "no format", 0o755);
        "unknown"
    });
    assert_eq!(unknown.await, (Stage::ProgramNotExecutable, "exec /bin/unknown: exec format error".to_owned()));
}

pub(crate) async fn scripts_run_and_missing_interpreters_are_told() {
    let world = World::new();
    write(&world, "bin/script", "#!/bin/sh\necho from a script $1\n", 0o755);
    let output = world.run(request(&["script", "with"])).await.unwrap();
    assert_eq!(output.stdout, "from a script with\n");

    let missing = failure(|world| {
        write(world, "bin/script", "#!/usr/bin/perl -w\n", 0o755);
        "script"
    });
    assert_eq!(
        missing.await,
        (
            Stage::ProgramNotFound,
            "exec /bin/script: its interpreter \"/usr/bin/perl\": no such file or directory".to_owned()
        )
    );
}

pub(crate) async fn created_container_waits_to_be_started() {
    let world = World::new();
    let spec = ContainerSpec::from_wire(request(&["sh", "-c", "exit 5"])).unwrap();
    let mut trace = Trace::default();

    let pid = world.engine.create(&spec, false, &mut trace).await.unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(!status.starts_with("sh"), "the program runs already");
    assert!(matches!(world.engine.create(&spec, false, &mut trace).await, Err(CreateError::IdInUse(_))));

    world.engine.start("case", &mut trace).await.unwrap();
    assert_eq!(world.engine.wait("case", "").await.unwrap().code, 5);
    // A second wait is answered as well, a second start is not.
    assert_eq!(world.engine.wait("case", "").await.unwrap().code, 5);
    assert!(matches!(world.engine.start("case", &mut trace).await, Err(StartError::NotCreated { .. })));
    world.engine.delete("case", false).await.unwrap();
    let names: Vec<_> = trace.points().iter().map(|point| point.name).collect();
    assert_eq!(names, ["prepare", "clone", "set-up", "streams", "exec"]);
}

pub(crate) async fn containers_are_deleted_in_any_state() {
    let world = World::new();
    let spec = ContainerSpec::from_wire(request(&["sleep", "1000"])).unwrap();
    for start in [false, true] {
        let pid = world.engine.create(&spec, start, &mut Trace::default()).await.unwrap();
        world.engine.delete("case", false).await.unwrap();
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        assert!(world.engine.delete("case", false).await.is_err());
    }
}

pub(crate) async fn several_containers_run_at_once() {
    let world = World::new();
    for number in 0..8 {
        let mut request = request(&["sh", "-c", &format!("sleep 0.1; exit {number}")]);
        request.id = format!("case-{number}");
        let spec = ContainerSpec::from_wire(request).unwrap();
        world.engine.create(&spec, true, &mut Trace::default()).await.unwrap();
    }
    for number in 0..8 {
        let id = format!("case-{number}");
        assert_eq!(world.engine.wait(&id, "").await.unwrap().code, number);
        world.engine.delete(&id, false).await.unwrap();
    }
}
