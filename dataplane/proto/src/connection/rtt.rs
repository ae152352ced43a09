//! The round-trip estimate of RFC 9002 section 5.

use std::time::Duration;

use super::Config;

#[derive(Clone, Debug)]
pub(super) struct Rtt {
    sampled: Option<Sampled>,
    initial: Duration,
    granularity: Duration,
    ack_delay_max: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Sampled {
    latest: Duration,
    min: Duration,
    smoothed: Duration,
    variation: Duration,
}

impl Rtt {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            sampled: None,
            initial: config.initial_rtt,
            granularity: config.granularity,
            ack_delay_max: config.ack_delay_max,
        }
    }

    pub(super) fn sample(&mut self, latest: Duration, ack_delay: Duration) {
        let Some(rtt) = &mut self.sampled else {
            let variation = latest / 2;
            self.sampled = Some(Sampled {
                latest,
                min: latest,
                smoothed: latest,
                variation,
            });
            return;
        };
        rtt.latest = latest;
        rtt.min = rtt.min.min(latest);
        // The delay that the peer reports is subtracted only as far as the path's minimum.
        let ack_delay = ack_delay.min(self.ack_delay_max);
        let adjusted = if latest >= rtt.min + ack_delay {
            latest - ack_delay
        } else {
            latest
        };
        rtt.variation = (rtt.variation * 3 + rtt.smoothed.abs_diff(adjusted)) / 4;
        rtt.smoothed = (rtt.smoothed * 7 + adjusted) / 8;
    }

    pub(super) fn smoothed(&self) -> Option<Duration> {
        self.sampled.map(|rtt| rtt.smoothed)
    }

    pub(super) fn min(&self) -> Option<Duration> {
        self.sampled.map(|rtt| rtt.min)
    }

    /// Section 6.1.2: how long after it was sent a packet is lost, if a later one is acknowledged.
    pub(super) fn loss_delay(&self) -> Duration {
        let rtt = self
            .sampled
            .map_or(self.initial, |rtt| rtt.smoothed.max(rtt.latest));
        (rtt * 9 / 8).max(self.granularity)
    }

    /// Section 6.2.1: the probe timeout before backing off.
    pub(super) fn pto(&self) -> Duration {
        let (smoothed, variation) = self
            .sampled
            .map_or((self.initial, self.initial / 2), |rtt| {
                (rtt.smoothed, rtt.variation)
            });
        smoothed + (variation * 4).max(self.granularity) + self.ack_delay_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn rtt() -> Rtt {
        Rtt::new(&Config {
            initial_rtt: 100 * MS,
            granularity: MS,
            ack_delay_max: 5 * MS,
            ..Config::default()
        })
    }

    #[test]
    fn without_a_sample_the_initial_round_trip_counts() {
        assert_eq!(rtt().pto(), (100 + 200 + 5) * MS);
        assert_eq!(
            rtt().loss_delay(),
            112 * MS + 500 * Duration::from_micros(1)
        );
    }

    #[test]
    fn samples_are_smoothed_as_in_rfc_9002_section_5_3() {
        let mut rtt = rtt();
        rtt.sample(80 * MS, 5 * MS);
        assert_eq!(rtt.smoothed(), Some(80 * MS));
        assert_eq!(rtt.pto(), (80 + 160 + 5) * MS);
        rtt.sample(100 * MS, 4 * MS);
        // Adjusted 96; variation (3·40 + 16) / 4 = 34; smoothed (7·80 + 96) / 8 = 82.
        assert_eq!(rtt.smoothed(), Some(82 * MS));
        assert_eq!(rtt.pto(), (82 + 4 * 34 + 5) * MS);
        assert_eq!(rtt.min(), Some(80 * MS));
        // A delay that would take the sample below the minimum is not believed.
        rtt.sample(82 * MS, 4 * MS);
        assert_eq!(rtt.smoothed(), Some(82 * MS));
        // And none beyond the bound.
        rtt.sample(90 * MS, 100 * MS);
        assert_eq!(rtt.smoothed(), Some((82 * MS * 7 + 85 * MS) / 8));
    }
}
