//! See `genie_proto::fuzzing::unseal`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    genie_proto::fuzzing::unseal(bytes);
});
