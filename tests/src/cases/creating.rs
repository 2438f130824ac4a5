// SPDX-License-Identifier: Apache-2.0
//! Verbs of a container that is still being created, where a hook holds it: before there is a machine, or while one boots.

use std::fs::{self, File};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::network::Namespace;
use super::verbs::follow;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure};
use crate::output::Output;
use crate::run::Running;

pub(super) const CASES: &[Case] = &[case!(verbs_while_it_is_created), case!(deleted_while_it_is_created)];

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A `create` that a hook holds up.
struct Creation<'a> {
    env: &'a Env,
    id: String,
    create: Running,
    /// What it says: its streams are the container's.
    said: PathBuf,
    /// The file that lets it go on.
    go: PathBuf,
}

impl<'a> Creation<'a> {
    /// One whose hook runs: with a network namespace that is there already, while the machine boots.
    fn begin(env: &'a Env, namespace: Option<&Namespace>) -> Result<Self> {
        let mut bundle = Bundle::busybox(env)?;
        let (at, go) = (bundle.folder.join("at"), bundle.folder.join("go"));
        let script = format!("touch {}; while [ ! -e {} ]; do sleep 0.05; done", at.display(), go.display());
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] });
        bundle.set("/hooks", json!({ "createRuntime": [hook] })).args(&["sleep", "1000"]);
        if let Some(namespace) = namespace {
            let network = json!({ "type": "network", "path": namespace.path });
            bundle.set("/linux/namespaces", json!([network, { "type": "pid" }, { "type": "mount" }]));
            bundle.set("/hostname", json!(""));
        }
        bundle.write()?;
        let (id, said) = (env.id(), bundle.folder.join("said"));
        let file = File::create(&said)?;
        let words = ["create", "--bundle", &bundle.folder.display().to_string(), &id].map(str::to_owned);
        let create = env.call(words).stdout(file.try_clone()?).stderr(file).spawn()?;
        let end = Instant::now() + LIMIT;
        while !at.exists() {
            ensure!(Instant::now() < end, "the hook is not run: {:?}", fs::read_to_string(&said));
            thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { env, id, create, said, go })
    }

    /// How it ends, and what it has said.
    fn end(self) -> Result<(Output, String)> {
        Ok((self.create.finish()?, fs::read_to_string(&self.said)?))
    }
}

fn verbs_while_it_is_created(env: &Env) -> Result {
    env.only_bulkhead()?; // Others have no such state in each of these verbs.
    let namespace = Namespace::empty(env, "creating")?;
    for namespace in [None, Some(&namespace)] {
        let creation = Creation::begin(env, namespace)?;
        let id = creation.id.clone();
        let (not_running, folder) =
            ("container not running: it is still being created", creation.said.with_file_name(""));
        let again = format!("create --bundle {} ID", folder.display());
        follow(
            env,
            &id,
            &[
                ("state ID", 0, "\"status\": \"creating\""),
                ("list", 0, "creating"),
                ("ps ID", 1, not_running),
                ("kill ID TERM", 1, not_running),
                ("kill ID KILL", 1, not_running),
                ("kill --all ID KILL", 1, not_running),
                ("start ID", 1, "cannot start a container that is still being created"),
                ("exec ID true", 255, "exec failed: cannot exec in a container that is still being created"),
                ("pause ID", 1, not_running),
                ("resume ID", 1, "container not paused"),
                ("update --pids-limit 5 ID", 1, not_running),
                ("events --stats ID", 1, not_running),
                ("delete ID", 1, "that is not stopped: creating"),
                (&again, 1, "container with given ID already exists"),
                ("gc", 0, ""),
                ("state ID", 0, "\"status\": \"creating\""),
            ],
        )?;
        fs::write(&creation.go, "")?;
        creation.end()?.0.expect_code(0)?;
        let steps = [("state ID", 0, "\"status\": \"created\""), ("start ID", 0, ""), ("delete --force ID", 0, "")];
        follow(env, &id, &steps)?;
    }
    Ok(())
}

/// Its supervisor ends by itself, and has what was made taken back.
fn deleted_while_it_is_created(env: &Env) -> Result {
    env.only_bulkhead()?;
    let namespace = Namespace::empty(env, "creating")?;
    for namespace in [None, Some(&namespace)] {
        let creation = Creation::begin(env, namespace)?;
        let id = creation.id.clone();

        creation.env.call(["delete", "--force", &id]).output()?.expect_stdout("")?;

        env.call(["state", &id]).output()?.expect_error(&["does not exist"])?;
        let (end, said) = creation.end()?;
        ensure!(!end.status.success() && said.contains("SIGTERM"), "{}; it said {said:?}", end.describe());
    }
    Ok(())
}
