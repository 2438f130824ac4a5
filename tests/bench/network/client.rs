// SPDX-License-Identifier: Apache-2.0
//! What runs in each peer: it connects to the host, and measures what it is told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::measurement::Measurement;
use super::server::{CONTROL_PORT, ECHO_PORT};
use crate::error::{BenchError, file};

/// Where iperf3 is in the peer.
pub(super) const IPERF3: &str = "/bin/iperf3";

/// How long the host is tried, should the network come up after its first program.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Measures for the host at `server` until that hangs up.
///
/// # Errors
///
/// The host cannot be reached.
pub(crate) fn client(server: Ipv4Addr) -> Result<(), BenchError> {
    let mut control = connect(server)?;
    let orders = control.try_clone().map_err(file("read orders from", server.to_string()))?;
    for order in BufReader::new(orders).lines() {
        let order = order.map_err(file("read orders from", server.to_string()))?;
        let answer = match obey(server, &order) {
            Ok(figure) => figure.to_string(),
            Err(why) => why.replace('\n', " "),
        };
        control.write_all(format!("{answer}\n").as_bytes()).map_err(file("answer", server.to_string()))?;
    }
    Ok(())
}

fn connect(server: Ipv4Addr) -> Result<TcpStream, BenchError> {
    let began = Instant::now();
    loop {
        match TcpStream::connect((server, CONTROL_PORT)) {
            Ok(control) => return Ok(control),
            Err(_) if began.elapsed() < CONNECT_LIMIT => thread::sleep(Duration::from_millis(100)),
            Err(error) => return Err(file("connect to", server.to_string())(error)),
        }
    }
}

fn obey(server: Ipv4Addr, order: &str) -> Result<f64, String> {
    let (measurement, seconds) = Measurement::parse(order).ok_or_else(|| format!("no such order: {order:?}"))?;
    match measurement {
        Measurement::Send { streams } => iperf3(server, streams, seconds, &[]),
        Measurement::Receive { streams } => iperf3(server, streams, seconds, &["--reverse"]),
        Measurement::RoundTrip => round_trip(server, seconds).map_err(|error| format!("round trip: {error}")),
    }
}

/// What `streams` connections carry together, in Mbit/s.
fn iperf3(server: Ipv4Addr, streams: u32, seconds: u32, options: &[&str]) -> Result<f64, String> {
    let [server, streams, seconds] = [server.to_string(), streams.to_string(), seconds.to_string()];
    let mut command = Command::new(IPERF3);
    command.args(["--json", "--client", &server, "--parallel", &streams, "--time", &seconds]).args(options);
    let output = command.output().map_err(|error| format!("cannot start {IPERF3}: {error}"))?;
    received(&output.stdout).map_err(|why| format!("iperf3 ended with {}: {why}", output.status))
}

/// What has come through, in Mbit/s, of iperf3's report.
fn received(report: &[u8]) -> Result<f64, String> {
    let report: Value = serde_json::from_slice(report).map_err(|error| format!("its report: {error}"))?;
    if let Some(why) = report["error"].as_str() {
        return Err(why.to_owned());
    }
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    rate.map(|bits| bits / 1e6).ok_or_else(|| "its report says nothing of what was received".to_owned())
}

/// How long a byte takes to the host and back, in µs: the mean of all that fit into `seconds`.
fn round_trip(server: Ipv4Addr, seconds: u32) -> std::io::Result<f64> {
    let mut stream = TcpStream::connect((server, ECHO_PORT))?;
    stream.set_nodelay(true)?;
    let limit = Duration::from_secs(seconds.into());
    let (began, mut count) = (Instant::now(), 0_u32);
    let mut byte = [0];
    while count == 0 || began.elapsed() < limit {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        count += 1;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_received_counts() {
        let report = br#"{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8e9}}}"#;
        assert_eq!(received(report), Ok(8000.0));
    }

    #[test]
    fn a_failed_run_says_why() {
        assert_eq!(received(br#"{"end": {}, "error": "unable to connect"}"#), Err("unable to connect".to_owned()));
        assert!(received(b"").is_err());
    }
}
