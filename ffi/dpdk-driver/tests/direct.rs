//! The steps of GPUDirect on real ports without a card, and segments that no CPU
//! reads: what lies in them is memory that faults when it is touched.
//!
//! One process with ordinary pages: DPDK's loopback port passes packet buffers
//! on as they are. A card that splits headers from payloads is nowhere here.

#[cfg(dpdk)]
mod ports {
    use std::sync::Arc;

    use genie_dataplane::device::{Device, Payload, TxFrame};
    use genie_dataplane::dpdk::{DeviceSpec, Options, Port};
    use genie_dataplane::memory::accelerator::direct::{Mapped, PAGE_BYTES, PortSide, Split, Step};
    use genie_dataplane::memory::accelerator::sim::{Config, Sim};
    use genie_dataplane::memory::accelerator::{Accelerator, DeviceLease, DeviceRegion};
    use genie_dataplane::memory::{Backing, Lease, Region};
    use rustix::mm::MprotectFlags;

    fn open(device: &str) -> Port {
        let options = Options {
            no_huge: true,
            mtu: 1500,
            ..Options::default()
        };
        let spec: DeviceSpec = format!("vdev:{device}").parse().expect("a device");
        Port::open(&spec, &options).unwrap_or_else(|error| panic!("{device}: {error}"))
    }

    /// Device memory that faults when a CPU touches it.
    fn device(gpudirect: bool) -> (Arc<Sim>, DeviceLease) {
        let config = Config {
            gpudirect,
            ..Config::default()
        };
        let sim = Arc::new(Sim::new(config).expect("a simulated device"));
        let accelerator: Arc<dyn Accelerator> = Arc::clone(&sim) as _;
        let region = DeviceRegion::allocate(&accelerator, 2 << 20).expect("room");
        (sim, DeviceLease::whole(region))
    }

    fn pages(lease: &DeviceLease) -> Mapped {
        let address = lease.address();
        let first = address.0.next_multiple_of(PAGE_BYTES);
        Mapped {
            address: genie_dataplane::memory::accelerator::DeviceAddress(first),
            len: 16 * PAGE_BYTES,
            iovas: Vec::new(),
        }
    }

    /// Every step up to the one that needs a card, and the reason it gives.
    fn falls_closed(name: &str, driver: &str) {
        let mut port = open(name);
        let (sim, lease) = device(true);
        let refused = port.try_direct(sim.direct(), lease.clone()).unwrap_err();
        assert_eq!(
            (refused.step, refused.reason.as_str()),
            (
                Step::BufferSplit,
                &*format!(
                    "{driver} cannot split headers from payloads (RTE_ETH_RX_OFFLOAD_BUFFER_SPLIT)"
                )
            )
        );
        // What was done before was undone: it can be done again, and the memory
        // is nobody's any more.
        let again = port.try_direct(sim.direct(), lease.clone()).unwrap_err();
        assert_eq!(again, refused);
        drop(lease);
        assert_eq!(sim.used_bytes(), 0);
        let (plain, lease) = device(false);
        let refused = port.try_direct(plain.direct(), lease).unwrap_err();
        assert_eq!(refused.step, Step::Support);
    }

    fn every_step_refuses_what_it_cannot_do(name: &str) {
        let mut port = open(name);
        let (_sim, lease) = device(true);
        let memory = pages(&lease);
        let mut port = &mut port;
        assert_eq!(port.iovas(memory.address, memory.len), Ok(vec![]));
        let unknown = port.unregister(&memory).unwrap_err();
        assert!(unknown.contains("rte_extmem_unregister fails"), "{unknown}");
        port.register(&memory).unwrap();
        let twice = port.register(&memory).unwrap_err();
        assert!(twice.contains("rte_extmem_register fails"), "{twice}");
        port.dma_map(&memory).unwrap();
        let twice = port.dma_map(&memory).unwrap_err();
        assert_eq!(twice, "the card can reach device memory already");
        assert_eq!(
            port.split(Split::Length(82)).unwrap_err(),
            "there is no pool in device memory"
        );
        let wrong = port.make_pool(&memory, 65_535).unwrap_err();
        assert!(wrong.contains("do not fit into pages of 65536"), "{wrong}");
        port.make_pool(&memory, 1500).unwrap();
        let twice = port.make_pool(&memory, 1500).unwrap_err();
        assert_eq!(twice, "there is a pool in device memory already");
        for split in [Split::Length(82), Split::Udp] {
            let refused = port.split(split).unwrap_err();
            assert!(refused.contains("cannot split headers"), "{refused}");
        }
        port.free_pool().unwrap();
        let none = port.free_pool().unwrap_err();
        assert_eq!(none, "there is no pool in device memory");
        port.dma_unmap(&memory).unwrap();
        port.dma_unmap(&memory)
            .expect("nothing is left to be undone");
        port.unregister(&memory).unwrap();
        let odd = Mapped {
            len: memory.len + 1,
            ..memory.clone()
        };
        let refused = port.register(&odd).unwrap_err();
        assert!(
            refused.contains("are not whole pages of 65536"),
            "{refused}"
        );
        // Addresses of the card's, one a page: as on a machine without an IOMMU.
        let physical = Mapped {
            iovas: (0..16).map(|page| page * PAGE_BYTES).collect(),
            ..memory
        };
        port.register(&physical).unwrap();
        port.make_pool(&physical, 1500).unwrap();
        port.free_pool().unwrap();
        port.unregister(&physical).unwrap();
    }

    /// Payloads arrive as addresses: the memory faults if anybody reads it.
    fn segments_are_delivered_unread() {
        let mut port = open("net_ring0");
        let page = rustix::param::page_size();
        let region = Region::with_backing(16 * page, Backing::Shmem).expect("memory");
        let lease = Lease::new(Arc::clone(&region), 0, (16 * page) as u64).expect("all of it");
        let base = region.as_ptr();
        let attachment = port.attach(lease).expect("a free place");
        let frames: Vec<_> = (0..20u32)
            .map(|number| {
                let mut frame = TxFrame::default();
                frame.head.extend([number as u8; 60]);
                frame.payload = (!number.is_multiple_of(5)).then(|| Payload {
                    attachment,
                    offset: u64::from(number) * 1000,
                    len: 900 + number,
                });
                frame
            })
            .collect();
        let protect = |flags| {
            // SAFETY: all of our own mapping, which nothing else uses.
            unsafe { rustix::mm::mprotect(base.cast(), 16 * page, flags) }.expect("our mapping")
        };
        protect(MprotectFlags::empty());
        port.keep_segments(true);
        assert_eq!(port.tx_burst(&frames), 20);
        let mut seen = Vec::new();
        let count = port.rx_direct(&mut |frame| {
            let mut head = vec![0; frame.head.len()];
            frame.head.copy_to(&mut head);
            let number = u32::from(head[0]);
            assert_eq!(head, [number as u8; 60]);
            seen.push((number, frame.payload.map(|(at, len)| (at.0, len))));
        });
        let expected = (0..20u32).map(|number| {
            let at = base.addr() as u64 + u64::from(number) * 1000;
            (
                number,
                (!number.is_multiple_of(5)).then_some((at, 900 + number)),
            )
        });
        assert_eq!(seen, expected.collect::<Vec<_>>());
        assert_eq!(count, 20);
        assert_eq!(port.in_flight(attachment), 0, "all were given back");
        // An engine's own way of receiving takes no frame whose payload is apart.
        assert_eq!(port.tx_burst(&frames), 20);
        let mut usable = 0;
        assert_eq!(port.rx_burst(&mut |_| usable += 1), 20);
        assert_eq!((usable, port.counters().rx_missed), (4, 16));
        // Segments that are not kept are made one, which reads them.
        protect(MprotectFlags::READ | MprotectFlags::WRITE);
        port.keep_segments(false);
        assert_eq!(port.tx_burst(&frames), 20);
        let mut lens = Vec::new();
        port.rx_burst(&mut |frame| lens.push(frame.len() as u32));
        let whole = |number: u32| {
            60 + if number.is_multiple_of(5) {
                0
            } else {
                900 + number
            }
        };
        assert_eq!(lens, (0..20).map(whole).collect::<Vec<_>>());
        assert!(port.detach(attachment));
    }

    /// Runs this program again with the library of this build, whatever the
    /// caller's environment names.
    fn without_other_library() {
        use std::os::unix::process::CommandExt;
        if std::env::var_os("GENIE_DPDK_LIB").is_some() {
            let program = std::env::current_exe().expect("our own path");
            let error = std::process::Command::new(program)
                .env_remove("GENIE_DPDK_LIB")
                .exec();
            panic!("our own program runs: {error}");
        }
    }

    pub(super) fn run() {
        without_other_library();
        every_step_refuses_what_it_cannot_do("net_null0");
        falls_closed("net_null1", "net_null");
        falls_closed("net_ring1", "net_ring");
        segments_are_delivered_unread();
        println!("all steps are refused with their reasons, and segments stay unread ... ok");
    }
}

fn main() {
    #[cfg(dpdk)]
    ports::run();
    #[cfg(not(dpdk))]
    {
        println!("skipped: {}", genie_dpdk::MISSING);
        let required = std::env::var("GENIE_REQUIRE_DPDK").is_ok_and(|value| value == "1");
        assert!(!required, "GENIE_REQUIRE_DPDK=1: a skip is a failure");
    }
}
