//! A certificate, its key, and the CA whose certificates are believed.
//!
//! TLS 1.3 only, without session tickets and early data: every connection is
//! a full handshake, so nothing of a recorded one can be used again.

use std::fmt;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Where credentials lie; all three or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialFiles {
    /// Certificates of CAs, PEM.
    pub ca: PathBuf,
    /// This node's certificate and any between it and the CA, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

/// Credentials that were found to be good.
pub struct Credentials {
    files: CredentialFiles,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    verifier: Arc<WebPkiServerVerifier>,
}

/// A chain of certificates that a peer has shown, its own first.
pub type Chain = Vec<CertificateDer<'static>>;

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}; 'genie ca init' and 'genie ca issue NAME' make one", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{} holds no {what}: {reason}", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What was found.
        reason: String,
    },
    /// Others can read the key.
    #[error("every user can read the private key {}: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// Where it lies.
        path: PathBuf,
    },
    /// The three do not belong together.
    #[error("{} cannot be used by node '{name}': {reason}; 'genie ca issue {name}' makes one that can", cert.display())]
    Unfit {
        /// The certificate.
        cert: PathBuf,
        /// Who wants to use it.
        name: String,
        /// Why not.
        reason: String,
    },
}

impl Credentials {
    /// Reads the files and checks that `name` can show them today.
    pub fn load(files: &CredentialFiles, name: &str) -> Result<Self, CredentialError> {
        let unfit = |reason: String| CredentialError::Unfit {
            cert: files.cert.clone(),
            name: name.to_owned(),
            reason,
        };
        let tls = |error: rustls::Error| unfit(explain(&error));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(read_roots(&files.ca)?);
        let chain = read_chain(&files.cert)?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| unfit(error.to_string()))?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| unfit(error.to_string()))?;
        verify(&verifier, &chain, name).map_err(unfit)?;
        let key = read_key(&files.key)?;
        let mut server = server_config(&provider)
            .map_err(tls)?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(tls)?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_webpki_verifier(Arc::clone(&verifier))
            .with_client_auth_cert(chain, key)
            .map_err(tls)?;
        client.resumption = Resumption::disabled();
        Ok(Self {
            files: files.clone(),
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
            verifier,
        })
    }

    /// What answers handshakes.
    pub(crate) fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }

    /// What begins them.
    pub(crate) fn connector(&self) -> &TlsConnector {
        &self.connector
    }

    /// Whether a chain is, at this moment, one of the CA's and `name`'s.
    pub fn verify(&self, chain: &[CertificateDer<'static>], name: &str) -> Result<(), String> {
        verify(&self.verifier, chain, name)
    }
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cert, ca) = (self.files.cert.display(), self.files.ca.display());
        write!(f, "certificate {cert}, peers' must be signed by {ca}")
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The rest holds a secret.
        f.debug_struct("Credentials")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

/// What a handshake's failure means and what mends it.
pub fn explain(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    const ISSUE: &str = "issue one with 'genie ca issue'";
    match error {
        Error::NoCertificatesPresented | Error::AlertReceived(Alert::CertificateRequired) => {
            format!("no certificate was shown: {ISSUE} and start with --ca, --cert and --key")
        }
        Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature)
        | Error::AlertReceived(Alert::UnknownCA | Alert::DecryptError) => {
            "the certificate is of another CA: both ends need certificates of one CA and that CA's \
             ca.pem"
                .to_owned()
        }
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. })
        | Error::AlertReceived(Alert::CertificateExpired) => {
            format!("the certificate has expired: {ISSUE} and send the agent SIGHUP")
        }
        Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            "the certificate is not valid yet: set the clock of the machine that says so".to_owned()
        }
        Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            "the certificate is another node's: the name in it must be the node's name".to_owned()
        }
        Error::InvalidMessage(_) => {
            "it does not speak TLS: give that agent --ca, --cert and --key too".to_owned()
        }
        other => other.to_string(),
    }
}

/// What an I/O error of a TLS connection means, if it is about TLS.
pub fn explain_io(error: &io::Error) -> Option<String> {
    let inner = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(explain(inner))
}

type ServerBuilder = rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>;

fn server_config(provider: &Arc<CryptoProvider>) -> Result<ServerBuilder, rustls::Error> {
    ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
}

fn verify(
    verifier: &WebPkiServerVerifier,
    chain: &[CertificateDer<'static>],
    name: &str,
) -> Result<(), String> {
    let name = ServerName::try_from(name)
        .map_err(|_| format!("'{name}' cannot be in a certificate: it is no host name"))?;
    let (own, between) = chain.split_first().ok_or("there is no certificate")?;
    verifier
        .verify_server_cert(own, between, &name, &[], UnixTime::now())
        .map(|_| ())
        .map_err(|error| explain(&error))
}

fn read(path: &Path) -> Result<Vec<u8>, CredentialError> {
    std::fs::read(path).map_err(|source| CredentialError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_roots(path: &Path) -> Result<RootCertStore, CredentialError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_chain(path)? {
        let added = roots.add(certificate);
        added.map_err(|error| pem(path, "CA certificate", error))?;
    }
    Ok(roots)
}

fn read_chain(path: &Path) -> Result<Chain, CredentialError> {
    let bytes = read(path)?;
    let chain: Result<Chain, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let chain = chain.map_err(|error| pem(path, "certificate", error))?;
    if chain.is_empty() {
        return Err(pem(path, "certificate", "nothing there is one"));
    }
    Ok(chain)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialError> {
    let bytes = read(path)?;
    let mode = std::fs::metadata(path).map_or(0, |file| file.permissions().mode());
    if mode & 0o007 != 0 {
        return Err(CredentialError::Exposed {
            path: path.to_owned(),
        });
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| pem(path, "private key", error))
}

fn pem(path: &Path, what: &'static str, reason: impl fmt::Display) -> CredentialError {
    CredentialError::Pem {
        path: path.to_owned(),
        what,
        reason: reason.to_string(),
    }
}
