//! A certificate authority in a folder: two files for itself, two for each node.
//!
//! ```text
//!   ca.pem      0644  the CA's certificate: to every node
//!   ca.key      0600  the CA's key: nowhere else
//!   NAME.pem    0644  a node's certificate   ┐ to that node
//!   NAME.key    0600  a node's key           ┘
//! ```
//!
//! Called by `genie ca`. No file is ever overwritten.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::{CredentialError, CredentialFiles, Credentials};
use crate::config::check_node;

/// How long a CA's certificate is valid: longer than the machines it serves.
pub const CA_DAYS: u32 = 3650;

/// How long a node's certificate is valid if nothing else is said.
pub const NODE_DAYS: u32 = 365;

/// How much clocks may differ: certificates are valid from that long ago.
const SKEW: Duration = Duration::from_secs(3600);

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Why nothing was issued.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Something of that name is there.
    #[error("{} exists and is not overwritten: remove it, or choose another folder with --folder", .0.display())]
    Exists(PathBuf),
    /// A file cannot be written or read.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// No CA there.
    #[error("{} is missing: 'genie ca init' makes a CA, --folder says where it lies", .0.display())]
    NoAuthority(PathBuf),
    /// Not a name that a certificate can hold.
    #[error(
        "a certificate cannot hold the node name '{0}': \
         use letters, digits, '-' and '.', and say --name accordingly to its agent"
    )]
    Name(String),
    /// The library refuses.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// What was issued would not be accepted.
    #[error("the CA in {} does not work: {source}", folder.display())]
    Unfit {
        /// Where it lies.
        folder: PathBuf,
        /// What an agent would say.
        source: CredentialError,
    },
}

/// Makes a CA; returns the paths of its certificate and key.
pub fn init(folder: &Path) -> Result<(PathBuf, PathBuf), AuthorityError> {
    let (cert, key) = (folder.join("ca.pem"), folder.join("ca.key"));
    refuse_existing(&[&cert, &key])?;
    std::fs::create_dir_all(folder).map_err(file("make", folder))?;
    let pair = KeyPair::generate()?;
    let mut params = ca_params(&pair);
    limit(&mut params, in_days(CA_DAYS));
    let certificate = params.self_signed(&pair)?;
    create(&key, 0o600, &pair.serialize_pem())?;
    create(&cert, 0o644, &certificate.pem())?;
    Ok((cert, key))
}

/// Issues a certificate to a node, valid until then; returns where all lies
/// that its agent needs.
pub fn issue(
    folder: &Path,
    name: &str,
    until: SystemTime,
) -> Result<CredentialFiles, AuthorityError> {
    let bad_name = |_| AuthorityError::Name(name.to_owned());
    check_node(name).map_err(|_| AuthorityError::Name(name.to_owned()))?;
    rustls::pki_types::DnsName::try_from(name).map_err(bad_name)?;
    let files = CredentialFiles {
        ca: folder.join("ca.pem"),
        cert: folder.join(format!("{name}.pem")),
        key: folder.join(format!("{name}.key")),
    };
    let ca_key = folder.join("ca.key");
    for path in [&files.ca, &ca_key] {
        if !path.exists() {
            return Err(AuthorityError::NoAuthority(path.clone()));
        }
    }
    refuse_existing(&[&files.cert, &files.key])?;
    let pem = std::fs::read_to_string(&ca_key).map_err(file("read", &ca_key))?;
    let ca_pair = KeyPair::from_pem(&pem)?;
    let issuer = Issuer::new(ca_params(&ca_pair), ca_pair);
    let pair = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Every agent both dials and is dialled.
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    limit(&mut params, until);
    let certificate = params.signed_by(&pair, &issuer)?;
    create(&files.key, 0o600, &pair.serialize_pem())?;
    create(&files.cert, 0o644, &certificate.pem())?;
    if until > SystemTime::now() {
        let loaded = Credentials::load(&files, name);
        loaded.map_err(|source| {
            for path in [&files.key, &files.cert] {
                let _ = std::fs::remove_file(path);
            }
            AuthorityError::Unfit {
                folder: folder.to_owned(),
                source,
            }
        })?;
    }
    Ok(files)
}

/// The moment that many days from now.
pub fn in_days(days: u32) -> SystemTime {
    SystemTime::now() + days * DAY
}

/// What a CA says of itself; nothing but its key is needed to say it again. A
/// checksum of the key in the name tells two CAs apart in errors; trust comes
/// from signatures.
fn ca_params(key: &KeyPair) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let name = format!("Genie CA {:08x}", crc32c::crc32c(key.public_key_raw()));
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

/// Makes a certificate valid from now, or a little before, until then.
fn limit(params: &mut CertificateParams, until: SystemTime) {
    let since = |time: SystemTime| {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Duration::from_secs(since.as_secs())
    };
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    // Also in a certificate that has expired the end comes after the beginning.
    params.not_before = epoch + since(SystemTime::now().min(until) - SKEW);
    params.not_after = epoch + since(until);
}

fn refuse_existing(paths: &[&PathBuf]) -> Result<(), AuthorityError> {
    match paths.iter().find(|path| path.exists()) {
        Some(path) => Err(AuthorityError::Exists((*path).clone())),
        None => Ok(()),
    }
}

fn create(path: &Path, mode: u32, text: &str) -> Result<(), AuthorityError> {
    let mut options = OpenOptions::new();
    let created = options.write(true).create_new(true).mode(mode).open(path);
    let written = created.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => AuthorityError::Exists(path.to_owned()),
        _ => file("write", path)(source),
    })
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::File {
        action,
        path,
        source,
    }
}
