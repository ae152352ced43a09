//! That a TCP engine gives every descriptor back, and that opening and closing
//! does not run out of ports. In a process of its own, since all descriptors and
//! threads of the process are counted.

use std::time::{Duration, Instant};

#[path = "tcp/harness.rs"]
#[allow(dead_code, reason = "the other tests use the rest of it")]
mod harness;

use harness::{Link, PATIENCE, filled, open_both};

#[test]
fn descriptors_come_back_after_ten_thousand_sessions() {
    const SESSIONS: usize = 10_000;
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let link = Link::new(2);
    link.move_and_check(&filled(1000, 1));
    let (before, threads_before) = (count(), threads());
    let mut b = link.b;
    for session in 0..SESSIONS {
        let ids = open_both(&link.a, &b, 1 + session as u16 % 2);
        link.a.endpoint.close(ids.0);
        assert_eq!(b.await_lost().0.session, ids.1);
    }
    let deadline = Instant::now() + PATIENCE;
    while (count() > before || threads() > threads_before) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(
        count() <= before,
        "{} descriptors, {before} before",
        count()
    );
    assert!(threads() <= threads_before, "{} threads", threads());
    link.a.stop();
    b.stop();
}
