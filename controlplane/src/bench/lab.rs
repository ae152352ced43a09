//! `--lab`: the same benchmark between two hosts that are made here.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use super::BenchError;
use super::plan::BenchArgs;
use super::report::Report;
use super::run::print;

/// What builds the two hosts; one copy for people and for this command.
const SCRIPT: &str = include_str!("../../../scripts/netns");

/// What the script gives the hosts unless it is told otherwise.
const HOST_MTU: &str = "1500";

/// DPDK on a host's own interface. Frames must fit the packet buffers of that
/// MTU (1600 bytes) and fill their block: the driver takes the ring for one
/// array, the kernel starts each block anew. 256 frames are 101 pages.
const HOST_DEVICE: &str = "vdev:net_af_packet0,iface=wire0,framesz=1616,blocksz=413696";

/// The two hosts, until dropped.
struct Lab {
    name: String,
    wire: PathBuf,
    peer: Option<Child>,
}

/// Builds the lab, runs the benchmark in it, and takes it down again.
pub fn run(profile: &str, args: &BenchArgs, json: bool) -> Result<(), BenchError> {
    let mut lab = Lab::up(profile)?;
    let address = lab.start_peer(args.dpdk_device.as_deref())?;
    let report = lab.measure(&address);
    let wire = lab.down();
    let mut report = report?;
    let wire = wire?;
    let count = |field: &str| wire[field].as_u64().unwrap_or(0);
    let (missed, refused) = (count("missed"), count("refused"));
    if missed + refused > 0 {
        report.notes.push(format!(
            "the wire emulator never saw {missed} frames and could not hand on {refused}: \
             this measured the emulator too"
        ));
    }
    report.wire = Some(wire);
    report.command = std::env::args().collect::<Vec<_>>().join(" ");
    report.notes.push(format!(
        "lab profile {profile}; kernel TCP's congestion control is in the rows' names"
    ));
    print(&report, json, args.csv.as_deref())?;
    match report.first_failure() {
        None => Ok(()),
        Some(row) => Err(BenchError::Rows {
            failed: report.rows.iter().filter(|row| row.error.is_some()).count(),
            all: report.rows.len(),
            first: format!("{}: {}", row.name, row.error.as_deref().unwrap_or_default()),
        }),
    }
}

impl Lab {
    fn up(profile: &str) -> Result<Self, BenchError> {
        let binary = std::env::current_exe().map_err(BenchError::Channel)?;
        let wire = std::env::var_os("GENIE_WIRE")
            .map_or(binary.with_file_name("genie-wire"), PathBuf::from);
        let name = format!("bench-{}", std::process::id());
        let lab = Self {
            name,
            wire,
            peer: None,
        };
        lab.script(&["up", profile])?;
        Ok(lab)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", SCRIPT, "netns"]).args(arguments);
        command
            .env("GENIE_LAB", &self.name)
            .env("GENIE_WIRE", &self.wire);
        command
    }

    fn script(&self, arguments: &[&str]) -> Result<Output, BenchError> {
        let output = self
            .command(arguments)
            .output()
            .map_err(BenchError::Channel)?;
        if output.status.success() {
            return Ok(output);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(BenchError::Lab(
            said.trim().trim_start_matches("netns: ").to_owned(),
        ))
    }

    fn start_peer(&mut self, device: Option<&str>) -> Result<String, BenchError> {
        let binary = std::env::current_exe().map_err(BenchError::Channel)?;
        let binary = binary.to_string_lossy();
        let mut words = vec!["exec", "b", &binary, "bench", "--serve", "10.77.0.2:0"];
        words.extend(["--dpdk-device", device.unwrap_or(HOST_DEVICE)]);
        let mut command = self.command(&words);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let child = self.peer.insert(child.map_err(BenchError::Channel)?);
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout)
                .read_line(&mut line)
                .map_err(BenchError::Channel)?;
        }
        let address = line
            .trim()
            .rsplit(' ')
            .next()
            .filter(|word| word.contains(':'));
        address.map(str::to_owned).ok_or(BenchError::PeerGone)
    }

    /// Runs this very command on the first host, toward the second.
    fn measure(&self, address: &str) -> Result<Report, BenchError> {
        let binary = std::env::current_exe().map_err(BenchError::Channel)?;
        let mut words: Vec<String> = ["exec", "a"].map(str::to_owned).to_vec();
        words.push(binary.to_string_lossy().into_owned());
        words.extend(without_lab(std::env::args().skip(1)));
        words.extend(["--json", "--peer", address].map(str::to_owned));
        if !words.iter().any(|word| word.starts_with("--dpdk-device")) {
            words.extend(["--dpdk-device", HOST_DEVICE].map(str::to_owned));
        }
        if !words.iter().any(|word| word.starts_with("--mtu")) {
            words.extend(["--mtu", HOST_MTU].map(str::to_owned));
        }
        if !words.iter().any(|word| word.starts_with("--congestion")) {
            words.extend(["--congestion", "cubic,bbr"].map(str::to_owned));
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = self.command(&words).stderr(Stdio::inherit()).output();
        let output = output.map_err(BenchError::Channel)?;
        // With rows that failed it prints them and then fails itself.
        serde_json::from_slice(&output.stdout)
            .map_err(|_| BenchError::Lab("the measuring host printed no report".into()))
    }

    fn down(&mut self) -> Result<serde_json::Value, BenchError> {
        self.end_peer();
        let output = self.script(&["down"])?;
        serde_json::from_slice(&output.stdout)
            .map_err(|_| BenchError::Lab("the wire printed no report".into()))
    }

    fn end_peer(&mut self) {
        if let Some(mut peer) = self.peer.take() {
            // The script has become the peer, so this is its process.
            let _ = peer.kill();
            let _ = peer.wait();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.end_peer();
        // Fails, as it may, if it is down already.
        if let Err(error) = self.script(&["down"])
            && !error.to_string().contains("no lab")
        {
            let _ = writeln!(std::io::stderr(), "genie bench: {error}");
        }
    }
}

/// The arguments but for those that say where and how to print.
fn without_lab(arguments: impl Iterator<Item = String>) -> Vec<String> {
    let mut kept = Vec::new();
    let mut skip = false;
    for word in arguments {
        let is_flag = |flag: &str| word == flag;
        let takes_value = ["--lab", "--csv"];
        if std::mem::take(&mut skip) || is_flag("--json") {
            continue;
        }
        if takes_value.iter().any(|flag| is_flag(flag)) {
            skip = true;
        } else if !takes_value
            .iter()
            .any(|flag| word.starts_with(&format!("{flag}=")))
        {
            kept.push(word);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measuring_host_is_asked_the_same_but_for_the_lab() {
        let words = "--json bench --lab bad --quick --csv=x.csv --transport tcp --csv y.csv";
        let kept = without_lab(words.split(' ').map(str::to_owned));
        assert_eq!(kept, ["bench", "--quick", "--transport", "tcp"]);
    }
}
