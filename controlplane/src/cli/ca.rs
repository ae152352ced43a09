//! `genie ca`: a certificate authority for the agents of one installation.

use std::path::PathBuf;

use clap::Subcommand;
use serde::Serialize;

use super::{CommandError, print};
use crate::identity::authority::{self, CA_DAYS, NODE_DAYS};

/// What to do about credentials.
#[derive(Debug, Subcommand)]
pub(super) enum CaCommand {
    /// Make a CA: ca.pem, which every agent needs, and ca.key, which signs and stays here
    Init {
        /// Where to
        #[arg(long, value_name = "FOLDER", default_value = ".")]
        folder: PathBuf,
    },
    /// Make a node's certificate and key, NAME.pem and NAME.key
    Issue {
        /// The node's name, as in its agent's --name
        name: String,
        /// Where the CA lies, and where to
        #[arg(long, value_name = "FOLDER", default_value = ".")]
        folder: PathBuf,
        /// For how many days the certificate is valid
        #[arg(long, value_name = "N", default_value_t = NODE_DAYS, value_parser = clap::value_parser!(u32).range(1..=i64::from(CA_DAYS)))]
        days: u32,
    },
}

/// What was made.
#[derive(Debug, Serialize)]
struct Made {
    cert: PathBuf,
    key: PathBuf,
    ca: Option<PathBuf>,
    valid_days: u32,
}

/// Runs one of them.
pub(super) fn run(command: CaCommand, json: bool) -> Result<(), CommandError> {
    let made = match command {
        CaCommand::Init { folder } => {
            let (cert, key) = authority::init(&folder)?;
            Made {
                cert,
                key,
                ca: None,
                valid_days: CA_DAYS,
            }
        }
        CaCommand::Issue { name, folder, days } => {
            let files = authority::issue(&folder, &name, authority::in_days(days))?;
            Made {
                cert: files.cert,
                key: files.key,
                ca: Some(files.ca),
                valid_days: days,
            }
        }
    };
    print(json, &made, || show(&made))
}

fn show(made: &Made) -> String {
    let (cert, key, days) = (made.cert.display(), made.key.display(), made.valid_days);
    match &made.ca {
        None => format!("{cert} and {key}, valid for {days} days; keep {key} secret\n"),
        Some(ca) => {
            let ca = ca.display();
            format!(
                "valid for {days} days; its agent takes\n  --ca {ca} --cert {cert} --key {key}\n"
            )
        }
    }
}
