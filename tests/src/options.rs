// SPDX-License-Identifier: Apache-2.0
//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) const HELP: &str = "\
usage: bulkhead-e2e [OPTION...]

Runs the end-to-end cases; root, on a machine whose KVM runs guests.

  --runtime PATH   the runtime (default: target/bulkhead/bin/bulkhead; `runc` checks the cases themselves)
  --filter SUBSTR  only cases whose name contains SUBSTR (may be repeated: any of them); one that no name contains is an error
  --skip-slow      leave out the cases that take minutes
  --may-skip FILE  a case that is skipped for a reason of which FILE has no line has failed
  --second-try     on an emulated host, which now and then loses a guest at its boot: run a case that failed once more at the
                   end, and count that; both results are printed. Not those that do something else each time
  --jobs N         cases at once (default 1)
  --stop-after S   begin no case once S seconds have passed; those that were not begun count as failed
  --claim DIR      only cases that nobody else has claimed in DIR, long ones first, for several hosts side by side that
                   share DIR, which is empty at first
  --host NAME      what a claim names as its host (default: host)
  --keep           keep the folders of failed cases
  --list           print the names and end
  --bench-pods N   instead of the cases, measure N pods of Bulkhead and of runc in turns (`make bench-pods`);
                   --machine TEXT says what on, --json FILE takes every figure

Environment: BULKHEAD_TEST_DEBIAN names a Debian root file system (tests/rootfs/make-debian makes one); BULKHEAD_TEST_SEED has
the cases of random:: draw a sequence again that one of them has told of.
";

const DEFAULT_RUNTIME: &str = "target/bulkhead/bin/bulkhead";

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) runtime: PathBuf,
    pub(crate) filters: Vec<String>,
    pub(crate) skip_slow: bool,
    pub(crate) second_try: bool,
    /// Has the reasons for which a case may be skipped.
    pub(crate) may_skip: Option<PathBuf>,
    pub(crate) jobs: usize,
    /// When no further case begins.
    pub(crate) stop_after: Option<Duration>,
    /// Where hosts that run side by side claim their cases.
    pub(crate) claims: Option<PathBuf>,
    /// What this host calls itself there.
    pub(crate) host: String,
    pub(crate) keep: bool,
    pub(crate) list: bool,
    /// Measures pods instead.
    pub(crate) pod_bench: Option<PodBench>,
    /// Set for the process that runs one case.
    pub(crate) case: Option<String>,
    /// The folder of that one case.
    pub(crate) work: PathBuf,
}

/// How pods are measured.
#[derive(Debug, Default)]
pub(crate) struct PodBench {
    /// Rounds that count.
    pub(crate) rounds: usize,
    /// What is said of the machine.
    pub(crate) machine: String,
    /// Takes the figures too.
    pub(crate) json: Option<PathBuf>,
}

/// Why there is nothing to run.
#[derive(Debug)]
pub(crate) enum Stop {
    Help,
    Usage(String),
}

impl Options {
    pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, Stop> {
        let mut options = Self {
            runtime: DEFAULT_RUNTIME.into(),
            filters: Vec::new(),
            skip_slow: false,
            second_try: false,
            may_skip: None,
            jobs: 1,
            stop_after: None,
            claims: None,
            host: "host".to_owned(),
            keep: false,
            list: false,
            pod_bench: None,
            case: None,
            work: PathBuf::new(),
        };
        let mut arguments = arguments;
        let (mut machine, mut json) = ("This machine.".to_owned(), None);
        while let Some(argument) = arguments.next() {
            let argument = text(argument)?;
            let mut value = || arguments.next().ok_or_else(|| Stop::Usage(format!("{argument} needs a value")));
            match argument.as_str() {
                "--runtime" => options.runtime = value()?.into(),
                "--filter" => options.filters.push(text(value()?)?),
                "--case" => options.case = Some(text(value()?)?),
                "--work" => options.work = value()?.into(),
                "--jobs" => {
                    let jobs = text(value()?)?;
                    options.jobs =
                        count(&jobs).ok_or_else(|| Stop::Usage(format!("--jobs {jobs} is not from 1 to 64")))?;
                }
                "--stop-after" => {
                    let seconds = text(value()?)?;
                    options.stop_after = Some(Duration::from_secs(
                        seconds
                            .parse()
                            .map_err(|_| Stop::Usage(format!("--stop-after {seconds} is not a number of seconds")))?,
                    ));
                }
                "--bench-pods" => {
                    let rounds = text(value()?)?;
                    let rounds = count(&rounds)
                        .ok_or_else(|| Stop::Usage(format!("--bench-pods {rounds} is not from 1 to 64")))?;
                    options.pod_bench = Some(PodBench { rounds, ..PodBench::default() });
                }
                "--machine" => machine = text(value()?)?,
                "--json" => json = Some(value()?.into()),
                "--claim" => options.claims = Some(value()?.into()),
                "--host" => options.host = text(value()?)?,
                "--may-skip" => options.may_skip = Some(value()?.into()),
                "--skip-slow" => options.skip_slow = true,
                "--second-try" => options.second_try = true,
                "--keep" => options.keep = true,
                "--list" => options.list = true,
                "--help" | "-h" => return Err(Stop::Help),
                other => return Err(Stop::Usage(format!("unknown option {other}"))),
            }
        }
        if let Some(bench) = &mut options.pod_bench {
            (bench.machine, bench.json) = (machine, json);
        }
        Ok(options)
    }
}

fn count(number: &str) -> Option<usize> {
    number.parse().ok().filter(|number| (1..=64).contains(number))
}

fn text(argument: OsString) -> Result<String, Stop> {
    argument.into_string().map_err(|argument| Stop::Usage(format!("{} is not UTF-8", argument.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, Stop> {
        Options::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn filters_add_up() {
        let options = parse("--filter a --filter b --skip-slow --jobs 3").unwrap();

        assert_eq!(options.filters, ["a", "b"]);
        assert!(options.skip_slow);
        assert_eq!(options.jobs, 3);
        assert_eq!(options.claims, None);
    }

    #[test]
    fn wrong_options_are_usage_errors() {
        for line in [
            "--jobs 0",
            "--jobs",
            "--frobnicate",
            "--runtime",
            "--claim",
            "--may-skip",
            "--stop-after soon",
            "--stop-after -1",
        ] {
            assert!(matches!(parse(line), Err(Stop::Usage(_))), "{line}");
        }
    }
}
