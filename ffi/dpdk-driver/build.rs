//! Compiles the driver only where `genie-dpdk-sys` found DPDK.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(dpdk)");
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("DEP_DPDK_VERSION").is_some() {
        println!("cargo::rustc-cfg=dpdk");
    }
    let missing = std::env::var("DEP_DPDK_MISSING").unwrap_or_default();
    println!("cargo::rustc-env=GENIE_DPDK_MISSING={missing}");
}
