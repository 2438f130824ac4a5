// SPDX-License-Identifier: Apache-2.0
//! The `process` of a configuration.

use std::collections::HashSet;

use bulkhead_protocol::agent::{Process, Rlimit};
use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Process as OciProcess};

use super::capabilities;
use super::error::{FieldError, without_nul};
use super::scheduling;
use crate::text;

/// Uid and gid that mean "none" to the kernel.
const INVALID_ID: u32 = u32::MAX;

/// Checks the process and brings it to its wire form; streams and the terminal's size are the supervisor's to add.
pub(crate) fn translate(process: &OciProcess) -> Result<Process, FieldError> {
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        return Err(FieldError::missing("process.args", "it names the program to run"));
    }
    if args.first().is_some_and(String::is_empty) {
        return Err(FieldError::missing("process.args[0]", "it names the program to run"));
    }
    let env = process.env().clone().unwrap_or_default();
    for (name, list) in [("args", &args), ("env", &env)] {
        for (index, text) in list.iter().enumerate() {
            without_nul(|| format!("process.{name}[{index}]"), text)?;
        }
    }
    if let Some((index, entry)) = env.iter().enumerate().find(|(_, entry)| entry.find('=').is_none_or(|at| at == 0)) {
        return Err(FieldError::invalid(format!("process.env[{index}]"), entry, "of the form NAME=VALUE"));
    }
    let cwd = process.cwd().to_string_lossy().into_owned();
    without_nul(|| "process.cwd".to_owned(), &cwd)?;
    if !cwd.starts_with('/') {
        return Err(FieldError::invalid("process.cwd", cwd, "an absolute path"));
    }
    let user = process.user();
    let gids = user.additional_gids().clone().unwrap_or_default();
    check_ids(user.uid(), user.gid(), &gids)?;
    let umask = user.umask();
    if let Some(mask) = umask.filter(|mask| *mask > 0o777) {
        return Err(FieldError::invalid("process.user.umask", mask, "from 0 to 511 (0777)"));
    }
    if let Some(score) = process.oom_score_adj().filter(|score| !(-1000..=1000).contains(score)) {
        return Err(FieldError::invalid("process.oomScoreAdj", score, "from -1000 to 1000"));
    }
    let (initial_cpus, final_cpus) =
        process.exec_cpu_affinity().as_ref().map(scheduling::exec_cpus).transpose()?.unwrap_or_default();
    let terminal = process.terminal().unwrap_or(false);
    let size = process.console_size().filter(|_| terminal);
    let cells = |count: u64| u32::from(u16::try_from(count).unwrap_or(u16::MAX));
    Ok(Process {
        args,
        env,
        cwd,
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: gids,
        umask,
        capabilities: process.capabilities().as_ref().map(capabilities::translate).into(),
        rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default())?,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        oom_score_adj: process.oom_score_adj(),
        scheduler: process.scheduler().as_ref().map(scheduling::scheduler).transpose()?.into(),
        io_priority: process.io_priority().as_ref().map(scheduling::io_priority).transpose()?,
        initial_cpus,
        final_cpus,
        terminal,
        terminal_rows: size.map_or(0, |size| cells(size.height())),
        terminal_columns: size.map_or(0, |size| cells(size.width())),
        ..Process::default()
    })
}

fn check_ids(uid: u32, gid: u32, additional_gids: &[u32]) -> Result<(), FieldError> {
    let expected = "from 0 to 4294967294";
    if uid == INVALID_ID {
        return Err(FieldError::invalid("process.user.uid", uid, expected));
    }
    if gid == INVALID_ID {
        return Err(FieldError::invalid("process.user.gid", gid, expected));
    }
    match additional_gids.iter().position(|gid| *gid == INVALID_ID) {
        Some(index) => Err(FieldError::invalid(format!("process.user.additionalGids[{index}]"), INVALID_ID, expected)),
        None => Ok(()),
    }
}

fn rlimits(limits: &[PosixRlimit]) -> Result<Vec<Rlimit>, FieldError> {
    let mut seen = HashSet::new();
    limits
        .iter()
        .enumerate()
        .map(|(index, limit)| {
            let resource = rlimit_number(limit.typ());
            let field = |name: &str| format!("process.rlimits[{index}].{name}");
            if !seen.insert(resource) {
                return Err(FieldError::invalid(field("type"), limit.typ(), "given once only"));
            }
            if limit.soft() > limit.hard() {
                let expected = format!("at most the hard limit {}", limit.hard());
                return Err(FieldError::invalid(field("soft"), limit.soft(), text::one_line(&expected)));
            }
            Ok(Rlimit { resource, soft: limit.soft(), hard: limit.hard(), ..Rlimit::default() })
        })
        .collect()
}

/// The kernel's number on x86-64.
fn rlimit_number(limit: PosixRlimitType) -> u32 {
    match limit {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(change: Value) -> Result<Process, String> {
        let mut value = json!({"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let process: OciProcess = serde_json::from_value(value).unwrap();
        translate(&process).map_err(|error| error.to_string())
    }

    #[test]
    fn a_full_process_is_translated() {
        let process = translated(json!({
            "terminal": true,
            "consoleSize": {"height": 50, "width": 200},
            "user": {"uid": 1000, "gid": 100, "umask": 63, "additionalGids": [4, 5]},
            "env": ["A=b", "C="],
            "cwd": "/home",
            "noNewPrivileges": true,
            "oomScoreAdj": -7,
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096}],
        }))
        .unwrap();

        assert_eq!((process.uid, process.gid, process.umask), (1000, 100, Some(63)));
        assert_eq!(process.additional_gids, [4, 5]);
        assert_eq!((process.terminal_rows, process.terminal_columns), (50, 200));
        assert_eq!((process.rlimits[0].resource, process.rlimits[0].hard), (7, 4096));
        assert!(process.no_new_privileges && process.terminal);
        assert_eq!(process.oom_score_adj, Some(-7));
    }

    #[test]
    fn each_bad_value_is_refused_with_its_field() {
        let limit = |soft, hard| json!({"type": "RLIMIT_CORE", "soft": soft, "hard": hard});
        let cases = [
            (json!({"args": []}), "process.args: missing; it names the program to run"),
            (json!({"args": ["", "x"]}), "process.args[0]: missing; it names the program to run"),
            (json!({"args": null}), "process.args: missing; it names the program to run"),
            (json!({"args": ["a\0"]}), "process.args[0]: \"a\\0\" is not a text without NUL"),
            (json!({"env": ["A=1", "B"]}), "process.env[1]: \"B\" is not of the form NAME=VALUE"),
            (json!({"env": ["=1"]}), "process.env[0]: \"=1\" is not of the form NAME=VALUE"),
            (json!({"cwd": "home"}), "process.cwd: \"home\" is not an absolute path"),
            (json!({"cwd": ""}), "process.cwd: \"\" is not an absolute path"),
            (json!({"user": {"uid": u32::MAX}}), "process.user.uid: \"4294967295\" is not from 0 to 4294967294"),
            (json!({"user": {"gid": u32::MAX}}), "process.user.gid: \"4294967295\" is not from 0 to 4294967294"),
            (json!({"user": {"umask": 512}}), "process.user.umask: \"512\" is not from 0 to 511 (0777)"),
            (json!({"oomScoreAdj": 1001}), "process.oomScoreAdj: \"1001\" is not from -1000 to 1000"),
            (json!({"rlimits": [limit(2, 1)]}), "process.rlimits[0].soft: \"2\" is not at most the hard limit 1"),
            (
                json!({"rlimits": [limit(1, 1), limit(1, 1)]}),
                "process.rlimits[1].type: \"RLIMIT_CORE\" is not given once only",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(translated(change).unwrap_err(), expected);
        }
    }

    #[test]
    fn an_absurd_console_size_is_bounded() {
        let process = translated(json!({"terminal": true, "consoleSize": {"height": u64::MAX, "width": 1}})).unwrap();

        assert_eq!(process.terminal_rows, 65535);
    }
}
