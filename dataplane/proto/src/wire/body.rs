//! The payloads of control packets.

use arrayvec::ArrayVec;
use zerocopy::byteorder::network_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{ACK_RANGES_MAX, CONTROL_MAX, Kind, ParseError, U48_LIMIT};
use crate::digest::Digest;

/// A control packet's payload.
// An ACK is parsed and read in place; on the heap it would cost an allocation a packet.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Of [`Kind::Ack`].
    Ack(Ack),
    /// Of [`Kind::Done`].
    Done(Done),
    /// Of [`Kind::DoneAck`].
    DoneAck(DoneAck),
    /// Of [`Kind::Probe`].
    Probe(Probe),
    /// Of [`Kind::ProbeAck`].
    ProbeAck(ProbeAck),
    /// Of [`Kind::Reset`].
    Reset(Reset),
    /// Of [`Kind::Grant`].
    Grant(Grant),
}

/// Which packets arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    /// How long the largest packet waited for this, in microseconds.
    pub delay_us: u32,
    /// The timestamp of the largest packet.
    pub echo: u32,
    /// How many packets the peer may have in flight.
    pub credit: u32,
    /// Packets that arrived marked as having met congestion; zero until ECN is read.
    pub ecn_ce: u32,
    /// Descending, neither overlapping nor adjacent, at least one.
    pub ranges: ArrayVec<AckRange, ACK_RANGES_MAX>,
}

/// Packet numbers that arrived, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckRange {
    /// The lowest.
    pub first: u64,
    /// The highest.
    pub last: u64,
}

/// Every byte of a transfer is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The length that was granted, in bytes.
    pub len: u64,
    /// The digest of what was applied.
    pub digest: Digest,
}

/// The sender's judgement of a [`Done`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DoneAck {
    /// Length and digest are the sender's too.
    Ok = 1,
    /// They differ: the tensor was changed while it moved.
    DigestMismatch = 2,
}

/// Asks for a [`ProbeAck`]; may be padded with zeros to try a packet size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Cannot be guessed by who does not see the path.
    pub token: u64,
}

/// Answers a [`Probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeAck {
    /// The token asked with.
    pub token: u64,
}

/// Something is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// What is over.
    pub scope: Scope,
    /// Why; see `docs/protocol.md` for the numbers.
    pub reason: u16,
}

/// How many OFFERs the peer may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// In all, the low 32 bits.
    pub total: u32,
    /// The longest tensor of each, in bytes.
    pub len_max: u32,
}

/// What a [`Reset`] ends. Both ends choose transfer ids, so it says whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Scope {
    /// The session.
    Session = 0,
    /// The transfer whose bytes the sender of the RESET receives.
    ToMe = 1,
    /// The transfer whose bytes the sender of the RESET sends.
    FromMe = 2,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAck {
    largest: U64,
    delay_us: U32,
    echo: U32,
    credit: U32,
    ecn_ce: U32,
    count: U16,
    reserved: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRange {
    /// Packets missing above the range; zero for the first.
    gap: U32,
    /// Packets in the range.
    count: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDone {
    len: U64,
    digest: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDoneAck {
    result: u8,
    reserved: [u8; 3],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawProbe {
    token: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawReset {
    scope: u8,
    reserved: u8,
    reason: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawGrant {
    total: U32,
    len_max: U32,
}

const _: () = assert!(size_of::<RawAck>() + ACK_RANGES_MAX * size_of::<RawRange>() <= CONTROL_MAX);

impl Body {
    /// Reads the payload of a packet of `kind`. Bytes beyond what is defined are
    /// padding on PROBE and malformed elsewhere.
    pub fn parse(kind: Kind, payload: &[u8]) -> Result<Self, ParseError> {
        if payload.len() > CONTROL_MAX && kind != Kind::Probe {
            return Err(ParseError::Body);
        }
        match kind {
            Kind::Data | Kind::Offer => Err(ParseError::Body),
            Kind::Ack => Ack::parse(payload).map(Self::Ack),
            Kind::Done => exactly::<RawDone>(payload).map(|raw| {
                Self::Done(Done {
                    len: raw.len.get(),
                    digest: Digest(raw.digest.get()),
                })
            }),
            Kind::DoneAck => match exactly::<RawDoneAck>(payload)?.result {
                1 => Ok(Self::DoneAck(DoneAck::Ok)),
                2 => Ok(Self::DoneAck(DoneAck::DigestMismatch)),
                _ => Err(ParseError::Body),
            },
            Kind::Probe => {
                let (raw, _) = RawProbe::ref_from_prefix(payload).map_err(|_| ParseError::Body)?;
                Ok(Self::Probe(Probe {
                    token: raw.token.get(),
                }))
            }
            Kind::ProbeAck => exactly::<RawProbe>(payload).map(|raw| {
                Self::ProbeAck(ProbeAck {
                    token: raw.token.get(),
                })
            }),
            Kind::Reset => {
                let raw = exactly::<RawReset>(payload)?;
                let scope = match raw.scope {
                    0 => Scope::Session,
                    1 => Scope::ToMe,
                    2 => Scope::FromMe,
                    _ => return Err(ParseError::Body),
                };
                Ok(Self::Reset(Reset {
                    scope,
                    reason: raw.reason.get(),
                }))
            }
            Kind::Grant => exactly::<RawGrant>(payload).map(|raw| {
                Self::Grant(Grant {
                    total: raw.total.get(),
                    len_max: raw.len_max.get(),
                })
            }),
        }
    }

    /// The type of packet it is the payload of.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Ack(_) => Kind::Ack,
            Self::Done(_) => Kind::Done,
            Self::DoneAck(_) => Kind::DoneAck,
            Self::Probe(_) => Kind::Probe,
            Self::ProbeAck(_) => Kind::ProbeAck,
            Self::Reset(_) => Kind::Reset,
            Self::Grant(_) => Kind::Grant,
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> ArrayVec<u8, CONTROL_MAX> {
        let mut bytes = ArrayVec::new();
        match self {
            Self::Ack(ack) => ack.encode(&mut bytes),
            Self::Done(done) => {
                push(
                    &mut bytes,
                    &RawDone {
                        len: done.len.into(),
                        digest: done.digest.0.into(),
                    },
                );
            }
            Self::DoneAck(result) => {
                push(
                    &mut bytes,
                    &RawDoneAck {
                        result: *result as u8,
                        reserved: [0; 3],
                    },
                );
            }
            Self::Probe(Probe { token }) | Self::ProbeAck(ProbeAck { token }) => {
                push(
                    &mut bytes,
                    &RawProbe {
                        token: (*token).into(),
                    },
                );
            }
            Self::Reset(reset) => push(
                &mut bytes,
                &RawReset {
                    scope: reset.scope as u8,
                    reserved: 0,
                    reason: reset.reason.into(),
                },
            ),
            Self::Grant(grant) => push(
                &mut bytes,
                &RawGrant {
                    total: grant.total.into(),
                    len_max: grant.len_max.into(),
                },
            ),
        }
        bytes
    }
}

impl Ack {
    fn parse(payload: &[u8]) -> Result<Self, ParseError> {
        let (raw, rest) = RawAck::ref_from_prefix(payload).map_err(|_| ParseError::Body)?;
        let pairs = <[RawRange]>::ref_from_bytes(rest).map_err(|_| ParseError::Body)?;
        let mut next = raw.largest.get();
        if pairs.len() != usize::from(raw.count.get()) || next >= U48_LIMIT {
            return Err(ParseError::Body);
        }
        let mut ranges = ArrayVec::new();
        for (index, pair) in pairs.iter().enumerate() {
            let (gap, count) = (u64::from(pair.gap.get()), u64::from(pair.count.get()));
            if (gap == 0) != (index == 0) {
                return Err(ParseError::Body);
            }
            let last = next.checked_sub(gap).ok_or(ParseError::Body)?;
            let below = count.checked_sub(1).ok_or(ParseError::Body)?;
            let first = last.checked_sub(below).ok_or(ParseError::Body)?;
            ranges
                .try_push(AckRange { first, last })
                .map_err(|_| ParseError::Body)?;
            // The number below the range; where there is none, no range may follow.
            match first.checked_sub(1) {
                Some(below) => next = below,
                None if index + 1 < pairs.len() => return Err(ParseError::Body),
                None => {}
            }
        }
        if ranges.is_empty() {
            return Err(ParseError::Body);
        }
        Ok(Self {
            delay_us: raw.delay_us.get(),
            echo: raw.echo.get(),
            credit: raw.credit.get(),
            ecn_ce: raw.ecn_ce.get(),
            ranges,
        })
    }

    /// Ranges that 32 bits cannot describe, and all below them, are left out.
    fn encode(&self, bytes: &mut ArrayVec<u8, CONTROL_MAX>) {
        let mut pairs: ArrayVec<RawRange, ACK_RANGES_MAX> = ArrayVec::new();
        let mut above = None;
        for range in &self.ranges {
            let gap = above.map_or(0, |above: u64| above - range.last - 1);
            let Ok(gap) = u32::try_from(gap) else { break };
            let count = range.last - range.first + 1;
            let whole = u32::try_from(count);
            let count = whole.unwrap_or(u32::MAX);
            pairs.push(RawRange {
                gap: gap.into(),
                count: count.into(),
            });
            if whole.is_err() {
                break;
            }
            above = Some(range.first);
        }
        push(
            bytes,
            &RawAck {
                largest: self.largest().into(),
                delay_us: self.delay_us.into(),
                echo: self.echo.into(),
                credit: self.credit.into(),
                ecn_ce: self.ecn_ce.into(),
                count: (pairs.len() as u16).into(),
                reserved: U16::ZERO,
            },
        );
        for pair in &pairs {
            push(bytes, pair);
        }
    }

    /// The highest packet number acknowledged.
    pub fn largest(&self) -> u64 {
        self.ranges.first().map_or(0, |range| range.last)
    }
}

fn exactly<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    payload: &[u8],
) -> Result<&T, ParseError> {
    T::ref_from_bytes(payload).map_err(|_| ParseError::Body)
}

fn push(bytes: &mut ArrayVec<u8, CONTROL_MAX>, raw: &(impl IntoBytes + Immutable)) {
    bytes
        .try_extend_from_slice(raw.as_bytes())
        .expect("the largest control payload fits, as asserted above");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_ack() -> impl Strategy<Value = Ack> {
        let ranges = proptest::collection::vec((1u64..1 << 32, 1u64..1 << 32), 1..=ACK_RANGES_MAX);
        (ranges, 1u64 << 39..U48_LIMIT, any::<[u32; 4]>()).prop_map(|(pairs, largest, rest)| {
            let mut ranges = ArrayVec::new();
            let mut next = largest;
            for (gap, count) in pairs {
                let last = if ranges.is_empty() { next } else { next - gap };
                let first = last + 1 - count;
                ranges.push(AckRange { first, last });
                next = first - 1;
            }
            let [delay_us, echo, credit, ecn_ce] = rest;
            Ack {
                delay_us,
                echo,
                credit,
                ecn_ce,
                ranges,
            }
        })
    }

    fn any_body() -> impl Strategy<Value = Body> {
        prop_oneof![
            any_ack().prop_map(Body::Ack),
            (any::<u64>(), any::<u32>()).prop_map(|(len, digest)| Body::Done(Done {
                len,
                digest: Digest(digest)
            })),
            any::<bool>().prop_map(|ok| Body::DoneAck(match ok {
                true => DoneAck::Ok,
                false => DoneAck::DigestMismatch,
            })),
            any::<u64>().prop_map(|token| Body::Probe(Probe { token })),
            any::<u64>().prop_map(|token| Body::ProbeAck(ProbeAck { token })),
            (0u8..3, any::<u16>()).prop_map(|(scope, reason)| Body::Reset(Reset {
                scope: [Scope::Session, Scope::ToMe, Scope::FromMe][usize::from(scope)],
                reason
            })),
            any::<(u32, u32)>().prop_map(|(total, len_max)| Body::Grant(Grant { total, len_max })),
        ]
    }

    proptest! {
        #[test]
        fn a_body_comes_back_as_it_went(body in any_body()) {
            prop_assert_eq!(Body::parse(body.kind(), &body.encode()), Ok(body));
        }

        #[test]
        fn a_cut_body_is_malformed(body in any_body(), cut: prop::sample::Index) {
            let bytes = body.encode();
            let bytes = &bytes[..cut.index(bytes.len())];
            prop_assert_eq!(Body::parse(body.kind(), bytes), Err(ParseError::Body));
        }
    }

    #[test]
    fn ranges_that_run_below_zero_are_malformed() {
        let one = AckRange { first: 3, last: 5 };
        let ack = Ack {
            delay_us: 0,
            echo: 0,
            credit: 0,
            ecn_ce: 0,
            ranges: [one].into_iter().collect(),
        };
        let mut bytes = Body::Ack(ack).encode();
        assert!(Body::parse(Kind::Ack, &bytes).is_ok());
        let count = bytes.len() - 1;
        for (value, fine) in [(0, false), (6, true), (7, false)] {
            bytes[count] = value;
            assert_eq!(
                Body::parse(Kind::Ack, &bytes).is_ok(),
                fine,
                "{value} packets"
            );
        }
    }
}
