// SPDX-License-Identifier: Apache-2.0
//! Standard streams without a terminal.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::time::Duration;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(stdout_and_stderr_are_apart),
    case!(pipelines_work),
    case!(stdin_ends),
    case!(stdin_without_a_reader_holds_nothing_up),
    case!(stdin_left_open_holds_nothing_up),
    case!(conversation),
    case!(end_of_stdout_before_the_end),
    case!(every_byte_value),
    case!(last_output_is_not_lost),
    case!(stdin_from_a_file),
    case!(closed_stdin),
    case!(closed_stdout_and_stderr),
    case!(stdout_of_a_closed_pipe),
    case!(stdout_to_a_file),
    case!(stdout_appended_to_a_file),
    case!(stdout_to_a_full_device),
    case!(slow_reader),
    case!(stdout_and_stderr_share_a_file),
];

fn stdout_and_stderr_are_apart(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo out; echo err >&2; echo more out; echo more err >&2; exit 7");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(7)?;
    ensure_eq!(output.stdout(), "out\nmore out\n", "stdout");
    ensure_eq!(output.stderr(), "err\nmore err\n", "stderr");
    Ok(())
}

fn pipelines_work(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("seq 1 1000 | grep 7 | sort -rn | head -n 3 | tr '\\n' ' '; echo a b c | (read x y; echo \"$y-$x\")");

    env.run(&bundle)?.output()?.expect_stdout("997 987 979 b c-a\n")
}

fn stdin_ends(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cat; echo '[end]'");
    env.run(&bundle)?.input("some text\n").output()?.expect_stdout("some text\n[end]\n")?;
    env.run(&bundle)?.input("").output()?.expect_stdout("[end]\n")?;
    env.run(&bundle)?.output()?.expect_stdout("[end]\n")
}

fn stdin_without_a_reader_holds_nothing_up(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo done");

    env.run(&bundle)?.input(vec![b'x'; 8 << 20]).output()?.expect_stdout("done\n")
}

fn stdin_left_open_holds_nothing_up(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo done; exit 4");

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    let held = running.stdin.take();
    let output = running.finish()?;

    drop(held);
    output.expect_code(4)?;
    ensure_eq!(output.stdout(), "done\n", "stdout");
    Ok(())
}

fn conversation(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("while read line; do echo \"<$line>\"; done; echo bye");

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    for word in ["one", "two", "three"] {
        running.write(format!("{word}\n").as_bytes())?;
        running.wait_for(&format!("<{word}>\n"))?;
    }
    running.close_stdin();

    running.finish()?.expect_stdout("<one>\n<two>\n<three>\nbye\n")
}

/// Others hold the streams open themselves.
fn end_of_stdout_before_the_end(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo early; exec >&-; read line; exit 5");

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("early\n")?;
    running.wait_for_end_of_stdout()?;
    ensure!(running.is_running()?, "the runtime has ended with stdout");

    running.write(b"go on\n")?;
    running.finish()?.expect_code(5)
}

fn every_byte_value(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["cat"]);
    let bytes: Vec<u8> = (0..=255u8).cycle().take(256 * 257).collect();

    let output = env.run(&bundle)?.input(bytes.clone()).output()?;

    output.expect_code(0)?;
    ensure!(output.stdout == bytes, "{} bytes came back, or others than were sent", output.stdout.len());
    Ok(())
}

fn last_output_is_not_lost(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2; exit 9");

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(output.status.code(), Some(9), "the status");
    ensure_eq!(output.stdout.len(), 3_000_000, "bytes on stdout");
    ensure_eq!(output.stderr.len(), 2_000_000, "bytes on stderr");
    Ok(())
}

fn stdin_from_a_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("wc -c");
    let path = env.work.join("input");
    fs::write(&path, vec![7; 123_456])?;

    env.run(&bundle)?.stdin(File::open(&path)?).output()?.expect_stdout("123456\n")
}

fn closed_stdin(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("wc -c; echo end");

    env.run(&bundle)?.wrapper("exec \"$@\" <&-").output()?.expect_stdout("0\nend\n")
}

fn closed_stdout_and_stderr(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo lost; echo lost >&2; echo kept >/note; exit 6");

    let output = env.run(&bundle)?.wrapper("exec \"$@\" <&- >&- 2>&-").output()?;

    output.expect_code(6)?;
    ensure_eq!(fs::read_to_string(bundle.path("note"))?, "kept\n", "the note");
    Ok(())
}

/// The writer is told by SIGPIPE, as without a runtime between.
fn stdout_of_a_closed_pipe(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("yes; echo \"yes: $?\" >&2; exit 3");

    let (mut reader, writer) = std::io::pipe()?;
    let running = env.run(&bundle)?.stdout(writer).spawn()?;
    let mut some = [0; 4096];
    reader.read_exact(&mut some)?;
    drop(reader);
    let output = running.finish()?;

    output.expect_code(3)?;
    ensure!(some.starts_with(b"y\ny\n"), "seen {:?}", &some[..8]);
    ensure!(output.stderr().ends_with("yes: 141\n"), "expected a SIGPIPE, seen {}", output.describe());
    Ok(())
}

fn stdout_to_a_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("seq 1 100000");
    let path = env.work.join("output");

    env.run(&bundle)?.stdout(File::create(&path)?).output()?.expect_code(0)?;

    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    ensure!(fs::read_to_string(&path)? == expected, "the file is not what was written");
    Ok(())
}

fn stdout_appended_to_a_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo line");
    let path = env.work.join("output");

    for _ in 0..2 {
        env.run(&bundle)?.stdout(OpenOptions::new().append(true).create(true).open(&path)?).output()?.expect_code(0)?;
    }

    ensure_eq!(fs::read_to_string(&path)?, "line\nline\n", "the file");
    Ok(())
}

/// Output that cannot be written is not lost in silence.
fn stdout_to_a_full_device(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("seq 1 200000 || exit 9");

    let full = OpenOptions::new().write(true).open("/dev/full")?;
    let output = env.run(&bundle)?.stdout(full).output()?;

    ensure!(output.status.code() != Some(0) || !output.stderr.is_empty(), "nobody is told: {}", output.describe());
    Ok(())
}

fn slow_reader(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("head -c 4000000 /dev/zero; echo end");

    let (mut reader, writer) = std::io::pipe()?;
    let mut running = env.run(&bundle)?.stdout(writer).spawn()?;
    // Longer than any buffer can hide: the writer has to wait for the reader.
    std::thread::sleep(Duration::from_secs(4));
    ensure!(running.is_running()?, "4 MB went into a pipe that nobody read");
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;

    running.finish()?.expect_code(0)?;
    ensure_eq!(bytes.len(), 4_000_004, "bytes read");
    if !bytes.ends_with(b"\0end\n") {
        fail!("the end is not what was written last");
    }
    Ok(())
}

fn stdout_and_stderr_share_a_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo a; sleep 0.3; echo b >&2; sleep 0.3; echo c");
    let path = env.work.join("output");
    let file = File::create(&path)?;

    env.run(&bundle)?.stdout(file.try_clone()?).stderr(file).output()?.expect_code(0)?;

    ensure_eq!(fs::read_to_string(&path)?, "a\nb\nc\n", "the file");
    Ok(())
}
