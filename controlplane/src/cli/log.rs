//! Where log lines go: to stderr, each event on one line that can only be read.

use std::io::{self, Stderr, Write};

use super::show::printable;

/// Writes whole events, as `tracing_subscriber` gives them: what a peer put
/// into one can neither act on a terminal nor pass for another event.
pub(super) struct Lines<W = Stderr>(W);

/// Lines on stderr.
pub(super) fn stderr() -> Lines {
    Lines(io::stderr())
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = printable(text.strip_suffix('\n').unwrap_or(&text));
        self.0.write_all((line + "\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_a_peer_put_into_it() {
        let mut lines = Lines(Vec::new());
        let event = b"WARN no session: a\nINFO ready\x1b[2J \xff\n";
        lines.write_all(event).unwrap();
        let text = String::from_utf8(lines.0).unwrap();
        assert_eq!(text, "WARN no session: a\\nINFO ready\\u{1b}[2J \u{fffd}\n");
    }
}
