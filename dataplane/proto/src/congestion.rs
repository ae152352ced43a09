//! How many bytes may be in flight.

use std::fmt::Debug;

use crate::time::Time;

mod fixed;
mod tolerant;

pub use fixed::Fixed;
pub use tolerant::Tolerant;

/// Decides the window; one per path, told of every packet's fate.
pub trait Controller: Debug + Send {
    /// Bytes that may be in flight.
    fn window_bytes(&self) -> u64;

    /// Packets sent at `sent_at` at the latest, `bytes` long together, were
    /// acknowledged. `limited`: the window was what kept us from sending more;
    /// it need not grow otherwise (RFC 9002 section 7.8).
    fn handle_ack(&mut self, now: Time, sent_at: Time, bytes: u64, limited: bool);

    /// Packets of `bytes` together, the last of them sent at `sent_at`, are lost.
    fn handle_loss(&mut self, now: Time, sent_at: Time, bytes: u64);
}

/// Which controller a path begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// [`Tolerant`].
    Tolerant,
    /// [`Fixed`] at so many bytes.
    Fixed(u64),
}

impl Algorithm {
    /// Makes the controller for a path whose packets are at most `packet_bytes` long.
    pub(crate) fn build(self, packet_bytes: u64) -> Box<dyn Controller> {
        match self {
            Self::Tolerant => Box::new(Tolerant::new(packet_bytes)),
            Self::Fixed(bytes) => Box::new(Fixed::new(bytes.max(2 * packet_bytes))),
        }
    }
}
