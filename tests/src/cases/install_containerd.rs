// SPDX-License-Identifier: Apache-2.0
//! `install-containerd`, undone: containerd goes on without the runtime, and its configuration is what it was.

use std::fs;

use super::{Case, case};
use crate::engines::Kubelet;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[case!(removed)];

fn removed(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut kubelet = Kubelet::new(env)?;
    let path = kubelet.containerd.config();
    let call = |flags: &[&str]| -> Result<String> {
        let path = path.display().to_string();
        let words = [&["install-containerd", "--config", &path], flags].concat();
        env.call(words).output()?.expect_code(0)?;
        Ok(fs::read_to_string(&path)?)
    };
    kubelet.pod("before")?.remove()?;

    let installed = fs::read_to_string(&path)?;
    let removed = call(&["--remove"])?;
    ensure!(!removed.contains("io.containerd.bulkhead.v2"), "what is left of it: {removed}");
    ensure_eq!(call(&["--remove"])?, removed, "what is removed a second time");
    ensure_eq!(call(&[])?, installed, "what is installed again");
    call(&["--remove"])?;

    // Of the tests' own configuration it is the default.
    fs::write(&path, removed.replace("default_runtime_name = \"bulkhead\"", "default_runtime_name = \"runc\""))?;
    kubelet.containerd.stop()?;
    kubelet.start()?;
    let refused = kubelet.pod("after").map(drop);
    ensure!(format!("{refused:?}").contains("no runtime for"), "a pod of the runtime that was removed: {refused:?}");
    kubelet.end()
}
