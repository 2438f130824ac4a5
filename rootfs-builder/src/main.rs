// SPDX-License-Identifier: Apache-2.0
//! Makes the guest's image: an initramfs with the agent in it, or a file system image with a shell for debugging.
//!
//! The same inputs give the same bytes: times are 0, owners are root, and everything is in sorted order.

mod agent_binary;
mod debug_image;
mod initramfs;
mod layout;
mod output;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "bulkhead-rootfs-builder", version, about = "Makes the guest's image")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write the initramfs (an uncompressed newc cpio archive) that a sandbox boots
    Initramfs {
        /// The agent: a static x86-64 program
        #[arg(long)]
        agent: PathBuf,
        /// The archive to write
        #[arg(long)]
        output: PathBuf,
    },
    /// Write an erofs image with the agent and a shell, for debugging (needs mkfs.erofs)
    Debug {
        /// The agent: a static x86-64 program
        #[arg(long)]
        agent: PathBuf,
        /// The image to write
        #[arg(long)]
        output: PathBuf,
        /// A static busybox, which becomes /bin/sh and the other tools' names
        #[arg(long)]
        shell: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Initramfs { agent, output } => initramfs::write(&agent, &output).map_err(error_chain),
        Command::Debug { agent, output, shell } => debug_image::write(&agent, &shell, &output).map_err(error_chain),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            report(&message);
            ExitCode::FAILURE
        }
    }
}

/// The error and what caused it, on one line.
fn error_chain(error: impl std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        message.push_str(": ");
        message.push_str(&inner.to_string());
        cause = inner.source();
    }
    message
}

#[expect(clippy::print_stderr, reason = "the one place where this program speaks to its user")]
fn report(message: &str) {
    eprintln!("bulkhead-rootfs-builder: {message}");
}
