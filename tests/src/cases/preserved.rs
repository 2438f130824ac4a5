// SPDX-License-Identifier: Apache-2.0
//! Descriptors of the caller's that a process is given by `--preserve-fds`.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq};
use crate::pty::Terminal;
use crate::run::{Run, Running};

pub(super) const CASES: &[Case] = &[
    case!(files_and_devices),
    case!(pipes_of_a_detached_container),
    case!(connection),
    case!(last_words_on_a_connection),
    case!(environment_of_the_caller),
    case!(exec),
    case!(terminal),
    case!(what_cannot_be_handed_on),
];

/// How long the other side of a connection may be silent.
const LIMIT: Duration = Duration::from_secs(100);

/// The words of `run` with so many descriptors.
fn words(env: &Env, bundle: &Bundle, verb: &[&str], count: &str) -> Result<Vec<String>> {
    bundle.write()?;
    let (folder, id) = (bundle.folder.display().to_string(), env.id());
    let words = [verb, &["--preserve-fds", count, "--bundle", &folder, &id]].concat();
    Ok(words.into_iter().map(str::to_owned).collect())
}

fn files_and_devices(env: &Env) -> Result {
    let (input, output) = (env.work.join("in"), env.work.join("out"));
    let bytes: Vec<u8> = (0..1_000_003_u32).map(|number| (number / 3 % 251) as u8).collect();
    fs::write(&input, &bytes)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cat <&3 >&4; echo lost >&5; ls /proc/self/fd | tail -1; stat -Lc %t:%T /dev/fd/5");

    let words = words(env, &bundle, &["run"], "3")?;
    let run = env.call(words).wrapper("exec 3<\"$INPUT\" 4>\"$OUTPUT\" 5>/dev/null; exec \"$@\"");
    // `ls` has the folder open beside what it was given.
    run.variable("INPUT", &input).variable("OUTPUT", &output).output()?.expect_stdout("6\n1:3\n")?;

    ensure!(fs::read(&output)? == bytes, "what came out is not what went in");
    Ok(())
}

fn pipes_of_a_detached_container(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cat <&3 | tr a-z A-Z >&4");
    let words = words(env, &bundle, &["run", "--detach"], "2")?;
    let id = words.last().cloned().unwrap_or_default();
    let (question, mut writer) = std::io::pipe()?;
    let (mut reader, answer) = std::io::pipe()?;

    // What it holds of them besides would keep the ends from being seen.
    let run = env.call(words).stdin(OwnedFd::from(question)).stdout(OwnedFd::from(answer));
    let run = run.wrapper("exec 3<&0 4>&1 0</dev/null 1>/dev/null; exec \"$@\" 2>/dev/null");
    run.output()?.expect_code(0)?;
    // The one that has asked for it is gone.
    writer.write_all(b"a question")?;
    drop(writer);
    let mut told = String::new();
    reader.read_to_string(&mut told)?;

    ensure_eq!(told, "A QUESTION", "what the container wrote");
    env.call(["delete", "--force", &id]).output()?.expect_code(0)
}

/// Runs that script with its descriptor 3 connected to what is returned.
fn connected(env: &Env, script: &str) -> Result<(Running, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(LIMIT))?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(script);
    let words = words(env, &bundle, &["run"], "1")?;
    let run = env.call(words).stdin(OwnedFd::from(theirs));
    Ok((run.wrapper("exec 3<&0 0</dev/null; exec \"$@\"").spawn()?, ours))
}

/// Those that the caller's environment tells of go first, and the container's tells of them; it has to mean this process.
fn environment_of_the_caller(env: &Env) -> Result {
    let (first, second) = (env.work.join("first"), env.work.join("second"));
    fs::write(&first, "one\n")?;
    fs::write(&second, "two\n")?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo $LISTEN_FDS $LISTEN_PID; cat <&3; cat <&4");
    let call = |script: &'static str| -> Result<Run<'_>> {
        let words = words(env, &bundle, &["run"], "1")?;
        let run = env.call(words).wrapper(script);
        Ok(run.variable("FIRST", &first).variable("SECOND", &second).variable("LISTEN_FDS", "1"))
    };
    let script = "exec 3<\"$FIRST\" 4<\"$SECOND\"; export LISTEN_PID=$$; exec \"$@\"";
    call(script)?.output()?.expect_stdout("1 1\none\ntwo\n")?;

    bundle.sh("echo ${LISTEN_FDS-none}; cat <&3");
    let call = |script: &'static str| -> Result<Run<'_>> {
        let words = words(env, &bundle, &["run"], "1")?;
        Ok(env.call(words).wrapper(script).variable("FIRST", &first).variable("LISTEN_FDS", "1"))
    };
    call("exec 3<\"$FIRST\"; export LISTEN_PID=1; exec \"$@\"")?.output()?.expect_stdout("none\none\n")?;
    if env.kind == Kind::Bulkhead {
        let refused = call("exec 3</ 4</dev/null; export LISTEN_PID=$$; exec \"$@\"")?.output()?;
        refused.expect_error(&["LISTEN_FDS=1 and --preserve-fds 1: descriptor 3", "it is a folder"])?;
    }
    Ok(())
}

fn connection(env: &Env) -> Result {
    let (running, mut stream) = connected(env, "cat <&3 | tr a-z A-Z >&3; echo done")?;

    let mut sender = stream.try_clone()?;
    // It answers while it is asked. A container that ends early shows in what comes back.
    let sending = thread::spawn(move || {
        let _ = sender.write_all(&b"many words ".repeat(100_000));
        let _ = sender.shutdown(Shutdown::Write);
    });
    let mut told = Vec::new();
    stream.read_to_end(&mut told).context(|| "reading the answer".to_owned())?;

    ensure!(told == b"MANY WORDS ".repeat(100_000), "{} bytes came back", told.len());
    ensure!(sending.join().is_ok(), "sending has panicked");
    running.finish()?.expect_stdout("done\n")
}

fn last_words_on_a_connection(env: &Env) -> Result {
    let (running, mut stream) = connected(env, "head -c 300000 /dev/zero >&3; exit 7")?;

    // Its end waits for who takes what it has sent.
    let mut told = Vec::new();
    stream.read_to_end(&mut told)?;

    ensure_eq!(told.len(), 300_000, "bytes that came");
    running.finish()?.expect_code(7)
}

fn exec(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]);
    let container = Detached::run(env, &bundle)?;
    let (input, output) = (env.work.join("in"), env.work.join("out"));
    fs::write(&input, "to be read\n")?;

    let script = "cat <&3; echo written >&4; echo to stderr >&2; exit 5";
    let run = container.verb_with(&["exec", "--preserve-fds", "2"], &["sh", "-c", script]);
    let run = run.wrapper("exec 3<\"$INPUT\" 4>\"$OUTPUT\"; exec \"$@\"");
    let told = run.variable("INPUT", &input).variable("OUTPUT", &output).output()?;

    told.expect_code(5)?;
    ensure_eq!(told.stdout() + &told.stderr(), "to be read\nto stderr\n", "its streams");
    ensure_eq!(fs::read_to_string(&output)?, "written\n", "what it wrote");
    // Without any, it has none.
    container.exec("ls /proc/self/fd | tail -1").output()?.expect_stdout("3\n")
}

fn terminal(env: &Env) -> Result {
    let output = env.work.join("out");
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("tty >&3").set("/process/terminal", true.into());
    let (runtime, root) = (env.runtime.display().to_string(), env.root.display().to_string());
    let shell = ["-c", "exec 3>\"$OUTPUT\"; exec \"$@\"", "sh", &runtime, "--root", &root].map(str::to_owned);
    let words = shell.into_iter().chain(words(env, &bundle, &["run"], "1")?);
    let run = env.tool(Path::new("/bin/sh"), words).variable("OUTPUT", &output);

    Terminal::new(24, 80)?.spawn(run)?.finish()?.expect_code(0)?;

    ensure_eq!(fs::read_to_string(&output)?, "/dev/pts/0\n", "what it wrote beside its terminal");
    Ok(())
}

fn what_cannot_be_handed_on(env: &Env) -> Result {
    env.only_bulkhead()?; // It has its caller's kernel.
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo it ran");
    for (script, count, expected) in [
        ("exec \"$@\"", "1", "--preserve-fds 1: descriptor 3 is not open"),
        ("exec 3</dev/null; exec \"$@\"", "2", "--preserve-fds 2: descriptor 4 is not open"),
        ("exec 3</; exec \"$@\"", "1", "it is a folder"),
        ("exec 3</dev/zero; exec \"$@\"", "1", "it is a device"),
        ("exec 3<>both; exec \"$@\"", "1", "it is open for reading and writing at once"),
        ("exec \"$@\"", "33", "at most 32"),
    ] {
        for verb in ["run", "create"] {
            let words = words(env, &bundle, &[verb], count)?;
            env.call(words).in_folder(&env.work).wrapper(script).output()?.expect_error(&[expected])?;
        }
    }
    Ok(())
}
