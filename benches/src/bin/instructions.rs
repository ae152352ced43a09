//! `instructions PIECE COUNT`: does one thing so many times, for callgrind.
//!
//! Run by `benches/instructions`, which takes the difference of two counts, so
//! that what the process does besides falls out.

#![forbid(unsafe_code)]

use std::hint::black_box;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use genie_benches::null_pair::{PACKETS, Pair};
use genie_benches::polled_pair::PolledPair;
use genie_dataplane::engine::ring::ring;
use genie_proto::wire::{Header, Kind};
use genie_proto::{DigestBuilder, SessionId, TransferId};

/// Does one thing so many times.
#[derive(Parser)]
struct Arguments {
    /// What
    piece: Piece,
    /// How often; packets in whole transfers of 4096
    count: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Piece {
    /// A packet through both ends of a connection
    Packet,
    /// A header encoded and parsed
    Header,
    /// A small tensor of 64 bytes there and one back, through two engines
    Pingpong,
    /// A segment's checksum into a digest
    Digest,
    /// A value into a ring and out
    Ring,
}

fn main() -> Result<()> {
    let Arguments { piece, count } = Arguments::parse();
    match piece {
        Piece::Packet => {
            let mut pair = Pair::new();
            (0..count / PACKETS).for_each(|_| pair.transfer());
        }
        Piece::Header => (0..count).try_for_each(header)?,
        Piece::Pingpong => PolledPair::in_steps(256).pingpong(count, 64),
        Piece::Digest => {
            let mut digest = DigestBuilder::new(count * 8896);
            (0..count).for_each(|number| digest.add(number * 8896, 8896, black_box(7)));
            black_box(digest.finish());
        }
        Piece::Ring => {
            let (mut sender, mut receiver) = ring::<u64>(1024)?;
            for number in 0..count {
                // It was emptied, so it cannot be full.
                let _ = sender.try_send(black_box(number));
                black_box(receiver.try_recv());
            }
        }
    }
    Ok(())
}

fn header(number: u64) -> Result<()> {
    let header = Header {
        kind: Kind::Data,
        flags: 0,
        payload_len: 8896,
        session: SessionId(1),
        transfer: TransferId {
            slot: 3,
            generation: 9,
        },
        timestamp: 123_456,
        path: 0,
        packet_number: number,
        offset: 1 << 30,
    };
    let bytes = black_box(header).encode(black_box(7));
    black_box(Header::parse(black_box(&bytes), 40 + 8896)?);
    Ok(())
}
