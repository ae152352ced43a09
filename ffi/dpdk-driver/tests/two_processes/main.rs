//! Two processes with an EAL each exchange frames over virtual devices.
//!
//! Runs itself again as the peers, since a process has one EAL for life. Says
//! why where it skips; `GENIE_REQUIRE_DPDK=1` makes that a failure. Arguments
//! select tests by name, as with the standard harness.

#[cfg(dpdk)]
mod allocations;
#[cfg(dpdk)]
mod peer;
#[cfg(dpdk)]
mod tests;

fn main() {
    #[cfg(dpdk)]
    match std::env::var("GENIE_TEST_PEER") {
        Ok(devargs) => peer::run(&devargs, std::env::var_os("GENIE_TEST_NO_HUGE").is_some()),
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
