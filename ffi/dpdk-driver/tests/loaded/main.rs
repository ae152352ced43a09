//! The library as Genie meets it: loaded at run time, through `dpdk::Port`.
//!
//! Two processes over `pair:SOCKET`, which is this program run again. Cargo puts
//! the library beside the tests of its own package, where it is looked for.

#[cfg(dpdk)]
mod peer;
#[cfg(dpdk)]
mod tests;

fn main() {
    #[cfg(dpdk)]
    match std::env::var("GENIE_TEST_SOCKET") {
        Ok(socket) => peer::run(socket.as_ref()),
        Err(_) => tests::run(),
    }
    #[cfg(not(dpdk))]
    skip(genie_dpdk::MISSING);
}

/// Says that the tests do not run, or fails where they must.
#[allow(dead_code, reason = "which caller exists depends on DPDK")]
fn skip(reason: &str) {
    println!("skipped: {reason}");
    if std::env::var("GENIE_REQUIRE_DPDK").is_ok_and(|value| value == "1") {
        eprintln!("GENIE_REQUIRE_DPDK=1: a skip is a failure");
        std::process::exit(1);
    }
}
