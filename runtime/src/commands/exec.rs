// SPDX-License-Identifier: Apache-2.0
//! `bulkhead exec`: runs a further process in a container.

use std::fs;
use std::io;
use std::path::{PathBuf, absolute};

use clap::Args;
use oci_spec::runtime::{Capability, LinuxCapabilities, Process};
use thiserror::Error;

use super::{Failure, Global, Outcome};
use crate::spec;
use crate::supervisor::state::Found;
use crate::supervisor::streams::{Asked, Preserved};
use crate::supervisor::{ExecError, ExecOptions, exec};

/// Run a further process in a container
#[derive(Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,

    /// Program and arguments, unless --process tells them
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,

    /// Take the process from a JSON file, as in config.json's `process`
    #[arg(long, short, value_name = "FILE")]
    process: Option<PathBuf>,

    /// Give it a terminal
    #[arg(long, short)]
    tty: bool,

    /// Return once it runs
    #[arg(long, short)]
    detach: bool,

    /// Write the process id that stands for it to FILE
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,

    /// Send the master side of its terminal to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,

    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,

    /// Set an environment variable (may be repeated)
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,

    /// User id, and group id
    #[arg(long, short, value_name = "UID[:GID]")]
    user: Option<String>,

    /// Further group id (may be repeated)
    #[arg(long, short = 'g', value_name = "GID")]
    additional_gids: Vec<u32>,

    /// Add a capability (may be repeated)
    #[arg(long, short, value_name = "NAME")]
    cap: Vec<String>,

    /// Let it gain no privileges by executing programs
    #[arg(long)]
    no_new_privs: bool,

    /// AppArmor profile, of which a guest has none but `unconfined`
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,

    /// SELinux label; a guest's kernel has no SELinux, so it is refused
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,

    /// Run it in this cgroup below the container's, which the container has made
    #[arg(long, value_name = "PATH", default_value = "", hide_default_value = true)]
    cgroup: String,

    /// Add it to a paused container as well: it runs when the container is resumed
    #[arg(long)]
    ignore_paused: bool,

    /// Give it this process' descriptors 3 to N+2: pipes, connections, files to read or to write
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    preserve_fds: u32,
}

#[derive(Debug, Error)]
enum ProcessError {
    #[error("process args cannot be empty: name a program, or a file with --process")]
    Empty,
    #[error("cannot read the process file {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("the process file {} is wrong", .0.display())]
    Parse(PathBuf, #[source] serde_json::Error),
    #[error("--user {0:?} is not of the form UID[:GID] in numbers")]
    User(String),
    #[error("--cap {0:?} is not a capability")]
    Capability(String),
}

/// Runs the process; the status is its own, or 255 where it could not be run, as with runc.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    exec_process(global, arguments).map_err(|failure| Failure {
        error: format!("exec failed: {}", crate::text::chain(&*failure.error)).into(),
        status: ExecError::STATUS,
    })
}

fn exec_process(global: &Global, arguments: &Arguments) -> Outcome {
    let preserved = Preserved::take(Asked::by_option(arguments.preserve_fds))?;
    let found = Found::open(&global.root, &arguments.id)?;
    let process = match &arguments.process {
        Some(file) => read_process(file)?,
        None => arguments.apply(spec::load_process(&found.record().bundle)?)?,
    };
    let process = arguments.finish(process)?;
    let options = ExecOptions {
        process,
        detach: arguments.detach,
        pid_file: arguments.pid_file.as_ref().map(absolute).transpose()?,
        console_socket: arguments.console_socket.as_ref().map(absolute).transpose()?,
        ignore_paused: arguments.ignore_paused,
        // The container's own is that of any process, and not insisted on.
        cgroup: arguments.cgroup.trim_matches('/').to_owned(),
        preserved,
    };
    Ok(exec(&found, options)?)
}

fn read_process(file: &PathBuf) -> Result<Process, ProcessError> {
    let text = fs::read(file).map_err(|error| ProcessError::Read(file.clone(), error))?;
    serde_json::from_slice(&text).map_err(|error| ProcessError::Parse(file.clone(), error))
}

impl Arguments {
    /// The container's own process, changed as the options say.
    fn apply(&self, mut process: Process) -> Result<Process, ProcessError> {
        process.set_args(Some(self.command.clone()));
        process.set_terminal(Some(false));
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(self.env.iter().cloned());
        process.set_env(Some(env));
        if self.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        let mut user = process.user().clone();
        if let Some(text) = &self.user {
            let (uid, gid) = parse_user(text).ok_or_else(|| ProcessError::User(text.clone()))?;
            user.set_uid(uid);
            if let Some(gid) = gid {
                user.set_gid(gid);
            }
        }
        if !self.additional_gids.is_empty() {
            let gids = user.additional_gids().iter().flatten().chain(&self.additional_gids).copied().collect();
            user.set_additional_gids(Some(gids));
        }
        process.set_user(user);
        if self.apparmor.is_some() {
            process.set_apparmor_profile(self.apparmor.clone());
        }
        if self.process_label.is_some() {
            process.set_selinux_label(self.process_label.clone());
        }
        if !self.cap.is_empty() {
            let capabilities = process.capabilities().clone().unwrap_or_default();
            process.set_capabilities(Some(self.add_capabilities(capabilities)?));
        }
        Ok(process)
    }

    /// Those options that concern a process from a file as well.
    fn finish(&self, mut process: Process) -> Result<Process, ProcessError> {
        if self.tty {
            process.set_terminal(Some(true));
        }
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(ProcessError::Empty);
        }
        Ok(process)
    }

    fn add_capabilities(&self, mut capabilities: LinuxCapabilities) -> Result<LinuxCapabilities, ProcessError> {
        let parse = |name: &String| {
            let upper = name.to_ascii_uppercase();
            let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
            serde_json::from_value::<Capability>(full.into()).map_err(|_| ProcessError::Capability(name.clone()))
        };
        let added = self.cap.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        let with =
            |set: &Option<oci_spec::runtime::Capabilities>| Some(set.iter().flatten().chain(&added).copied().collect());
        let (bounding, effective, permitted) =
            (with(capabilities.bounding()), with(capabilities.effective()), with(capabilities.permitted()));
        capabilities.set_bounding(bounding);
        capabilities.set_effective(effective);
        capabilities.set_permitted(permitted);
        Ok(capabilities)
    }
}

fn parse_user(text: &str) -> Option<(u32, Option<u32>)> {
    match text.split_once(':') {
        Some((uid, gid)) => Some((uid.parse().ok()?, Some(gid.parse().ok()?))),
        None => Some((text.parse().ok()?, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Process {
        serde_json::from_value(serde_json::json!({
            "args": ["init"], "cwd": "/", "terminal": true, "env": ["A=b"],
            "user": {"uid": 0, "gid": 0, "additionalGids": [5]}, "capabilities": {"bounding": ["CAP_KILL"]},
        }))
        .unwrap()
    }

    fn applied(arguments: &Arguments) -> Result<Process, ProcessError> {
        arguments.finish(arguments.apply(base())?)
    }

    #[test]
    fn options_change_the_containers_own_process() {
        let arguments = Arguments {
            command: vec!["ls".into(), "-l".into()],
            cwd: Some("/tmp".into()),
            env: vec!["C=d".into()],
            user: Some("7:8".into()),
            additional_gids: vec![9],
            cap: vec!["net_admin".into()],
            no_new_privs: true,
            apparmor: Some("unconfined".into()),
            process_label: Some("label".into()),
            ..Arguments::default()
        };

        let process = applied(&arguments).unwrap();

        assert_eq!(process.args().as_deref().unwrap(), ["ls", "-l"]);
        assert_eq!(process.env().as_deref().unwrap(), ["A=b", "C=d"]);
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        assert_eq!(process.user().additional_gids().as_deref().unwrap(), [5, 9]);
        assert_eq!(process.terminal(), Some(false));
        assert_eq!(process.no_new_privileges(), Some(true));
        assert_eq!(process.apparmor_profile().as_deref(), Some("unconfined"));
        assert_eq!(process.selinux_label().as_deref(), Some("label"));
        let capabilities = process.capabilities().as_ref().unwrap();
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 2);
        assert!(capabilities.effective().as_ref().unwrap().contains(&Capability::NetAdmin));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let command = vec!["ls".into()];
        let refused = |arguments: Arguments| applied(&arguments).unwrap_err();

        assert!(matches!(refused(Arguments::default()), ProcessError::Empty));
        for user in ["", "root", "1:", ":1", "-1"] {
            let arguments = Arguments { user: Some(user.into()), command: command.clone(), ..Arguments::default() };
            assert!(matches!(refused(arguments), ProcessError::User(_)), "{user}");
        }
        let arguments = Arguments { cap: vec!["FLY".into()], command, ..Arguments::default() };
        assert!(matches!(refused(arguments), ProcessError::Capability(_)));
    }
}
