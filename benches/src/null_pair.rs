//! The protocol alone: two connections, no network, and no payload but, if it
//! is asked for, the digest of one.

use genie_dataplane::engine::frame::Head;
use genie_dataplane::memory::View;
use genie_proto::wire::HEADER_LEN;
use genie_proto::{Config, Connection, Event, SessionId, Time, TransferId};

/// Packets of one transfer.
pub const PACKETS: u64 = 4096;

/// Two connections and no network: what one gives the other takes at once.
#[derive(Debug)]
pub struct Pair {
    ends: [Connection; 2],
    /// What every packet carries, if digests are computed.
    segment: Option<Vec<u8>>,
    generation: u32,
    now: u64,
    /// Where packets are written, as an engine writes them into its frames.
    head: Head,
}

impl Pair {
    /// Two that know of each other.
    #[expect(clippy::new_without_default, reason = "a benchmark makes one, by name")]
    pub fn new() -> Self {
        Self::of(None)
    }

    /// Two whose sender computes the digest of each segment of 8 KiB, always the
    /// same one, so that it comes from the cache.
    pub fn with_digest() -> Self {
        Self::of(Some((0..8192).map(|at| (at / 7) as u8).collect()))
    }

    fn of(segment: Option<Vec<u8>>) -> Self {
        let config = config();
        let connection = |local, remote| {
            Connection::new(config.clone(), SessionId(local), SessionId(remote), Time(0))
        };
        Self {
            ends: [connection(1, 2), connection(2, 1)],
            segment,
            generation: 0,
            now: 1,
            head: Head::new(),
        }
    }

    /// Carries what `from` has to say; `false` if it had nothing.
    fn carry(&mut self, from: usize) -> bool {
        let now = Time(self.now);
        let mut any = false;
        // A burst at a time, as the engine does.
        for _ in 0..32 {
            // Without a segment its checksum is zero at both ends: only the
            // protocol is measured. With one the receiver knows what it is.
            let mut crc = 0;
            let segment = &self.segment;
            let digest = |_| {
                let bytes = segment.as_deref().unwrap_or_default();
                crc = View::from(bytes).crc32c();
                crc
            };
            self.head.clear();
            let sent = self.ends[from].poll_transmit_into(now, &mut self.head, digest);
            let Some(payload) = sent else {
                break;
            };
            any = true;
            let len = self.head.len() + payload.map_or(0, |segment| segment.len as usize);
            self.ends[1 - from].handle_datagram(now, &self.head, len, |_| crc);
        }
        any
    }

    /// Moves one transfer of [`PACKETS`] packets and returns when both ends agree.
    ///
    /// # Panics
    /// If it fails: nothing is lost here.
    pub fn transfer(&mut self) {
        let len = PACKETS * config().segment_max();
        self.generation += 1;
        let id = TransferId {
            slot: 0,
            generation: self.generation,
        };
        self.ends[1].receive(id, len).expect("the slot is free");
        self.ends[0].send(id, len).expect("the slot is free");
        let mut ended = 0;
        while ended < 2 {
            self.now += 1000;
            let any = self.carry(0) | self.carry(1);
            for end in &mut self.ends {
                while let Some(event) = end.poll_event() {
                    match event {
                        Event::Sent { .. } | Event::Received { .. } => ended += 1,
                        other => panic!("{other:?}"),
                    }
                }
            }
            if !any {
                // Only an acknowledgement waits for company.
                self.now += 200_000;
                for end in &mut self.ends {
                    end.handle_timeout(Time(self.now));
                }
            }
        }
    }
}

fn config() -> Config {
    // Segments of 8 KiB, a port of MTU 9000 has room for more.
    Config {
        datagram_max: 8192 + HEADER_LEN as u16,
        ..Config::default()
    }
}
