//! DPDK devices, through the driver library that is looked for at run time.
