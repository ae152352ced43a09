//! `genie doctor NODE`: can we reach it, over what, and why over nothing better.

use super::system::{AgentReply, PeerReply, System};
use super::{Finding, Wanted};

/// Looks at a peer, through this host's agent where there is one.
pub(super) fn peer(system: &dyn System, wanted: &Wanted, node: &str) -> Vec<Finding> {
    // An address instead of a name: nobody has to know it.
    if node.contains(':') {
        return vec![knock(system, node, node)];
    }
    let what = format!("peer {node}");
    let status = wanted.socket.as_ref().map(|socket| system.agent(socket));
    let (Some(socket), Some(AgentReply::Status(status))) = (&wanted.socket, status) else {
        let why = "no agent runs here that could open a session; an address (HOST:PORT) needs none";
        let mend = format!("genie agent --peer {node}=HOST:5555");
        return vec![Finding::broken(what, why, mend)];
    };
    let Some(known) = status.peers.iter().find(|peer| peer.name == node) else {
        let why = "the agent does not know it";
        let mend = format!("genie agent --peer {node}=HOST:5555");
        return vec![Finding::broken(what, why, mend)];
    };
    match system.session(socket, node) {
        Err(why) => match knock(system, node, &known.address) {
            // It answers, so what the agent says is the reason.
            Finding { mend: None, .. } => {
                let mend = format!("genie doctor {}", known.address);
                vec![Finding::broken(what, why, mend)]
            }
            finding => vec![finding],
        },
        Ok(session) => {
            let mut findings = vec![Finding::ok(
                what,
                format!(
                    "over {}, round trip {} µs when the path was opened",
                    session.path, session.opened_in_us
                ),
            )];
            let better = session.reasons.iter();
            findings.extend(better.map(|reason| Finding {
                mend: mend_better(&status.name, node, &known.address, reason),
                ..Finding::warn(format!("peer {node}: better path"), reason, "")
            }));
            findings
        }
    }
}

/// What leads on from a refusal, which names the end that has no better path:
/// that end is to allow it, or its own doctor knows what it lacks.
fn mend_better(ours: &str, node: &str, address: &str, reason: &str) -> Option<String> {
    let there = reason.contains(&format!("node '{node}'"));
    if !there && !reason.contains(&format!("node '{ours}'")) {
        return None;
    }
    let (transport, why) = reason.split_once(": ")?;
    let command = if why.contains("does not allow it") {
        let name = if there { node } else { ours };
        format!("genie agent --name {name} --transport {transport},tcp")
    } else {
        "genie doctor".to_owned()
    };
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    Some(if there {
        format!("ssh {host} {command}")
    } else {
        command
    })
}

/// Asks whoever listens there.
fn knock(system: &dyn System, node: &str, address: &str) -> Finding {
    let what = format!("peer {node}");
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "5555"));
    match system.knock(address) {
        PeerReply::Genie(took) => Finding::ok(
            what,
            format!(
                "an agent of a version that we understand, connected in {} µs",
                took.as_micros()
            ),
        ),
        PeerReply::Unreachable(why) => Finding::broken(
            what,
            format!("{address}: {why}"),
            format!("ssh {host} genie agent --listen {address}"),
        ),
        PeerReply::Foreign(why) => Finding::broken(
            what,
            format!("{address}: {why}"),
            format!("ssh {host} ss -ltnp sport = :{port}"),
        ),
        PeerReply::Version { why, ours_is_older } => {
            let mend = if ours_is_older {
                format!("scp {host}:'$(command -v genie)' /usr/local/bin/genie")
            } else {
                format!("scp $(command -v genie) {host}:/usr/local/bin/genie")
            };
            Finding::broken(what, why, mend)
        }
    }
}
