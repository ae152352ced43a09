//! iperf3, as others would run it.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, TcpListener};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::bench::BenchError;

/// What iperf3 says of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Decimal gigabytes a second at the receiver.
    pub gb_per_s: f64,
    /// CPU seconds of both ends for each gigabyte.
    pub cpu_s_per_gb: Option<f64>,
    /// Segments sent again.
    pub retransmits: Option<u64>,
}

/// Starts a server that serves one client and ends; returns its port.
pub fn serve_once() -> Result<u16, BenchError> {
    // Free at this moment, which is the best one can know of a port for another program.
    let free = TcpListener::bind("0.0.0.0:0").map_err(BenchError::Channel)?;
    let port = free.local_addr().map_err(BenchError::Channel)?.port();
    drop(free);
    let mut server = Command::new("iperf3")
        .args([
            "--server",
            "--one-off",
            "--forceflush",
            "--port",
            &port.to_string(),
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| BenchError::Refused(format!("iperf3 cannot be run: {error}")))?;
    let output = server.stdout.take().ok_or(BenchError::PeerGone)?;
    let mut lines = BufReader::new(output).lines();
    // It says that it listens, between two rules of dashes.
    let listens = lines.any(|line| line.is_ok_and(|line| line.contains("listening")));
    std::thread::spawn(move || {
        lines.for_each(drop);
        let _ = server.wait();
    });
    if listens {
        Ok(port)
    } else {
        Err(BenchError::Refused("iperf3 does not listen".into()))
    }
}

/// Runs a client for `seconds`, after another that is not counted, with these
/// further arguments.
pub fn run(to: (IpAddr, u16), seconds: f64, more: &[&str]) -> Result<Outcome, BenchError> {
    let output = Command::new("iperf3")
        .args([
            "--json",
            "--client",
            &to.0.to_string(),
            "--port",
            &to.1.to_string(),
        ])
        .args(["--omit", "1"])
        .args(["--time", &seconds.ceil().to_string(), "--length", "1M"])
        .args(more)
        .output()
        .map_err(|error| BenchError::Refused(format!("iperf3 cannot be run: {error}")))?;
    let said: Value = serde_json::from_slice(&output.stdout).map_err(|_| BenchError::Garbage)?;
    parse(&said)
}

fn parse(said: &Value) -> Result<Outcome, BenchError> {
    if let Some(error) = said["error"].as_str() {
        return Err(BenchError::Refused(format!("iperf3: {error}")));
    }
    let end = &said["end"];
    let received = &end["sum_received"];
    let rate = received["bits_per_second"]
        .as_f64()
        .ok_or(BenchError::Garbage)?;
    let gigabytes = received["bytes"].as_f64().unwrap_or(0.0) / 1e9;
    let seconds = received["seconds"].as_f64().unwrap_or(0.0);
    let cpu = &end["cpu_utilization_percent"];
    let percent = cpu["host_total"]
        .as_f64()
        .zip(cpu["remote_total"].as_f64())
        .map(|(host, remote)| host + remote);
    Ok(Outcome {
        gb_per_s: rate / 8e9,
        cpu_s_per_gb: percent
            .filter(|_| gigabytes > 0.0)
            .map(|percent| percent / 100.0 * seconds / gigabytes),
        retransmits: end["sum_sent"]["retransmits"].as_u64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_iperf3_prints_is_read() {
        let said = json!({ "end": {
            "sum_sent": { "retransmits": 3 },
            "sum_received": { "bits_per_second": 40e9, "bytes": 10e9, "seconds": 2.0 },
            "cpu_utilization_percent": { "host_total": 60.0, "remote_total": 90.0 },
        } });
        let expected = Outcome {
            gb_per_s: 5.0,
            cpu_s_per_gb: Some(0.3),
            retransmits: Some(3),
        };
        assert_eq!(parse(&said).unwrap(), expected);
        assert!(parse(&json!({ "error": "unable to connect" })).is_err());
        assert!(parse(&json!({})).is_err());
    }
}
