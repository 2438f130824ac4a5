// SPDX-License-Identifier: Apache-2.0
//! The command line: options that go before any verb, as runc has them, and the verbs.

use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::ValueParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

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

/// What `--version` tells behind the program's name, as runc words it: engines look for a line of the form `NAME version X`.
const VERSION: &str =
    concat!("version ", env!("CARGO_PKG_VERSION"), "\ncommit: ", env!("BULKHEAD_COMMIT"), "\nspec: ", "1.2.1");

/// Runs OCI containers, each in its own KVM virtual machine.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version = VERSION, disable_version_flag = true, infer_long_args = false)]
// Of what is given twice, the last holds, as with runc.
#[command(args_override_self = true)]
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
    let words: Vec<_> = env::args_os().collect();
    let cli = match parse(&words) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, &words),
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

/// Parses a command line in which a flag may have a value, as in `--tty=false`.
fn parse(words: &[OsString]) -> Result<Cli, clap::Error> {
    let parsed = with_values_of_flags(Cli::command()).try_get_matches_from(words);
    match parsed.and_then(|mut matches| Cli::from_arg_matches_mut(&mut matches)) {
        // The help tells of flags as people use them, unless these words use them otherwise.
        Err(error) if error.kind() == ErrorKind::DisplayHelp => match Cli::try_parse_from(words) {
            Err(plain) if plain.kind() == ErrorKind::DisplayHelp => Err(plain),
            _ => Err(error),
        },
        result => result,
    }
}

/// The same command line, whose flags may have one of Go's values behind a `=`, as runc's may.
fn with_values_of_flags(command: clap::Command) -> clap::Command {
    let with_value = |arg: Arg| {
        if !matches!(arg.get_action(), ArgAction::SetTrue) {
            return arg;
        }
        let arg = arg.action(ArgAction::Set).num_args(0..=1).require_equals(true);
        arg.default_value("false").default_missing_value("true").value_parser(ValueParser::new(parse_flag))
    };
    command.mut_args(with_value).mut_subcommands(with_values_of_flags)
}

/// What Go's `strconv.ParseBool` takes.
fn parse_flag(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("a flag is true or false"),
    }
}

/// The log file of a command line that is wrong elsewhere, and its format, as far as they are understood.
fn log_of(words: &[OsString]) -> (Option<PathBuf>, LogFormat) {
    let Ok(matches) = with_values_of_flags(Cli::command()).ignore_errors(true).try_get_matches_from(words) else {
        return (None, LogFormat::Text);
    };
    let format = matches.try_get_one::<LogFormat>("log_format").ok().flatten().copied();
    (matches.try_get_one::<PathBuf>("log").ok().flatten().cloned(), format.unwrap_or(LogFormat::Text))
}

/// Help and version go to stdout and are no failure, also where nothing was asked for; a usage error is one line, also in the
/// log file, where engines look for it. The statuses are runc's.
fn usage(error: &clap::Error, words: &[OsString]) -> ExitCode {
    match error.kind() {
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = io::stdout().write_all(Cli::command().render_help().to_string().as_bytes());
            return ExitCode::SUCCESS;
        }
        _ if !error.use_stderr() => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        _ => {
            let (log, format) = log_of(words);
            // Without the file, the line is on stderr.
            let _ = logging::init(log.as_deref(), format, false);
            logging::error(format_args!("{}", usage_line(&error.to_string())));
        }
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

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        super::parse(&words(line))
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
        with_values_of_flags(Cli::command()).debug_assert();
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
    fn of_what_is_given_twice_the_last_holds() {
        let line = "bulkhead --log /a --debug --log-format json --log /b --debug --log-format text run -b /a --keep c1 \
                    --keep --bundle /b";
        let cli = parse(line).unwrap();
        assert_eq!((cli.log, cli.log_format, cli.debug), (Some("/b".into()), LogFormat::Text, true));
        let Command::Run(arguments) = cli.command else { panic!("not a run") };
        assert_eq!(arguments, parse_run("bulkhead run --keep --bundle /b c1"));

        assert!(parse("bulkhead state a b").is_err());
        let exec = |line: &str| match parse(line).unwrap().command {
            Command::Exec(arguments) => arguments,
            other => panic!("{other:?}"),
        };
        // What may be given several times is not meant.
        let twice = exec("bulkhead exec -e A=b -e C=d c1 env env");
        assert_ne!(twice, exec("bulkhead exec -e C=d c1 env env"));
        assert_ne!(twice, exec("bulkhead exec -e A=b -e C=d c1 env"));
    }

    #[test]
    fn flags_may_have_values() {
        let debug = |line: &str| parse(line).map(|cli| cli.debug);
        for (words, expected) in [("--debug=true", true), ("--debug=0", false), ("--debug --debug=f", false)] {
            assert_eq!(debug(&format!("bulkhead {words} list")).unwrap(), expected, "{words}");
            assert_eq!(debug(&format!("bulkhead list {words}")).unwrap(), expected, "{words}");
        }
        assert!(debug("bulkhead --debug=maybe list").is_err());
        // The next word is none.
        let detached = parse_run("bulkhead run --detach true");
        assert_eq!(detached, parse_run("bulkhead run -d=true true"));
        assert_ne!(detached, parse_run("bulkhead run --detach=false true"));
        let kind = parse("bulkhead run --detach=true --help").unwrap_err().kind();
        assert_eq!(kind, ErrorKind::DisplayHelp);
        for line in ["bulkhead --help", "bulkhead run --help", "bulkhead run --detach -h"] {
            let help = parse(line).unwrap_err().to_string();
            assert!(help.contains("--debug\n") || help.contains("--debug  "), "{help}");
        }
    }

    #[test]
    fn the_log_of_a_wrong_command_line_is_found() {
        let json = |path: &str| (Some(path.into()), LogFormat::Json);
        for line in [
            "bulkhead --log /l --log-format json frobnicate",
            "bulkhead --root /r --log /x --log=/l --log-format=json create --nosuch c1",
            "bulkhead --log /l --log-format json state",
            "bulkhead --log /l --log-format json --debug state a b",
            "bulkhead state --log /l --log-format json a b",
        ] {
            assert!(parse(line).is_err(), "{line}");
            assert_eq!(log_of(&words(line)), json("/l"), "{line}");
        }
        // What is the container's command names no log.
        assert_eq!(log_of(&words("bulkhead exec --nosuch c1 sh --log /l")), (None, LogFormat::Text));
        assert_eq!(log_of(&words("bulkhead --log /l --log-format xml list")), (Some("/l".into()), LogFormat::Text));
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
        assert_eq!(lines[0], format!("bulkhead version {}", env!("CARGO_PKG_VERSION")), "{text}");
        assert!(lines[1].starts_with("commit: "), "{text}");
        assert_eq!(lines[2], format!("spec: {}", commands::OCI_VERSION), "{text}");
    }
}
