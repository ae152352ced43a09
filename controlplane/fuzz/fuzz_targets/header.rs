//! See `genie_controlplane::fuzzing::header`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    genie_controlplane::fuzzing::header(bytes);
});
