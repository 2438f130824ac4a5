// SPDX-License-Identifier: Apache-2.0
//! Runs cases: each in a process of its own that can be killed, and one line about each.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_child_subreaper;

use crate::cases::{self, Case};
use crate::env::{self, Env};
use crate::failure::{Context as _, Failure, Result, fail};
use crate::leftovers::Before;
use crate::options::{Options, PodBench};
use crate::skips::GoodReasons;
use crate::{pod_bench, processes};

const PASSED: u8 = 0;
const FAILED: u8 = 1;
const SKIPPED: u8 = 77;

/// The longest silence.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// How often time limits, and orphans, are looked at.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// How a case ended.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

/// The cases that the options name, or a filter that names none.
pub(crate) fn selected(options: &Options) -> std::result::Result<Vec<&'static Case>, &str> {
    let names_none = |filter: &&String| !cases::all().any(|case| case.name().contains(filter.as_str()));
    if let Some(filter) = options.filters.iter().find(names_none) {
        return Err(filter);
    }
    let wanted = |case: &&Case| {
        options.filters.is_empty() || options.filters.iter().any(|filter| case.name().contains(filter.as_str()))
    };
    let mut cases: Vec<_> = cases::all().filter(wanted).collect();
    if options.claims.is_some() {
        // A long one that begins last would leave the other hosts without work.
        cases.sort_by_key(|case| std::cmp::Reverse(case.limit));
    }
    Ok(cases)
}

/// Runs the selected cases and tells of each.
pub(crate) fn run_all(options: &Options, cases: Vec<&'static Case>) -> ExitCode {
    match Suite::new(options).and_then(|mut suite| suite.run(cases)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failure::Failed(reason) | Failure::Skipped(reason)) => {
            eprintln!("bulkhead-e2e: {reason}");
            ExitCode::from(2)
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    passed: usize,
    /// Of them, those that had failed before.
    passed_again: usize,
    failed: usize,
    skipped: usize,
    not_begun: usize,
}

#[derive(Debug)]
struct Suite<'a> {
    options: &'a Options,
    runtime: PathBuf,
    work: PathBuf,
    counts: Counts,
    /// For which reasons a case may be skipped; any, if there are none.
    good_reasons: Option<GoodReasons>,
    running: Vec<Running>,
    /// The cases that have failed once and get a second try.
    again: Vec<&'static Case>,
    /// Whether the second tries have begun.
    is_second: bool,
    /// When something was said last.
    told: Instant,
}

impl<'a> Suite<'a> {
    fn new(options: &'a Options) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            fail!("needs root");
        }
        let runtime = find_program(&options.runtime)?;
        let good_reasons = options.may_skip.as_deref().map(GoodReasons::read).transpose()?;
        let base = std::env::var_os("TMPDIR").filter(|path| !path.is_empty()).unwrap_or_else(|| "/tmp".into());
        let work = Path::new(&base).join(format!("bulkhead-e2e.{}", std::process::id()));
        fs::create_dir_all(&work).context(|| format!("making {}", work.display()))?;
        set_child_subreaper(true)?;
        Ok(Self {
            options,
            runtime,
            work,
            counts: Counts::default(),
            good_reasons,
            running: Vec::new(),
            again: Vec::new(),
            is_second: false,
            told: Instant::now(),
        })
    }

    fn run(&mut self, cases: Vec<&'static Case>) -> Result<bool> {
        let started = Instant::now();
        let mut waiting = cases.into_iter();
        loop {
            while self.running.len() < self.options.jobs {
                let Some(case) = waiting.next() else { break };
                if !self.is_second && !self.claim(case)? {
                    continue;
                }
                if case.slow && self.options.skip_slow {
                    self.tell(case, Duration::ZERO, &Verdict::Skipped("slow".to_owned()));
                } else if self.options.stop_after.is_some_and(|limit| started.elapsed() >= limit) {
                    self.counts.not_begun += 1;
                    println!("FAIL {} [not begun: the time was up]", case.name());
                } else {
                    let running = Running::start(case, self.options, &self.runtime, &self.work)?;
                    self.running.push(running);
                }
            }
            if self.running.is_empty() {
                if self.again.is_empty() || self.is_second {
                    break;
                }
                self.is_second = true;
                waiting = std::mem::take(&mut self.again).into_iter();
                continue;
            }
            // There is one, and it makes room for the next at once when it has ended.
            processes::wait_for_any(self.running.iter().map(|running| &running.child), BETWEEN_LOOKS)?;
            self.collect()?;
            self.give_sign_of_life();
        }
        let Counts { passed, passed_again, failed, skipped, not_begun } = self.counts;
        let again = if passed_again == 0 { String::new() } else { format!(" ({passed_again} at the second try)") };
        let late = if not_begun == 0 { String::new() } else { format!(", {not_begun} not begun for want of time") };
        println!("e2e: {passed} passed{again}, {failed} failed, {skipped} skipped{late}");
        eprintln!("bulkhead-e2e: {} s", started.elapsed().as_secs());
        let _ = fs::remove_dir(&self.work);
        Ok(failed == 0 && not_begun == 0)
    }

    /// Whether this host is the one to run a case.
    fn claim(&self, case: &Case) -> Result<bool> {
        let Some(folder) = &self.options.claims else { return Ok(true) };
        let claim = folder.join(case.name().replace("::", "-"));
        // Unlike a file's, a link's creation is one step wherever it lies, what it says included.
        match symlink(&self.options.host, &claim) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => fail!("claiming {}: {error}", claim.display()),
        }
    }

    /// Tells of the cases that have ended or have to.
    fn collect(&mut self) -> Result {
        let mut index = 0;
        while index < self.running.len() {
            let Some(verdict) = self.running[index].poll()? else {
                index += 1;
                continue;
            };
            let verdict = self.judged(verdict);
            let ended = self.running.swap_remove(index);
            let keep = self.options.keep && matches!(verdict, Verdict::Failed(_));
            if !keep {
                let _ = fs::remove_dir_all(&ended.work);
            }
            self.tell(ended.case, ended.started.elapsed(), &verdict);
        }
        let own: Vec<i32> = self.running.iter().map(|running| running.child.id().cast_signed()).collect();
        processes::reap_orphans(&own);
        Ok(())
    }

    /// Says once a minute what takes so long, so that who watches knows a long case from a machine that hangs.
    fn give_sign_of_life(&mut self) {
        if self.told.elapsed() < SIGN_OF_LIFE {
            return;
        }
        self.told = Instant::now();
        for running in &self.running {
            eprintln!("running {} ({} s)", running.case.name(), running.started.elapsed().as_secs());
        }
    }

    /// A skip for a reason that is no good one is a failure.
    fn judged(&self, verdict: Verdict) -> Verdict {
        match (verdict, &self.good_reasons) {
            (Verdict::Skipped(reason), Some(good)) if !good.have(&reason) => {
                Verdict::Failed(format!("skipped, for a reason that --may-skip does not have: {reason}"))
            }
            (verdict, _) => verdict,
        }
    }

    /// Whether a case that has failed is given another try.
    fn is_tried_again(&self, case: &Case) -> bool {
        self.options.second_try && !self.is_second && !case.varies && env::is_emulated()
    }

    fn tell(&mut self, case: &'static Case, elapsed: Duration, verdict: &Verdict) {
        let (word, reason) = match verdict {
            Verdict::Passed => {
                self.counts.passed += 1;
                self.counts.passed_again += usize::from(self.is_second);
                ("ok", None)
            }
            Verdict::Failed(reason) if self.is_tried_again(case) => {
                self.again.push(case);
                ("again", Some(reason))
            }
            Verdict::Failed(reason) => {
                self.counts.failed += 1;
                ("FAIL", Some(reason))
            }
            Verdict::Skipped(reason) => {
                self.counts.skipped += 1;
                ("skip", Some(reason))
            }
        };
        let reason = reason.map(|reason| format!(" [{}]", reason.trim().replace('\n', " | "))).unwrap_or_default();
        self.told = Instant::now();
        println!("{word} {} ({:.1} s){reason}", case.name(), elapsed.as_secs_f64());
        let _ = io::stdout().flush();
    }
}

/// A case that is being run by another process.
#[derive(Debug)]
struct Running {
    case: &'static Case,
    child: Child,
    work: PathBuf,
    started: Instant,
}

impl Running {
    fn start(case: &'static Case, options: &Options, runtime: &Path, work: &Path) -> Result<Self> {
        let work = work.join(case.name().replace("::", "-"));
        fs::create_dir_all(&work)?;
        let log = File::create(work.join("log"))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--case").arg(case.name()).arg("--work").arg(&work).arg("--runtime").arg(runtime);
        if options.skip_slow {
            command.arg("--skip-slow");
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = command.spawn().context(|| "starting a case".to_owned())?;
        Ok(Self { case, child, work, started: Instant::now() })
    }

    /// How it ended, if it did; past its time limit it is killed with all that it started.
    fn poll(&mut self) -> Result<Option<Verdict>> {
        let log = || fs::read_to_string(self.work.join("log")).unwrap_or_default();
        if let Some(status) = self.child.try_wait()? {
            return Ok(Some(match status.code() {
                Some(code) if code == i32::from(PASSED) => Verdict::Passed,
                Some(code) if code == i32::from(SKIPPED) => Verdict::Skipped(log()),
                Some(code) if code == i32::from(FAILED) => Verdict::Failed(log()),
                _ => Verdict::Failed(format!(
                    "the case ended with {:?}, signal {:?}: {}",
                    status.code(),
                    status.signal(),
                    log()
                )),
            }));
        }
        if self.started.elapsed() < self.case.limit {
            return Ok(None);
        }
        let below: Vec<String> = processes::descendants(self.child.id().cast_signed())
            .iter()
            .map(|process| format!("{} {}", process.pid, process.command_line()))
            .collect();
        // A process that hangs in the kernel outlives its kill: it is not waited for.
        processes::kill_tree(self.child.id().cast_signed());
        Ok(Some(Verdict::Failed(format!(
            "no end after {:?}, killed with [{}]: {}",
            self.case.limit,
            below.join(", "),
            log()
        ))))
    }
}

/// Runs one case in this process; its reason for not passing goes to stdout.
pub(crate) fn run_one(options: &Options, name: &str) -> ExitCode {
    let Some(case) = cases::all().find(|case| case.name() == name) else {
        println!("no case {name}");
        return ExitCode::from(FAILED);
    };
    match run_case(options, case) {
        Ok(()) => ExitCode::from(PASSED),
        Err(Failure::Failed(reason)) => {
            println!("{reason}");
            ExitCode::from(FAILED)
        }
        Err(Failure::Skipped(reason)) => {
            println!("{reason}");
            ExitCode::from(SKIPPED)
        }
    }
}

/// Measures pods, in surroundings like a case's.
pub(crate) fn run_bench(options: &Options, bench: &PodBench) -> ExitCode {
    let measured = Suite::new(options).and_then(|suite| {
        let measured = in_surroundings(&suite.runtime, &suite.work, |env| pod_bench::run(env, bench));
        fs::remove_dir_all(&suite.work).context(|| format!("removing {}", suite.work.display())).and(measured)
    });
    match measured {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(reason) | Failure::Skipped(reason)) => {
            eprintln!("bench: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run_case(options: &Options, case: &Case) -> Result {
    in_surroundings(&options.runtime, &options.work, case.run)
}

fn in_surroundings(runtime: &Path, work: &Path, run: impl FnOnce(&Env) -> Result) -> Result {
    isolate()?;
    let env = Env::new(runtime, work)?;
    let before = Before::record();
    let result = run(&env);
    let mut left = env.unmount_all().and_then(|()| before.check(&env));
    if let (Err(Failure::Failed(reason)), Err(Failure::Failed(found))) = (&result, &left) {
        left = Err(Failure::Failed(format!("{reason}; and then: {found}")));
        return left;
    }
    result.and(left)
}

/// Makes this process the reaper of all that it will start, in a mount namespace of its own whose mounts propagate among
/// its children as those of a host under systemd do.
fn isolate() -> Result {
    set_child_subreaper(true)?;
    unshare(CloneFlags::CLONE_NEWNS).context(|| "making a mount namespace".to_owned())?;
    for propagation in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | propagation, None::<&str>)
            .context(|| "setting the propagation of mounts".to_owned())?;
    }
    Ok(())
}

/// The absolute path of a program, looked up as a shell does.
fn find_program(program: &Path) -> Result<PathBuf> {
    if program.components().count() > 1 {
        let path = std::path::absolute(program)?;
        if !path.is_file() {
            fail!("there is no {} (`make build` makes it; --runtime names another)", path.display());
        }
        return Ok(path);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&folders).map(|folder| folder.join(program)).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => fail!("there is no {} in PATH", program.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(line: &str) -> std::result::Result<Vec<&'static str>, String> {
        let options = Options::parse(line.split_whitespace().map(Into::into)).unwrap();
        let cases = selected(&options).map_err(str::to_owned)?;
        Ok(cases.iter().map(|case| case.name()).collect())
    }

    #[test]
    fn a_filter_names_a_case_at_least() {
        assert_eq!(
            names("--filter random::verbs_and_kills_for_a_minute").unwrap(),
            ["random::verbs_and_kills_for_a_minute"]
        );
        assert_eq!(names("--filter random:: --filter typo"), Err("typo".to_owned()));
        assert!(names("").unwrap().len() > 100);
    }

    #[test]
    fn what_is_drawn_anew_has_no_second_try() {
        let random = |case: &&Case| case.name().starts_with("random::");

        assert!(cases::all().filter(random).all(|case| case.varies));
        assert!(cases::all().any(|case| !case.varies));
    }
}
