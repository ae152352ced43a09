//! Checks of the host: the agent, memory, DPDK, what this user may do, the clock.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use genie_dataplane::dpdk;
use genie_hugepages::{Backing, PageSize};

use super::system::{AgentReply, DpdkLack, System};
use super::{Finding, Wanted, as_root, network};
use crate::status::AgentStatus;
use crate::units::show_bytes;

/// Certificates made by this build cannot be valid before it was written.
const OLDEST_CLOCK: Duration = Duration::from_secs(1_750_000_000);

/// Descriptors that a busy agent needs: one for each connection, arena and stream.
const DESCRIPTORS: u64 = 4096;

/// What a NIC's queues and an arena want pinned, at least.
const PINNED: u64 = 256 << 20;

pub(super) fn agent(system: &dyn System, wanted: &Wanted) -> Vec<Finding> {
    let what = "agent";
    let Some(socket) = &wanted.socket else {
        return Vec::new();
    };
    let place = socket.display();
    let status = match system.agent(socket) {
        AgentReply::Absent => {
            return vec![Finding::warn(
                what,
                format!("none answers on {place}"),
                format!("genie agent --socket {place}"),
            )];
        }
        AgentReply::Refused(why) => {
            let mend = as_root(system, "genie doctor");
            return vec![Finding::warn(what, why, mend)];
        }
        AgentReply::Status(status) => status,
    };
    let summary = format!("{} (genie {}) on {place}", status.name, status.version);
    let mut findings = vec![Finding::ok(what, summary)];
    if let Some(warning) = &status.warning {
        let mend = "genie agent --listen 127.0.0.1:5555 --data 127.0.0.1:5556";
        findings.push(Finding::warn("security", warning, mend));
    }
    for transport in &status.transports {
        let what = format!("agent: {}", transport.transport);
        findings.push(match (&transport.path, &transport.reason) {
            (Some(path), _) => Finding::ok(what, path),
            (None, reason) => {
                let reason = reason.as_deref().unwrap_or("it cannot be used");
                Finding {
                    mend: mend_transport(system, &status, reason),
                    ..Finding::warn(what, reason, "")
                }
            }
        });
    }
    findings
}

/// What gives an agent the transport that it is without for this reason. Other
/// reasons name the command themselves, or are mended as another finding says.
fn mend_transport(system: &dyn System, status: &AgentStatus, reason: &str) -> Option<String> {
    if reason.contains("(--dpdk-device)") {
        let device = network::dpdk_device(system);
        let name = &status.name;
        let command = format!("genie agent --name {name} --dpdk-device {device}");
        return Some(as_root(system, &command));
    }
    reason
        .starts_with("no huge pages")
        .then(|| reserve_pages(system))
}

pub(super) fn socket(system: &dyn System, wanted: &Wanted) -> Vec<Finding> {
    let what = "application socket";
    let elsewhere = format!("genie agent --socket /tmp/genie-{}.sock", system.uid());
    let Some(socket) = &wanted.socket else {
        let why = "there is no default place: XDG_RUNTIME_DIR is not set";
        return vec![Finding::warn(what, why, elsewhere)];
    };
    if matches!(system.agent(socket), AgentReply::Status(_)) {
        return vec![Finding::ok(what, format!("{} is in use", socket.display()))];
    }
    // An agent makes the folders that are missing.
    let folder = socket
        .ancestors()
        .skip(1)
        .find(|folder| !folder.as_os_str().is_empty() && folder.exists());
    let folder = folder.unwrap_or(Path::new("."));
    if system.writable(folder) {
        let why = format!("{} can be made", socket.display());
        return vec![Finding::ok(what, why)];
    }
    let why = format!("this user may not write in {}", folder.display());
    vec![Finding::warn(what, why, elsewhere)]
}

pub(super) fn huge_pages(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let what = "huge pages";
    let wanted = u64::from(dpdk::Options::default().memory_mib) << 20;
    let pages = PageSize::MB_2.pages_for(wanted);
    let survey = match system.huge_pages() {
        Ok(survey) => survey,
        Err(why) => {
            return vec![Finding::warn(
                what,
                why,
                as_root(system, "mount -t sysfs sysfs /sys"),
            )];
        }
    };
    let Some(pool) = survey.pool(PageSize::MB_2) else {
        let why = "this kernel has no pages of 2 MiB: DPDK and huge arenas cannot be used";
        return vec![Finding {
            mend: None,
            ..Finding::warn(what, why, "")
        }];
    };
    let free = pool.usable();
    let choice = survey.choose(PageSize::MB_2, wanted);
    if matches!(choice.backing, Backing::Huge(_)) {
        let why = format!("{free} of {} pages of 2 MiB are free", pool.total);
        return vec![Finding::ok(what, why)];
    }
    if free >= pages {
        // A control group's limit; the survey says how to raise it.
        let why = choice.reasons.into_iter().next().unwrap_or_default();
        let mend = as_root(system, "genie hugepages status");
        return vec![Finding::warn(what, why, mend)];
    }
    let why = format!("a DPDK port takes {pages} pages of 2 MiB, and {free} are free");
    vec![Finding::warn(what, why, reserve_pages(system))]
}

/// The command that reserves what a DPDK port takes.
fn reserve_pages(system: &dyn System) -> String {
    let wanted = u64::from(dpdk::Options::default().memory_mib) << 20;
    let pages = PageSize::MB_2.pages_for(wanted);
    as_root(system, &format!("genie hugepages reserve 2M:{pages}"))
}

pub(super) fn dpdk(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let what = "DPDK";
    vec![match system.dpdk() {
        Ok(version) => Finding::ok(what, version),
        Err((why, lack)) => {
            let mend = match lack {
                DpdkLack::Library => as_root(system, "apt-get install -y libdpdk-dev"),
                DpdkLack::Driver | DpdkLack::Files => {
                    "cargo build --release -p genie-controlplane -p genie-dpdk-driver".to_owned()
                }
            };
            Finding::warn(what, why, mend)
        }
    }]
}

/// Capabilities and what needs them (capabilities(7)).
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (12, "CAP_NET_ADMIN", "af_packet and af_xdp devices"),
    (13, "CAP_NET_RAW", "af_packet and af_xdp devices"),
    (14, "CAP_IPC_LOCK", "pinned memory beyond the limit"),
    (
        21,
        "CAP_SYS_ADMIN",
        "af_xdp devices and reserving huge pages",
    ),
];

pub(super) fn capabilities(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let what = "capabilities";
    let status = system.read("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let lacking = CAPABILITIES
        .iter()
        .filter(|(bit, ..)| effective & 1 << bit == 0);
    let lacking: Vec<String> = lacking
        .map(|(_, name, needs)| format!("{name} ({needs})"))
        .collect();
    vec![if lacking.is_empty() {
        Finding::ok(what, "all that Genie can use")
    } else {
        let why = format!("missing, TCP works without: {}", lacking.join(", "));
        Finding::warn(what, why, "sudo genie agent")
    }]
}

pub(super) fn limits(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let limits = system.read("/proc/self/limits").unwrap_or_default();
    let soft = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        let soft = line.split_whitespace().next()?;
        Some(soft.parse().unwrap_or(u64::MAX))
    };
    let mut findings = Vec::new();
    if let Some(files) = soft("Max open files") {
        findings.push(if files >= DESCRIPTORS {
            Finding::ok("open files", limit(files, |files| files.to_string()))
        } else {
            let why = format!("{files} descriptors, a busy agent needs {DESCRIPTORS}");
            let raise = format!("prlimit --pid $$ --nofile={DESCRIPTORS}:{DESCRIPTORS}");
            Finding::warn("open files", why, as_root(system, &raise))
        });
    }
    if let Some(bytes) = soft("Max locked memory") {
        findings.push(if bytes >= PINNED || system.uid() == 0 {
            Finding::ok("locked memory", limit(bytes, show_bytes))
        } else {
            let why = format!(
                "{}, a NIC's memory takes {}",
                show_bytes(bytes),
                show_bytes(PINNED)
            );
            let raise = "prlimit --pid $$ --memlock=unlimited:unlimited";
            Finding::warn("locked memory", why, as_root(system, raise))
        });
    }
    findings
}

fn limit(value: u64, show: impl Fn(u64) -> String) -> String {
    if value == u64::MAX {
        "unlimited".to_owned()
    } else {
        format!("up to {}", show(value))
    }
}

pub(super) fn clock(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let what = "clock";
    let since = system.now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if since < OLDEST_CLOCK {
        let why = "it stands before this program was written, so certificates seem not yet valid";
        let mend = as_root(system, keep_in_step(system));
        return vec![Finding::warn(what, why, mend)];
    }
    let folder = "/sys/devices/system/clocksource/clocksource0";
    let read = |file| system.read(&format!("{folder}/{file}")).unwrap_or_default();
    let (source, available) = (read("current_clocksource"), read("available_clocksource"));
    let source = source.trim();
    // Reading these takes microseconds, and engines read the clock all the time.
    let slow = ["hpet", "acpi_pm", "jiffies"].contains(&source);
    let fast = available
        .split_whitespace()
        .find(|name| ["tsc", "kvm-clock"].contains(name));
    vec![match (slow, fast) {
        (true, Some(fast)) => {
            let why = format!("the kernel reads it from {source}, which is slow");
            let set = format!("sh -c 'echo {fast} > {folder}/current_clocksource'");
            Finding::warn(what, why, as_root(system, &set))
        }
        _ if source.is_empty() => Finding::ok(what, "set"),
        _ => Finding::ok(what, format!("set, read from {source}")),
    }]
}

pub(super) fn synchronisation(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let what = "clock synchronisation";
    vec![match system.clock() {
        Ok(clock) if clock.synchronised => {
            let most = clock.error_most.as_millis();
            Finding::ok(what, format!("in step with the world, within {most} ms"))
        }
        Ok(_) => {
            let why = "nobody keeps it in step (NTP): certificates may seem expired or not yet \
                       valid, and times in logs of several hosts do not compare";
            Finding::warn(what, why, as_root(system, keep_in_step(system)))
        }
        Err(why) => Finding::ok(what, format!("the kernel does not say: {why}")),
    }]
}

/// What sets the clock and keeps it so, with systemd and, as in containers, without.
fn keep_in_step(system: &dyn System) -> &'static str {
    if system
        .list("/run/systemd")
        .iter()
        .any(|name| name == "system")
    {
        "sh -c 'apt-get install -y systemd-timesyncd && timedatectl set-ntp true'"
    } else {
        "sh -c 'apt-get install -y chrony && { pidof chronyd || chronyd; }'"
    }
}

pub(super) fn cuda(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let what = "CUDA";
    vec![match system.cuda() {
        Ok(device) => Finding::ok(what, device),
        Err(why) if has_gpu(system) => Finding::warn(
            what,
            why,
            as_root(system, "apt-get install -y nvidia-driver"),
        ),
        Err(_) => Finding::ok(
            what,
            "no NVIDIA device on the PCI bus: tensors live in host memory",
        ),
    }]
}

/// Whether a display or 3D controller of NVIDIA's is there, driver or not.
fn has_gpu(system: &dyn System) -> bool {
    let folder = "/sys/bus/pci/devices";
    system.list(folder).iter().any(|device| {
        let read = |file| system.read(&format!("{folder}/{device}/{file}"));
        let is = |file, start: &str| read(file).is_some_and(|text| text.starts_with(start));
        is("vendor", "0x10de") && is("class", "0x03")
    })
}
