//! `genie-wire FIRST SECOND PROFILE`: joins two interfaces by a wire that is
//! as bad as the profile says. Runs until SIGTERM or SIGINT, then prints what
//! it did as one line of JSON.

#![forbid(unsafe_code)]

use std::io::Write;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use clap::Parser;
use genie_benches::emulator::Profile;
use genie_benches::emulator::profile::NAMED;
use genie_benches::emulator::wire::Wire;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

/// Joins two interfaces by a wire that is as bad as its profile says.
#[derive(Parser)]
struct Arguments {
    /// One interface
    #[arg(required_unless_present = "list")]
    first: Option<String>,
    /// The other interface
    #[arg(required_unless_present = "list")]
    second: Option<String>,
    /// A profile's name, pairs such as rate=100mbit,delay=5ms, or both
    #[arg(default_value = "clean")]
    profile: Profile,
    /// List the named profiles
    #[arg(long)]
    list: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (Some(first), Some(second), false) = (arguments.first, arguments.second, arguments.list)
    else {
        for (name, pairs, what) in NAMED {
            println!("{name:9} {what}\n          {pairs}");
        }
        return Ok(());
    };
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let stop = SignalFd::new(&signals)?;
    // The default slack of 50 µs would be an error of 50 µs in every delay.
    nix::sys::prctl::set_timerslack(1)?;
    let mut wire = Wire::open(&first, &second, &arguments.profile)
        .with_context(|| format!("cannot join {first} and {second}"))?;
    println!("ready");
    std::io::stdout().flush()?;
    wire.run(stop.as_fd())?;
    println!(
        "{}",
        serde_json::to_string(&wire.report(arguments.profile)?)?
    );
    Ok(())
}
