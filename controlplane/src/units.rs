//! Byte counts and durations as people write them, in flags and files.

use std::time::Duration;

/// Why a byte count or duration was not understood.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnitError {
    /// Not a byte count.
    #[error("'{0}' is not a number of bytes: write for example 4096, 512MiB or 8GiB")]
    Bytes(String),
    /// Not a duration.
    #[error("'{0}' is not a duration: write for example 2s, 500ms or 1.5s")]
    Duration(String),
}

/// Reads a byte count: a whole number and optionally a unit.
///
/// `KiB MiB GiB TiB` are powers of 1024, `kB MB GB TB` powers of 1000; a bare
/// `K M G T` is a power of 1024, as in most tools that allocate memory.
pub fn parse_bytes(text: &str) -> Result<u64, UnitError> {
    let refused = || UnitError::Bytes(text.to_owned());
    let trimmed = text.trim();
    let digits = trimmed.len()
        - trimmed
            .trim_start_matches(|c: char| c.is_ascii_digit())
            .len();
    let (number, unit) = trimmed.split_at(digits);
    let number: u64 = number.parse().map_err(|_| refused())?;
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(refused()),
    };
    number.checked_mul(factor).ok_or_else(refused)
}

/// Reads a duration: a number and `ms`, `s` or `min`. Zero is refused.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let refused = || UnitError::Duration(text.to_owned());
    let trimmed = text.trim();
    let number = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &trimmed[number.len()..] {
        "ms" => 0.001,
        "s" => 1.0,
        "min" => 60.0,
        _ => return Err(refused()),
    };
    let number: f64 = number.trim().parse().map_err(|_| refused())?;
    let duration = Duration::try_from_secs_f64(number * factor).map_err(|_| refused())?;
    // A year: longer ones overflow when added to the clock.
    let sensible = Duration::from_millis(1)..=Duration::from_secs(365 * 24 * 3600);
    if sensible.contains(&duration) {
        Ok(duration)
    } else {
        Err(refused())
    }
}

/// Writes a byte count with a decimal unit, as rates are decimal too.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [(f64, &str); 4] = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    for (factor, unit) in UNITS {
        if bytes as f64 >= factor {
            return format!("{:.1} {unit}", bytes as f64 / factor);
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("8GiB"), Ok(8 << 30));
        assert_eq!(parse_bytes("2 GB"), Ok(2_000_000_000));
        assert_eq!(parse_bytes("16M"), Ok(16 << 20));
        for bad in ["", "G", "-1", "1.5G", "1 parsec", "99999999999T", "1é"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        for bad in [
            "", "2", "s", "0s", "-1s", "NaNs", "infs", "1e300s", "2 weeks", "2é",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown_bytes() {
        assert_eq!(show_bytes(999), "999 B");
        assert_eq!(show_bytes(90_900_000), "90.9 MB");
    }
}
