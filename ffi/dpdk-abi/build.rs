//! Derives the build id from the version and the text of the ABI.

use std::path::Path;

fn main() {
    let source = Path::new("src/lib.rs");
    println!("cargo::rerun-if-changed={}", source.display());
    let text = std::fs::read(source).expect("a crate has its source");
    let version = std::env::var("CARGO_PKG_VERSION").expect("cargo sets the version");
    println!(
        "cargo::rustc-env=GENIE_DPDK_BUILD_ID={version}+abi.{:016x}",
        fnv1a(&text)
    );
}

/// FNV-1a, 64 bits: any change of the text changes it, and it needs no crate.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
