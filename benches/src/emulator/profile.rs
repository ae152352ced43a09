//! What a link does to frames, as people write it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a link behaves; the same in both directions.
///
/// Written as a name of [`NAMED`], as `key=value` pairs with commas, or as a
/// name followed by pairs that change it: `bad,rate=50mbit,seed=7`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Profile {
    /// Bits per second of whole frames without their check sequence; 0: no limit.
    pub rate_bits: u64,
    /// Bytes that wait for the link before more are dropped; 0: no limit.
    pub buffer_bytes: u64,
    /// From the end of a frame's sending to its arrival.
    pub delay: Duration,
    /// The probability of each frame to be lost.
    pub loss: f64,
    /// The probability of each frame to arrive [`Profile::reorder_by`] late.
    pub reorder: f64,
    /// How late that is.
    pub reorder_by: Duration,
    /// The probability of each frame to arrive twice.
    pub duplicate: f64,
    /// The probability of each frame to have one bit changed behind its Ethernet header.
    pub corrupt: f64,
    /// How often the link goes dark; zero: never.
    pub dark_every: Duration,
    /// For how long it then is.
    pub dark_for: Duration,
    /// Largest IP packet in bytes; a larger one disappears; 0: no limit.
    pub mtu: u32,
    /// After this the limit is [`Profile::mtu_later`]; zero: it stays.
    pub mtu_after: Duration,
    /// The limit then.
    pub mtu_later: u32,
    /// Everything random follows from it and the direction.
    pub seed: u64,
}

/// The profiles of the lab: a name, what it is written out as, and what it stands for.
pub const NAMED: [(&str, &str, &str); 8] = [
    (
        "clean",
        "rate=1gbit,buffer=512k,delay=50us",
        "a quiet link of 1 Gbit/s",
    ),
    (
        "loss",
        "rate=1gbit,buffer=512k,delay=50us,loss=0.01",
        "one frame in a hundred is lost",
    ),
    (
        "bad",
        "rate=500mbit,buffer=512k,delay=200us,loss=0.01,reorder=0.01,duplicate=0.005,corrupt=0.005",
        "loss, reordering, duplication and corruption at once",
    ),
    (
        "wan",
        "rate=200mbit,buffer=1m,delay=20ms,loss=0.0005",
        "40 ms to another region and back",
    ),
    (
        "thin",
        "rate=100mbit,buffer=32k,delay=5ms",
        "a buffer of a quarter of the path's product",
    ),
    (
        "deep",
        "rate=100mbit,buffer=4m,delay=5ms",
        "a buffer that holds a third of a second",
    ),
    (
        "blackout",
        "rate=500mbit,buffer=512k,delay=200us,dark-every=2s,dark-for=300ms",
        "dark for 300 ms in every 2 s",
    ),
    (
        "mtu",
        "rate=500mbit,buffer=512k,delay=200us,mtu=1500,mtu-after=2s,mtu-later=1300",
        "after 2 s larger packets than 1300 bytes disappear",
    ),
];

/// Why a profile was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// Neither a name nor a pair.
    #[error("'{0}' is no profile: write one of {names}, or pairs as in rate=100mbit,delay=5ms",
        names = names())]
    Name(String),
    /// A key that there is not.
    #[error("'{0}' cannot be set: there are {KEYS}")]
    Key(String),
    /// A value that cannot be read.
    #[error("'{value}' is no {key}: write for example {key}={example}")]
    Value {
        /// The key.
        key: String,
        /// What was written.
        value: String,
        /// What could be.
        example: &'static str,
    },
}

const KEYS: &str = "rate, buffer, delay, loss, reorder, reorder-by, duplicate, corrupt, \
    dark-every, dark-for, mtu, mtu-after, mtu-later, seed";

fn names() -> String {
    NAMED.map(|(name, ..)| name).join(", ")
}

impl Default for Profile {
    /// A link that does nothing to frames.
    fn default() -> Self {
        Self {
            rate_bits: 0,
            buffer_bytes: 0,
            delay: Duration::ZERO,
            loss: 0.0,
            reorder: 0.0,
            reorder_by: Duration::from_millis(1),
            duplicate: 0.0,
            corrupt: 0.0,
            dark_every: Duration::ZERO,
            dark_for: Duration::ZERO,
            mtu: 0,
            mtu_after: Duration::ZERO,
            mtu_later: 0,
            seed: 1,
        }
    }
}

impl FromStr for Profile {
    type Err = ProfileError;

    fn from_str(text: &str) -> Result<Self, ProfileError> {
        let mut profile = Self::default();
        for (index, word) in text.split(',').map(str::trim).enumerate() {
            if let Some((key, value)) = word.split_once('=') {
                profile.set(key, value)?;
                continue;
            }
            let named = NAMED.iter().find(|(name, ..)| *name == word && index == 0);
            let (_, pairs, _) = named.ok_or_else(|| ProfileError::Name(word.into()))?;
            profile = pairs.parse()?;
        }
        Ok(profile)
    }
}

impl TryFrom<String> for Profile {
    type Error = ProfileError;

    fn try_from(text: String) -> Result<Self, ProfileError> {
        text.parse()
    }
}

impl From<Profile> for String {
    fn from(profile: Profile) -> String {
        profile.to_string()
    }
}

impl Profile {
    fn set(&mut self, key: &str, value: &str) -> Result<(), ProfileError> {
        let refused = |example| ProfileError::Value {
            key: key.into(),
            value: value.into(),
            example,
        };
        let number = |example| scaled(value, &[("", 1.0)]).ok_or(refused(example));
        let probability = || {
            let number: f64 = value.parse().map_err(|_| refused("0.01"))?;
            let valid = (0.0..=1.0).contains(&number);
            if valid {
                Ok(number)
            } else {
                Err(refused("0.01"))
            }
        };
        let duration = || {
            const UNITS: [(&str, f64); 4] = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("", 1.0)];
            let seconds = scaled(value, &UNITS).ok_or(refused("5ms"))?;
            Duration::try_from_secs_f64(seconds).map_err(|_| refused("5ms"))
        };
        match key {
            "rate" => {
                const UNITS: [(&str, f64); 4] =
                    [("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3), ("", 1.0)];
                self.rate_bits = scaled(value, &UNITS).ok_or(refused("100mbit"))? as u64;
            }
            "buffer" => {
                const UNITS: [(&str, f64); 3] = [("k", 1024.0), ("m", 1048576.0), ("", 1.0)];
                self.buffer_bytes = scaled(value, &UNITS).ok_or(refused("512k"))? as u64;
            }
            "delay" => self.delay = duration()?,
            "loss" => self.loss = probability()?,
            "reorder" => self.reorder = probability()?,
            "reorder-by" => self.reorder_by = duration()?,
            "duplicate" => self.duplicate = probability()?,
            "corrupt" => self.corrupt = probability()?,
            "dark-every" => self.dark_every = duration()?,
            "dark-for" => self.dark_for = duration()?,
            "mtu" => self.mtu = number("1500")? as u32,
            "mtu-after" => self.mtu_after = duration()?,
            "mtu-later" => self.mtu_later = number("1300")? as u32,
            "seed" => self.seed = value.parse().map_err(|_| refused("7"))?,
            other => return Err(ProfileError::Key(other.into())),
        }
        Ok(())
    }

    /// How long `bytes` occupy the link.
    pub fn time_on_wire(&self, bytes: usize) -> Duration {
        if self.rate_bits == 0 {
            return Duration::ZERO;
        }
        let nanos = bytes as u128 * 8 * 1_000_000_000 / u128::from(self.rate_bits);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Whether the link is dark at `now`, counted from its start.
    pub fn is_dark(&self, now: Duration) -> bool {
        if self.dark_every.is_zero() {
            return false;
        }
        // The dark part comes last, so that a test can start in the light.
        let phase = now.as_nanos() % self.dark_every.as_nanos();
        phase >= self.dark_every.saturating_sub(self.dark_for).as_nanos()
    }

    /// The largest IP packet at `now`, if there is a limit.
    pub fn mtu_at(&self, now: Duration) -> Option<u32> {
        let later = !self.mtu_after.is_zero() && now >= self.mtu_after;
        let mtu = if later { self.mtu_later } else { self.mtu };
        (mtu > 0).then_some(mtu)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |duration: Duration| duration.as_secs_f64() * 1e6;
        write!(f, "rate={},buffer={}", self.rate_bits, self.buffer_bytes)?;
        write!(f, ",delay={}us,loss={}", us(self.delay), self.loss)?;
        write!(
            f,
            ",reorder={},reorder-by={}us",
            self.reorder,
            us(self.reorder_by)
        )?;
        write!(f, ",duplicate={},corrupt={}", self.duplicate, self.corrupt)?;
        write!(
            f,
            ",dark-every={}us,dark-for={}us",
            us(self.dark_every),
            us(self.dark_for)
        )?;
        write!(f, ",mtu={},mtu-after={}us", self.mtu, us(self.mtu_after))?;
        write!(f, ",mtu-later={},seed={}", self.mtu_later, self.seed)
    }
}

/// A number that is not negative, times its unit.
fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    let number: f64 = digits.parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some(number * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_profile_is_understood_and_reads_back() {
        for (name, ..) in NAMED {
            let profile: Profile = name.parse().unwrap();
            assert_ne!(profile, Profile::default(), "{name}");
            assert_eq!(
                profile.to_string().parse::<Profile>().unwrap(),
                profile,
                "{name}"
            );
        }
    }

    #[test]
    fn a_name_can_be_changed_by_pairs() {
        let profile: Profile = "bad,rate=50mbit,seed=7,delay=1.5ms".parse().unwrap();
        assert_eq!(profile.rate_bits, 50_000_000);
        assert_eq!((profile.seed, profile.loss), (7, 0.01));
        assert_eq!(profile.delay, Duration::from_micros(1500));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in [
            "",
            "good",
            "rate",
            "loss=0.01,bad",
            "rate=fast",
            "loss=1.5",
            "loss=-1",
            "delay=-1ms",
            "delay=1h",
            "colour=red",
            "rate=1é",
            "delay=1e300s",
        ] {
            assert!(text.parse::<Profile>().is_err(), "{text}");
        }
    }

    #[test]
    fn dark_and_narrow_times() {
        let profile: Profile = "dark-every=2s,dark-for=300ms,mtu=1500,mtu-after=1s,mtu-later=1300"
            .parse()
            .unwrap();
        let at = Duration::from_millis;
        assert!(!profile.is_dark(at(1699)) && profile.is_dark(at(1700)));
        assert!(profile.is_dark(at(1999)) && !profile.is_dark(at(2000)));
        assert_eq!(profile.mtu_at(at(999)), Some(1500));
        assert_eq!(profile.mtu_at(at(1000)), Some(1300));
        assert_eq!(Profile::default().mtu_at(at(0)), None);
    }
}
