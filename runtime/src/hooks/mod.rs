// SPDX-License-Identifier: Apache-2.0
//! The programs that a configuration wants run at points of a container's life.
//!
//! | hooks | where | when | a failure |
//! | --- | --- | --- | --- |
//! | `prestart`, `createRuntime` | host | before the guest boots, where they may set up its network, or others follow; else while it boots | ends the start |
//! | `createContainer` | host, in namespaces of the container's: its program is a file of the host, which the guest does not have | after those, before the guest boots | ends the start |
//! | `startContainer` | guest, in the container | right before its program | ends the start |
//! | `poststart` | host | the container's program runs | ends the container, as with runc |
//! | `poststop` | host | the container is gone | is a warning |

mod namespaces;
mod state;

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::time::timeout;

pub(crate) use self::namespaces::ContainerNamespaces;
pub(crate) use self::state::{State, Status};
use crate::{logging, network, pidfd, text};

/// What an error quotes of a hook's output.
const QUOTED_OUTPUT: usize = 1024;

/// The hooks of a configuration that are run on the host, in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hooks {
    /// `prestart` and `createRuntime`.
    pub(crate) create: Vec<Hook>,
    /// `createContainer`: run in namespaces of the container's.
    pub(crate) create_container: Vec<Hook>,
    pub(crate) poststart: Vec<Hook>,
    pub(crate) poststop: Vec<Hook>,
}

/// One program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hook {
    /// The field that it comes from, as in `hooks.prestart[0]`.
    pub(crate) field: String,
    /// Absolute.
    pub(crate) path: PathBuf,
    /// With the program's name; empty for the path alone.
    pub(crate) args: Vec<String>,
    /// All of its environment.
    pub(crate) env: Vec<(String, String)>,
    pub(crate) timeout: Option<Duration>,
}

/// A hook that failed.
#[derive(Debug, Error)]
pub(crate) enum HookError {
    #[error("cannot run the hook {field} ({})", path.display())]
    Run { field: String, path: PathBuf, source: io::Error },
    #[error("the hook {field} ({}) failed: {status}{}", path.display(), after_colon(output))]
    Failed { field: String, path: PathBuf, status: ExitStatus, output: String },
    #[error("the hook {field} ({}) did not end within {} s", path.display(), timeout.as_secs())]
    Timeout { field: String, path: PathBuf, timeout: Duration },
}

fn after_colon(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!(": {output}") }
}

/// Runs hooks one after the other, in the host's namespaces and the bundle's folder. What is given up meanwhile is killed.
///
/// # Errors
///
/// The first that failed; those after it are not run.
pub(crate) async fn run(hooks: &[Hook], state: &State) -> Result<(), HookError> {
    for hook in hooks {
        run_one(hook, state, None).await?;
    }
    Ok(())
}

/// The same in the container's namespaces.
pub(crate) async fn run_inside(
    namespaces: &ContainerNamespaces,
    hooks: &[Hook],
    state: &State,
) -> Result<(), HookError> {
    for hook in hooks {
        run_one(hook, state, Some(namespaces)).await?;
    }
    Ok(())
}

/// Runs hooks of which none may keep the others from being run: failures are warnings.
pub(crate) async fn run_all(hooks: &[Hook], state: &State) {
    for hook in hooks {
        if let Err(error) = run_one(hook, state, None).await {
            logging::warn(format_args!("{}", text::chain(&error)));
        }
    }
}

async fn run_one(hook: &Hook, state: &State, namespaces: Option<&ContainerNamespaces>) -> Result<(), HookError> {
    let failed = |source| HookError::Run { field: hook.field.clone(), path: hook.path.clone(), source };
    logging::debug(format_args!("running the hook {} ({})", hook.field, hook.path.display()));
    let output = File::from(memfd_create("hook-output", MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?);
    let mut running = Running(spawn(hook, state, &output, namespaces).map_err(failed)?);
    let end = running.end();
    let status = match hook.timeout {
        None => end.await,
        Some(limit) => match timeout(limit, end).await {
            Ok(status) => status,
            Err(_) => {
                let (field, path) = (hook.field.clone(), hook.path.clone());
                return Err(HookError::Timeout { field, path, timeout: limit });
            }
        },
    };
    let status = status.map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    let (field, path) = (hook.field.clone(), hook.path.clone());
    Err(HookError::Failed { field, path, status, output: end_of(&output) })
}

/// Starts a hook. The state comes from a file, so that nobody waits for a hook that does not read it.
fn spawn(hook: &Hook, state: &State, output: &File, namespaces: Option<&ContainerNamespaces>) -> io::Result<Child> {
    let mut stdin = File::from(memfd_create("container-state", MemfdFlags::CLOEXEC)?);
    stdin.write_all(state.to_text().as_bytes())?;
    stdin.seek(SeekFrom::Start(0))?;
    let mut command = Command::new(&hook.path);
    if let Some((name, args)) = hook.args.split_first() {
        command.arg0(name).args(args);
    }
    command
        .env_clear()
        .envs(hook.env.iter().map(|(name, value)| (name, value)))
        .current_dir(state.bundle())
        .stdin(stdin)
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output.try_clone()?));
    match namespaces {
        // Wherever this process is.
        None => network::on_host(|| command.spawn())?,
        Some(namespaces) => namespaces.run(move || command.spawn())?,
    }
}

/// A hook's process, which ends with this at the latest.
#[derive(Debug)]
struct Running(Child);

impl Running {
    async fn end(&mut self) -> io::Result<ExitStatus> {
        pidfd::ended(pidfd::open(self.0.id())?).await?;
        self.0.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Of one that has ended, both do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The end of what a hook said, in one line.
fn end_of(output: &File) -> String {
    let length = output.metadata().map_or(0, |metadata| metadata.len());
    let mut end = vec![0; QUOTED_OUTPUT];
    let read = output.read_at(&mut end, length.saturating_sub(QUOTED_OUTPUT as u64)).unwrap_or(0);
    text::one_line(&String::from_utf8_lossy(&end[..read]))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn shell(script: &str, timeout: Option<Duration>) -> Hook {
        Hook {
            field: "hooks.prestart[0]".to_owned(),
            path: "/bin/sh".into(),
            args: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec![("NAME".to_owned(), "value".to_owned())],
            timeout,
        }
    }

    fn state(bundle: &Path) -> State {
        State::new("x", bundle, Default::default())
    }

    #[tokio::test]
    async fn a_hook_has_the_state_its_environment_and_the_bundle() {
        let bundle = tempfile::tempdir().unwrap();
        let hooks = [shell("echo 1 > order", None), shell("cat > state; echo \"$NAME-$HOME\" >> order", None)];

        run(&hooks, &state(bundle.path()).at(Status::Creating, Some(7))).await.unwrap();

        assert_eq!(std::fs::read_to_string(bundle.path().join("order")).unwrap(), "1\nvalue-\n");
        let told: serde_json::Value =
            serde_json::from_slice(&std::fs::read(bundle.path().join("state")).unwrap()).unwrap();
        assert_eq!((told["id"].as_str(), told["pid"].as_u64()), (Some("x"), Some(7)));
    }

    #[tokio::test]
    async fn a_failure_is_told_and_keeps_the_rest_from_being_run() {
        let bundle = tempfile::tempdir().unwrap();
        let hooks = [shell("echo oh dear >&2; exit 3", None), shell("touch second", None)];

        let error = run(&hooks, &state(bundle.path())).await.unwrap_err();

        assert_eq!(error.to_string(), "the hook hooks.prestart[0] (/bin/sh) failed: exit status: 3: oh dear");
        assert!(!bundle.path().join("second").exists());
        run_all(&hooks, &state(bundle.path())).await;
        assert!(bundle.path().join("second").exists());
    }

    #[tokio::test]
    async fn one_that_takes_too_long_is_killed() {
        let bundle = tempfile::tempdir().unwrap();
        let hook = shell("exec sleep 100", Some(Duration::from_millis(100)));

        let error = run(&[hook], &state(bundle.path())).await.unwrap_err();

        assert!(matches!(error, HookError::Timeout { .. }), "{error}");
    }

    #[tokio::test]
    async fn an_absent_program_is_named() {
        let hook = Hook { path: "/no/such".into(), ..shell("", None) };

        let error = run(&[hook], &state(Path::new("/"))).await.unwrap_err();

        let text = text::chain(&error);
        assert!(text.starts_with("cannot run the hook hooks.prestart[0] (/no/such): No such file"), "{text}");
    }
}
