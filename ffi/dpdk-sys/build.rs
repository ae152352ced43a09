//! Finds DPDK, binds what the driver uses of it, and compiles the shim.
//!
//! A host without DPDK, or without libclang for bindgen, is an ordinary place
//! to build: the crate is then empty, and `DEP_DPDK_MISSING` tells the driver
//! crate why. With DPDK, `DEP_DPDK_VERSION` is its version.

use std::env;
use std::path::{Path, PathBuf};

/// The oldest release whose functions the bindings use.
const OLDEST: &str = "22.11";

/// The libraries that hold them. The drivers come from DPDK's plug-in folder.
const LIBRARIES: [&str; 4] = ["rte_ethdev", "rte_mbuf", "rte_mempool", "rte_eal"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(dpdk)");
    println!("cargo::rerun-if-changed=shim");
    match find() {
        Ok(dpdk) => {
            bind(&dpdk);
            compile(&dpdk);
            link(&dpdk);
            println!("cargo::rustc-cfg=dpdk");
            println!("cargo::metadata=VERSION={}", dpdk.version);
        }
        Err(reason) => {
            println!("cargo::metadata=MISSING={reason}");
            println!("cargo::warning=building without DPDK: {reason}");
        }
    }
}

struct Dpdk {
    version: String,
    /// `-I`, `-m`, `-include`, `-D`, as pkg-config prints them.
    flags: Vec<String>,
    library_folders: Vec<PathBuf>,
}

fn find() -> Result<Dpdk, String> {
    if env::var("CARGO_CFG_TARGET_POINTER_WIDTH").as_deref() != Ok("64") {
        return Err("the driver's ABI is for 64-bit targets".into());
    }
    let library = pkg_config::Config::new()
        .atleast_version(OLDEST)
        .cargo_metadata(false)
        .probe("libdpdk")
        .map_err(|_| format!("pkg-config finds no libdpdk of at least {OLDEST}"))?;
    libclang_loads()?;
    Ok(Dpdk {
        version: library.version,
        flags: cflags()?,
        library_folders: library.link_paths,
    })
}

/// pkg-config's Rust crate drops `-m…` and `-include …`, which DPDK needs.
fn cflags() -> Result<Vec<String>, String> {
    let program = env::var_os("PKG_CONFIG").unwrap_or_else(|| "pkg-config".into());
    let output = std::process::Command::new(program)
        .args(["--cflags", "libdpdk"])
        .output()
        .map_err(|error| format!("pkg-config does not run: {error}"))?;
    if !output.status.success() {
        return Err("pkg-config does not print libdpdk's compiler flags".into());
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// bindgen panics where there is no libclang; here that is a reason.
fn libclang_loads() -> Result<(), String> {
    match std::panic::catch_unwind(bindgen::clang_version) {
        Ok(_) => Ok(()),
        Err(_) => Err("bindgen finds no libclang (on Debian: apt install libclang-dev)".into()),
    }
}

fn bind(dpdk: &Dpdk) {
    let bindings = bindgen::Builder::default()
        .header("shim/shim.h")
        .clang_args(&dpdk.flags)
        .allowlist_function("genie_.*")
        .allowlist_function("rte_(version|strerror)")
        .allowlist_function("rte_eal_(init|cleanup)")
        .allowlist_function("rte_dev_(probe|remove|dma_map|dma_unmap|name)")
        .allowlist_function("rte_thread_(register|unregister)")
        .allowlist_function("rte_extmem_(register|unregister)")
        .allowlist_function("rte_pktmbuf_(pool_create|pool_create_extbuf|free_bulk)")
        .allowlist_function("rte_eal_iova_mode")
        .allowlist_function("rte_mem_virt2iova")
        .allowlist_function("rte_mempool_(free|avail_count)")
        .allowlist_function("rte_eth_(rx|tx)_queue_setup")
        .allowlist_function("rte_eth_tx_done_cleanup")
        .allowlist_function("rte_eth_dev_rx_intr_(enable|disable|ctl_q_get_fd)")
        .allowlist_function("rte_eth_(macaddr_get|link_get_nowait|stats_get)")
        .allowlist_function("rte_eth_dev_(info_get|configure|start|stop|close|set_mtu|get_mtu)")
        .allowlist_function("rte_eth_dev_(adjust_nb_rx_tx_desc|get_port_by_name|socket_id)")
        .allowlist_function("rte_eth_allmulticast_enable")
        .allowlist_type("genie_.*")
        .allowlist_var("GENIE_.*")
        // Only pointed to. As bindgen sees them they are packed unions that
        // differ between releases, so nothing here may look inside.
        .blocklist_type("rte_(mbuf|mempool|device)(__.*)?")
        .raw_line("#[repr(C)] pub struct rte_mbuf { _opaque: [u8; 0] }")
        .raw_line("#[repr(C)] pub struct rte_mempool { _opaque: [u8; 0] }")
        .raw_line("#[repr(C)] pub struct rte_device { _opaque: [u8; 0] }")
        .use_core()
        .prepend_enum_name(false)
        .derive_default(true)
        .layout_tests(true)
        .generate_comments(false)
        .generate()
        .expect("bindgen reads the headers that pkg-config names");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    bindings
        .write_to_file(out.join("bindings.rs"))
        .expect("OUT_DIR is writable");
}

fn compile(dpdk: &Dpdk) {
    let mut build = cc::Build::new();
    build
        .file(Path::new("shim/shim.c"))
        .opt_level(3)
        .std("gnu11")
        .warnings(true);
    for flag in &dpdk.flags {
        build.flag(flag);
    }
    build
        .flag("-Wno-unused-parameter")
        .compile("genie_dpdk_shim");
}

fn link(dpdk: &Dpdk) {
    for folder in &dpdk.library_folders {
        println!("cargo::rustc-link-search=native={}", folder.display());
    }
    for library in LIBRARIES {
        println!("cargo::rustc-link-lib=dylib={library}");
    }
}
