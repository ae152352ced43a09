//! Raw bindings to DPDK and the C shim over its inline functions.
