//! The wire protocol of the DPDK path as a sans-IO state machine.
