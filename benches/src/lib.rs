//! Micro-benchmarks and the throughput harness.
