//! The tests, and the processes they talk to.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Memory of both peers in 2 MiB pages, with room for a third that restarts.
const HUGE_PAGES: usize = 300;

type Test = (&'static str, fn(&Path));

const TESTS: [Test; 11] = [
    (
        "frames_of_all_kinds_arrive_intact_both_ways",
        frames_of_all_kinds,
    ),
    (
        "no_packet_buffer_is_lost_in_100k_frames",
        no_packet_buffer_is_lost,
    ),
    ("a_frame_wakes_a_thread_that_sleeps", frame_wakes),
    ("strays_are_taken_dropped_and_counted", strays),
    ("attached_memory_is_free_again_after_reap", attached_memory),
    ("a_killed_vhost_comes_back", killed_vhost),
    ("a_killed_virtio_user_comes_back", killed_virtio_user),
    (
        "peers_killed_in_the_middle_of_traffic_come_back",
        killed_under_load,
    ),
    ("nobody_behind_the_socket_is_an_error", nobody_answers),
    ("memif_carries_frames", memif),
    ("ordinary_pages_work_too", ordinary_pages),
];

/// Runs the tests that the arguments select.
pub(crate) fn run() {
    let free = free_huge_pages();
    if free < HUGE_PAGES {
        return super::skip(&format!(
            "{free} free huge pages of 2 MiB, {HUGE_PAGES} needed: \
             echo {HUGE_PAGES} > /proc/sys/vm/nr_hugepages"
        ));
    }
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let selected = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f));
    let mut failed = 0;
    for (name, test) in TESTS.into_iter().filter(|(name, _)| selected(name)) {
        let folder = tempfile::tempdir().expect("a folder for the socket");
        let start = std::time::Instant::now();
        match std::panic::catch_unwind(|| test(folder.path())) {
            Ok(()) => println!(
                "test {name} ... ok ({:.1} s)",
                start.elapsed().as_secs_f64()
            ),
            Err(_) => {
                println!("test {name} ... FAILED");
                failed += 1;
            }
        }
    }
    if failed > 0 {
        println!("{failed} failed");
        std::process::exit(1);
    }
}

fn free_huge_pages() -> usize {
    let file = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    std::fs::read_to_string(file)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

struct Peer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Peer {
    fn start(devargs: &str) -> Self {
        Self::start_on(devargs, false)
    }

    fn spawn(devargs: &str, no_huge: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("our own path"));
        command.env("GENIE_TEST_PEER", devargs);
        if no_huge {
            command.env("GENIE_TEST_NO_HUGE", "1");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("our own program runs");
        let stdin = child.stdin.take().expect("it is piped");
        let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        Self {
            child,
            stdin,
            stdout,
        }
    }

    fn start_on(devargs: &str, no_huge: bool) -> Self {
        let mut peer = Self::spawn(devargs, no_huge);
        let opened = peer.answer();
        assert!(opened.starts_with("open "), "{devargs}: {opened}");
        println!("    {opened}");
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

    fn wait_for_link(&mut self) {
        let link = self.ask("link 1");
        assert!(link.starts_with("link true"), "{link}");
    }

    /// The number that follows `name` in the answer to `stats`.
    fn stat(&mut self, name: &str) -> u64 {
        let stats = self.ask("stats");
        let (_, rest) = stats.split_once(name).expect("a name in the line");
        rest.split_whitespace()
            .next()
            .expect("a number")
            .parse()
            .expect("a number")
    }

    fn kill(mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }

    fn close(mut self) {
        assert_eq!(self.ask("close"), "closed missing 0");
        drop(self.stdin);
        assert!(self.child.wait().expect("it is our child").success());
    }
}

fn virtio_user(folder: &Path) -> String {
    let socket = folder.join("pair");
    format!(
        "net_virtio_user0,path={},server=1,queues=1,queue_size=1024",
        socket.display()
    )
}

fn vhost(folder: &Path) -> String {
    format!(
        "net_vhost0,iface={},client=1,queues=1",
        folder.join("pair").display()
    )
}

fn pair(folder: &Path) -> (Peer, Peer) {
    // virtio_user as server waits in `port_open` until vhost connects, which
    // as client waits for nobody.
    let mut vhost = Peer::start(&vhost(folder));
    let mut virtio_user = Peer::start(&virtio_user(folder));
    virtio_user.wait_for_link();
    vhost.wait_for_link();
    (virtio_user, vhost)
}

/// Sends `count` frames and checks each byte and both ports' own counters.
fn exchange(from: &mut Peer, to: &mut Peer, count: u64, head: u64, payload: u64) {
    let bytes = count * (head + payload);
    let before = (from.stat("tx"), to.stat("rx"));
    to.tell(&format!("receive {count}"));
    let sent = from.ask(&format!("send {count} {head} {payload}"));
    assert_eq!(sent, format!("sent {count} pending 0"));
    assert_eq!(to.answer(), format!("received {count} bad 0 bytes {bytes}"));
    assert_eq!(
        from.stat("tx") - before.0,
        count,
        "the sender's port counts {head}+{payload}"
    );
    assert_eq!(
        to.stat("rx") - before.1,
        count,
        "the receiver's port counts {head}+{payload}"
    );
}

fn frames_of_all_kinds(folder: &Path) {
    let (mut a, mut b) = pair(folder);
    for (head, payload) in [
        (60, 0),
        (64, 1),
        (94, 8192),
        (94, 8920),
        (9014, 0),
        (1500, 7514),
    ] {
        exchange(&mut a, &mut b, 3000, head, payload);
        exchange(&mut b, &mut a, 3000, head, payload);
    }
    // The one side cannot refer to memory outside DPDK's and says what it copied.
    assert_eq!(a.stat("copied"), 3000 * (1 + 8192 + 8920 + 7514));
    assert_eq!(b.stat("copied"), 0);
    a.close();
    b.close();
}

/// Interrupts are reported while they are on, each time, and otherwise not.
fn frame_wakes(folder: &Path) {
    let (mut a, mut b) = pair(folder);
    let wake = |from: &mut Peer, to: &mut Peer| {
        for _ in 0..3 {
            assert_eq!(to.ask("doze 10000"), "dozing 0");
            from.ask("send 1 64 0");
            assert_eq!(to.answer(), "woken 1");
            assert!(to.ask("receive 1").starts_with("received 1 bad 0"));
        }
        assert_eq!(to.ask("doze 200"), "dozing 0");
        assert_eq!(to.answer(), "woken 0");
        // Off: nothing is reported, and nothing later is taken for it.
        from.ask("send 1 64 0");
        assert!(to.ask("receive 1").starts_with("received 1 bad 0"));
    };
    wake(&mut a, &mut b);
    wake(&mut b, &mut a);
    a.close();
    b.close();
}

fn no_packet_buffer_is_lost(folder: &Path) {
    let (mut a, mut b) = pair(folder);
    exchange(&mut a, &mut b, 100_000, 94, 100);
    exchange(&mut b, &mut a, 100_000, 94, 100);
    // virtio_user holds what is in its two rings; vhost has no ring of its own.
    assert!(
        a.stat("used") <= 2 * 1024,
        "{} in two rings of 1024",
        a.stat("used")
    );
    assert_eq!(b.stat("used"), 0);
    // Nor was memory taken or given back by any burst.
    assert_eq!((a.stat("allocations"), b.stat("allocations")), (0, 0));
    // All are back after that, which `close` asserts.
    a.close();
    b.close();
}

fn strays(folder: &Path) {
    let (mut a, mut b) = pair(folder);
    for peer in [&mut a, &mut b] {
        let used = peer.stat("used");
        assert_eq!(peer.ask("stray"), "strays 7 errors 7");
        assert_eq!(peer.stat("used"), used);
        assert_eq!(peer.stat("tx"), 0);
    }
    exchange(&mut a, &mut b, 100, 64, 0);
    a.close();
    b.close();
}

fn attached_memory(folder: &Path) {
    let (mut a, mut b) = pair(folder);
    exchange(&mut b, &mut a, 5000, 94, 8192);
    assert_eq!(b.stat("refs"), 1);
    // Once it is given back it is unknown (EINVAL).
    assert_eq!(b.ask("detach"), "detached 0 then -22");
    a.close();
    b.close();
}

fn killed_vhost(folder: &Path) {
    let (mut a, mut b) = pair(folder);
    exchange(&mut a, &mut b, 500, 94, 8192);
    b.kill();
    a.ask("poll 300");
    let mut b = Peer::start(&vhost(folder));
    // Nobody asks the survivor for its link: it takes the peer back by itself.
    b.wait_for_link();
    // What was in the rings when the peer died may still come.
    b.ask("poll 200");
    a.ask("poll 200");
    exchange(&mut a, &mut b, 3000, 94, 8192);
    exchange(&mut b, &mut a, 3000, 94, 8192);
    let up = a.ask("link 1");
    assert!(up.starts_with("link true"), "{up}");
    b.kill();
    let down = a.ask("link 0");
    assert!(down.starts_with("link false"), "{down}");
    a.close();
}

fn killed_virtio_user(folder: &Path) {
    let (mut a, mut b) = pair(folder);
    exchange(&mut b, &mut a, 500, 94, 8192);
    a.kill();
    let down = b.ask("link 0");
    println!("    the survivor: {down}");
    assert!(down.starts_with("link false"), "{down}");
    assert_eq!(b.stat("refs"), 1);
    std::fs::remove_file(folder.join("pair")).expect("a killed server leaves its socket");
    let mut a = Peer::start(&virtio_user(folder));
    a.wait_for_link();
    b.wait_for_link();
    b.ask("poll 200");
    a.ask("poll 200");
    exchange(&mut a, &mut b, 3000, 94, 8192);
    exchange(&mut b, &mut a, 3000, 94, 8192);
    a.close();
    b.close();
}

fn killed_under_load(folder: &Path) {
    let (mut a, mut b) = pair(folder);
    for _ in 0..2 {
        a.tell("send 100000 94 2000");
        b.tell("receive 100000");
        std::thread::sleep(std::time::Duration::from_millis(50));
        b.kill();
        b = Peer::start(&vhost(folder));
        b.tell("drain");
        assert_eq!(a.answer(), "sent 100000 pending 0");
        assert_intact(&b.answer());
    }
    for _ in 0..2 {
        b.tell("send 100000 94 2000");
        a.tell("receive 100000");
        std::thread::sleep(std::time::Duration::from_millis(50));
        a.kill();
        std::fs::remove_file(folder.join("pair")).expect("a killed server leaves its socket");
        a = Peer::start(&virtio_user(folder));
        a.tell("drain");
        assert_eq!(b.answer(), "sent 100000 pending 0");
        assert_intact(&a.answer());
        assert_eq!(b.stat("refs"), 1);
    }
    exchange(&mut a, &mut b, 3000, 94, 8192);
    exchange(&mut b, &mut a, 3000, 94, 8192);
    a.close();
    b.close();
}

/// Some frames came, and none with a wrong byte.
fn assert_intact(drained: &str) {
    assert!(
        drained.contains(" bad 0 ") && !drained.starts_with("received 0 "),
        "{drained}"
    );
}

/// virtio_user as server waits without a limit. Who connects and hangs up ends that.
fn nobody_answers(folder: &Path) {
    let mut waiting = Peer::spawn(&virtio_user(folder), false);
    let socket = folder.join("pair");
    while UnixStream::connect(&socket).is_err() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let answer = waiting.answer();
    assert!(
        answer.starts_with("failed open: DPDK cannot attach net_virtio_user0"),
        "{answer}"
    );
}

fn memif(folder: &Path) {
    let socket = folder.join("memif");
    let device = |role: &str| {
        format!(
            "net_memif0,role={role},socket={},socket-abstract=no,bsize=9216",
            socket.display()
        )
    };
    let mut a = Peer::start(&device("server"));
    let mut b = Peer::start(&device("client"));
    a.wait_for_link();
    b.wait_for_link();
    exchange(&mut a, &mut b, 3000, 94, 8192);
    exchange(&mut b, &mut a, 3000, 94, 8192);
    assert_eq!((a.stat("copied"), b.stat("copied")), (0, 0));
    assert_eq!((a.stat("refs"), b.stat("refs")), (1, 1));
    // Not closed: a graceful close crashes the other side now and then.
    a.kill();
    b.kill();
}

fn ordinary_pages(folder: &Path) {
    let mut b = Peer::start_on(&vhost(folder), true);
    let mut a = Peer::start_on(&virtio_user(folder), true);
    a.wait_for_link();
    b.wait_for_link();
    exchange(&mut a, &mut b, 1000, 94, 8192);
    exchange(&mut b, &mut a, 1000, 94, 8192);
    a.close();
    b.close();
}
