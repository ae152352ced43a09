//! `genie doctor`: looks, and shows what was found.

use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::Args;

use super::show::printable;
use super::{CommandError, print};
use crate::config::{CONTROL_PORT, DATA_PORT, default_socket};
use crate::doctor::{Real, Report, Wanted, examine};
use crate::metrics;

/// What to look at; the flags are those that an agent would be started with.
#[derive(Args, Debug)]
pub(super) struct DoctorArgs {
    /// A peer to look at, too: its name, or HOST:PORT
    node: Option<String>,
    /// The agent's socket
    #[arg(long, value_name = "PATH", env = "GENIE_SOCKET")]
    socket: Option<PathBuf>,
    /// Where peers reach the agent
    #[arg(long, value_name = "ADDR", env = "GENIE_LISTEN", default_value_t = local(CONTROL_PORT))]
    listen: SocketAddr,
    /// Where peers' TCP data connections arrive
    #[arg(long, value_name = "ADDR", env = "GENIE_DATA", default_value_t = local(DATA_PORT))]
    data: SocketAddr,
    /// Where metrics are served
    #[arg(long, value_name = "ADDR", env = "GENIE_METRICS")]
    metrics: Option<metrics::Wanted>,
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Fails only if nothing at all can work.
pub(super) fn run(args: DoctorArgs, json: bool) -> Result<(), CommandError> {
    let mut addresses = vec![("--listen", args.listen), ("--data", args.data)];
    let metrics::Wanted(metrics) = args.metrics.unwrap_or_default();
    addresses.extend(metrics.map(|address| ("--metrics", address)));
    let wanted = Wanted {
        socket: args.socket.or_else(default_socket),
        addresses,
        node: args.node,
    };
    let report = examine(&Real, &wanted);
    print(json, &report, || text(&report))?;
    if report.usable {
        Ok(())
    } else {
        Err(CommandError::Unusable)
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let (what, why) = (printable(&finding.what), printable(&finding.why));
        writeln!(text, "{:<6} {what}: {why}", finding.state.word())
            .expect("writing to a string cannot fail");
        if let Some(mend) = &finding.mend {
            writeln!(text, "       mend: {}", printable(mend))
                .expect("writing to a string cannot fail");
        }
    }
    text
}
