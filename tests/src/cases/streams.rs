// SPDX-License-Identifier: Apache-2.0
//! Much data through the standard streams, unchanged.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Failure, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(stdin_to_stdout_64_mib),
    case!(stdin_to_stdout_1_gib).slow(900),
    case!(checksum_in_the_container),
    case!(checksum_outside),
    case!(both_outputs_at_once),
];

const CHUNK: usize = 1 << 16;

/// A sequence of bytes that never repeats within what is sent here.
#[derive(Debug)]
struct Noise(u64);

impl Noise {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
        }
    }
}

/// Writes `chunks` chunks of noise.
fn send(mut to: impl Write, chunks: usize) -> std::io::Result<()> {
    let mut noise = Noise::new();
    let mut buffer = vec![0; CHUNK];
    for _ in 0..chunks {
        noise.fill(&mut buffer);
        to.write_all(&buffer)?;
    }
    Ok(())
}

/// Reads to the end and compares with `chunks` chunks of noise.
fn compare(mut from: impl Read, chunks: usize) -> Result {
    let mut noise = Noise::new();
    let mut expected = vec![0; CHUNK];
    let mut seen = vec![0; CHUNK];
    for number in 0..chunks {
        noise.fill(&mut expected);
        from.read_exact(&mut seen).context(|| format!("reading chunk {number} of {chunks}"))?;
        ensure!(seen == expected, "chunk {number} of {chunks} is not what was sent");
    }
    ensure_eq!(from.read(&mut seen)?, 0, "bytes after the last that was sent");
    Ok(())
}

fn round_trip(env: &Env, mib: usize, limit: Duration) -> Result {
    let chunks = mib * (1 << 20) / CHUNK;
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["cat"]);
    let (reader, writer) = std::io::pipe()?;

    let mut running = env.run(&bundle)?.open_stdin().stdout(writer).limit(limit).spawn()?;
    let Some(stdin) = running.stdin.take() else { fail!("no stdin") };
    let feeder = thread::spawn(move || send(stdin, chunks));
    let result = compare(reader, chunks);
    let output = running.finish()?;

    result.map_err(|failure| match failure {
        Failure::Failed(reason) => Failure::Failed(format!("{reason}; {}", output.describe())),
        skipped @ Failure::Skipped(_) => skipped,
    })?;
    match feeder.join() {
        Ok(sent) => sent.context(|| "writing stdin".to_owned())?,
        Err(_) => fail!("the feeder panicked"),
    }
    output.expect_code(0)?;
    output.expect_silent_stderr()
}

fn stdin_to_stdout_64_mib(env: &Env) -> Result {
    round_trip(env, 64, Duration::from_secs(110))
}

fn stdin_to_stdout_1_gib(env: &Env) -> Result {
    round_trip(env, 1024, Duration::from_secs(880))
}

const CHECKED_CHUNKS: usize = 16 * (1 << 20) / CHUNK;

/// What `sha256sum` of this machine says of the noise.
fn checksum_here() -> Result<String> {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    if let Some(stdin) = child.stdin.take() {
        send(stdin, CHECKED_CHUNKS)?;
    }
    Ok(String::from_utf8_lossy(&child.wait_with_output()?.stdout).into_owned())
}

fn checksum_in_the_container(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sha256sum"]);
    let mut input = Vec::new();
    send(&mut input, CHECKED_CHUNKS)?;

    env.run(&bundle)?.input(input).output()?.expect_stdout(&checksum_here()?)
}

fn checksum_outside(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cat /noise");
    let mut content = Vec::new();
    send(&mut content, CHECKED_CHUNKS)?;
    bundle.add_file("noise", &content, 0o644)?;

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    ensure!(
        output.stdout == content,
        "{} bytes came, or others than the file's {}",
        output.stdout.len(),
        content.len()
    );
    Ok(())
}

/// Neither stream waits for the other.
fn both_outputs_at_once(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("yes out | head -c 8000000 & yes err | head -c 8000000 >&2 & wait");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    ensure_eq!((output.stdout.len(), output.stderr.len()), (8_000_000, 8_000_000), "bytes on stdout and stderr");
    Ok(())
}
