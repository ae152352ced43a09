//! The safe DPDK layer behind a narrow C ABI, loaded at run time.
