// SPDX-License-Identifier: Apache-2.0
//! What runs on the host for all peers: iperf3's server, and one that sends back each byte.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use crate::error::{BenchError, file};

/// Where peers ask for orders.
pub(super) const CONTROL_PORT: u16 = 5210;
/// Where bytes come back.
pub(super) const ECHO_PORT: u16 = 5211;

/// Where iperf3's server writes.
const LOG: &str = "/tmp/iperf3.log";

/// The servers. Dropped, iperf3's ends; the other ends with this process.
#[derive(Debug)]
pub(super) struct Servers {
    iperf3: Child,
}

impl Servers {
    /// Starts them for peers of all networks.
    ///
    /// # Errors
    ///
    /// iperf3 cannot be started, or somebody else has the port.
    pub(super) fn start(iperf3: &Path) -> Result<Self, BenchError> {
        let log = File::create(LOG).map_err(file("create", LOG))?;
        let listener =
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, ECHO_PORT)).map_err(file("listen on", ECHO_PORT.to_string()))?;
        thread::spawn(move || listener.incoming().flatten().for_each(echo_in_background));
        let errors = log.try_clone().map_err(file("open", LOG))?;
        let mut command = Command::new(iperf3);
        command.arg("--server").stdin(Stdio::null()).stdout(log).stderr(errors);
        Ok(Self { iperf3: command.spawn().map_err(file("start", iperf3))? })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let _ = self.iperf3.kill();
        let _ = self.iperf3.wait();
    }
}

fn echo_in_background(stream: TcpStream) {
    // A connection that fails is the client's to tell.
    thread::spawn(move || echo(stream));
}

/// Sends back each byte until the client hangs up.
fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
}
