//! Where log lines go: to stderr, each event on one line that can only be read.

use std::io::{self, Stderr, Write};
use std::sync::{Arc, OnceLock};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

use super::show::printable;

/// Lines that wait to be written; more are dropped.
const WAITING_MAX: usize = 8192;

/// Writes whole events, as `tracing_subscriber` gives them: what a peer put
/// into one can neither act on a terminal nor pass for another event.
pub(super) struct Lines<W = Stderr> {
    out: W,
    /// Counts the lines that found no room to wait.
    dropped: Arc<OnceLock<ErrorCounter>>,
    /// How many of them the log itself has told of.
    told: usize,
}

/// Lines on stderr.
pub(super) fn stderr() -> Lines {
    Lines::new(io::stderr())
}

/// Lines on stderr that a thread of its own writes: whoever logs never waits for
/// a disk or a program that takes none. The log says how many were dropped
/// meanwhile, once lines are taken again. The guard writes the rest, for a
/// second at the most.
pub(super) fn stderr_in_background() -> (NonBlocking, WorkerGuard) {
    in_background(io::stderr())
}

fn in_background<W: Write + Send + 'static>(out: W) -> (NonBlocking, WorkerGuard) {
    let lines = Lines::new(out);
    let dropped = Arc::clone(&lines.dropped);
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(WAITING_MAX)
        .thread_name("genie-log")
        .finish(lines);
    let _ = dropped.set(writer.error_counter());
    (writer, guard)
}

impl<W: Write> Lines<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            dropped: Arc::default(),
            told: 0,
        }
    }

    fn tell_dropped(&mut self) -> io::Result<()> {
        let dropped = self.dropped.get().map_or(0, ErrorCounter::dropped_lines);
        let news = dropped - self.told;
        self.told = dropped;
        if news > 0 {
            writeln!(self.out, "{news} lines were dropped: nobody took them")?;
        }
        Ok(())
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.tell_dropped()?;
        let text = String::from_utf8_lossy(event);
        let line = printable(text.strip_suffix('\n').unwrap_or(&text));
        self.out.write_all((line + "\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_a_peer_put_into_it() {
        let mut lines = Lines::new(Vec::new());
        let event = b"WARN no session: a\nINFO ready\x1b[2J \xff\n";
        lines.write_all(event).unwrap();
        let text = String::from_utf8(lines.out).unwrap();
        assert_eq!(text, "WARN no session: a\\nINFO ready\\u{1b}[2J \u{fffd}\n");
    }

    /// Takes nothing before it is told to, and then whatever comes.
    struct Stuck {
        until: Option<Receiver<()>>,
        taken: Sender<Vec<u8>>,
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some(until) = self.until.take() {
                let _ = until.recv();
            }
            let _ = self.taken.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nobody_waits_for_a_log_that_is_stuck_and_it_says_what_it_lacks() {
        let (go, until) = channel();
        let (taken, written) = channel();
        let until = Some(until);
        let (mut log, guard) = in_background(Stuck { until, taken });
        let logged = WAITING_MAX + 100;
        for number in 0..logged {
            let event = format!("event {number}\n");
            log.write_all(event.as_bytes()).unwrap();
        }
        let dropped = log.error_counter().dropped_lines();
        // The thread may have taken one out of the queue by then.
        assert!((99..=100).contains(&dropped), "{dropped}");
        drop(go);
        drop(log);
        drop(guard);
        let text: Vec<u8> = written.iter().flatten().collect();
        let text = String::from_utf8(text).unwrap();
        let notice = format!("{dropped} lines were dropped: nobody took them\n");
        assert_eq!(text.matches(&notice).count(), 1);
        assert_eq!(text.matches("event").count(), logged - dropped);
    }
}
