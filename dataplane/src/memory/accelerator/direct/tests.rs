//! Every step, and every way in which it fails, against sides that record calls.

use std::sync::{Arc, Mutex};

use super::*;
use crate::memory::accelerator::sim::{Config, Sim};
use crate::memory::accelerator::{Accelerator, DeviceRegion};

/// What was called, and what is to fail.
#[derive(Clone, Default)]
struct Record(Arc<Mutex<(Vec<String>, Vec<String>)>>);

struct Side {
    record: Record,
    ordering: Ordering,
    iovas: Vec<u64>,
}

impl Record {
    fn failing(call: &str) -> Self {
        Self(Arc::new(Mutex::new((Vec::new(), vec![call.into()]))))
    }

    fn call(&self, name: &str, detail: &str) -> Result<(), String> {
        let mut state = self.0.lock().unwrap();
        state.0.push(format!("{name}{detail}"));
        if state.1.iter().any(|failing| failing == name) {
            return Err(format!("{name} failed with 999"));
        }
        Ok(())
    }

    fn calls(&self) -> Vec<String> {
        self.0.lock().unwrap().0.clone()
    }

    fn side(&self) -> Side {
        Side {
            record: self.clone(),
            ordering: Ordering::Flushed,
            iovas: Vec::new(),
        }
    }
}

fn shown(memory: &Mapped) -> String {
    assert!(memory.address.0.is_multiple_of(PAGE_BYTES));
    assert!(memory.len.is_multiple_of(PAGE_BYTES));
    format!(" {} pages {:x?}", memory.len / PAGE_BYTES, memory.iovas)
}

impl DeviceSide for Side {
    fn supported(&self) -> Result<(), String> {
        self.record.call("supported", "")
    }

    fn ordering(&self) -> Result<Ordering, String> {
        self.record.call("ordering", "").map(|()| self.ordering)
    }

    fn sync_memops(&self, _: DeviceAddress) -> Result<(), String> {
        self.record.call("sync_memops", "")
    }

    fn flush(&self) -> Result<(), String> {
        self.record.call("flush", "")
    }
}

impl PortSide for Side {
    fn no_inlining(&mut self) -> Result<(), String> {
        self.record.call("no_inlining", "")
    }

    fn iovas(&mut self, _: DeviceAddress, _: u64) -> Result<Vec<u64>, String> {
        self.record.call("iovas", "").map(|()| self.iovas.clone())
    }

    fn register(&mut self, memory: &Mapped) -> Result<(), String> {
        self.record.call("register", &shown(memory))
    }

    fn unregister(&mut self, memory: &Mapped) -> Result<(), String> {
        self.record.call("unregister", &shown(memory))
    }

    fn dma_map(&mut self, memory: &Mapped) -> Result<(), String> {
        self.record.call("dma_map", &shown(memory))
    }

    fn dma_unmap(&mut self, memory: &Mapped) -> Result<(), String> {
        self.record.call("dma_unmap", &shown(memory))
    }

    fn make_pool(&mut self, memory: &Mapped, buffer_bytes: u16) -> Result<(), String> {
        let detail = format!("{} of {buffer_bytes}", shown(memory));
        self.record.call("make_pool", &detail)
    }

    fn free_pool(&mut self) -> Result<(), String> {
        self.record.call("free_pool", "")
    }

    fn can_split(&mut self) -> Result<(), String> {
        self.record.call("can_split", "")
    }

    fn split(&mut self, split: Split) -> Result<(), String> {
        self.record.call("split", &format!(" {split:?}"))
    }

    fn join(&mut self) -> Result<(), String> {
        self.record.call("join", "")
    }
}

/// Memory with exactly four whole pages of 64 KiB in it.
fn memory() -> (Arc<Sim>, DeviceLease) {
    let sim = Arc::new(Sim::new(Config::default()).unwrap());
    let accelerator: Arc<dyn Accelerator> = Arc::clone(&sim) as _;
    let region = DeviceRegion::allocate(&accelerator, 6 << 16).unwrap();
    let whole = DeviceLease::whole(region);
    let start = whole.address().0;
    let first = start.next_multiple_of(PAGE_BYTES) - start;
    // Neither begins nor ends on a page where that can be helped.
    let begin = first.saturating_sub(1);
    let lease = whole.slice(begin..first + (4 << 16) + 1);
    (sim, lease.unwrap())
}

fn open(side: Side, device: Side, lease: DeviceLease) -> Result<Direct<'static>, Refused> {
    let (device, port) = (Box::new(device), Box::new(side));
    Direct::open(device, port, lease, 9000, Some(Split::Length(82)))
}

const UP: [&str; 11] = [
    "supported",
    "ordering",
    "sync_memops",
    "no_inlining",
    "iovas",
    "register 4 pages []",
    "dma_map 4 pages []",
    "make_pool 4 pages [] of 9000",
    "can_split",
    "split Length(82)",
    "flush",
];
const DOWN: [&str; 4] = [
    "join",
    "free_pool",
    "dma_unmap 4 pages []",
    "unregister 4 pages []",
];

#[test]
fn all_steps_are_taken_in_order_and_undone_in_the_opposite() {
    let (sim, lease) = memory();
    let record = Record::default();
    let direct = open(record.side(), record.side(), lease).unwrap();
    assert_eq!(direct.memory().len, 4 * PAGE_BYTES);
    direct.before_consumer().unwrap();
    assert_eq!(record.calls(), UP);
    assert!(sim.used_bytes() > 0, "the memory is held");
    drop(direct);
    assert_eq!(record.calls(), [&UP[..], &DOWN].concat());
    assert_eq!(sim.used_bytes(), 0);
}

#[test]
fn every_step_that_fails_says_why_and_undoes_those_before() {
    let steps = [
        ("supported", Step::Support, 1, 0),
        ("ordering", Step::WriteOrdering, 2, 0),
        ("sync_memops", Step::SyncMemops, 3, 0),
        ("no_inlining", Step::Inlining, 4, 0),
        ("iovas", Step::Addresses, 5, 0),
        ("register", Step::Register, 6, 0),
        ("dma_map", Step::DmaMap, 7, 2),
        ("make_pool", Step::Pool, 8, 2),
        ("can_split", Step::BufferSplit, 9, 3),
        ("split", Step::BufferSplit, 10, 3),
    ];
    for (call, step, taken, undone) in steps {
        let (sim, lease) = memory();
        let record = Record::failing(call);
        let refused = open(record.side(), record.side(), lease).unwrap_err();
        assert_eq!(refused.step, step);
        assert_eq!(refused.reason, format!("{call} failed with 999"));
        let undone = &DOWN[DOWN.len() - undone..];
        assert_eq!(record.calls(), [&UP[..taken], undone].concat(), "{call}");
        assert_eq!(sim.used_bytes(), 0, "{call}: the memory is given back");
        let why = why_staged(MemoryKind::Cuda(0), &refused);
        let (staged, reason) = ("cuda:0 is staged through host memory: ", &refused.reason);
        assert!(why.starts_with(staged) && why.ends_with(reason), "{why}");
    }
}

#[test]
fn what_cannot_be_undone_keeps_the_memory_and_what_lies_beneath() {
    for (call, undone) in [
        ("join", 1),
        ("free_pool", 2),
        ("dma_unmap", 3),
        ("unregister", 4),
    ] {
        let (sim, lease) = memory();
        let record = Record::failing(call);
        drop(open(record.side(), record.side(), lease).unwrap());
        let expected = [&UP[..10], &DOWN[..undone]].concat();
        assert_eq!(record.calls(), expected, "{call}");
        assert!(sim.used_bytes() > 0, "{call}: a card may still write there");
    }
}

#[test]
fn without_a_split_the_port_is_not_stopped() {
    let (_sim, lease) = memory();
    let record = Record::default();
    let (device, port) = (Box::new(record.side()), Box::new(record.side()));
    drop(Direct::open(device, port, lease, 9000, None).unwrap());
    assert_eq!(record.calls(), [&UP[..9], &DOWN[1..]].concat());
}

#[test]
fn what_was_mapped_by_halves_and_cannot_be_unmapped_keeps_the_memory() {
    let (sim, lease) = memory();
    let record = Record::failing("dma_map");
    record.0.lock().unwrap().1.push("dma_unmap".into());
    let refused = open(record.side(), record.side(), lease).unwrap_err();
    assert_eq!(refused.step, Step::DmaMap);
    assert_eq!(record.calls(), [&UP[..7], &DOWN[2..3]].concat());
    assert!(sim.used_bytes() > 0, "a card may still write there");
}

#[test]
fn writes_that_are_ordered_need_no_flush_and_those_that_cannot_be_are_refused() {
    let (_sim, lease) = memory();
    let record = Record::default();
    let ordered = Side {
        ordering: Ordering::Ordered,
        ..record.side()
    };
    let direct = open(record.side(), ordered, lease.clone()).unwrap();
    direct.before_consumer().unwrap();
    assert_eq!(record.calls(), UP[..10]);
    drop(direct);
    let record = Record::default();
    let unknown = Side {
        ordering: Ordering::Unknown,
        ..record.side()
    };
    let refused = open(record.side(), unknown, lease).unwrap_err();
    assert_eq!(refused.step, Step::WriteOrdering);
    assert_eq!(record.calls(), UP[..2]);
}

#[test]
fn a_flush_that_fails_is_told_before_anything_is_read() {
    let (_sim, lease) = memory();
    let record = Record::failing("flush");
    let direct = open(record.side(), record.side(), lease).unwrap();
    assert_eq!(
        direct.before_consumer().unwrap_err(),
        "flush failed with 999"
    );
}

#[test]
fn memory_without_a_whole_page_is_refused() {
    let (_sim, lease) = memory();
    let record = Record::default();
    let short = lease.slice(0..PAGE_BYTES - 1).unwrap();
    let short = short.slice(1..PAGE_BYTES - 1).unwrap();
    let refused = open(record.side(), record.side(), short).unwrap_err();
    assert_eq!(refused.step, Step::Alignment);
    assert_eq!(record.calls(), UP[..2]);
}

#[test]
fn physical_addresses_are_one_a_page() {
    for (count, taken) in [(4, true), (3, false), (5, false)] {
        let (_sim, lease) = memory();
        let record = Record::default();
        let physical = Side {
            iovas: (0..count).map(|page| 0x10_0000 * (page + 1)).collect(),
            ..record.side()
        };
        let opened = open(physical, record.side(), lease);
        assert_eq!(opened.is_ok(), taken, "{count}");
        match opened {
            Ok(_) => assert_eq!(
                record.calls()[5],
                "register 4 pages [100000, 200000, 300000, 400000]"
            ),
            Err(refused) => assert_eq!(refused.step, Step::Addresses),
        }
    }
}

#[test]
fn drivers_differ_in_arguments_and_splits() {
    let mlx5 = device_arguments("mlx5_pci", "0000:3b:00.0");
    assert_eq!(mlx5, "0000:3b:00.0,txq_inline_max=0");
    assert_eq!(device_arguments("mlx5_pci", &mlx5), mlx5);
    assert_eq!(device_arguments("net_ice", "0000:3b:00.0"), "0000:3b:00.0");
    assert_eq!(split_of("mlx5_pci", 82), Some(Split::Length(82)));
    assert_eq!(split_of("net_ice", 82), Some(Split::Udp));
    assert_eq!(split_of("net_vhost", 82), None);
}
