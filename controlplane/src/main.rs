//! The `genie` binary; everything is in [`genie_controlplane::cli`].

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    genie_controlplane::cli::main()
}
