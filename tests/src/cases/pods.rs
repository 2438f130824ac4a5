// SPDX-License-Identifier: Apache-2.0
//! Pods as the kubelet makes them, by containerd's CRI.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::sync::Barrier;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::MessageField;

use super::network::host;
use super::{Case, case};
use crate::cri::api::{
    AttachRequest, ContainerState, ContainerStatsResponse, Empty, ExecRequest, LinuxContainerResources,
    ListContainerStatsResponse, ListContainersResponse, ListPodSandboxResponse, NamespaceMode, PodSandboxState,
    UpdateContainerResourcesRequest, UrlResponse,
};
use crate::cri::{STATUS, STDIN, STDOUT, WebSocket};
use crate::engines::{Kubelet, Pod, mount, named};
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, fail};
use crate::processes;

pub(super) const CASES: &[Case] = &[
    case!(three_containers),
    case!(volumes),
    case!(socket_of_the_host),
    case!(network),
    case!(logs_and_statistics),
    case!(streams),
    case!(killed_container),
    case!(killed_vmm),
    case!(killed_shim),
    case!(killed_containerd),
    case!(at_once).limit(600).varies(),
    case!(processes),
    case!(ten_at_once).slow(1800).varies(),
    case!(fifty_in_a_row).slow(3600),
];

/// What a container does that waits to be ended.
pub(super) const WAIT: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";

/// The processes of that name below this one.
fn running(name: &str) -> Vec<i32> {
    let below = processes::descendants(std::process::id().cast_signed());
    let named = below.iter().filter(|process| process.name.starts_with(name) && process.state != 'Z');
    named.map(|process| process.pid).collect()
}

fn three_containers(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("three")?;
    let shared = kubelet.volume("shared")?;
    let with_shared = |name: &str, script: &str| {
        let mut config = pod.config(name, script);
        config.mounts.push(mount(&shared, "/shared", false));
        pod.start(config)
    };
    let first = with_shared("first", &format!("echo own > /own; {WAIT}"))?;
    let second = with_shared("second", "nc -l -p 4000 -e echo from the second & wait; sleep 1000")?;
    let third = with_shared("third", WAIT)?;

    if env.kind == Kind::Bulkhead {
        ensure_eq!(running("bulkhead-vmm").len(), 1, "machines of the pod");
    }
    ensure_eq!(running("containerd-shim").len(), 1, "shims of the pod");
    let everyone = [&first, &second, &third];
    for id in everyone {
        ensure_eq!(pod.container(id)?.state, ContainerState::CONTAINER_RUNNING.into(), "its state");
        ensure_eq!(pod.output(id, "hostname")?, "three\n", "its host name");
    }
    // One network, one IPC namespace and /dev/shm, but each its own files and processes.
    ensure_eq!(pod.output(&third, "nc 127.0.0.1 4000")?, "from the second\n", "what comes from the loopback interface");
    let namespaces = "for kind in net ipc uts; do readlink /proc/self/ns/$kind; done";
    ensure_eq!(pod.output(&first, namespaces)?, pod.output(&second, namespaces)?, "the namespaces");
    pod.output(&first, "echo shm > /dev/shm/file; echo file > /shared/file")?;
    ensure_eq!(pod.output(&third, "cat /dev/shm/file /shared/file")?, "shm\nfile\n", "what another has written");
    ensure_eq!(pod.output(&third, "ls /own 2>&1 || true")?, "ls: /own: No such file or directory\n", "its own file");
    ensure!(!pod.output(&second, "ps")?.contains("trap"), "it sees another's processes");

    let failing = pod.exec(&first, "echo out; echo err >&2; exit 9")?;
    ensure_eq!((failing.exit_code, failing.stdout, failing.stderr), (9, b"out\n".to_vec(), b"err\n".to_vec()), "exec");

    restart_one(&pod, &first, &third)?;
    pod.remove()?;
    kubelet.end()
}

/// Ends one container and starts its successor; another goes on.
fn restart_one(pod: &Pod<'_>, ended: &str, other: &str) -> Result {
    pod.output(other, "echo $$ > /mark")?;
    pod.stop(ended, 30)?;
    ensure_eq!(pod.wait(ended)?, 3, "the exit code");
    pod.remove_container(ended)?;
    let mut config = pod.config("first", WAIT);
    config.metadata.mut_or_insert_default().attempt = 1;
    let again = pod.start(config)?;
    ensure_eq!(pod.output(&again, "ls /own 2>&1 || true")?, "ls: /own: No such file or directory\n", "the old files");
    ensure_eq!(pod.output(other, "test -s /mark && echo there")?, "there\n", "the other container");
    Ok(())
}

fn volumes(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("volumes")?;
    // As the kubelet lays out a config map: files are links through a link that is swapped.
    let map = kubelet.volume("map")?;
    let fill = |version: &str| -> Result {
        fs::create_dir(map.join(version))?;
        fs::write(map.join(version).join("key"), version)?;
        symlink(version, map.join("..new"))?;
        Ok(fs::rename(map.join("..new"), map.join("..data"))?)
    };
    fill("..one")?;
    symlink("..data/key", map.join("key"))?;
    let memory = kubelet.volume("memory")?;
    env.mount("tmpfs", "tmpfs", &memory, "size=1m")?;
    let log = kubelet.volume("logs")?.join("termination");
    fs::write(&log, "")?;
    let sub = kubelet.volume("empty")?.join("sub");
    fs::create_dir(&sub)?;
    fs::write(sub.join("there"), "sub\n")?;
    let mut config = pod.config("volumes", WAIT);
    config.mounts = vec![
        mount(&map, "/map", true),
        mount(&map.join("key"), "/sub-path-key", true),
        mount(&memory, "/memory", false),
        mount(&sub, "/sub", false),
        mount(&log, "/dev/termination-log", false),
    ];
    let id = pod.start(config)?;

    ensure_eq!(pod.output(&id, "set -- $(df -k /dev/shm | tail -n 1); echo $2")?, "65536\n", "KiB of shared memory");
    ensure_eq!(pod.output(&id, "cat /map/key /sub-path-key")?, "..one..one", "the config map");
    fill("..two")?;
    fs::remove_dir_all(map.join("..one"))?;
    ensure_eq!(pod.output(&id, "sleep 1; cat /map/key")?, "..two", "the swapped config map");
    ensure!(pod.exec(&id, "echo x > /map/new")?.exit_code != 0, "a read-only volume can be written");
    pod.output(&id, "echo kept > /memory/file; cat /sub/there; echo last words > /dev/termination-log")?;
    ensure_eq!(fs::read_to_string(memory.join("file"))?, "kept\n", "what is in the volume of memory");
    ensure!(pod.exec(&id, "head -c 2000000 /dev/zero > /memory/large")?.exit_code != 0, "a volume of 1 MiB is larger");
    ensure_eq!(fs::read_to_string(&log)?, "last words\n", "the termination log");
    pod.remove()?;
    kubelet.end()
}

/// As a plugin's socket that is a hostPath: each container of the pod that mounts it has it, one after the other too.
fn socket_of_the_host(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let socket = kubelet.volume("plugin")?.join("s");
    let listener = UnixListener::bind(&socket)?;
    let (sender, lines) = channel();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(std::io::Result::ok) {
            let mut line = String::new();
            let read = BufReader::new(stream).read_line(&mut line);
            let _ = sender.send(read.map(|_| line));
        }
    });
    let pod = kubelet.pod("socket")?;
    let start = |name: &str| {
        let mut config = pod.config(name, &format!("logger -t {name} started; {WAIT}"));
        config.mounts = vec![mount(&socket, "/dev/log", false)];
        pod.start(config)
    };
    let expect = |text: &str| -> Result {
        let line = lines.recv_timeout(Duration::from_secs(60))??;
        ensure!(line.contains(text), "not {text:?} but {line:?}");
        Ok(())
    };

    let first = start("first")?;
    expect("first: started")?;
    let second = start("second")?;
    expect("second: started")?;
    pod.stop(&first, 30)?;
    pod.remove_container(&first)?;
    pod.output(&second, "logger -t second goes on")?;
    expect("second: goes on")?;
    start("third")?;
    expect("third: started")?;

    pod.remove()?;
    kubelet.end()
}

fn network(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let (serving, asking) = (kubelet.pod("serving")?, kubelet.pod("asking")?);
    let address = serving.address()?;
    let script = "mkdir /www; echo from a pod > /www/index.html; httpd -f -p 80 -h /www";
    serving.script("serve", script)?;
    let id = asking.script("ask", WAIT)?;

    let own = asking.address()?;
    ensure!(asking.output(&id, "ip -o addr show dev eth0")?.contains(&format!("inet {own}/24")), "no {own} on eth0");
    // Not wget: with an /etc/hosts, that of a static busybox looks for libraries.
    let get = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 30 {address} 80 | tail -n 1");
    ensure_eq!(asking.output(&id, &get)?, "from a pod\n", "what comes from the other pod");
    ensure_eq!(host(&format!("busybox wget -q -O - http://{address}/"))?, "from a pod\n", "what comes to the host");
    asking.output(&id, &format!("ping -c 1 -w 30 {}", kubelet.host_address()))?;
    let files = asking.output(&id, "cat /etc/resolv.conf /etc/hosts /etc/hostname")?;
    for part in ["nameserver 10.1.2.3", "search cluster.test", "localhost", "asking\n"] {
        ensure!(files.contains(part), "no {part:?} in {files:?}");
    }
    serving.remove()?;
    asking.remove()?;
    kubelet.end()
}

fn logs_and_statistics(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("logs")?;
    let ending = pod.script("ending", "echo one; echo two >&2; printf three; exit 7")?;
    let mut config = pod.config("lasting", WAIT);
    let limits = LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    config.linux.mut_or_insert_default().resources = MessageField::some(limits);
    let lasting = pod.start(config)?;

    ensure_eq!(pod.wait(&ending)?, 7, "the exit code");
    let mut lines = pod.log("ending")?;
    lines.sort();
    ensure_eq!(lines, ["stderr F two", "stdout F one", "stdout P three"], "the log");
    kubelet.call::<Empty>("ReopenContainerLog", &named(&lasting))?;
    let stats: ContainerStatsResponse = kubelet.call("ContainerStats", &named(&lasting))?;
    let stats = stats.stats.unwrap_or_default();
    let used = stats.memory.working_set_bytes.value;
    ensure!((1..64 << 20).contains(&used), "bytes in use: {used}");
    ensure!(stats.cpu.usage_core_nano_seconds.value > 0, "no time of a processor: {stats:?}");
    // Of the sandbox: what the pod costs the host.
    let cost = kubelet.containerd.succeed(["task", "metrics", &pod.id])?.stdout();
    let value = |name: &str| cost.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let tells = |name: &str| value(name).is_some_and(|value| value != "0");
    ensure!(tells("memory.usage ") && tells("cpu.usage_usec ") && tells("pids.current "), "the pod's cost: {cost}");
    let all: ListContainerStatsResponse = kubelet.call("ListContainerStats", &Empty::new())?;
    ensure!(all.stats.iter().any(|stats| stats.attributes.id == lasting), "{lasting} is not in {all:?}");

    let limits = LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() };
    let update = UpdateContainerResourcesRequest {
        container_id: lasting.clone(),
        linux: MessageField::some(limits),
        ..Default::default()
    };
    kubelet.call::<Empty>("UpdateContainerResources", &update)?;
    ensure_eq!(pod.output(&lasting, "cat /sys/fs/cgroup/memory.max")?, "100663296\n", "the new limit");
    pod.remove()?;
    kubelet.end()
}

/// The streams that `kubectl exec` and `attach` are made of.
fn streams(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("streams")?;
    let mut config = pod.config("asking", "while read line; do echo \"told $line\"; done");
    config.stdin = true;
    let asking = pod.start(config)?;
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();

    let request = ExecRequest {
        container_id: asking.clone(),
        cmd: words(&["sh", "-c", "cat; echo err >&2; exit 6"]),
        stdin: true,
        stdout: true,
        stderr: true,
        ..ExecRequest::default()
    };
    let url: UrlResponse = kubelet.call("Exec", &request)?;
    let mut stream = WebSocket::connect(&url.url, "")?;
    stream.send(STDIN, b"through\n")?;
    stream.wait_for(STDOUT, "through\n")?;
    drop(stream);

    let cmd = words(&["sh", "-c", "tty; read line; echo got $line; exit 4"]);
    let (container_id, tty) = (asking.clone(), true);
    let request = ExecRequest { container_id, cmd, tty, stdin: true, stdout: true, ..ExecRequest::default() };
    let url: UrlResponse = kubelet.call("Exec", &request)?;
    let mut terminal = WebSocket::connect(&url.url, "")?;
    terminal.wait_for(STDOUT, "/dev/pts/")?;
    terminal.send(STDIN, b"typed\n")?;
    let channels = terminal.finish()?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    ensure!(channels[usize::from(STDOUT)].contains("got typed"), "on the terminal: {channels:?}");
    ensure!(channels[usize::from(STATUS)].contains("\"4\""), "the end: {channels:?}");

    let container_id = asking.clone();
    let request = AttachRequest { container_id, stdin: true, stdout: true, stderr: true, ..AttachRequest::default() };
    let url: UrlResponse = kubelet.call("Attach", &request)?;
    let mut attached = WebSocket::connect(&url.url, "")?;
    attached.send(STDIN, b"this\n")?;
    attached.wait_for(STDOUT, "told this\n")?;
    drop(attached);
    ensure_eq!(pod.container(&asking)?.state, ContainerState::CONTAINER_RUNNING.into(), "its state");
    pod.remove()?;
    kubelet.end()
}

fn killed_container(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("killed")?;
    let killed = pod.script("killed", "sleep 1000 & echo $! > /pid; wait $!")?;
    let other = pod.script("other", WAIT)?;
    let failing = pod.create(pod.config("failing", "true"))?;
    pod.remove_container(&failing)?;

    // Of what is below init, and then init.
    pod.output(&killed, "while ! test -s /pid; do sleep 0.1; done; kill -9 $(cat /pid)")?;
    ensure_eq!(pod.wait(&killed)?, 137, "the exit code of one that tells of its child's");
    let again = pod.script("again", "sleep 1000; exit 1")?;
    pod.stop(&again, 0)?;
    ensure_eq!(pod.wait(&again)?, 137, "the exit code of one that was killed");
    ensure_eq!(pod.container(&other)?.state, ContainerState::CONTAINER_RUNNING.into(), "the other's state");
    ensure_eq!(pod.output(&other, "echo there")?, "there\n", "the other");
    ensure_eq!(pod.status()?.state, PodSandboxState::SANDBOX_READY.into(), "the pod's state");
    pod.remove()?;
    kubelet.end()
}

/// What the kubelet finds of a pod that was lost: it is not ready, its containers have ended so, and it can be removed.
fn is_lost(kubelet: &Kubelet<'_>, pod: Pod<'_>, id: &str, exit_codes: &[i32]) -> Result {
    let exit_code = pod.wait(id)?;
    ensure!(exit_codes.contains(&exit_code), "the exit code of a container that was lost: {exit_code}");
    let end = Instant::now() + Duration::from_secs(60);
    while pod.status()?.state == PodSandboxState::SANDBOX_READY.into() {
        ensure!(Instant::now() < end, "the pod is ready still: {}", kubelet.containerd.log());
        thread::sleep(Duration::from_millis(100));
    }
    pod.remove()
}

fn killed_vmm(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("lost")?;
    let id = pod.script("lost", WAIT)?;

    for vmm in running("bulkhead-vmm") {
        kill(Pid::from_raw(vmm), Signal::SIGKILL)?;
    }
    is_lost(&kubelet, pod, &id, &[137])?;
    kubelet.end()
}

fn killed_shim(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("lost")?;
    let id = pod.script("lost", WAIT)?;

    for shim in running("containerd-shim") {
        kill(Pid::from_raw(shim), Signal::SIGKILL)?;
    }
    // Of a connection that is lost, CRI says 255, whatever the runtime, unless it hears of the shim's `delete` before.
    is_lost(&kubelet, pod, &id, &[137, 255])?;
    kubelet.end()
}

fn killed_containerd(env: &Env) -> Result {
    let mut kubelet = Kubelet::new(env)?;
    let config = kubelet.pod_config("lasting")?;
    let pod = kubelet.run(config.clone())?;
    let (lasting, ending) = (pod.script("lasting", WAIT)?, pod.script("ending", "sleep 3; exit 6")?);
    let id = pod.id.clone();
    let removed = pod.output(&lasting, "hostname")?;
    ensure_eq!(removed, "lasting\n", "its host name");

    kubelet.containerd.kill()?;
    thread::sleep(Duration::from_secs(5));
    kubelet.start()?;

    let pod = kubelet.found(id, config);
    ensure_eq!(pod.wait(&ending)?, 6, "the exit code of what ended meanwhile");
    ensure_eq!(pod.container(&lasting)?.state, ContainerState::CONTAINER_RUNNING.into(), "the other's state");
    ensure_eq!(pod.status()?.state, PodSandboxState::SANDBOX_READY.into(), "the pod's state");
    ensure_eq!(pod.output(&lasting, "echo there")?, "there\n", "the other");
    pod.remove()?;
    kubelet.end()
}

/// Pods come and go, one and then several; nothing of them may be left.
fn at_once(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    come_and_go(&kubelet, 1)?;
    live_together(&kubelet, 3)?;
    nothing_is_left(kubelet)
}

fn ten_at_once(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    live_together(&kubelet, 10)?;
    nothing_is_left(kubelet)
}

fn fifty_in_a_row(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    come_and_go(&kubelet, 50)?;
    nothing_is_left(kubelet)
}

/// Makes pods and removes them, one after the other.
fn come_and_go(kubelet: &Kubelet<'_>, count: usize) -> Result {
    for _ in 0..count {
        let pod = kubelet.pod("in-a-row")?;
        let id = pod.script("one", "exit 5")?;
        ensure_eq!(pod.wait(&id)?, 5, "the exit code");
        pod.remove()?;
    }
    Ok(())
}

/// Makes pods at once, that all live before they are removed at once.
fn live_together(kubelet: &Kubelet<'_>, count: usize) -> Result {
    let all_live = Barrier::new(count);
    let live = || {
        let running = kubelet.pod("at-once").and_then(|pod| {
            let id = pod.script("one", WAIT)?;
            Ok((pod, id))
        });
        // Also of those that could not be made: the others wait.
        all_live.wait();
        let (pod, id) = running?;
        ensure_eq!(pod.container(&id)?.state, ContainerState::CONTAINER_RUNNING.into(), "its state");
        pod.remove()
    };
    thread::scope(|scope| {
        let lives: Vec<_> = (0..count).map(|_| scope.spawn(live)).collect();
        lives.into_iter().try_for_each(|life| life.join().unwrap_or_else(|_| fail!("a thread has panicked")))
    })
}

/// Ends CRI, of whose pods nothing may be left.
fn nothing_is_left(kubelet: Kubelet<'_>) -> Result {
    let pods: ListPodSandboxResponse = kubelet.call("ListPodSandbox", &Empty::new())?;
    let containers: ListContainersResponse = kubelet.call("ListContainers", &Empty::new())?;
    ensure!(pods.items.is_empty() && containers.containers.is_empty(), "what is left: {pods:?}, {containers:?}");
    kubelet.end()
}

/// Containers that see each other's processes, as a pod with `shareProcessNamespace` has them.
fn processes(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("processes")?;
    let common = |name: &str, script: &str| {
        let mut config = pod.config(name, script);
        let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        security.namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
        pod.start(config)
    };
    let first = common("first", "sleep 1001 & sleep 1002 & wait $!; exit 4")?;
    let second = common("second", WAIT)?;

    let seen = pod.output(&second, "ps -o args")?;
    ensure!(seen.contains("sleep 1001") && seen.contains("trap 'exit 3'"), "the processes of the pod: {seen}");
    let kill = "ps -o pid,args | while read pid args; do test \"$args\" != 'sleep 1002' || kill $pid; done";
    pod.output(&second, kill)?;
    ensure_eq!(pod.wait(&first)?, 4, "the exit code of one whose process another has ended");
    let seen = pod.output(&second, "ps -o args")?;
    ensure!(!seen.contains("sleep 1001"), "what a container leaves that has ended: {seen}");
    ensure_eq!(pod.container(&second)?.state, ContainerState::CONTAINER_RUNNING.into(), "the other's state");
    pod.remove()?;
    kubelet.end()
}
