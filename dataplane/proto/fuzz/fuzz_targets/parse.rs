//! See `genie_proto::fuzzing::parse`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| genie_proto::fuzzing::parse(bytes));
