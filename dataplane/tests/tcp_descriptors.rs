//! That a TCP engine gives every descriptor back. In a process of its own,
//! since all descriptors of the process are counted.

use std::time::{Duration, Instant};

#[path = "tcp/harness.rs"]
#[allow(dead_code, reason = "the other tests use the rest of it")]
mod harness;

use harness::{Link, PATIENCE, filled, open_both};

#[test]
fn descriptors_come_back_after_a_hundred_sessions() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let link = Link::new(2);
    link.move_and_check(&filled(1000, 1));
    let before = count();
    let mut b = link.b;
    for _ in 0..100 {
        let ids = open_both(&link.a, &b, 2);
        link.a.endpoint.close(ids.0);
        assert_eq!(b.await_lost().0.session, ids.1);
    }
    let deadline = Instant::now() + PATIENCE;
    while count() > before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(
        count() <= before,
        "{} descriptors, {before} before",
        count()
    );
    link.a.stop();
    b.stop();
}
