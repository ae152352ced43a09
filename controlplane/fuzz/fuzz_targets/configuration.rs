//! See `genie_controlplane::fuzzing::configuration`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    genie_controlplane::fuzzing::configuration(bytes);
});
