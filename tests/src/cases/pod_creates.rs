// SPDX-License-Identifier: Apache-2.0
//! Containers of a pod whose guest does not make them: what they were to have is free again, and the pod goes on.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api::Status;
use serde_json::json;

use super::shim::Shim;
use super::task::{Hanging, KILL, Tasks, creation, limit};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[case!(refused_by_the_guest), case!(given_up).limit(600)];

/// How long a creation may take where it is given up: longer than a boot on a slow host.
const PATIENCE_MS: u32 = 45_000;

/// A container with a volume.
fn with_volume(tasks: &Tasks<'_>, volume: &Path, script: &str) -> Result<Bundle> {
    let mut bundle = tasks.member(script)?;
    bundle.bind(volume, "/volume", &[]);
    Ok(bundle)
}

/// A container of that id is made and does its work, with the volume as it is then; another one of the pod has gone on.
fn goes_on(env: &Env, tasks: &Tasks<'_>, id: &str, volume: &Path, other: &str) -> Result {
    let output = env.work.join("output");
    fs::rename(volume, env.work.join("an-older-one"))?;
    fs::create_dir(volume)?;
    fs::write(volume.join("there"), "there\n")?;
    let bundle = with_volume(tasks, volume, "cat /volume/there; echo written > /volume/new; exit 4")?;
    tasks.create(id, &bundle, &format!("file://{}", output.display()))?;
    tasks.start(id, "")?;

    ensure_eq!(tasks.wait(id, "")?.exit_status, 4, "the exit status of the next one");
    ensure_eq!(fs::read_to_string(&output)?, "there\n", "what it has read");
    ensure_eq!(fs::read_to_string(volume.join("new"))?, "written\n", "what it has written");
    tasks.delete(id)?;
    ensure_eq!(tasks.status(other)?, Status::RUNNING, "the state of another container");
    tasks.kill(other, "", KILL, false)?;
    ensure_eq!(tasks.wait(other, "")?.exit_status, 137, "its exit status");
    tasks.delete(other).map(drop)
}

fn refused_by_the_guest(env: &Env) -> Result {
    let tasks = Tasks::with_pod(env)?;
    let other = tasks.run_member("sleep 1000", "")?;
    let (volume, id) = (env.folder("volume")?, env.id());
    let mut bundle = with_volume(&tasks, &volume, "true")?;
    bundle.set("/linux/resources", json!({ "unified": { "memory.high": "lots" } }));
    let undone = env.work.join("undone");
    let hook = |script: String| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    let undo = format!("echo undone >> {}", undone.display());
    bundle.set("/hooks", json!({ "createRuntime": hook("true".to_owned()), "poststop": hook(undo) })).write()?;

    for _ in 0..2 {
        let refused = tasks.calls.create(limit(), &creation(&id, &bundle, "")).map(drop);
        ensure!(format!("{refused:?}").contains("memory.high"), "what the guest's kernel does not take: {refused:?}");
        ensure!(tasks.status(&id).is_err(), "what was refused has a state");
    }
    ensure_eq!(fs::read_to_string(&undone)?, "undone\nundone\n", "what the last hooks have done");

    goes_on(env, &tasks, &id, &volume, &other)?;
    let sandbox = tasks.shim.id.clone();
    tasks.shut_down(&sandbox)
}

/// The guest waits for a file of the container's, which is on a file system that answers nobody.
fn given_up(env: &Env) -> Result {
    let mut shim = Shim::new(env)?;
    shim.boot_timeout_ms = Some(PATIENCE_MS);
    let tasks = Tasks::with_pod_of(env, shim)?;
    let other = tasks.run_member("sleep 1000", "")?;
    let (volume, id) = (env.folder("volume")?, env.id());
    let mut bundle = with_volume(&tasks, &volume, "true")?;
    let place = bundle.path("hanging");
    fs::create_dir(&place)?;
    let mut hanging = Hanging::mount(env, &place)?;
    bundle.set("/linux/maskedPaths", json!(["/hanging/file"])).write()?;

    let (calls, request) = (tasks.shim.tasks()?, creation(&id, &bundle, ""));
    let creating = thread::spawn(move || calls.create(limit(), &request).err().map(|error| error.to_string()));
    hanging.request()?;
    // It is given up; that may wait for the guest to let go of what it has begun.
    thread::sleep(Duration::from_millis(u64::from(PATIENCE_MS) + 5000));
    ensure_eq!(tasks.status(&other)?, Status::RUNNING, "the state of another container meanwhile");
    drop(hanging);

    let Ok(Some(why)) = creating.join() else { fail!("a container is made that its file system holds up") };
    ensure!(why.contains(&format!("{PATIENCE_MS} ms")), "it cannot be made, as {why:?}");
    ensure!(tasks.status(&id).is_err(), "what was given up has a state");
    goes_on(env, &tasks, &id, &volume, &other)?;
    let sandbox = tasks.shim.id.clone();
    tasks.shut_down(&sandbox)
}
