// SPDX-License-Identifier: Apache-2.0
//! System-call filters, scheduling, I/O priority, execution domain, clocks.

use std::time::Duration;

use bulkhead_agent::container::{ContainerSpec, CreateError, DeleteError};
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;

use crate::fixture::{DEADLINE, World, chain, process, request};

/// One BPF instruction.
fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&code.to_le_bytes());
    (bytes[2], bytes[3]) = (jt, jf);
    bytes[4..].copy_from_slice(&k.to_le_bytes());
    bytes
}

/// Answers one system call with an errno, and allows the rest.
fn deny(number: libc::c_long, errno: i32) -> wire::Seccomp {
    let number = u32::try_from(number).unwrap();
    let filter = [
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, number),
        instruction(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()),
        instruction(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    wire::Seccomp { filter: filter.concat(), ..Default::default() }
}

/// Each way of installing it, by a user with and without capabilities.
pub(crate) async fn seccomp_filter_holds() {
    let world = World::new();
    let script = "mkdir /tmp/d; grep -E '^(Seccomp|CapEff|CapPrm|NoNewPrivs):' /proc/self/status";
    for no_new_privileges in [false, true] {
        for uid in [0, 1000] {
            let mut request = request(&["sh", "-c", script]);
            let process = process(&mut request);
            process.seccomp = Some(deny(libc::SYS_mkdir, libc::EXDEV)).into();
            process.no_new_privileges = no_new_privileges;
            process.uid = uid;
            let output = world.run(request).await.unwrap();
            assert!(output.stderr.contains("cross-device link"), "{output:?}");
            let words: Vec<&str> = output.stdout.split_whitespace().collect();
            let nnp = if no_new_privileges { "1" } else { "0" };
            let none = "0000000000000000";
            assert_eq!(words, ["CapPrm:", none, "CapEff:", none, "NoNewPrivs:", nnp, "Seccomp:", "2"], "{uid}");
        }
    }
}

pub(crate) async fn bad_seccomp_filter_is_refused() {
    let world = World::new();
    let mut bad = request(&["true"]);
    // A load from outside of what a filter sees.
    let filter = [instruction(0x20, 0, 0, 64), instruction(0x06, 0, 0, 0)].concat();
    process(&mut bad).seccomp = Some(wire::Seccomp { filter, ..Default::default() }).into();
    let error = world.refused(bad).await;
    let text = chain(&error);
    assert!(text.contains("cannot install the seccomp filter of 2 instructions"), "{text}");
}

pub(crate) async fn scheduling_is_the_specs() {
    let world = World::new();
    // The nice value, and the policy (3 is SCHED_BATCH); the name has no blanks in it.
    let script = "cut -d' ' -f19,41 /proc/self/stat; uname -m";
    let output = world
        .script(script, |request| {
            let scheduler = wire::Scheduler { policy: 3, nice: 7, ..Default::default() };
            process(request).scheduler = Some(scheduler).into();
            process(request).personality = Some(8);
            process(request).io_priority = Some(3 << 13);
        })
        .await;
    assert_eq!(output, "7 3\ni686");
}

pub(crate) async fn clocks_have_the_specs_offsets() {
    let world = World::new();
    let uptime = world
        .script("cut -d. -f1 /proc/uptime", |request| {
            let namespace = wire::Namespace { kind: wire::NamespaceKind::TIME.into(), ..Default::default() };
            request.namespaces.push(namespace);
            request.time_offsets = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME]
                .map(|clock| wire::TimeOffset { clock, seconds: 1_000_000_000, ..Default::default() })
                .to_vec();
        })
        .await;
    assert!(uptime.parse::<u64>().unwrap() >= 1_000_000_000, "{uptime}");
}

pub(crate) async fn container_that_is_deleted_while_it_is_made_does_not_come() {
    let world = World::new();
    let mut wanted = request(&["sleep", "100"]);
    wanted.start_hooks = vec![wire::Hook {
        path: "/bin/sh".to_owned(),
        args: ["sh", "-c", "echo > /tmp/began; while [ ! -e /tmp/end ]; do sleep 0.02; done"]
            .map(str::to_owned)
            .to_vec(),
        env: vec!["PATH=/bin".to_owned()],
        timeout_s: 20,
        ..Default::default()
    }];
    let spec = ContainerSpec::from_wire(wanted).unwrap();
    let mut trace = Trace::default();
    let making = world.engine.create(&spec, true, &mut trace);
    let deleting = async {
        while !world.rootfs("tmp/began").exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let ending = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            std::fs::write(world.rootfs("tmp/end"), "").unwrap();
        };
        tokio::join!(world.engine.delete("case", true), ending).0
    };

    let (made, deleted) = tokio::time::timeout(DEADLINE, async { tokio::join!(making, deleting) }).await.unwrap();

    assert!(matches!(&made, Err(CreateError::Deleted(id)) if id == "case"), "{made:?}");
    deleted.unwrap();
    assert!(matches!(world.engine.delete("case", true).await, Err(DeleteError::NoSuchContainer(_))));
    // Its name is free again.
    assert_eq!(world.run(request(&["echo", "again"])).await.unwrap().stdout, "again\n");
}

pub(crate) async fn start_hooks_run_in_the_container_before_its_program() {
    let world = World::new();
    let hook = |script: &str| wire::Hook {
        path: "/bin/sh".to_owned(),
        args: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/bin".to_owned(), "A=b=c".to_owned()],
        timeout_s: 1,
        ..Default::default()
    };
    let told = world
        .script("cat /tmp/told", |request| {
            request.start_hooks =
                vec![hook("cat > /tmp/told"), hook("echo \" $A $HOME\" >> /tmp/told; hostname >> /tmp/told")];
            request.start_hook_state = "{}".to_owned();
            request.hostname = "inside".to_owned();
        })
        .await;
    assert_eq!(told, "{} b=c \ninside");

    for (script, expected) in [
        ("echo no; exit 3", "the hook failed: /bin/sh: exit status: 3: no"),
        ("exec sleep 100", "the hook failed: /bin/sh: it did not end within 1 s"),
    ] {
        let mut request = request(&["true"]);
        request.start_hooks = vec![hook(script)];
        let error = world.refused(request).await;
        assert!(chain(&error).contains(expected), "{}", chain(&error));
    }
}
