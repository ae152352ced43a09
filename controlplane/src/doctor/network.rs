//! Checks of the network: loopback, ports, cards and what reaches them.

use super::system::{AgentReply, Bind, System};
use super::{Finding, Wanted, as_root};

/// The IP packet that a DPDK path wants to fill.
const JUMBO: u32 = 9000;

pub(super) fn loopback(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let what = "TCP on loopback";
    vec![match system.loopback() {
        Ok(()) => Finding::ok(what, "bytes arrive"),
        Err(why) => Finding::broken(what, why, as_root(system, "ip link set lo up")),
    }]
}

pub(super) fn ports(system: &dyn System, wanted: &Wanted) -> Vec<Finding> {
    let agent = wanted.socket.as_ref().map(|socket| system.agent(socket));
    let held = |address| match &agent {
        Some(AgentReply::Status(status)) => {
            let data = status.transports.iter().filter_map(|one| one.data);
            data.chain([status.listen])
                .chain(status.metrics.address)
                .any(|own| own == address)
        }
        _ => false,
    };
    let one = |(flag, address): &(&'static str, _)| {
        let what = format!("port {address}");
        if held(*address) {
            return Finding::ok(what, "this host's agent listens there");
        }
        match system.bind(*address) {
            Bind::Free => Finding::ok(what, "free"),
            Bind::Taken => {
                let mut other = *address;
                other.set_port(system.free_port(*address).unwrap_or(0));
                let why = format!(
                    "another program listens there (ss -ltnp 'sport = :{}' shows it)",
                    address.port()
                );
                Finding::warn(what, why, format!("genie agent {flag} {other}"))
            }
            Bind::Refused(why) => {
                Finding::warn(what, why, format!("genie agent {flag} 127.0.0.1:0"))
            }
        }
    };
    wanted.addresses.iter().map(one).collect()
}

const PCI: &str = "/sys/bus/pci/devices";

/// Network controllers on the PCI bus (class 02).
fn nics(system: &dyn System) -> Vec<String> {
    let mut devices = system.list(PCI);
    devices.retain(|device| {
        let class = system.read(&format!("{PCI}/{device}/class"));
        class.is_some_and(|class| class.starts_with("0x02"))
    });
    devices
}

/// Drivers that hand a card over to DPDK.
const DPDKS: [&str; 3] = ["vfio-pci", "uio_pci_generic", "igb_uio"];

/// Drivers beside which DPDK works.
const BIFURCATED: [&str; 3] = ["mlx4_core", "mlx5_core", "mana"];

pub(super) fn cards(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let nics = nics(system);
    if nics.is_empty() {
        return vec![Finding::ok(
            "network cards",
            "none on the PCI bus: DPDK can use pair: and vdev: devices",
        )];
    }
    nics.iter().map(|address| card(system, address)).collect()
}

/// A device that an agent here could open: the first card that DPDK can use, or
/// the one that needs none.
pub(super) fn dpdk_device(system: &dyn System) -> String {
    let usable = |address: &String| {
        let driver = system.link(&format!("{PCI}/{address}/driver"));
        driver.is_some_and(|driver| {
            let driver = driver.as_str();
            DPDKS.contains(&driver) || BIFURCATED.contains(&driver)
        })
    };
    let card = nics(system).into_iter().find(usable);
    card.map_or("pair:/tmp/genie-pair.sock".to_owned(), |address| {
        format!("pci:{address}")
    })
}

fn card(system: &dyn System, address: &str) -> Finding {
    let what = format!("network card {address}");
    let driver = system.link(&format!("{PCI}/{address}/driver"));
    let bind = as_root(system, &format!("scripts/bind-nic bind {address}"));
    match driver.as_deref() {
        Some(driver) if DPDKS.contains(&driver) => Finding::ok(
            what,
            format!("bound to {driver}: --dpdk-device pci:{address}"),
        ),
        Some(driver) if BIFURCATED.contains(&driver) => Finding::ok(
            what,
            format!("{driver} serves kernel and DPDK: --dpdk-device pci:{address}"),
        ),
        Some(driver) => {
            let why = format!("the kernel's {driver} has it, so DPDK cannot use it");
            Finding::warn(what, why, bind)
        }
        None => Finding::warn(what, "no driver has it", bind),
    }
}

pub(super) fn iommu(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let what = "IOMMU and VFIO";
    if nics(system).is_empty() {
        return vec![Finding::ok(
            what,
            "not needed: there is no network card on the PCI bus",
        )];
    }
    if system.list("/sys/class/iommu").is_empty() {
        let why = "the kernel uses no IOMMU, which VFIO wants (reboot after the mend)";
        let mend = as_root(
            system,
            "sh -c 'echo GRUB_CMDLINE_LINUX=\\\"intel_iommu=on amd_iommu=on iommu=pt\\\" > \
             /etc/default/grub.d/iommu.cfg && update-grub'",
        );
        return vec![Finding::warn(what, why, mend)];
    }
    if system.list("/dev/vfio").is_empty() {
        let mend = as_root(system, "modprobe vfio-pci");
        return vec![Finding::warn(
            what,
            "the module vfio-pci is not loaded",
            mend,
        )];
    }
    vec![Finding::ok(what, "on, and loaded")]
}

/// What a card should do for the kernel's TCP: ethtool's name and its short one.
const OFFLOADS: [(&str, &str); 5] = [
    ("rx-checksumming", "rx"),
    ("tx-checksumming", "tx"),
    ("scatter-gather", "sg"),
    ("tcp-segmentation-offload", "tso"),
    ("generic-receive-offload", "gro"),
];

pub(super) fn offloads(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let mut interfaces = system.list(NET);
    // Cards, not bridges, tunnels and loopback.
    interfaces.retain(|name| system.link(&format!("{NET}/{name}/device")).is_some());
    interfaces
        .iter()
        .map(|name| interface_offloads(system, name))
        .collect()
}

fn interface_offloads(system: &dyn System, name: &str) -> Finding {
    let what = format!("offloads of {name}");
    let Some(features) = system.offloads(name) else {
        let mend = as_root(system, "apt-get install -y ethtool");
        return Finding::warn(what, "ethtool cannot be run to ask for them", mend);
    };
    let state = |feature: &str| {
        let mut lines = features.lines();
        lines.find_map(|line| line.strip_prefix(feature)?.strip_prefix(": "))
    };
    let (mut missing, mut off) = (Vec::new(), Vec::new());
    for (feature, short) in OFFLOADS {
        match state(feature) {
            Some("off") => off.push((feature, short)),
            Some(state) if !state.starts_with("off") => {}
            _ => missing.push(feature),
        }
    }
    let lacks = |list: &[&str]| match list {
        [] => String::new(),
        list => format!("; the device lacks {}", list.join(", ")),
    };
    if off.is_empty() {
        let why = match &missing[..] {
            [] => "all that kernel TCP wants".to_owned(),
            list => format!("the device lacks {}: the CPU does it", list.join(", ")),
        };
        return Finding::ok(what, why);
    }
    let names: Vec<&str> = off.iter().map(|(feature, _)| *feature).collect();
    let why = format!(
        "turned off, so the CPU does it for kernel TCP: {}{}",
        names.join(", "),
        lacks(&missing)
    );
    let turn_on: String = off
        .iter()
        .map(|(_, short)| format!(" {short} on"))
        .collect();
    Finding::warn(
        what,
        why,
        as_root(system, &format!("ethtool -K {name}{turn_on}")),
    )
}

/// What the device lacks that the agent on this host has opened.
pub(super) fn device_offloads(system: &dyn System, wanted: &Wanted) -> Vec<Finding> {
    let agent = wanted.socket.as_ref().map(|socket| system.agent(socket));
    let Some(AgentReply::Status(status)) = agent else {
        return Vec::new();
    };
    let engines = status
        .transports
        .iter()
        .filter_map(|one| one.engine.as_ref());
    let lacking = engines.filter(|engine| !engine.lacks.is_empty());
    let finding = |engine: &genie_dataplane::engine::Snapshot| {
        let what = format!("offloads of {}", engine.driver);
        let lacks = engine.lacks.join(", ");
        Finding::ok(
            what,
            format!("the device lacks {lacks}: the CPU does it, or does without"),
        )
    };
    lacking.map(finding).collect()
}

const NET: &str = "/sys/class/net";

pub(super) fn mtu(system: &dyn System, _: &Wanted) -> Vec<Finding> {
    let folder = NET;
    let mut findings = Vec::new();
    for name in system.list(folder) {
        let read = |file| system.read(&format!("{folder}/{name}/{file}"));
        // Cards, not bridges, tunnels and loopback.
        if system.link(&format!("{folder}/{name}/device")).is_none() {
            continue;
        }
        let Some(mtu) = read("mtu").and_then(|mtu| mtu.trim().parse::<u32>().ok()) else {
            continue;
        };
        let what = format!("MTU of {name}");
        findings.push(if mtu >= JUMBO {
            Finding::ok(what, mtu.to_string())
        } else {
            let why = format!("{mtu}: frames of {JUMBO} bytes cost less for each byte, where the network takes them");
            Finding::warn(what, why, as_root(system, &format!("ip link set dev {name} mtu {JUMBO}")))
        });
    }
    findings
}
