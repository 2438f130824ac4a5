// SPDX-License-Identifier: Apache-2.0
//! Hooks: what they are told, how long they may take, and what follows a failure.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use super::network::Namespace;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Failure, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(hooks_are_told_of_the_container),
    case!(networks_of_hooks),
    case!(namespaces_of_hooks),
    case!(hook_in_the_container_has_its_time),
    case!(failing_hooks_of_a_container_that_lives_on),
    case!(last_hooks_after_a_refused_network),
];

fn hooks_are_told_of_the_container(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = bundle.folder.clone();
    let kinds = [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("createContainer", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ];
    let mut hooks = json!({});
    for (kind, _) in kinds {
        let script = format!("cat > {0}/{kind}; {{ env; pwd; echo \"$0 $1\"; }} > {0}/{kind}.env", folder.display());
        let args = ["name", "-c", &script, "zero", "one"];
        hooks[kind] =
            json!([{ "path": "/bin/sh", "args": args, "env": ["PATH=/usr/bin:/bin", "ONLY=this"], "timeout": 60 }]);
    }
    bundle.set("/hooks", hooks).annotation("org.example.key", "value").sh("sleep 1");
    let id = env.id();

    env.run_as(&bundle, &id)?.variable("SECRET_OF_THE_HOST", "1").output()?.expect_stdout("")?;

    for (kind, status) in kinds {
        let text = fs::read_to_string(folder.join(kind)).context(|| format!("reading what {kind} was told"))?;
        let state: Value = serde_json::from_str(&text).context(|| text.clone())?;
        ensure_eq!(state["id"], id.as_str(), "the id of {kind}");
        ensure_eq!(state["bundle"], folder.display().to_string(), "the bundle of {kind}");
        ensure_eq!(state["annotations"]["org.example.key"], "value", "the annotation of {kind}");
        ensure!(state["ociVersion"].as_str().is_some_and(|version| version.starts_with("1.")), "{kind}: {state}");
        // An older runc has the status of prestart as of what came before it.
        ensure!(state["status"] == status || env.kind == Kind::Other, "{kind}, which is to see {status}: {state}");
        ensure!((state["pid"].as_u64().unwrap_or(0) > 0) == (kind != "poststop"), "the pid of {kind}: {state}");
        let seen = fs::read_to_string(folder.join(format!("{kind}.env")))?;
        let holds = |line: &str| seen.lines().any(|seen| seen == line);
        ensure!(holds("ONLY=this") && holds("zero one") && !seen.contains("SECRET"), "{kind} has {seen}");
        let at_home = holds(&folder.display().to_string());
        ensure!(at_home || env.kind == Kind::Other, "{kind} is not in the bundle's folder: {seen}");
    }
    Ok(())
}

/// `createContainer` is the container's, the others are the host's; with a namespace of the engine's and without.
fn networks_of_hooks(env: &Env) -> Result {
    let hosts = fs::read_link("/proc/self/ns/net")?;
    let engines = Namespace::empty(env, "hooks")?;
    let inode = fs::metadata(&engines.path)?.ino();
    for given in [None, Some(&engines)] {
        let mut bundle = Bundle::busybox(env)?;
        let folder = bundle.folder.clone();
        let mut hooks = json!({});
        for kind in ["createRuntime", "createContainer", "poststart", "poststop"] {
            let script = format!("readlink /proc/self/ns/net > {}/{kind}", folder.display());
            hooks[kind] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }]);
        }
        bundle.set("/hooks", hooks).sh("sleep 1");
        if let Some(namespace) = given {
            namespace.give_to(&mut bundle);
        }
        env.run(&bundle)?.output()?.expect_code(0)?;

        let seen = |kind: &str| Ok::<_, Failure>(fs::read_to_string(folder.join(kind))?.trim_end().to_owned());
        for kind in ["createRuntime", "poststart", "poststop"] {
            ensure_eq!(seen(kind)?, hosts.display().to_string(), "the network of {kind}");
        }
        let containers = seen("createContainer")?;
        ensure!(containers != hosts.display().to_string(), "createContainer is in the host's network");
        ensure!(given.is_none() || containers == format!("net:[{inode}]"), "createContainer is in {containers}");
    }
    Ok(())
}

/// What a `createContainer` hook mounts is the container's and not the host's; so is its name of the host. With a network namespace
/// of the engine's, which lets the guest boot while other hooks run, and without.
fn namespaces_of_hooks(env: &Env) -> Result {
    const KINDS: [&str; 3] = ["mnt", "uts", "ipc"];
    let hosts = KINDS.map(|kind| fs::read_link(format!("/proc/self/ns/{kind}")));
    let engines = Namespace::empty(env, "hooks")?;
    for given in [None, Some(&engines)] {
        let mut bundle = Bundle::busybox(env)?;
        let (folder, place) = (bundle.folder.clone(), bundle.rootfs().join("mnt"));
        fs::create_dir_all(&place)?;
        let volume = bundle.folder.join("volume");
        fs::create_dir_all(volume.join("below"))?;
        let look = |kind: &str| {
            format!(
                "for kind in {}; do readlink /proc/self/ns/$kind; done > {}/{kind}; ",
                KINDS.join(" "),
                folder.display()
            )
        };
        let mounts = format!(
            "for place in {} {}/below; do mount -t tmpfs tmpfs $place && echo of the hook > $place/file; done; hostname > {}/name",
            place.display(),
            volume.display(),
            folder.display()
        );
        let hook = |script: String| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }]);
        bundle.set(
            "/hooks",
            json!({ "createRuntime": hook(look("createRuntime")), "createContainer": hook(look("createContainer") + &mounts) }),
        );
        // runc has made the container's mounts by then.
        let below = if env.kind == Kind::Bulkhead { "cat /volume/below/file" } else { "echo of the hook" };
        bundle.bind(&volume, "/volume", &["rbind"]);
        bundle.set("/hostname", json!("box")).sh(&format!("cat /mnt/file; {below}"));
        if let Some(namespace) = given {
            namespace.give_to(&mut bundle);
        }

        env.run(&bundle)?.output()?.expect_stdout("of the hook\nof the hook\n")?;

        let seen = |kind: &str| Ok::<_, Failure>(fs::read_to_string(folder.join(kind))?);
        let (outside, inside) = (seen("createRuntime")?, seen("createContainer")?);
        for (((kind, hosts), outside), inside) in KINDS.iter().zip(&hosts).zip(outside.lines()).zip(inside.lines()) {
            let hosts = hosts.as_ref().map(|link| link.display().to_string()).unwrap_or_default();
            ensure_eq!(outside, hosts, "createRuntime's namespace {kind}");
            ensure!(inside != hosts, "createContainer has the host's namespace {kind}");
        }
        // runc names the host after these hooks.
        ensure!(env.kind == Kind::Other || seen("name")? == "box\n", "the hook sees the name {:?}", seen("name")?);
        let on_the_host = [place.join("file"), volume.join("below/file")].into_iter().find(|file| file.exists());
        ensure!(on_the_host.is_none(), "the host has what the hook has mounted: {on_the_host:?}");
        fs::remove_dir(&place)?;
    }
    Ok(())
}

fn hook_in_the_container_has_its_time(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ran");
    let hook = |timeout: u32| json!([{ "path": "/bin/sleep", "args": ["sleep", "100"], "timeout": timeout }]);
    bundle.set("/hooks", json!({ "startContainer": hook(1) }));
    env.run(&bundle)?.output()?.expect_error(&["/bin/sleep", "within 1 s"])?;
    bundle.set("/hooks", json!({ "startContainer": [{ "path": "/no/such" }] }));
    env.run(&bundle)?.output()?.expect_error(&["/no/such"])?;
    bundle.sh("sleep 1000").set("/hooks", json!({ "poststart": hook(1) }));
    env.run(&bundle)?.output()?.expect_error(&["hooks.poststart[0]", "within 1 s"])
}

/// Nothing is left of a `create` that a hook ended; a `start` that one ended leaves what `delete` removes. Both are followed
/// by the last hooks.
fn failing_hooks_of_a_container_that_lives_on(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    let mark = bundle.folder.join("poststop");
    let shell = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    let after = shell(&format!("echo over >> {}", mark.display()));
    bundle.sh("sleep 1000");

    let id = env.id();
    for (round, kind) in ["createRuntime", "startContainer"].into_iter().enumerate() {
        bundle.set("/hooks", json!({ kind: shell("exit 3"), "poststop": after }));
        bundle.write()?;
        let create = ["create", "--bundle", &bundle.folder.display().to_string(), &id].map(str::to_owned);
        if kind == "createRuntime" {
            env.call(create).output()?.expect_error(&["hooks.createRuntime[0]", "exit status: 3"])?;
        } else {
            let container = Detached::create(env, &bundle)?;
            container.verb(&["start"]).output()?.expect_error(&["/bin/sh", "exit status: 3"])?;
            container.wait_for_status("stopped")?;
            container.must(&["delete"])?;
        }
        env.call(["state", &id]).output()?.expect_error(&["does not exist"])?;
        ensure_eq!(fs::read_to_string(&mark)?, "over\n".repeat(round + 1), "the hooks after {kind}");
    }

    bundle.set("/hooks", json!({ "poststart": shell("exit 4"), "poststop": after }));
    let container = Detached::create(env, &bundle)?;
    container.verb(&["start"]).output()?.expect_error(&["hooks.poststart[0]", "exit status: 4"])?;
    container.wait_for_status("stopped")?;
    container.must(&["delete"])?;
    ensure_eq!(fs::read_to_string(&mark)?, "over\n".repeat(3), "the hooks after poststart");
    Ok(())
}

/// What hooks have made is undone by the last ones, whatever has ended the start.
fn last_hooks_after_a_refused_network(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    let mark = bundle.folder.join("poststop");
    let hook = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }]);
    let make = "pid=$(grep -o '\"pid\": *[0-9]*' | tr -dc 0-9); net=\"nsenter --net=/proc/$pid/ns/net\"; \
                $net ip link add gre1 type gre local 10.9.40.2 remote 10.9.40.1 && $net ip link set gre1 up";
    bundle
        .set("/hooks", json!({ "createRuntime": hook(make), "poststop": hook(&format!("touch {}", mark.display())) }));
    bundle.sh("echo ran");

    env.run(&bundle)?.output()?.expect_error(&["gre1", "possible are veth"])?;

    ensure!(mark.exists(), "the poststop hooks were not run");
    Ok(())
}
