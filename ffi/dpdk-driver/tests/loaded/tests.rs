//! The tests, and the processes they talk to.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use genie_dataplane::dpdk::pair::{Claim, End};

/// Memory of three peers in 2 MiB pages.
const HUGE_PAGES: usize = 220;

type Test = (&'static str, fn(&Path));

const TESTS: [Test; 3] = [
    (
        "two_processes_share_a_pair_and_a_third_is_refused",
        share_a_pair,
    ),
    ("either_process_comes_back_as_what_it_was", comes_back),
    (
        "a_first_process_that_does_not_answer_is_an_error",
        nobody_answers,
    ),
];

pub(crate) fn run() {
    let file = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = std::fs::read_to_string(file).unwrap_or_default();
    let free: usize = free.trim().parse().unwrap_or(0);
    if free < HUGE_PAGES {
        return super::skip(&format!(
            "{free} free huge pages of 2 MiB, {HUGE_PAGES} needed: \
             echo {HUGE_PAGES} > /proc/sys/vm/nr_hugepages"
        ));
    }
    let mut failed = 0;
    for (name, test) in TESTS {
        let folder = tempfile::tempdir().expect("a folder for the socket");
        let ok = std::panic::catch_unwind(|| test(&folder.path().join("pair"))).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        failed += i32::from(!ok);
    }
    if failed > 0 {
        std::process::exit(1);
    }
}

struct Peer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts a process; returns it and what it says of opening the pair.
    fn start(socket: &Path) -> (Self, String) {
        let mut child = Command::new(std::env::current_exe().expect("our own path"))
            .env("GENIE_TEST_SOCKET", socket)
            // The library of this build, whatever the caller's environment says.
            .env_remove("GENIE_DPDK_LIB")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("our own program runs");
        let stdin = child.stdin.take().expect("it is piped");
        let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut peer = Self {
            child,
            stdin,
            stdout,
        };
        let opened = peer.answer();
        (peer, opened)
    }

    fn start_as(socket: &Path, driver: &str) -> Self {
        let (peer, opened) = Self::start(socket);
        assert_eq!(opened, format!("open {driver} mtu 9000"));
        peer
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("the peer reads its stdin");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        let bytes = self
            .stdout
            .read_line(&mut line)
            .expect("the peer's stdout is a pipe");
        assert!(bytes > 0, "the peer ended: {:?}", self.child.wait());
        line.trim_end().to_owned()
    }

    fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer()
    }

    fn kill(mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }

    fn close(self) {
        let Self {
            mut child,
            stdin,
            mut stdout,
        } = self;
        drop(stdin);
        let mut line = String::new();
        stdout
            .read_line(&mut line)
            .expect("the peer's stdout is a pipe");
        assert_eq!(line, "closed\n");
        assert!(child.wait().expect("it is our child").success());
    }
}

fn exchange(from: &mut Peer, to: &mut Peer) {
    assert_eq!(from.ask("link"), "link true");
    assert_eq!(to.ask("link"), "link true");
    to.tell("receive 5000");
    assert_eq!(from.ask("send 5000"), "sent 5000 counted 5000 in flight 0");
    assert_eq!(to.answer(), "received 5000 counted 5000 bad 0");
}

fn share_a_pair(socket: &Path) {
    let mut first = Peer::start_as(socket, "net_vhost");
    let mut second = Peer::start_as(socket, "net_virtio_user");
    let (_third, refused) = Peer::start(socket);
    assert!(
        refused.contains("joins two other processes already"),
        "{refused}"
    );
    exchange(&mut first, &mut second);
    exchange(&mut second, &mut first);
    for peer in [&mut first, &mut second] {
        assert_eq!(
            peer.ask("detach"),
            "detached true then taken 1 sent 0 errors 1"
        );
    }
    first.close();
    second.close();
}

fn comes_back(socket: &Path) {
    let mut first = Peer::start_as(socket, "net_vhost");
    let mut second = Peer::start_as(socket, "net_virtio_user");
    exchange(&mut first, &mut second);
    first.kill();
    let mut first = Peer::start_as(socket, "net_vhost");
    exchange(&mut first, &mut second);
    exchange(&mut second, &mut first);
    second.kill();
    let mut second = Peer::start_as(socket, "net_virtio_user");
    exchange(&mut first, &mut second);
    exchange(&mut second, &mut first);
    // An orderly end and a new start do as well.
    second.close();
    let mut second = Peer::start_as(socket, "net_virtio_user");
    exchange(&mut first, &mut second);
    first.close();
    let mut first = Peer::start_as(socket, "net_vhost");
    exchange(&mut second, &mut first);
    first.close();
    second.close();
}

fn nobody_answers(socket: &Path) {
    // Holds the first end and never opens it.
    let claim = Claim::take(socket, 1).expect("the first end is free");
    assert_eq!(claim.end(), End::Vhost);
    let (_second, refused) = Peer::start(socket);
    assert!(
        refused.starts_with("refused: nobody answers on "),
        "{refused}"
    );
}
