//! The `genie` command: what people type, and what they are shown.
//!
//! Exit codes: 0 done, 1 failed, 2 not understood. Data goes to stdout, as text
//! or with `--json` as one JSON value; everything else goes to stderr.

mod ca;
mod device;
mod doctor;
mod end;
mod hugepages;
mod log;
mod move_file;
mod show;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::FalseyValueParser;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use genie_client::{Client, ClientError, Memory, NotOfArena};
use genie_dataplane::memory::RegionError;
use genie_dataplane::memory::accelerator::AcceleratorError;
use genie_dataplane::stage::StartError;
use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use ca::CaCommand;
use doctor::DoctorArgs;
use end::Unfinished;
use hugepages::{HugepagesCommand, HugepagesError};

use crate::agent::{self, AgentError};
use crate::bench::{self, BenchArgs, BenchError};
use crate::config::{AgentArgs, Config, ConfigError, default_socket};
use crate::identity::authority::AuthorityError;
use crate::safetensors::FileError;
use crate::tensor::{TensorError, check_name};
use crate::units::parse_duration;

/// Engines publish ten times as often.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Moves a terminal's cursor home and clears what is below (ECMA-48).
const CLEAR: &str = "\x1b[H\x1b[J";

/// Moves tensors between machines.
#[derive(Debug, Parser)]
#[command(name = "genie", version, arg_required_else_help = true)]
struct Cli {
    /// What to log to stderr: error, warn, info, debug, trace, or a list by module
    #[arg(long, global = true, value_name = "LEVEL", env = "GENIE_LOG")]
    log: Option<String>,
    /// Print data as JSON
    #[arg(long, global = true, env = "GENIE_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this host's agent until SIGTERM
    Agent(Box<AgentArgs>),
    /// Put the tensors of a file into a node's store
    Put {
        /// A .safetensors file
        file: PathBuf,
        /// Where to: PREFIX on this host's agent, NODE:PREFIX on a peer's
        #[arg(value_name = "[NODE:]PREFIX")]
        to: Target,
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        patience: Patience,
        #[command(flatten)]
        agent: Local,
    },
    /// Write the tensors under a prefix into a file
    Get {
        /// Where from: PREFIX on this host's agent, NODE:PREFIX on a peer's
        #[arg(value_name = "[NODE:]PREFIX")]
        from: Target,
        /// The .safetensors file to write
        file: PathBuf,
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        patience: Patience,
        #[command(flatten)]
        agent: Local,
    },
    /// List a node's store
    Ls {
        /// A peer; this host's agent if there is none
        node: Option<String>,
        #[command(flatten)]
        agent: Local,
    },
    /// Remove a tensor, or all under a prefix
    Rm {
        /// NAME on this host's agent, NODE:NAME on a peer's
        #[arg(value_name = "[NODE:]NAME")]
        name: Target,
        #[command(flatten)]
        agent: Local,
    },
    /// Show, reserve or give back this machine's huge pages
    #[command(subcommand)]
    Hugepages(HugepagesCommand),
    /// Make credentials for agents
    #[command(subcommand)]
    Ca(CaCommand),
    /// Look at what of this machine can be used, and say what mends the rest
    Doctor(DoctorArgs),
    /// Show the agent, its transports, sessions and counters
    Status {
        /// Show it again every second until interrupted; with --json one line each time
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        agent: Local,
    },
    /// An agent that `genie bench` starts: ends with its parent
    #[command(hide = true)]
    BenchAgent(Box<AgentArgs>),
    /// Measure what transports carry, beside what this machine can carry
    Bench(Box<BenchArgs>),
}

/// Which pages tensors pass through.
#[derive(Args, Debug)]
struct Pages {
    /// Memory that tensors pass through: auto, host, or hugepage, which fails rather than use other pages; cuda:N or sim: the accelerator's, at both ends
    #[arg(long, value_name = "KIND", default_value_t, env = "GENIE_MEMORY")]
    memory: Memory,
}

/// How long to try.
#[derive(Args, Debug)]
struct Patience {
    /// Give up what takes longer than this
    #[arg(long, value_name = "TIME", env = "GENIE_DEADLINE", value_parser = parse_duration)]
    deadline: Option<Duration>,
    /// Try again for this long if the peer is lost or cannot be reached; a put is still done once
    #[arg(long, value_name = "TIME", env = "GENIE_RETRY", value_parser = parse_duration)]
    retry: Option<Duration>,
}

/// How to reach this host's agent.
#[derive(Args, Debug)]
struct Local {
    /// The agent's socket
    #[arg(long, value_name = "PATH", env = "GENIE_SOCKET")]
    socket: Option<PathBuf>,
}

/// A prefix or name, and on which node.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    node: Option<String>,
    name: String,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Hugepages(#[from] HugepagesError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Bench(#[from] BenchError),
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
    #[error(transparent)]
    Stage(#[from] StartError),
    #[error("no memory for the file: {0}")]
    Memory(#[from] RegionError),
    #[error("cannot copy between host and accelerator: {0}")]
    Copy(String),
    #[error("{file}: {source}")]
    Tensor { file: String, source: TensorError },
    #[error("{file}: {source}")]
    Arena { file: String, source: NotOfArena },
    #[error("cannot print: {0}")]
    Print(io::Error),
    #[error("nothing can work here: not even TCP on the loopback interface does")]
    Unusable,
    #[error("cannot watch for signals and time: {0}")]
    Watch(io::Error),
}

impl CommandError {
    /// Itself for a terminal: a peer's words, which come through the agent, on
    /// one line, and our own on as many as they have.
    fn shown(&self) -> String {
        let text = self.to_string();
        match self {
            Self::Client(_) => show::printable(&text),
            _ => {
                let lines = text.lines().map(show::printable);
                lines.collect::<Vec<_>>().join("\n")
            }
        }
    }
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let mut command = Cli::command();
    // Looks for DPDK, so only for those who ask.
    if std::env::args_os().any(|arg| arg == "--version") {
        command = command.long_version(long_version());
    }
    let cli = match Cli::from_arg_matches(&command.get_matches()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let is_agent = matches!(cli.command, Command::Agent(_));
    let default = if is_agent { "info" } else { "warn" };
    let filter = match EnvFilter::try_new(cli.log.as_deref().unwrap_or(default)) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("genie: --log: {error}");
            return ExitCode::from(2);
        }
    };
    let (writer, _written) = if is_agent {
        let (writer, guard) = log::stderr_in_background();
        (BoxMakeWriter::new(writer), Some(guard))
    } else {
        (BoxMakeWriter::new(log::stderr), None)
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .init();
    match run(cli.command, cli.json) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output has enough of it.
        Err(CommandError::Print(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("genie: {}", error.shown());
            let usage = match &error {
                CommandError::Config(_) => true,
                CommandError::Bench(error) => error.is_usage(),
                _ => false,
            };
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run(command: Command, json: bool) -> Result<(), CommandError> {
    match command {
        Command::Agent(args) => {
            let load = move || {
                let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
                Config::load((*args).clone(), names)
            };
            Ok(agent::run(load()?, load, json)?)
        }
        Command::BenchAgent(args) => {
            // A parent that was killed tells nobody.
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
                .map_err(|errno| CommandError::Watch(errno.into()))?;
            run(Command::Agent(args), json)
        }
        Command::Put {
            file,
            to,
            pages,
            patience,
            agent,
        } => {
            let _unfinished = Unfinished::until(patience.deadline)?;
            let client = &mut agent.connect()?;
            client.set_patience(patience.deadline, patience.retry)?;
            let report = move_file::put(client, &file, &to, pages.memory, json)?;
            print(json, &report, || show::moved("put", &report))
        }
        Command::Get {
            from,
            file,
            pages,
            patience,
            agent,
        } => {
            let unfinished = &Unfinished::until(patience.deadline)?;
            let client = &mut agent.connect()?;
            client.set_patience(patience.deadline, patience.retry)?;
            let report = move_file::get(client, &from, &file, pages.memory, unfinished, json)?;
            print(json, &report, || show::moved("got", &report))
        }
        Command::Ls { node, agent } => {
            let listed = agent.connect()?.list(node.as_deref())?;
            print(json, &listed, || show::listed(&listed))
        }
        Command::Rm { name, agent } => {
            let tensors = agent.connect()?.remove(name.node.as_deref(), &name.name)?;
            let removed = show::Removed { tensors };
            print(json, &removed, || format!("removed {tensors} tensors\n"))
        }
        Command::Ca(command) => ca::run(command, json),
        Command::Hugepages(command) => hugepages::run(command, json),
        Command::Doctor(args) => doctor::run(args, json),
        Command::Status { watch, agent } => {
            let mut client = agent.connect()?;
            loop {
                let status = client.status()?;
                let clear = if watch && !json { CLEAR } else { "" };
                print(json, &status, || {
                    format!("{clear}{}", show::status(&status))
                })?;
                if !watch {
                    return Ok(());
                }
                std::thread::sleep(WATCH_EVERY);
            }
        }
        Command::Bench(args) => Ok(bench::run(*args, json)?),
    }
}

impl Local {
    fn connect(self) -> Result<Client, CommandError> {
        let socket = self
            .socket
            .or_else(default_socket)
            .ok_or(ConfigError::NoSocket)?;
        Ok(Client::connect(&socket)?)
    }
}

impl std::str::FromStr for Target {
    type Err = TensorError;

    fn from_str(text: &str) -> Result<Self, TensorError> {
        let (node, name) = match text.split_once(':') {
            // A leading colon says that the rest, colons and all, is a local name.
            Some(("", name)) => (None, name),
            Some((node, name)) => (Some(node.to_owned()), name),
            None => (None, text),
        };
        check_name(name)?;
        Ok(Self {
            node,
            name: name.to_owned(),
        })
    }
}

fn print<T: Serialize>(
    json: bool,
    value: &T,
    text: impl FnOnce() -> String,
) -> Result<(), CommandError> {
    let text = if json {
        let json = serde_json::to_string(value);
        json.map(|json| json + "\n")
            .map_err(|error| CommandError::Print(error.into()))?
    } else {
        text()
    };
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(CommandError::Print)
}

/// What `--version` says beyond the number.
fn long_version() -> String {
    let transports = crate::transport::AUTO
        .map(|transport| transport.to_string())
        .join(", ");
    let protocol = crate::frame::VERSIONS;
    let dpdk = match genie_dataplane::dpdk::load() {
        Ok(library) => format!("{}, build {}", library.dpdk_version(), library.build_id()),
        Err(reason) => format!("not found: {reason}"),
    };
    format!(
        "{}\ntransports: {transports}\ncontrol protocol: {} to {}\nDPDK: {dpdk}",
        env!("CARGO_PKG_VERSION"),
        protocol.start(),
        protocol.end()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        let mut command = Cli::command();
        command.clone().debug_assert();
        // A variable of one command does not keep another from starting.
        command.build();
        let arguments = |command: &clap::Command| -> Vec<String> {
            let named = command.get_arguments().filter_map(|one| one.get_env());
            named
                .map(|name| name.to_string_lossy().into_owned())
                .collect()
        };
        for one in command.get_subcommands() {
            crate::config::check_variables(arguments(one).into_iter()).unwrap();
        }
    }

    #[test]
    fn errors_cannot_act_on_a_terminal() {
        let client = CommandError::Client(ClientError::Failed {
            kind: genie_client::FailureKind::Peer,
            message: "a\n\u{1b}[1mb".into(),
        });
        assert_eq!(client.shown(), r"a\n\u{1b}[1mb");
        let print = CommandError::Print(io::Error::other("a\nb\u{7}"));
        assert_eq!(print.shown(), "cannot print: a\nb\\u{7}");
    }

    #[test]
    fn targets() {
        let parse = |text: &str| text.parse::<Target>().map(|t| (t.node, t.name));
        assert_eq!(parse("b:model"), Ok((Some("b".into()), "model".into())));
        assert_eq!(parse("model/x"), Ok((None, "model/x".into())));
        assert_eq!(parse(":a:b"), Ok((None, "a:b".into())));
        for bad in ["", "b:", "b:../x", "b:/x", "a\0b"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
