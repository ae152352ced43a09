//! See `genie_controlplane::fuzzing::frames`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    genie_controlplane::fuzzing::frames(bytes);
});
