// SPDX-License-Identifier: Apache-2.0
//! What each container of a pod has for itself, whatever the others have, and what becomes of them when one is killed.

use std::fs;

use serde_json::json;

use super::pods::WAIT;
use super::{Case, case};
use crate::cri::api::{
    ContainerState, Empty, ExecRequest, LinuxContainerResources, NamespaceMode, ProfileType, SecurityProfile,
    UpdateContainerResourcesRequest, UrlResponse,
};
use crate::cri::{RESIZE, STATUS, STDOUT, WebSocket};
use crate::engines::Kubelet;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};
use crate::processes;

pub(super) const CASES: &[Case] = &[
    case!(filters_of_their_own),
    case!(terminal_of_an_exec),
    case!(killed_by_another).limit(600),
    case!(cpus_of_the_machine),
];

/// Each has its own filter of system calls, which holds for what is executed in it too.
fn filters_of_their_own(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let profile = env.work.join("no-folders.json");
    let denied = json!({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"});
    fs::write(&profile, json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]}).to_string())?;
    let pod = kubelet.pod("filters")?;
    let start = |name: &str, seccomp: SecurityProfile, attempt| {
        let mut config = pod.config(name, &format!("mkdir /made 2>/dev/null && echo made || echo denied; {WAIT}"));
        config.metadata.mut_or_insert_default().attempt = attempt;
        let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        security.seccomp = Some(seccomp).into();
        pod.start(config)
    };
    let localhost_ref = format!("localhost/{}", profile.display());
    let own = SecurityProfile { profile_type: ProfileType::LOCALHOST.into(), localhost_ref, ..Default::default() };
    let none = SecurityProfile { profile_type: ProfileType::UNCONFINED.into(), ..Default::default() };
    let denied = start("denied", own.clone(), 0)?;
    let free = start("free", none, 0)?;
    let default = start("default", SecurityProfile::default(), 0)?;

    let filters = |id: &str| pod.output(id, "grep -w Seccomp: /proc/self/status /proc/1/status | grep -c '2$' || true");
    let can = |id: &str| -> Result<bool> { Ok(pod.exec(id, "mkdir /other")?.exit_code == 0) };
    for (id, expected) in [(&denied, false), (&free, true), (&default, true)] {
        ensure_eq!(can(id)?, expected, "whether an executed process can make a folder");
        ensure_eq!(
            pod.output(id, "test -e /made && echo made || echo denied")? == "made\n",
            expected,
            "whether init can"
        );
    }
    ensure_eq!(
        [filters(&denied)?, filters(&free)?, filters(&default)?],
        ["2\n", "0\n", "2\n"],
        "processes that have a filter"
    );
    pod.stop(&denied, 0)?;
    pod.remove_container(&denied)?;
    let again = start("denied", own, 1)?;
    ensure!(!can(&again)? && pod.exec(&free, "mkdir /another")?.exit_code == 0, "filters after a restart");
    pod.remove()?;
    kubelet.end()
}

/// `kubectl exec -it` from a terminal whose size changes.
fn terminal_of_an_exec(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("terminal")?;
    let container_id = pod.script("waiting", WAIT)?;
    let script = "trap 'echo changed' WINCH; until test \"$(stty size)\" = '33 77'; do sleep 0.1; done; echo first; \
                  until test \"$(stty size)\" = '20 60'; do sleep 0.1; done; echo second; exit 5";
    let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
    let request = ExecRequest { container_id, cmd, tty: true, stdin: true, stdout: true, ..ExecRequest::default() };
    let url: UrlResponse = kubelet.call("Exec", &request)?;
    let mut terminal = WebSocket::connect(&url.url, "")?;

    terminal.send(RESIZE, br#"{"Width":77,"Height":33}"#)?;
    terminal.wait_for(STDOUT, "first")?;
    terminal.send(RESIZE, br#"{"Width":60,"Height":20}"#)?;
    let channels = terminal.finish()?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());

    let stdout = &channels[usize::from(STDOUT)];
    ensure!(stdout.contains("changed") && stdout.contains("second"), "on the terminal: {channels:?}");
    ensure!(channels[usize::from(STATUS)].contains("\"5\""), "the end: {channels:?}");
    pod.remove()?;
    kubelet.end()
}

/// A container is killed from within the pod, again and again, and started anew; the others go on.
fn killed_by_another(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("killed")?;
    let start = |name: &str, script: &str, attempt| {
        let mut config = pod.config(name, script);
        config.metadata.mut_or_insert_default().attempt = attempt;
        let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        security.namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
        pod.start(config)
    };
    let killer = start("killer", WAIT, 0)?;
    let steady = start("steady", "while :; do echo >> /beats; sleep 0.1; done", 0)?;
    let beats = || -> Result<usize> { Ok(pod.output(&steady, "wc -l < /beats")?.trim().parse()?) };
    let mut before = beats()?;

    for round in 0..4 {
        let victim = start("victim", ": victim; sleep 4711 & wait", round)?;
        // The words are not those of the script itself.
        let kill = "until ps -o args | grep -q '[v]ictim'; do sleep 0.1; done; \
                    ps -o pid,args | grep '[v]ictim' | while read pid rest; do kill -9 $pid; done";
        pod.output(&killer, kill)?;

        ensure_eq!(pod.wait(&victim)?, 137, "the exit code of what was killed, in round {round}");
        pod.remove_container(&victim)?;
        ensure_eq!(pod.output(&killer, "ps -o args | grep -c '[4]711' || true")?, "0\n", "what is left of it");
        let now = beats()?;
        ensure!(now > before, "the other container has not gone on: {before} and {now} beats");
        before = now;
    }
    for id in [&killer, &steady] {
        ensure_eq!(pod.container(id)?.state, ContainerState::CONTAINER_RUNNING.into(), "the others' state");
    }
    pod.remove()?;
    kubelet.end()
}

/// The CPUs of the host that the kubelet's static CPU manager gives containers, at their beginning and later: the machine is kept to
/// what they have together, for as long as all of them have some.
fn cpus_of_the_machine(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("cpus")?;
    let below = processes::descendants(std::process::id().cast_signed());
    let Some(vmm) = below.iter().find(|process| process.name.starts_with("bulkhead-vmm")) else {
        fail!("the pod has no machine among {below:?}");
    };
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", vmm.pid))?;
    let place = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let file = format!("/sys/fs/cgroup{place}/cpuset.cpus");
    let of_machine = || fs::read_to_string(&file).context(|| format!("reading {file}"));
    let resources = |cpus: &str| LinuxContainerResources { cpuset_cpus: cpus.to_owned(), ..Default::default() };
    let start = |name: &str, cpus: &str| {
        let mut config = pod.config(name, WAIT);
        config.linux.mut_or_insert_default().resources = Some(resources(cpus)).into();
        pod.start(config)
    };
    let update = |id: &str, cpus: &str| {
        let linux = Some(resources(cpus)).into();
        let request = UpdateContainerResourcesRequest { container_id: id.to_owned(), linux, ..Default::default() };
        kubelet.call::<Empty>("UpdateContainerResources", &request)
    };

    ensure_eq!(of_machine()?, "\n", "the CPUs of a machine without a container");
    let first = start("first", "0")?;
    ensure_eq!(of_machine()?, "0\n", "the CPUs of a machine whose only container has one");
    let second = start("second", "")?;
    let all = fs::read_to_string("/sys/fs/cgroup/cpuset.cpus.effective")?;
    ensure_eq!(of_machine()?, all, "the CPUs with a container that has all");
    update(&second, "0")?;
    ensure_eq!(of_machine()?, "0\n", "the CPUs when both have some");
    ensure!(update(&second, "4711").is_err(), "a CPU that the host does not have");
    ensure_eq!(of_machine()?, "0\n", "the CPUs after that was refused");
    // Its number means nothing in the guest.
    ensure_eq!(
        pod.output(
            &first,
            "grep -c processor /proc/cpuinfo; cat /sys/fs/cgroup/cpuset.cpus 2>/dev/null | tr -d '\\n'"
        )?,
        "1\n",
        "the guest's CPUs"
    );
    for id in [&first, &second] {
        pod.stop(id, 0)?;
    }
    // A container's end is told before the machine has let go of all that it had.
    for _ in 0..100 {
        if of_machine()? == all {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    ensure_eq!(of_machine()?, all, "the CPUs without a container");
    pod.remove()?;
    kubelet.end()
}
