// SPDX-License-Identifier: Apache-2.0
//! What a container has around it on the host: a cgroup, a network namespace, a bind mount, hooks. Each as it is drawn; when the
//! container is gone, nothing of it is left, and each hook has been run once.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::engine::unified;
use super::network::Namespace;
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

/// How many there are: as many bits are drawn.
pub(super) const KINDS: u32 = 4;

/// Run in the container: it fails where the bind mount that there should be is not there.
pub(super) const LOOK: &str = "test ! -e /expected || test -e /shared/there || exit 9; ";

/// The surroundings of one container.
pub(super) struct Surroundings {
    cgroup: Option<PathBuf>,
    namespace: Option<Namespace>,
    /// Where the hooks write.
    told: Option<PathBuf>,
}

impl Surroundings {
    /// Gives a bundle those whose bit is set.
    pub(super) fn draw(env: &Env, bundle: &mut Bundle, bits: u64) -> Result<Self> {
        let has = |bit: u32| (bits >> bit) & 1 == 1;
        let id = env.id();
        let mut drawn = Self { cgroup: None, namespace: None, told: None };
        if has(0)
            && let Ok(root) = unified()
        {
            bundle.set("/linux/cgroupsPath", json!(format!("/{id}")));
            drawn.cgroup = Some(root.join(&id));
        }
        if has(1) {
            let number = id.rsplit('-').next().unwrap_or_default();
            let namespace = Namespace::new(env, &format!("r{number}"))?;
            namespace.give_to(bundle);
            drawn.namespace = Some(namespace);
        }
        if has(2) {
            let shared = env.folder(&format!("shared-{id}"))?;
            fs::write(shared.join("there"), "")?;
            bundle.add_file("expected", "", 0o644)?;
            bundle.bind(&shared, "/shared", &[]);
        }
        if has(3) {
            let told = env.work.join(format!("told-{id}"));
            let hook = |name: &str| {
                let script = format!("echo {name} >>{}", told.display());
                json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
            };
            bundle.set("/hooks", json!({ "createRuntime": hook("made"), "poststop": hook("gone") }));
            drawn.told = Some(told);
        }
        Ok(drawn)
    }

    /// What is left when the container is gone, which had been made, or perhaps not.
    pub(super) fn ensure_gone(self, was_made: bool) -> Result {
        if let Some(cgroup) = &self.cgroup {
            // A killed machine's end is not waited for by anyone.
            let end = Instant::now() + Duration::from_secs(10);
            while cgroup.exists() {
                ensure!(Instant::now() < end, "{} is left", cgroup.display());
                thread::sleep(Duration::from_millis(50));
            }
        }
        if let Some(namespace) = &self.namespace {
            ensure_eq!(namespace.leftovers()?, "", "what is left in the network namespace");
        }
        if let Some(told) = &self.told {
            let told = fs::read_to_string(told).unwrap_or_default();
            let is_right = told == "made\ngone\n" || !was_made && ["", "made\n"].contains(&told.as_str());
            ensure!(is_right, "the hooks that were run: {told:?}");
        }
        Ok(())
    }
}
