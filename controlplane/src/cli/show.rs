//! Text for people.

use std::fmt::Write;

use genie_client::{Listed, Owner};
use genie_dataplane::device::tap::TapSnapshot;
use genie_dataplane::ledger::Copies;
use serde::Serialize;

use super::move_file::Report;
use crate::status::{AcceleratorStatus, AgentStatus, SessionStatus, TransportStatus};
use crate::units::show_bytes;

/// What `rm` prints.
#[derive(Debug, Serialize)]
pub(super) struct Removed {
    /// How many tensors.
    pub(super) tensors: u64,
}

pub(super) fn moved(verb: &str, report: &Report) -> String {
    let moved = &report.moved;
    let mut text = String::new();
    line(
        &mut text,
        &format!(
            "{verb} {} tensors, {} in {:.3} s, {:.2} GB/s over {}",
            moved.tensors,
            show_bytes(moved.bytes),
            moved.seconds,
            moved.gb_per_s,
            moved.path
        ),
    );
    for reason in &moved.reasons {
        line(&mut text, &format!("  not {reason}"));
    }
    line(
        &mut text,
        &format!(
            "  copies per byte: {}",
            copies_per_byte(moved.copies, moved.bytes)
        ),
    );
    line(
        &mut text,
        &format!(
            "  retransmits {}, digest {}, file {:.3} s",
            moved.retransmits, moved.digest, report.file_seconds
        ),
    );
    text
}

/// Who copied how much, both ends together: Genie, the device's driver, the kernel.
fn copies_per_byte(copies: Copies, bytes: u64) -> String {
    let each = |copied: u64| copied as f64 / bytes.max(1) as f64;
    format!(
        "genie {:.2}, driver {:.2}, kernel {:.2}",
        each(copies.genie),
        each(copies.driver),
        each(copies.kernel)
    )
}

pub(super) fn listed(listed: &[Listed]) -> String {
    let mut text = String::new();
    let width = listed
        .iter()
        .map(|tensor| tensor.name.chars().count())
        .max()
        .unwrap_or(0);
    for tensor in listed {
        let shape = tensor
            .shape
            .iter()
            .map(u64::to_string)
            .collect::<Vec<_>>()
            .join("x");
        let owner = match &tensor.owner {
            Owner::User(uid) => format!("uid {uid}"),
            Owner::Peer(name) => format!("peer {name}"),
        };
        let dtype = if tensor.window {
            "window"
        } else {
            &tensor.dtype
        };
        let bytes = show_bytes(tensor.bytes);
        line(
            &mut text,
            &format!(
                "{:width$}  {dtype:<8} [{shape}]  {bytes}  {}  {owner}",
                tensor.name, tensor.memory
            ),
        );
    }
    text
}

pub(super) fn status(status: &AgentStatus) -> String {
    let mut text = String::new();
    line(
        &mut text,
        &format!(
            "agent {} (genie {}, instance {}), up {:.0} s",
            status.name, status.version, status.instance, status.up_seconds
        ),
    );
    line(
        &mut text,
        &format!("  identity: {}", status.identity.summary),
    );
    if let Some(reason) = &status.identity.reload_error {
        line(
            &mut text,
            &format!("  WARNING: newer files are not used: {reason}"),
        );
    }
    if let Some(warning) = &status.warning {
        line(&mut text, &format!("  WARNING: {warning}"));
    }
    line(
        &mut text,
        &format!(
            "  listen {}, socket {}",
            status.listen,
            status.socket.display()
        ),
    );
    match (&status.metrics.address, &status.metrics.reason) {
        (Some(address), _) => line(&mut text, &format!("  metrics http://{address}/metrics")),
        (None, Some(reason)) => line(&mut text, &format!("  no metrics: {reason}")),
        (None, None) => {}
    }
    let usage = |used, limit| format!("{} of {}", show_bytes(used), show_bytes(limit));
    line(
        &mut text,
        &format!(
            "  store {} tensors, {}; {} arenas, {}",
            status.store.tensors,
            usage(status.store.used_bytes, status.store.limit_bytes),
            status.arenas.regions,
            usage(status.arenas.used_bytes, status.arenas.limit_bytes)
        ),
    );
    for one in &status.peer_usage {
        let refused = one.refused;
        line(
            &mut text,
            &format!(
                "  peer {}: {} in the store, {} of {} transfers; refused for memory {}, \
                 transfers {}, rate {}",
                one.peer,
                usage(one.memory_bytes, one.memory_limit_bytes),
                one.transfers,
                one.transfers_limit,
                refused.memory,
                refused.transfers,
                refused.rate
            ),
        );
    }
    line(
        &mut text,
        &format!("transports (allowed: {})", status.preference),
    );
    status
        .transports
        .iter()
        .for_each(|one| transport(&mut text, one));
    for one in &status.accelerators {
        line(&mut text, &accelerator(one));
    }
    if !status.peers.is_empty() {
        line(&mut text, "peers");
        for peer in &status.peers {
            line(&mut text, &format!("  {} at {}", peer.name, peer.address));
        }
    }
    line(
        &mut text,
        if status.sessions.is_empty() {
            "no sessions"
        } else {
            "sessions"
        },
    );
    status
        .sessions
        .iter()
        .for_each(|one| session(&mut text, one));
    text
}

fn accelerator(one: &AcceleratorStatus) -> String {
    let kind = one.kind;
    if let Some(reason) = &one.reason {
        return format!("accelerator {kind} cannot be used: {reason}");
    }
    let (name, driver) = (one.name.as_deref(), one.driver.as_deref());
    let gpudirect = one.gpudirect.as_deref().unwrap_or("it was not tried");
    let slots = one.slots_reason.as_deref();
    let slots = slots.map_or_else(String::new, |reason| {
        format!("; slots on ordinary pages: {reason}")
    });
    format!(
        "accelerator {kind}: {}, driver {}, {}; gpudirect: no, because {gpudirect}{slots}",
        name.unwrap_or("nameless"),
        driver.unwrap_or("unknown"),
        show_bytes(one.memory_bytes)
    )
}

fn transport(text: &mut String, transport: &TransportStatus) {
    match (&transport.path, &transport.reason) {
        (Some(path), _) => {
            let data = transport
                .data
                .map(|data| format!(", data {data}"))
                .unwrap_or_default();
            line(text, &format!("  {path}{data}"));
        }
        (None, reason) => {
            let reason = reason.as_deref().unwrap_or("unknown reason");
            line(
                text,
                &format!("  {} cannot be used: {reason}", transport.transport),
            );
        }
    }
    let Some(engine) = &transport.engine else {
        return;
    };
    line(
        text,
        &format!(
            "    sent {}, received {}, dropped {}; copied by genie {}, driver {}, kernel {}",
            show_bytes(engine.sent_bytes),
            show_bytes(engine.received_bytes),
            engine.dropped,
            show_bytes(engine.copies.genie),
            show_bytes(engine.copies.driver),
            show_bytes(engine.copies.kernel)
        ),
    );
    for caution in &engine.cautions {
        line(text, &format!("    CAUTION: {caution}"));
    }
    if let Some(tap) = &engine.tap {
        line(text, &format!("    {}", tapped(tap)));
    }
    if let Some(one) = &engine.steering {
        line(
            text,
            &format!(
                "    queue {} of {}: {} frames passed on to others, {} from them, {} lost on the way",
                one.queue, one.queues, one.forwarded, one.received, one.dropped
            ),
        );
    }
    if let Some(port) = &engine.port {
        line(
            text,
            &format!(
                "    port: rx {} frames {}, missed {}; tx {} frames {}, errors {}; \
                 {} regions registered, {} so far",
                port.rx_frames,
                show_bytes(port.rx_bytes),
                port.rx_missed,
                port.tx_frames,
                show_bytes(port.tx_bytes),
                port.tx_errors,
                port.registered,
                port.registrations
            ),
        );
    }
}

fn tapped(tap: &TapSnapshot) -> String {
    let error = match &tap.error {
        Some(error) => format!("; no more: {error}"),
        None => String::new(),
    };
    format!(
        "recorded in {}: {} frames, {}; {} missing, {} after its end{error}",
        tap.file.display(),
        tap.frames,
        show_bytes(tap.bytes),
        tap.missed,
        tap.after_end
    )
}

fn session(text: &mut String, session: &SessionStatus) {
    line(
        text,
        &format!(
            "  {} ({}) over {}{}, up {:.0} s, {} requests, instance {}",
            session.peer,
            session.direction,
            session.path,
            if session.sealed { " (sealed)" } else { "" },
            session.up_seconds,
            session.requests,
            session.instance
        ),
    );
    for reason in &session.reasons {
        line(text, &format!("    not {reason}"));
    }
    if let Some(reason) = &session.lost {
        line(text, &format!("    path lost, opening another: {reason}"));
    }
    for change in &session.changes {
        line(
            text,
            &format!(
                "    {:.0} s ago from {} to {}, {:.0} ms without a path: {}",
                change.seconds_ago, change.from, change.to, change.gap_ms, change.reason
            ),
        );
    }
}

/// One line, whatever a peer put into it.
fn line(text: &mut String, line: &str) {
    writeln!(text, "{}", printable(line)).expect("writing to a string cannot fail");
}

/// Text that can only be read: what would move a terminal's cursor, change its
/// settings or turn the direction of writing is escaped.
pub(super) fn printable(text: &str) -> String {
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        if acts(c) {
            printable.extend(c.escape_default());
        } else {
            printable.push(c);
        }
    }
    printable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_stays_text_on_one_line() {
        let hostile = "a\u{1b}[2Jb\rc\nd\u{9b}e\u{202e}f";
        let shown = printable(hostile);
        assert_eq!(shown, r"a\u{1b}[2Jb\rc\nd\u{9b}e\u{202e}f");
        assert_eq!(printable("重み é 'x'"), "重み é 'x'");
        let tensor = Listed {
            name: hostile.into(),
            dtype: hostile.into(),
            shape: vec![1],
            bytes: 1,
            owner: Owner::Peer(hostile.into()),
            memory: "host".into(),
            window: false,
        };
        let shown = listed(&[tensor]);
        assert_eq!(shown.matches('\n').count(), 1);
        assert!(!shown.trim_end().chars().any(char::is_control), "{shown}");
    }

    #[test]
    fn copies_are_shown_by_who_made_them() {
        let copies = Copies {
            genie: 100,
            driver: 200,
            kernel: 50,
        };
        let shown = copies_per_byte(copies, 100);
        assert_eq!(shown, "genie 1.00, driver 2.00, kernel 0.50");
        assert!(copies_per_byte(copies, 0).starts_with("genie 100"));
    }
}
