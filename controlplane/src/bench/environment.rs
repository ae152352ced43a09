//! Where a benchmark runs, and how busy that machine is with other things.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use super::report::Environment;

/// Reads all that is known before the run.
pub fn survey() -> Environment {
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Environment {
        genie: env!("CARGO_PKG_VERSION").into(),
        commit: commit(),
        optimised: !cfg!(debug_assertions),
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        cpu: model.map_or("unknown", |(_, model)| model).into(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        cache_bytes: cache_bytes(),
        memory_bytes: rustix::system::sysinfo().totalram as u64,
        free_hugepages: free_hugepages(),
        root: rustix::process::geteuid().is_root(),
        tcp_congestion: non_empty(read("/proc/sys/net/ipv4/tcp_congestion_control")),
        dpdk: match genie_dataplane::dpdk::load() {
            Ok(library) => library.dpdk_version(),
            Err(error) => error.to_string(),
        },
        busy_others: None,
        stolen: None,
    }
}

/// Huge pages of 2 MiB that are free now.
pub fn free_hugepages() -> u64 {
    let free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    read(free).trim().parse().unwrap_or(0)
}

/// Whether this process may give a socket this congestion control.
pub fn may_choose(control: &str) -> bool {
    let allowed = read("/proc/sys/net/ipv4/tcp_allowed_congestion_control");
    rustix::process::geteuid().is_root() || allowed.split_whitespace().any(|one| one == control)
}

/// How much of the machine others use, from [`Watch::start`] on.
#[derive(Debug)]
pub struct Watch {
    started: Instant,
    before: Jiffies,
    ours_before: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Jiffies {
    busy: u64,
    stolen: u64,
    all: u64,
}

impl Watch {
    /// Begins to watch.
    pub fn start() -> Self {
        Self {
            started: Instant::now(),
            before: jiffies(),
            ours_before: our_jiffies(),
        }
    }

    /// Writes down what others used. Processes that were started here and have
    /// ended are not others.
    pub fn finish(self, environment: &mut Environment) {
        let after = jiffies();
        let all = after.all.saturating_sub(self.before.all) as f64;
        if all == 0.0 || self.started.elapsed() < Duration::from_millis(200) {
            return;
        }
        let busy = after.busy.saturating_sub(self.before.busy) as f64;
        let others = busy - our_jiffies().saturating_sub(self.ours_before) as f64;
        environment.busy_others = Some((others / all).max(0.0));
        let stolen = after.stolen.saturating_sub(self.before.stolen) as f64;
        environment.stolen = Some(stolen / all);
    }
}

/// CPU time of this process so far, all its threads, user and kernel.
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// CPU time of a process so far, all its threads, user and kernel, to 10 ms.
pub fn cpu_time_of(process: u32) -> Option<Duration> {
    let [user, kernel, ..] = ticks(&format!("/proc/{process}/stat"))?;
    let per_second = rustix::param::clock_ticks_per_second();
    Some(Duration::from_secs_f64(
        (user + kernel) as f64 / per_second as f64,
    ))
}

/// Now, UTC, as RFC 3339 writes it.
pub fn date() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The Gregorian date so many days after 1970-01-01 (Hinnant, `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (400 * era + year_of_era + u64::from(month <= 2), month, day)
}

/// `GENIE_COMMIT`, or what git says of the folder the binary was built in.
fn commit() -> Option<String> {
    if let Some(commit) = std::env::var("GENIE_COMMIT").ok().and_then(non_empty) {
        return Some(commit);
    }
    let binary = std::env::current_exe().ok()?;
    let output = Command::new("git")
        .arg("-C")
        .arg(binary.parent()?)
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    non_empty(text).filter(|_| output.status.success())
}

/// The largest cache of the first processor.
fn cache_bytes() -> Option<u64> {
    let folder = fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let sizes = folder.flatten().filter_map(|entry| {
        let text = fs::read_to_string(entry.path().join("size")).ok()?;
        crate::units::parse_bytes(text.trim()).ok()
    });
    sizes.max()
}

/// Of this process and of its children that have ended.
fn our_jiffies() -> u64 {
    ticks("/proc/self/stat").map_or(0, |ticks| ticks.iter().sum())
}

/// User and kernel time of a process, and of its children that have ended.
fn ticks(path: &str) -> Option<[u64; 4]> {
    let text = read(path);
    // The name, in parentheses, may hold anything; utime is the 12th behind it.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = [0; 4];
    for tick in &mut ticks {
        *tick = fields.next()?.parse().ok()?;
    }
    Some(ticks)
}

fn jiffies() -> Jiffies {
    let text = read("/proc/stat");
    let Some(line) = text.lines().find_map(|line| line.strip_prefix("cpu ")) else {
        return Jiffies::default();
    };
    // user nice system idle iowait irq softirq steal; guests are in user.
    let fields: Vec<u64> = line
        .split_whitespace()
        .flat_map(str::parse)
        .take(8)
        .collect();
    let at = |index: usize| fields.get(index).copied().unwrap_or(0);
    let all = fields.iter().sum();
    let stolen = at(7);
    Jiffies {
        busy: all - at(3) - at(4) - stolen,
        stolen,
        all,
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn non_empty(text: String) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(20_454), (2026, 1, 1));
        assert_eq!(date().len(), "2026-01-01T00:00:00Z".len());
    }

    #[test]
    fn what_this_process_uses_is_not_others() {
        let before = our_jiffies();
        let until = Instant::now() + Duration::from_secs(20);
        // Ten ticks of work.
        while our_jiffies() < before + 10 {
            assert!(Instant::now() < until, "no time is counted");
        }
        let of_process = cpu_time().as_secs_f64() * rustix::param::clock_ticks_per_second() as f64;
        assert!((our_jiffies() as f64) < of_process * 2.0 + 100.0);
    }

    #[test]
    fn this_machine_is_known() {
        let environment = survey();
        assert!(environment.cpus > 0 && environment.memory_bytes > 1 << 20);
        assert!(!environment.kernel.is_empty() && !environment.dpdk.is_empty());
    }
}
