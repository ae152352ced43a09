//! What an agent says over HTTP, against what really moved.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS};
use openmetrics_parser::prometheus::parse_prometheus;
use serde_json::Value;

fn address(agent: &Agent) -> SocketAddr {
    let status = agent.status();
    let address = status["metrics"]["address"].as_str();
    address.expect("metrics are served").parse().unwrap()
}

/// Status line and body of what a GET brings.
fn get(address: SocketAddr, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(GENEROUS)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

/// The value of the one sample with this name and these labels.
fn sample(page: &str, name: &str, labels: &[&str]) -> f64 {
    let mut found = page.lines().filter(|line| {
        line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label))
    });
    let line = found
        .next()
        .unwrap_or_else(|| panic!("no {name} {labels:?} in\n{page}"));
    assert_eq!(found.next(), None, "one sample");
    let (_, value) = line.rsplit_once(' ').expect("a value");
    value.parse().expect("a number")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

#[test]
fn the_figures_are_those_of_a_real_transfer() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    let tensors: Vec<Tensor> = (0..20)
        .map(|i| Tensor::bytes(&format!("t.{i}"), 1000 * i + 1))
        .collect();
    let (file, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("back.safetensors"),
    );
    model::write(&file, &tensors, &[]);
    let put = a.json(&["put", text(&file), "b:m"]);
    a.json(&["get", "b:m", text(&back)]);
    let bytes = put["bytes"].as_u64().unwrap() as f64;
    assert!(bytes > 0.0);
    let (of_a, of_b) = (
        get(address(&a), "/metrics").1,
        get(address(&b), "/metrics").1,
    );
    for (page, peer) in [(&of_a, "peer=\"b\""), (&of_b, "peer=\"a\"")] {
        for way in ["direction=\"sent\"", "direction=\"received\""] {
            let labels = ["path=\"tcp\"", peer, way];
            assert_eq!(sample(page, "genie_bytes_total", &labels), bytes);
            assert_eq!(sample(page, "genie_tensors_total", &labels), 20.0);
        }
        assert_eq!(sample(page, "genie_sessions", &["path=\"tcp\"", peer]), 1.0);
        let parsed = parse_prometheus(page);
        let parsed = parsed.unwrap_or_else(|error| panic!("{error:?}\n{page}"));
        assert!(parsed.families.len() > 15, "{page}");
    }
    assert!(of_b.contains("\ngenie_store_tensors 20\n"), "{of_b}");
    // What the peer holds here: its tensors and a little for their names.
    let held = sample(&of_b, "genie_peer_memory_used_bytes", &["peer=\"a\""]);
    assert!((bytes..bytes + 8192.0).contains(&held), "{held}");
    let refused = ["peer=\"a\"", "limit=\"rate\""];
    assert_eq!(sample(&of_b, "genie_peer_refused_total", &refused), 0.0);
}

#[test]
fn health_and_status_are_told_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let address = address(&a);
    let (line, body) = get(address, "/health");
    assert!(line.contains(" 200 ") && body == "ok\n", "{line} {body}");
    let status: Value = serde_json::from_str(&get(address, "/status.json").1).unwrap();
    assert_eq!(status["name"], "a");
    assert_eq!(status["users"], serde_json::json!([]));
    assert!(get(address, "/etc/passwd").0.contains(" 404 "));
    // Whatever else comes is answered or dropped, and the agent goes on.
    for hostile in [&b"\x16\x03\x01\x02\x00"[..], b"GET ", &[b'a'; 100_000]] {
        let mut stream = TcpStream::connect(address).unwrap();
        let _ = stream.write_all(hostile);
    }
    assert_eq!(get(address, "/health").1, "ok\n");
}

#[test]
fn an_agent_whose_metrics_port_is_taken_says_so_and_runs() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let taken = format!("--metrics={}", address(&a));
    let b = Agent::start(folder.path(), "b", &[&taken]);
    let metrics = b.status()["metrics"].clone();
    assert!(metrics["address"].is_null());
    let reason = metrics["reason"].as_str().unwrap();
    assert!(reason.contains("choose another with --metrics"), "{reason}");
    let off = Agent::start(folder.path(), "c", &["--metrics=off"]);
    assert!(off.status()["metrics"]["reason"].is_null());
}

/// Words that are names of metrics.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names = words.filter(|word| word.starts_with("genie_"));
    names.map(str::to_owned).collect()
}

#[test]
fn dashboard_and_alerts_ask_for_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let known = names(&get(address(&a), "/metrics").1);
    let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib");
    for file in ["grafana/genie.json", "prometheus/genie-alerts.yml"] {
        let text = std::fs::read_to_string(contrib.join(file)).unwrap();
        let asked = names(&text);
        assert!(asked.len() >= 4, "{file}: {asked:?}");
        let unknown: Vec<_> = asked.difference(&known).collect();
        assert!(unknown.is_empty(), "{file} asks for {unknown:?}");
    }
    let dashboard = std::fs::read_to_string(contrib.join("grafana/genie.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() >= 4);
}

#[test]
fn status_can_be_watched() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let mut watching = a.spawn(&["status", "--watch", "--json"]);
    let until = std::time::Instant::now() + std::time::Duration::from_millis(2500);
    while std::time::Instant::now() < until {
        assert!(watching.is_running());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    // Not SIGINT, which whoever runs the tests in the background has ignored.
    watching.signal(rustix::process::Signal::TERM);
    let output = watching.wait(GENEROUS);
    let shown: Vec<Value> = output
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("one status a line"))
        .collect();
    assert!(shown.len() >= 2, "{output:?}");
    assert_eq!(shown[0]["name"], "a");
}
