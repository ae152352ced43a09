//! How the simulated accelerator behaves, from code or from the environment.

#![forbid(unsafe_code)]

use std::time::Duration;

use super::{INVALID_VALUE, call};
use crate::memory::accelerator::AcceleratorError;

/// The variable that sets up every simulated accelerator of a process.
const VARIABLE: &str = "GENIE_SIM";

/// How a simulated device behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// How much memory it has.
    pub memory_bytes: u64,
    /// How long each copy takes on top of the copying.
    pub delay: Duration,
    /// Whether heads of different streams are taken at random rather than in turn.
    pub reorder: bool,
    /// For the random order.
    pub seed: u64,
    /// After how many copies one fails, and how.
    pub fail_copy: Option<(u64, Fault)>,
    /// How many pieces of host memory are refused before one is pinned.
    pub refuse_pins: u32,
    /// Whether it claims that network cards reach its memory, so that the steps
    /// of GPUDirect are taken as far as a port goes.
    pub gpudirect: bool,
}

/// How a copy fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It, and what its stream had begun.
    Once,
    /// It, and every call from then on, like an uncorrectable memory error.
    Sticky,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory_bytes: 1 << 30,
            delay: Duration::ZERO,
            reorder: true,
            seed: 1,
            fail_copy: None,
            refuse_pins: 0,
            gpudirect: false,
        }
    }
}

impl Config {
    /// What `GENIE_SIM` says: `bytes=N`, `delay-us=N`, `fail-copy=N`,
    /// `sticky-copy=N`, `refuse-pins=N`, `seed=N`, `in-order`, `gpudirect`,
    /// joined by commas.
    pub fn from_env() -> Result<Self, AcceleratorError> {
        match std::env::var(VARIABLE) {
            Ok(text) => Self::parse(&text),
            Err(_) => Ok(Self::default()),
        }
    }

    fn parse(text: &str) -> Result<Self, AcceleratorError> {
        let mut config = Self::default();
        for word in text.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match (key, value.parse::<u64>()) {
                ("in-order", _) if value.is_empty() => config.reorder = false,
                ("gpudirect", _) if value.is_empty() => config.gpudirect = true,
                ("refuse-pins", Ok(count)) => {
                    config.refuse_pins = u32::try_from(count).unwrap_or(u32::MAX);
                }
                ("bytes", Ok(bytes)) => config.memory_bytes = bytes,
                ("delay-us", Ok(micros)) => config.delay = Duration::from_micros(micros),
                ("fail-copy", Ok(after)) => config.fail_copy = Some((after, Fault::Once)),
                ("sticky-copy", Ok(after)) => config.fail_copy = Some((after, Fault::Sticky)),
                ("seed", Ok(seed)) => config.seed = seed,
                _ => {
                    let text = format!("'{word}' is not understood");
                    return Err(call(VARIABLE, INVALID_VALUE, text, false));
                }
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_sets_a_device_up() {
        let config = Config::parse("bytes=4096, delay-us=20,sticky-copy=3,in-order").unwrap();
        assert_eq!(config.memory_bytes, 4096);
        assert_eq!(config.delay, Duration::from_micros(20));
        assert_eq!(config.fail_copy, Some((3, Fault::Sticky)));
        assert!(!config.reorder);
        let refused = Config::parse("byts=1").unwrap_err().to_string();
        assert_eq!(
            refused,
            "sim: GENIE_SIM failed with 1 ('byts=1' is not understood)"
        );
    }
}
