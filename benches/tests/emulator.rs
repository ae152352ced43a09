//! The wire emulator against ping and iperf3, between two network namespaces.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

use genie_benches::emulator::wire::Report;
use serde_json::Value;

/// A lab that is taken down when the test ends, also by a panic.
struct Lab {
    name: String,
    _alone: MutexGuard<'static, ()>,
}

/// What is measured must not be disturbed by the next measurement.
static ALONE: Mutex<()> = Mutex::new(());

impl Lab {
    /// `None`, with the reason printed, where there can be none.
    fn up(test: &str, profile: &str) -> Option<Self> {
        let missing = ["ip", "ethtool", "ping", "iperf3"]
            .into_iter()
            .find(|tool| {
                let there = Command::new("which").arg(tool).output();
                !there.is_ok_and(|output| output.status.success())
            });
        let reason = match (rustix::process::geteuid().is_root(), missing) {
            (false, _) => Some("the lab needs root".to_owned()),
            (true, Some(tool)) => Some(format!("{tool} is not installed")),
            (true, None) => None,
        };
        if let Some(reason) = reason {
            assert!(
                std::env::var_os("GENIE_REQUIRE_LAB").is_none(),
                "the lab is required: {reason}"
            );
            println!("skipped: {test}: {reason}");
            return None;
        }
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("t{}-{test}", std::process::id() % 100_000);
        let lab = Self { name, _alone };
        let output = lab.script(&["up", profile]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Some(lab)
    }

    fn script(&self, arguments: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/netns");
        Command::new(script)
            .args(arguments)
            .env("GENIE_LAB", &self.name)
            .env("GENIE_WIRE", env!("CARGO_BIN_EXE_genie-wire"))
            .output()
            .expect("bash is there")
    }

    fn on(&self, host: &str, command: &str) -> String {
        let words = command.split(' ');
        let output = self.script(&["exec", host].into_iter().chain(words).collect::<Vec<_>>());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {text}{error}");
        text
    }

    /// Runs iperf3 from host a to host b and returns its sums, which have
    /// `field`. Its own control connection crosses the wire too, and may lose
    /// them there; then once more.
    fn iperf3(&self, arguments: &str, sums: &str, field: &str) -> Value {
        let mut said = Value::Null;
        for _ in 0..8 {
            self.on("b", "iperf3 --server --one-off --daemon");
            // A daemon listens a moment after its parent has ended.
            std::thread::sleep(std::time::Duration::from_millis(300));
            let command = format!("exec a iperf3 --client 10.77.0.2 --json {arguments}");
            let output = self.script(&command.split(' ').collect::<Vec<_>>());
            said = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let sums = &said["end"][sums];
            if sums[field].is_number() {
                return sums.clone();
            }
            println!("iperf3 again: {}", said["error"]);
        }
        panic!("iperf3 never got its results through: {said}");
    }

    fn report(self) -> Report {
        let output = self.script(&["down"]);
        serde_json::from_slice(&output.stdout).expect("the wire prints JSON")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Fails, as it may, after a report.
        self.script(&["down"]);
    }
}

fn assert_close(what: &str, measured: f64, asked: f64) {
    let off = (measured - asked).abs() / asked;
    assert!(off < 0.05, "{what}: measured {measured}, asked for {asked}");
}

#[test]
fn the_rate_is_what_iperf3_measures() {
    let Some(lab) = Lab::up("rate", "rate=80mbit,buffer=256k,delay=1ms") else {
        return;
    };
    let sums = lab.iperf3(
        "--congestion cubic --time 3 --omit 1",
        "sum_received",
        "bits_per_second",
    );
    let goodput = sums["bits_per_second"].as_f64().unwrap();
    // 1448 bytes of each frame of 1514 are the application's.
    assert_close("rate in bit/s", goodput * 1514.0 / 1448.0, 80e6);
    let report = lab.report();
    assert_eq!((report.missed, report.refused), (0, 0));
    let there = &report.directions[0];
    assert!(
        there.queue_max_bytes > 100_000,
        "cubic fills the buffer: {there:?}"
    );
}

#[test]
fn the_delay_is_what_ping_measures() {
    let Some(lab) = Lab::up("delay", "delay=10ms") else {
        return;
    };
    let text = lab.on("a", "ping -i 0.01 -c 100 10.77.0.2");
    let times = text
        .split("time=")
        .skip(1)
        .map(|rest| rest.split(' ').next().unwrap());
    let mut times: Vec<f64> = times.map(|time| time.parse().unwrap()).collect();
    assert_eq!(times.len(), 100, "nothing is lost");
    times.sort_by(f64::total_cmp);
    assert_close("round trip in ms", times[50], 20.0);
}

#[test]
fn the_loss_is_what_iperf3_and_ping_count() {
    let Some(lab) = Lab::up("loss", "loss=0.2,seed=11") else {
        return;
    };
    // Slow enough that the receiver's own buffer of 200 KB loses nothing.
    let sum = lab.iperf3(
        "--udp --length 200 --bitrate 12m --time 3",
        "sum",
        "lost_packets",
    );
    let (lost, all) = (
        sum["lost_packets"].as_f64().unwrap(),
        sum["packets"].as_f64().unwrap(),
    );
    assert!(
        all > 20_000.0,
        "enough packets for a margin of three deviations: {all}"
    );
    assert_close("loss of datagrams", lost / all, 0.2);
    let text = lab.on("a", "ping -q -i 0.001 -c 500 -W 0.2 10.77.0.2");
    let received: f64 = text
        .split(" received")
        .next()
        .unwrap()
        .rsplit(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    // Lost on the way there or back: 1 - 0.8². Too few for 5 %, enough for 25.
    assert!(
        (0.25 * 0.36) > ((500.0 - received) / 500.0 - 0.36).abs(),
        "{received} of 500"
    );
    let report = lab.report();
    assert_eq!((report.missed, report.refused), (0, 0));
}

#[test]
fn a_narrowed_wire_swallows_large_packets_only() {
    let Some(lab) = Lab::up("mtu", "mtu=1300") else {
        return;
    };
    lab.on("a", "ping -q -c 3 -i 0.01 -M do -s 1272 10.77.0.2");
    let large = lab.script(&[
        "exec",
        "a",
        "ping",
        "-q",
        "-c",
        "3",
        "-i",
        "0.01",
        "-W",
        "0.2",
        "-M",
        "do",
        "-s",
        "1273",
        "10.77.0.2",
    ]);
    assert!(!large.status.success());
    assert_eq!(lab.report().directions[0].lost_mtu, 3);
}
