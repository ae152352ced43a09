//! A made-up machine, and what the doctor says of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use genie_clock::Clock;
use genie_hugepages::{PageSize, Pool, Survey, Transparent};

use super::system::{AgentReply, Bind, DpdkLack, PeerReply, System};
use super::{Finding, Report, State, Wanted, examine};
use crate::session::testing;
use crate::status::{AgentStatus, PeerStatus, SessionStatus, TransportStatus};

/// A server of root's with everything, unless a test takes something away.
struct Fake {
    uid: u32,
    files: BTreeMap<String, String>,
    links: BTreeMap<String, String>,
    writable: bool,
    free_pages: u64,
    dpdk: Result<String, (String, DpdkLack)>,
    cuda: Result<String, String>,
    loopback: Result<(), String>,
    taken: Vec<SocketAddr>,
    year: u64,
    synchronised: bool,
    offloads: Option<String>,
    agent: AgentReply,
    session: Result<SessionStatus, String>,
    peer: PeerReply,
}

const OFFLOADS: &str = "Features for eth0:\n\
    rx-checksumming: on\n\
    tx-checksumming: on\n\
    \ttx-checksum-ipv4: off [fixed]\n\
    scatter-gather: on\n\
    tcp-segmentation-offload: on\n\
    generic-receive-offload: on\n";

const NIC: &str = "/sys/bus/pci/devices/0000:3b:00.0";

impl Fake {
    fn new() -> Self {
        let file = |(path, text): (&str, &str)| (path.to_owned(), text.to_owned());
        let class = format!("{NIC}/class");
        let files = [
            (class.as_str(), "0x020000\n"),
            ("/sys/class/iommu/dmar0", ""),
            ("/dev/vfio/vfio", ""),
            ("/sys/class/net/eth0/mtu", "9000\n"),
            (
                "/proc/self/status",
                "Name:\tgenie\nCapEff:\t000001ffffffffff\n",
            ),
            (
                "/proc/self/limits",
                "Max open files            1048576   1048576   files\n\
                 Max locked memory         unlimited unlimited bytes\n",
            ),
            (
                "/sys/devices/system/clocksource/clocksource0/current_clocksource",
                "tsc\n",
            ),
        ];
        let links = [
            (format!("{NIC}/driver"), "vfio-pci".to_owned()),
            (
                "/sys/class/net/eth0/device".to_owned(),
                "0000:00:03.0".to_owned(),
            ),
        ];
        Self {
            uid: 0,
            files: files.map(file).into(),
            links: links.into(),
            writable: true,
            free_pages: 512,
            dpdk: Ok("DPDK 22.11.11".to_owned()),
            cuda: Ok("H100, driver 570".to_owned()),
            loopback: Ok(()),
            taken: Vec::new(),
            year: 2030,
            synchronised: true,
            offloads: Some(OFFLOADS.to_owned()),
            agent: AgentReply::Status(Box::new(status())),
            session: Err("no session".to_owned()),
            peer: PeerReply::Genie(Duration::from_micros(80)),
        }
    }

    fn set(&mut self, path: &str, text: &str) {
        self.files.insert(path.to_owned(), text.to_owned());
    }

    fn examine(&self) -> Report {
        examine(self, &wanted())
    }

    /// The finding on `what`, which is the only one.
    fn find(&self, what: &str) -> Finding {
        let findings = self.examine().findings;
        let mut found = findings.into_iter().filter(|finding| finding.what == what);
        let one = found.next().unwrap_or_else(|| panic!("nothing on {what}"));
        assert_eq!(found.next(), None);
        one
    }

    fn peer(&self, node: &str) -> Vec<Finding> {
        super::peer::peer(self, &wanted(), node)
    }
}

fn status() -> AgentStatus {
    let mut status = testing::node().status(0);
    status.listen = ([127, 0, 0, 1], 5555).into();
    status.peers = vec![PeerStatus {
        name: "b".to_owned(),
        address: "10.0.0.2:5555".to_owned(),
    }];
    status
}

fn wanted() -> Wanted {
    Wanted {
        socket: Some(PathBuf::from("/nowhere/genie.sock")),
        addresses: vec![
            ("--listen", ([127, 0, 0, 1], 5555).into()),
            ("--data", ([127, 0, 0, 1], 5556).into()),
        ],
        node: None,
    }
}

impl System for Fake {
    fn uid(&self) -> u32 {
        self.uid
    }

    fn read(&self, path: &str) -> Option<String> {
        self.files.get(path).cloned()
    }

    fn list(&self, path: &str) -> Vec<String> {
        let below = |name: &String| {
            let rest = name.strip_prefix(path)?.strip_prefix('/')?;
            Some(rest.split('/').next()?.to_owned())
        };
        let mut names: Vec<_> = self
            .files
            .keys()
            .chain(self.links.keys())
            .filter_map(below)
            .collect();
        names.sort();
        names.dedup();
        names
    }

    fn link(&self, path: &str) -> Option<String> {
        self.links.get(path).cloned()
    }

    fn writable(&self, _: &Path) -> bool {
        self.writable
    }

    fn huge_pages(&self) -> Result<Survey, String> {
        let pool = Pool {
            size: PageSize::MB_2,
            total: self.free_pages,
            free: self.free_pages,
            promised: 0,
            surplus: 0,
            overcommit: 0,
            nodes: Vec::new(),
        };
        Ok(Survey {
            pools: vec![pool],
            nodes: vec![0],
            mounts: Vec::new(),
            memlock: None,
            cgroups: Vec::new(),
            transparent: Transparent::Never,
        })
    }

    fn dpdk(&self) -> Result<String, (String, DpdkLack)> {
        self.dpdk.clone()
    }

    fn cuda(&self) -> Result<String, String> {
        self.cuda.clone()
    }

    fn loopback(&self) -> Result<(), String> {
        self.loopback.clone()
    }

    fn bind(&self, address: SocketAddr) -> Bind {
        if self.taken.contains(&address) {
            Bind::Taken
        } else {
            Bind::Free
        }
    }

    fn free_port(&self, _: SocketAddr) -> Option<u16> {
        Some(4321)
    }

    fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs((self.year - 1970) * 365 * 24 * 3600)
    }

    fn clock(&self) -> Result<Clock, String> {
        Ok(Clock {
            synchronised: self.synchronised,
            error_most: Duration::from_millis(3),
        })
    }

    fn offloads(&self, _: &str) -> Option<String> {
        self.offloads.clone()
    }

    fn agent(&self, _: &Path) -> AgentReply {
        self.agent.clone()
    }

    fn session(&self, _: &Path, _: &str) -> Result<SessionStatus, String> {
        self.session.clone()
    }

    fn knock(&self, _: &str) -> PeerReply {
        self.peer.clone()
    }
}

fn is(finding: &Finding, state: State, mend: &str) {
    assert_eq!(finding.state, state, "{finding:?}");
    assert_eq!(finding.mend.as_deref(), Some(mend), "{finding:?}");
    assert!(!finding.why.is_empty(), "{finding:?}");
}

#[test]
fn where_everything_is_well_nothing_is_to_be_mended() {
    let report = Fake::new().examine();
    assert!(report.usable);
    for finding in &report.findings {
        assert_eq!(finding.state, State::Ok, "{finding:?}");
        assert_eq!(finding.mend, None, "{finding:?}");
    }
    let card = Fake::new().find("network card 0000:3b:00.0");
    assert!(
        card.why.contains("--dpdk-device pci:0000:3b:00.0"),
        "{card:?}"
    );
}

#[test]
fn only_without_tcp_can_nothing_work() {
    let mut machine = Fake::new();
    machine.loopback = Err("Network is unreachable".to_owned());
    is(
        &machine.find("TCP on loopback"),
        State::Broken,
        "ip link set lo up",
    );
    assert!(!machine.examine().usable);
    let mut poor = Fake::new();
    poor.uid = 65534;
    poor.free_pages = 0;
    poor.dpdk = Err(("no library".to_owned(), DpdkLack::Library));
    poor.agent = AgentReply::Absent;
    poor.files.clear();
    poor.links.clear();
    assert!(poor.examine().usable);
}

#[test]
fn ordinary_users_are_told_to_become_root_where_that_helps() {
    let mut machine = Fake::new();
    machine.uid = 65534;
    machine.free_pages = 3;
    machine.set("/proc/self/status", "CapEff:\t0000000000000000\n");
    machine.set(
        "/proc/self/limits",
        "Max open files            1024   4096   files\n\
         Max locked memory         8388608 8388608 bytes\n",
    );
    let pages = machine.find("huge pages");
    is(&pages, State::Warn, "sudo genie hugepages reserve 2M:64");
    assert!(pages.why.contains("and 3 are free"), "{pages:?}");
    is(
        &machine.find("capabilities"),
        State::Warn,
        "sudo genie agent",
    );
    is(
        &machine.find("open files"),
        State::Warn,
        "sudo prlimit --pid $$ --nofile=4096:4096",
    );
    is(
        &machine.find("locked memory"),
        State::Warn,
        "sudo prlimit --pid $$ --memlock=unlimited:unlimited",
    );
}

#[test]
fn a_lack_of_dpdk_is_told_by_what_is_missing() {
    let mut machine = Fake::new();
    for (lack, mend) in [
        (DpdkLack::Library, "apt-get install -y libdpdk-dev"),
        (
            DpdkLack::Driver,
            "cargo build --release -p genie-controlplane -p genie-dpdk-driver",
        ),
    ] {
        machine.dpdk = Err(("why".to_owned(), lack));
        is(&machine.find("DPDK"), State::Warn, mend);
    }
}

#[test]
fn cards_of_the_kernel_can_be_bound() {
    let mut machine = Fake::new();
    machine
        .links
        .insert(format!("{NIC}/driver"), "ice".to_owned());
    machine.files.remove("/dev/vfio/vfio");
    let card = machine.find("network card 0000:3b:00.0");
    is(&card, State::Warn, "scripts/bind-nic bind 0000:3b:00.0");
    is(
        &machine.find("IOMMU and VFIO"),
        State::Warn,
        "modprobe vfio-pci",
    );
    machine.files.remove("/sys/class/iommu/dmar0");
    let iommu = machine.find("IOMMU and VFIO");
    assert!(iommu.mend.unwrap().contains("intel_iommu=on"));
    machine.set("/sys/class/net/eth0/mtu", "1500\n");
    is(
        &machine.find("MTU of eth0"),
        State::Warn,
        "ip link set dev eth0 mtu 9000",
    );
}

#[test]
fn a_port_of_somebody_elses_is_told_from_the_agents_own() {
    let mut machine = Fake::new();
    machine.taken = vec![([127, 0, 0, 1], 5555).into(), ([127, 0, 0, 1], 5556).into()];
    assert_eq!(machine.find("port 127.0.0.1:5555").state, State::Ok);
    let data = machine.find("port 127.0.0.1:5556");
    is(&data, State::Warn, "genie agent --data 127.0.0.1:4321");
}

#[test]
fn without_an_agent_one_is_to_be_started() {
    let mut machine = Fake::new();
    machine.agent = AgentReply::Absent;
    is(
        &machine.find("agent"),
        State::Warn,
        "genie agent --socket /nowhere/genie.sock",
    );
    machine.writable = false;
    is(
        &machine.find("application socket"),
        State::Warn,
        "genie agent --socket /tmp/genie-0.sock",
    );
    is(
        &machine.peer("b")[0],
        State::Broken,
        "genie agent --peer b=HOST:5555",
    );
}

#[test]
fn a_transport_that_an_agent_is_without_is_mended_where_a_command_can() {
    let mut machine = Fake::new();
    machine.uid = 1000;
    let mut find = |driver: &str, reason: &str| {
        let mut status = status();
        status.transports = vec![TransportStatus {
            transport: "dpdk".to_owned(),
            path: None,
            queue: None,
            data: None,
            reason: Some(reason.to_owned()),
            engine: None,
        }];
        machine.agent = AgentReply::Status(Box::new(status));
        let link = format!("{NIC}/driver");
        machine.links.insert(link, driver.to_owned());
        let found = machine.find("agent: dpdk");
        assert_eq!((found.state, &*found.why), (State::Warn, reason));
        found.mend
    };
    let none = "no device was given (--dpdk-device)";
    for (driver, device) in [
        ("vfio-pci", "pci:0000:3b:00.0"),
        ("mlx5_core", "pci:0000:3b:00.0"),
        ("ice", "pair:/tmp/genie-pair.sock"),
    ] {
        let mend = format!("sudo genie agent --name a --dpdk-device {device}");
        assert_eq!(find(driver, none), Some(mend));
    }
    let pages = find("ice", "no huge pages: none of 2 MiB is free");
    let reserve = "sudo genie hugepages reserve 2M:64";
    assert_eq!(pages.as_deref(), Some(reserve));
    assert_eq!(find("ice", "cannot open pci:0000:3b:00.0: busy"), None);
}

#[test]
fn a_clock_that_is_slow_or_wrong_is_noticed() {
    let mut machine = Fake::new();
    machine.year = 1971;
    is(
        &machine.find("clock"),
        State::Warn,
        "sh -c 'apt-get install -y chrony && { pidof chronyd || chronyd; }'",
    );
    machine.year = 2030;
    let folder = "/sys/devices/system/clocksource/clocksource0";
    machine.set(&format!("{folder}/current_clocksource"), "hpet\n");
    machine.set(&format!("{folder}/available_clocksource"), "tsc hpet\n");
    let mend = machine.find("clock").mend.unwrap();
    assert!(mend.contains("echo tsc"), "{mend}");
}

#[test]
fn a_clock_that_nobody_keeps_in_step_is_noticed() {
    let mut machine = Fake::new();
    let synchronised = machine.find("clock synchronisation");
    assert!(synchronised.why.contains("3 ms"), "{synchronised:?}");
    machine.synchronised = false;
    machine.uid = 1000;
    machine.set("/run/systemd/system/units", "");
    is(
        &machine.find("clock synchronisation"),
        State::Warn,
        "sudo sh -c 'apt-get install -y systemd-timesyncd && timedatectl set-ntp true'",
    );
}

#[test]
fn offloads_that_are_off_can_be_turned_on_and_those_that_are_missing_are_said() {
    let mut machine = Fake::new();
    machine.offloads = Some(
        OFFLOADS
            .replace("scatter-gather: on", "scatter-gather: off")
            .replace("tx-checksumming: on", "tx-checksumming: off")
            .replace(
                "generic-receive-offload: on",
                "generic-receive-offload: off [fixed]",
            ),
    );
    let found = machine.find("offloads of eth0");
    is(&found, State::Warn, "ethtool -K eth0 tx on sg on");
    assert!(found.why.contains("generic-receive-offload"), "{found:?}");
    machine.offloads = None;
    is(
        &machine.find("offloads of eth0"),
        State::Warn,
        "apt-get install -y ethtool",
    );
    // What the agent's device lacks is said by itself.
    let mut status = status();
    let engine = genie_dataplane::engine::Snapshot {
        driver: "net_some".to_owned(),
        lacks: vec!["receive interrupts".to_owned()],
        ..Default::default()
    };
    status.transports = vec![TransportStatus {
        transport: "dpdk".to_owned(),
        path: Some("dpdk:net_some".to_owned()),
        queue: None,
        data: None,
        reason: None,
        engine: Some(engine),
    }];
    machine.agent = AgentReply::Status(Box::new(status));
    let found = machine.find("offloads of net_some");
    assert_eq!((found.state, found.mend), (State::Ok, None));
    assert!(found.why.contains("receive interrupts"), "{}", found.why);
}

#[test]
fn cuda_is_missed_only_where_there_is_a_gpu() {
    let mut machine = Fake::new();
    machine.cuda = Err("no libcuda.so.1".to_owned());
    assert_eq!(machine.find("CUDA").state, State::Ok);
    machine.set("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n");
    machine.set("/sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n");
    is(
        &machine.find("CUDA"),
        State::Warn,
        "apt-get install -y nvidia-driver",
    );
}

#[test]
fn a_peer_is_shown_with_its_path_and_the_reasons_for_it() {
    let mut machine = Fake::new();
    machine.session = Ok(SessionStatus {
        peer: "b".to_owned(),
        instance: "1".to_owned(),
        direction: "dialled".to_owned(),
        path: "tcp".to_owned(),
        sealed: false,
        lost: None,
        path_changes: 0,
        changes: Vec::new(),
        reasons: [
            "dpdk: node 'b': no huge pages",
            "dpdk: node 'a' does not allow it (--transport tcp)",
            "shm: they are on different hosts",
        ]
        .map(str::to_owned)
        .into(),
        up_seconds: 1.0,
        opened_in_us: 90,
        session: 1,
        requests: 0,
    });
    let findings = machine.peer("b");
    assert_eq!(findings.len(), 4);
    assert_eq!(findings[0].state, State::Ok);
    assert!(findings[0].why.contains("over tcp, round trip 90 µs"));
    assert!(findings[1].why.contains("no huge pages"));
    is(&findings[1], State::Warn, "ssh 10.0.0.2 genie doctor");
    let ours = "genie agent --name a --transport dpdk,tcp";
    is(&findings[2], State::Warn, ours);
    assert_eq!((findings[3].state, &findings[3].mend), (State::Warn, &None));
    machine.session = Err("refused".to_owned());
    is(
        &machine.peer("b")[0],
        State::Broken,
        "genie doctor 10.0.0.2:5555",
    );
    assert_eq!(machine.peer("10.0.0.9:5555")[0].state, State::Ok);
    is(
        &machine.peer("stranger")[0],
        State::Broken,
        "genie agent --peer stranger=HOST:5555",
    );
}

#[test]
fn of_two_versions_the_older_is_to_be_replaced() {
    let mut machine = Fake::new();
    for (ours_is_older, mend) in [
        (
            true,
            "scp 10.0.0.2:'$(command -v genie)' /usr/local/bin/genie",
        ),
        (
            false,
            "scp $(command -v genie) 10.0.0.2:/usr/local/bin/genie",
        ),
    ] {
        machine.peer = PeerReply::Version {
            why: "versions 3 to 5".to_owned(),
            ours_is_older,
        };
        is(&machine.peer("b")[0], State::Broken, mend);
    }
}
