// SPDX-License-Identifier: Apache-2.0
//! The command line: options that go before any verb, as runc has them, and the verbs.

use std::env;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use crate::commands::{
    self, check, checkpoint, completion, create, delete, events, exec, features, gc, install_containerd, kill, list,
    logs, man, pause, ps, resume, run, spec, start, state, update,
};
use crate::logging::{self, LogFormat};
use crate::text;
use crate::user_namespace;

/// Where the state of root's sandboxes lives by default; an ordinary user's lives in [`ROOT_NAME`] below the folder of the session.
const DEFAULT_ROOT: &str = "/run/bulkhead";
const ROOT_NAME: &str = "bulkhead";

/// What `--version` tells, as runc words it.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\ncommit: ", env!("BULKHEAD_COMMIT"), "\nspec: ", "1.2.1",);

/// Runs OCI containers, each in its own KVM virtual machine.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version = VERSION, disable_version_flag = true, infer_long_args = false)]
struct Cli {
    /// Where the state of sandboxes is kept; a tmpfs is best [default: $BULKHEAD_ROOT, or /run/bulkhead, or
    /// $XDG_RUNTIME_DIR/bulkhead in a user namespace]
    #[arg(long, global = true, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Append log lines to FILE instead of stderr
    #[arg(long, global = true, value_name = "FILE")]
    log: Option<PathBuf>,

    /// Format of the lines in --log FILE
    #[arg(long, global = true, value_enum, default_value = "text", value_name = "FORMAT")]
    log_format: LogFormat,

    /// Log what is being done
    #[arg(long, global = true)]
    debug: bool,

    /// Write the phases of a run to FILE, in Chrome's trace format
    #[arg(long, global = true, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Accepted for runc's sake
    #[arg(long, global = true, hide = true)]
    systemd_cgroup: bool,

    /// Accepted for runc's sake: a sandbox's user is always root
    #[arg(long, global = true, hide = true, value_name = "MODE")]
    rootless: Option<String>,

    /// Accepted for crun's sake
    #[arg(long, global = true, hide = true, value_name = "NAME")]
    cgroup_manager: Option<String>,

    /// Accepted for runc's sake: a virtual machine is not saved by CRIU
    #[arg(long, global = true, hide = true, value_name = "FILE")]
    criu: Option<PathBuf>,

    /// Print the version
    #[arg(long, short = 'v', action = clap::ArgAction::Version)]
    version: Option<bool>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Arguments),
    Create(create::Arguments),
    Start(start::Arguments),
    State(state::Arguments),
    Kill(kill::Arguments),
    Exec(exec::Arguments),
    Delete(delete::Arguments),
    List(list::Arguments),
    Ps(ps::Arguments),
    Pause(pause::Arguments),
    Resume(resume::Arguments),
    Update(update::Arguments),
    Events(events::Arguments),
    Logs(logs::Arguments),
    Gc(gc::Arguments),
    Features(features::Arguments),
    Spec(spec::Arguments),
    Check(check::Arguments),
    InstallContainerd(install_containerd::Arguments),
    Completion(completion::Arguments),
    #[command(hide = true)]
    Man(man::Arguments),
    #[command(hide = true)]
    Checkpoint(checkpoint::Arguments),
    #[command(hide = true)]
    Restore(checkpoint::Arguments),
}

/// The status of a verb that there is not, as with runc.
const NO_SUCH_VERB: u8 = 3;

/// Parses the process' arguments, runs the verb, and tells what failed.
pub(crate) fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if let Err(error) = logging::init(cli.log.as_deref(), cli.log_format, cli.debug) {
        let path = cli.log.unwrap_or_default();
        logging::error(format_args!("cannot open the log file {}: {error}", path.display()));
        return ExitCode::FAILURE;
    }
    let root = cli.root.or_else(|| env::var_os("BULKHEAD_ROOT").filter(|root| !root.is_empty()).map(PathBuf::from));
    let default_root = || match user_namespace::runtime_dir() {
        Some(dir) => dir.join(ROOT_NAME),
        None => DEFAULT_ROOT.into(),
    };
    let global = commands::Global { root: root.unwrap_or_else(default_root), trace: cli.trace };
    let result = match cli.command {
        Command::Run(arguments) => run::run(&global, arguments),
        Command::Create(arguments) => create::run(&global, arguments),
        Command::Start(arguments) => start::run(&global, &arguments),
        Command::State(arguments) => state::run(&global, &arguments),
        Command::Kill(arguments) => kill::run(&global, &arguments),
        Command::Exec(arguments) => exec::run(&global, &arguments),
        Command::Delete(arguments) => delete::run(&global, &arguments),
        Command::List(arguments) => list::run(&global, &arguments),
        Command::Ps(arguments) => ps::run(&global, &arguments),
        Command::Pause(arguments) => pause::run(&global, &arguments),
        Command::Resume(arguments) => resume::run(&global, &arguments),
        Command::Update(arguments) => update::run(&global, &arguments),
        Command::Events(arguments) => events::run(&global, &arguments),
        Command::Logs(arguments) => logs::run(&global, &arguments),
        Command::Gc(arguments) => gc::run(&global, &arguments),
        Command::Features(arguments) => features::run(&arguments),
        Command::Spec(arguments) => spec::run(&arguments),
        Command::Check(arguments) => check::run(&global, &arguments),
        Command::InstallContainerd(arguments) => install_containerd::run(&arguments),
        Command::Completion(arguments) => completion::run(&arguments, Cli::command()),
        Command::Man(arguments) => man::run(&arguments, Cli::command()),
        Command::Checkpoint(_) => checkpoint::run("checkpoint"),
        Command::Restore(_) => checkpoint::run("restore"),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            logging::error(format_args!("{}", text::chain(&*failure.error)));
            ExitCode::from(failure.status)
        }
    }
}

/// Help and version go to stdout and are no failure, also where nothing was asked for; a usage error is one line. The
/// statuses are runc's.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = io::stdout().write_all(Cli::command().render_help().to_string().as_bytes());
            return ExitCode::SUCCESS;
        }
        _ if !error.use_stderr() => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        _ => logging::error(format_args!("{}", usage_line(&error.to_string()))),
    }
    if error.kind() == ErrorKind::InvalidSubcommand { NO_SUCH_VERB.into() } else { ExitCode::FAILURE }
}

/// The message of clap's many lines: the first paragraph, and a pointer to the help.
fn usage_line(rendered: &str) -> String {
    let mut line = String::new();
    for part in rendered.lines().map(str::trim).take_while(|part| !part.is_empty()) {
        let part = part.strip_prefix("error: ").unwrap_or(part);
        let _ = write!(line, "{}{part}", if line.is_empty() { "" } else { " " });
    }
    line.push_str(" (see `bulkhead --help`)");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    fn parse_run(line: &str) -> run::Arguments {
        match parse(line).unwrap().command {
            Command::Run(arguments) => arguments,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_may_stand_before_and_after_the_id() {
        let before = parse_run("bulkhead run --bundle /b --pid-file /p c1");
        let after = parse_run("bulkhead run c1 -b /b --pid-file=/p");

        assert_eq!(before, after);
        assert_eq!(before.common.id, "c1");
    }

    #[test]
    fn global_options_are_those_of_runc() {
        let cli = parse("bulkhead --root /r --log /l --log-format json --debug --trace /t run c1").unwrap();

        assert_eq!(cli.root, Some("/r".into()));
        assert_eq!(cli.log, Some("/l".into()));
        assert_eq!(cli.log_format, LogFormat::Json);
        assert!(cli.debug);
        assert_eq!(cli.trace, Some("/t".into()));
    }

    #[test]
    fn usage_errors_are_one_line() {
        let absent = parse("bulkhead run").unwrap_err();
        let unknown = parse("bulkhead frobnicate").unwrap_err();
        let format = parse("bulkhead --log-format xml run c").unwrap_err();

        assert_eq!(
            usage_line(&absent.to_string()),
            "the following required arguments were not provided: <ID> (see `bulkhead --help`)"
        );
        assert!(usage_line(&unknown.to_string()).starts_with("unrecognized subcommand 'frobnicate'"));
        assert!(usage_line(&format.to_string()).starts_with("invalid value 'xml' for '--log-format <FORMAT>'"));
    }

    #[test]
    fn what_engines_probe_for_is_not_claimed() {
        for line in ["bulkhead checkpoint --help", "bulkhead restore --bundle b --detach --image-path i c1"] {
            let command = parse(line).unwrap().command;
            assert!(matches!(command, Command::Checkpoint(_) | Command::Restore(_)), "{line}");
        }
    }

    #[test]
    fn the_version_has_the_lines_of_runc() {
        let text = parse("bulkhead --version").unwrap_err().to_string();

        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("bulkhead "), "{text}");
        assert!(lines[1].starts_with("commit: "), "{text}");
        assert_eq!(lines[2], format!("spec: {}", commands::OCI_VERSION), "{text}");
    }
}
