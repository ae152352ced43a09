//! Who gets in: certificates, allowed names, rights, and data connections that
//! belong to a session.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use genie_controlplane::frame;
use genie_controlplane::identity::authority;
use genie_controlplane::identity::stream::ControlStream;
use genie_controlplane::identity::{CredentialFiles, Credentials};
use genie_controlplane::message::{Hello, Instance, Message};
use genie_controlplane::transport::{Local, Offer, Transport};
use genie_dataplane::SessionId;
use genie_dataplane::tcp::Token;
use genie_dataplane::tcp::frame::{HELLO_LEN, Hello as DataHello, Verdict};
use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, Output, Running, eventually, genie_command};
use rustix::process::Signal;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// A CA in a folder of its own.
struct Authority(PathBuf);

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
        let folder = folder.join(name);
        authority::init(&folder).unwrap();
        Self(folder)
    }

    fn issue(&self, name: &str) -> CredentialFiles {
        authority::issue(&self.0, name, authority::in_days(1)).unwrap()
    }

    fn issue_for(&self, name: &str, time: Duration) -> CredentialFiles {
        authority::issue(&self.0, name, SystemTime::now() + time).unwrap()
    }
}

fn flags(files: &CredentialFiles) -> Vec<String> {
    let flag = |name, path: &Path| format!("--{name}={}", path.display());
    vec![
        flag("ca", &files.ca),
        flag("cert", &files.cert),
        flag("key", &files.key),
    ]
}

fn start(folder: &Path, name: &str, files: &CredentialFiles, more: &[&str]) -> Agent {
    let flags = flags(files);
    let mut args: Vec<&str> = flags.iter().map(String::as_str).collect();
    args.extend(more);
    Agent::start(folder, name, &args)
}

/// Runs an agent that should not start.
fn fails_to_start(folder: &Path, name: &str, files: &CredentialFiles) -> Output {
    let mut command = genie_command();
    command.args(["agent", "--transport=tcp", "--listen=127.0.0.1:0"]);
    command.args(["--data=127.0.0.1:0", "--name", name]);
    command.arg(format!("--socket={}/{name}.x", folder.display()));
    command.args(flags(files));
    Running::start(command).wait(GENEROUS)
}

fn file(folder: &Path) -> String {
    let path = folder.join("m.safetensors");
    model::write(&path, &[Tensor::bytes("x", 100_000)], &[]);
    path.to_str().unwrap().to_owned()
}

fn genie(args: &[&str]) -> Output {
    let mut command = genie_command();
    command.args(args);
    Running::start(command).wait(GENEROUS)
}

#[test]
fn a_ca_makes_files_with_the_right_modes_and_overwrites_none() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("pki");
    let at = format!("--folder={}", place.display());
    for args in [["ca", "init", &at].as_slice(), &["ca", "issue", "a", &at]] {
        let output = genie(args);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.contains("valid for"), "{output:?}");
    }
    let mode = |name: &str| {
        let metadata = std::fs::metadata(place.join(name)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!((mode("ca.pem"), mode("a.pem")), (0o644, 0o644));
    assert_eq!((mode("ca.key"), mode("a.key")), (0o600, 0o600));
    let key = std::fs::read(place.join("a.key")).unwrap();
    genie(&["ca", "init", &at]).assert_fails_with("is not overwritten");
    genie(&["ca", "issue", "a", &at]).assert_fails_with("is not overwritten");
    assert_eq!(std::fs::read(place.join("a.key")).unwrap(), key);
    genie(&["ca", "issue", "a/b", &at]).assert_fails_with("a/b");
    genie(&["ca", "issue", "b", "--folder=/nonexistent"]).assert_fails_with("genie ca init");
}

#[test]
fn agents_of_one_ca_move_tensors_and_say_who_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let b = start(folder.path(), "b", &ca.issue("b"), &[]);
    let a = start(folder.path(), "a", &ca.issue("a"), &[&b.as_peer()]);
    let put = a.json(&["put", &file(folder.path()), "b:m"]);
    assert_eq!(put["bytes"], 100_000);
    assert_eq!(put["path"], "tcp");
    for agent in [&a, &b] {
        let identity = agent.status()["identity"].clone();
        assert_eq!(identity["authenticated"], true);
        assert_eq!(identity["refused_peers"], 0);
        let summary = identity["summary"].as_str().unwrap();
        assert!(summary.contains("every node"), "{summary}");
    }
    let alone = Agent::start(folder.path(), "c", &[]);
    assert_eq!(alone.status()["identity"]["authenticated"], false);
    alone.assert_logs("no credentials");
}

#[test]
fn tls_and_plain_do_not_mix_and_each_says_what_mends_it() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let plain = Agent::start(folder.path(), "p", &[]);
    let tls = start(folder.path(), "t", &ca.issue("t"), &[&plain.as_peer()]);
    let other = Agent::start(folder.path(), "q", &[&tls.as_peer()]);
    other
        .genie(&["ls", "t"])
        .assert_fails_with("start this agent with --ca, --cert and --key");
    tls.genie(&["ls", "p"])
        .assert_fails_with("it does not speak TLS: give that agent --ca, --cert and --key too");
    tls.assert_logs("it does not speak TLS");
    plain.assert_logs("it speaks TLS");
    assert_eq!(tls.status()["identity"]["refused_peers"], 1);
    assert_eq!(tls.status()["sessions"].as_array().unwrap().len(), 0);
}

#[test]
fn a_certificate_of_another_ca_is_refused_by_either_end() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (
        Authority::new(folder.path(), "ours"),
        Authority::new(folder.path(), "theirs"),
    );
    let b = start(folder.path(), "b", &ours.issue("b"), &[]);
    let strange = theirs.issue("s");
    let s = start(folder.path(), "s", &strange, &[&b.as_peer()]);
    s.genie(&["ls", "b"]).assert_fails_with("of another CA");
    drop(s);
    // One that believes both is still not believed.
    let both = folder.path().join("both.pem");
    let mut text = std::fs::read(&strange.ca).unwrap();
    text.extend(std::fs::read(ours.0.join("ca.pem")).unwrap());
    std::fs::write(&both, text).unwrap();
    let mixed = CredentialFiles {
        ca: both,
        ..strange
    };
    let m = start(folder.path(), "s", &mixed, &[&b.as_peer()]);
    m.genie(&["ls", "b"])
        .assert_fails_with("it refused this node: the certificate is of another CA");
    assert_eq!(b.status()["identity"]["refused_peers"], 2);
    b.assert_logs("of another CA");
}

#[test]
fn a_certificate_that_has_expired_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let b = start(folder.path(), "b", &ca.issue("b"), &[]);
    let short = ca.issue_for("a", Duration::from_secs(8));
    let until = SystemTime::now() + Duration::from_secs(9);
    let a = start(folder.path(), "a", &short, &[&b.as_peer()]);
    while SystemTime::now() < until {
        std::thread::sleep(Duration::from_millis(100));
    }
    a.genie(&["ls", "b"])
        .assert_fails_with("it refused this node: the certificate has expired");
    b.assert_logs("has expired");
    fails_to_start(folder.path(), "a", &short).assert_fails_with("has expired");
}

#[test]
fn an_agent_refuses_credentials_that_are_not_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let files = ca.issue("c");
    fails_to_start(folder.path(), "b", &files).assert_fails_with("another node's");
    let key = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(&files.key, key).unwrap();
    fails_to_start(folder.path(), "c", &files).assert_fails_with("chmod 600");
    let wrong = CredentialFiles {
        key: ca.issue("d").key,
        ..files.clone()
    };
    fails_to_start(folder.path(), "c", &wrong).assert_fails_with("cannot be used");
    let missing = CredentialFiles {
        cert: "/nonexistent".into(),
        ..files
    };
    fails_to_start(folder.path(), "c", &missing).assert_fails_with("/nonexistent");
}

/// TLS by the book, believing the right CA, with no certificate to show.
#[tokio::test]
async fn a_tls_client_without_a_certificate_is_refused() {
    use tokio::io::AsyncReadExt;
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let b = start(folder.path(), "b", &ca.issue("b"), &[]);
    let mut roots = rustls::RootCertStore::empty();
    let pem = ca.0.join("ca.pem");
    roots
        .add(CertificateDer::from_pem_file(&pem).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let stream = tokio::net::TcpStream::connect(b.listen).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("b").unwrap();
    // In TLS 1.3 the refusal comes after the client's own handshake is done.
    let mut stream = connector.connect(name, stream).await.unwrap();
    let mut answer = Vec::new();
    let refused = stream.read_to_end(&mut answer).await.unwrap_err();
    let alert = refused.get_ref().unwrap().downcast_ref::<rustls::Error>();
    let required = rustls::AlertDescription::CertificateRequired;
    assert_eq!(alert, Some(&rustls::Error::AlertReceived(required)));
    assert!(answer.is_empty(), "{answer:?}");
    drop(stream);
    eventually("the refusal is counted", || {
        (b.status()["identity"]["refused_peers"] == 1).then_some(())
    });
    b.assert_logs("no certificate was shown");
}

#[test]
fn a_name_that_is_not_allowed_opens_no_session() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let b = start(folder.path(), "b", &ca.issue("b"), &["--allow=a"]);
    let a = start(folder.path(), "a", &ca.issue("a"), &[&b.as_peer()]);
    let c = start(folder.path(), "c", &ca.issue("c"), &[&b.as_peer()]);
    assert!(a.genie(&["ls", "b"]).status.success());
    c.genie(&["ls", "b"])
        .assert_fails_with("node 'b' does not allow 'c'");
    assert_eq!(b.status()["identity"]["refused_peers"], 1);
    b.assert_logs("does not allow 'c'");
}

#[test]
fn a_right_that_is_missing_is_named_to_the_peer() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let toml = folder.path().join("b.toml");
    std::fs::write(
        &toml,
        "[rights.a]\nput = ['in']\nget = ['in', 'out']\nlist = ['*']\n",
    )
    .unwrap();
    let config = format!("--config={}", toml.display());
    let b = start(folder.path(), "b", &ca.issue("b"), &[&config]);
    let a = start(folder.path(), "a", &ca.issue("a"), &[&b.as_peer()]);
    let file = file(folder.path());
    let copy = folder.path().join("copy").display().to_string();
    assert!(a.genie(&["put", &file, "b:in/m"]).status.success());
    assert!(a.genie(&["get", "b:in", &copy]).status.success());
    assert!(a.genie(&["ls", "b"]).status.success());
    let refused = [
        (vec!["put", &file, "b:out"], "put under 'out'"),
        (vec!["put", &file, "b:inn"], "put under 'inn'"),
        (vec!["get", "b:other", &copy], "get under 'other'"),
        (vec!["rm", "b:in/m"], "remove under 'in/m'"),
    ];
    for (args, expected) in &refused {
        let denied = format!("peer 'b' does not let this node {expected}");
        a.genie(args).assert_fails_with(&denied);
    }
    let identity = b.status()["identity"].clone();
    assert_eq!(identity["refused_requests"], refused.len());
    b.assert_logs("no such right");
    // The session lives on, and the tensor too.
    assert_eq!(a.status()["sessions"].as_array().unwrap().len(), 1);
    assert!(a.genie(&["get", "b:in", &copy]).status.success());
}

#[test]
fn sighup_takes_newer_files_and_keeps_the_old_if_they_are_bad() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let files = ca.issue("b");
    let toml = folder.path().join("b.toml");
    std::fs::write(&toml, "allow = ['a', 'c']\n").unwrap();
    let config = format!("--config={}", toml.display());
    let b = start(folder.path(), "b", &files, &[&config]);
    let a = start(folder.path(), "a", &ca.issue("a"), &[&b.as_peer()]);
    let c = start(folder.path(), "c", &ca.issue("c"), &[&b.as_peer()]);
    for agent in [&a, &c] {
        assert!(agent.genie(&["ls", "b"]).status.success());
    }
    let peers = || -> Vec<String> {
        let status = b.status();
        let sessions = status["sessions"].as_array().unwrap();
        let peer = |s: &serde_json::Value| s["peer"].as_str().unwrap().to_owned();
        sessions.iter().map(peer).collect()
    };
    assert_eq!(peers(), ["a", "c"]);

    std::fs::write(&toml, "allow = ['a']\n").unwrap();
    b.signal(Signal::HUP);
    eventually("c's session ended", || (peers() == ["a"]).then_some(()));
    c.assert_logs("no longer allows 'c'");
    c.genie(&["ls", "b"])
        .assert_fails_with("does not allow 'c'");

    // Bad ones change nothing, and that is said.
    let good = std::fs::read(&files.cert).unwrap();
    std::fs::write(&files.cert, "nonsense").unwrap();
    b.signal(Signal::HUP);
    let reason = eventually("the bad file is named", || {
        let identity = b.status()["identity"].clone();
        identity["reload_error"].as_str().map(str::to_owned)
    });
    assert!(reason.contains("b.pem"), "{reason}");
    assert_eq!(peers(), ["a"]);
    assert!(a.genie(&["ls", "b"]).status.success());

    // Another CA takes over: a is no longer believed, one of the new CA's is.
    std::fs::write(&files.cert, good).unwrap();
    let other = Authority::new(folder.path(), "other");
    let new = other.issue("b");
    for (from, to) in [
        (&new.ca, &files.ca),
        (&new.cert, &files.cert),
        (&new.key, &files.key),
    ] {
        std::fs::copy(from, to).unwrap();
    }
    b.signal(Signal::HUP);
    eventually("a's session ended", || peers().is_empty().then_some(()));
    assert!(b.status()["identity"]["reload_error"].is_null());
    a.assert_logs("no longer believes 'a'");
    drop(a);
    let a2 = start(folder.path(), "a", &other.issue("a"), &[&b.as_peer()]);
    assert!(a2.genie(&["ls", "b"]).status.success());
}

#[test]
fn the_commands_of_the_readme_work() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let mark = "<!-- run by tests/tests/identity.rs -->\n```sh\n";
    let (_, rest) = readme.split_once(mark).expect("the README has the section");
    let (commands, _) = rest.split_once("```").expect("the block ends");
    // Ports that other tests leave alone, and no end before both agents are gone.
    let mut script = format!("set -e\n{commands}wait\n");
    for port in ["6555", "6556", "6557", "6558"] {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        script = script.replace(port, &free.local_addr().unwrap().port().to_string());
    }
    let folder = tempfile::tempdir().unwrap();
    let mut bash = std::process::Command::new("bash");
    genie_tests::clean(&mut bash);
    let bin = genie_tests::genie_path();
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", bin.parent().unwrap().display());
    bash.args(["-c", &script])
        .env("PATH", path)
        .current_dir(&folder);
    let output = Running::start(bash).wait(GENEROUS);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.contains("session up peer=a"), "{output:?}");
}

/// A peer that keeps to the protocol as far as each test says.
struct Peer {
    stream: ControlStream,
    data: SocketAddr,
    theirs: SessionId,
    ours: SessionId,
}

fn hello(name: &str, instance: u8) -> Message {
    Message::Hello(Hello {
        name: name.into(),
        instance: Instance([instance; 16]),
        preference: "tcp".parse().unwrap(),
        offers: vec![Offer {
            transport: Transport::Tcp,
            local: Ok(Local::Tcp {
                data: ([127, 0, 0, 1], 1).into(),
                streams: 1,
            }),
        }],
        liveness_ms: 30_000,
        range_bytes: None,
        data_security: Default::default(),
    })
}

impl Peer {
    /// Connects with credentials, and says to be `name`.
    async fn introduce(
        to: SocketAddr,
        files: &CredentialFiles,
        own: &str,
        name: &str,
    ) -> ControlStream {
        let credentials = Credentials::load(files, own).unwrap();
        let stream = tokio::net::TcpStream::connect(to).await.unwrap();
        let mut stream = ControlStream::dial(stream, Some(&credentials), "b")
            .await
            .unwrap();
        frame::exchange_preamble(&mut stream).await.unwrap();
        frame::write(&mut stream, &hello(name, 7)).await.unwrap();
        let theirs: Message = frame::read(&mut stream, frame::BODY_MAX).await.unwrap();
        assert!(matches!(theirs, Message::Hello(_)), "{theirs:?}");
        stream
    }

    /// Has agent `b` wait for the data connections of a session.
    async fn ask(b: &Agent, to: SocketAddr, files: &CredentialFiles, name: &str) -> Self {
        let mut stream = Self::introduce(to, files, name, name).await;
        let ours = SessionId(7);
        let ask = Message::Try {
            transport: Transport::Tcp,
            session: ours,
            token: Some(Token([1; 16])),
            salt: None,
        };
        frame::write(&mut stream, &ask).await.unwrap();
        let theirs = match frame::read(&mut stream, frame::BODY_MAX).await.unwrap() {
            Message::Trying { session, .. } => session,
            other => panic!("{other:?}"),
        };
        let data = b.data.unwrap();
        Self {
            stream,
            data,
            theirs,
            ours,
        }
    }

    fn token(&self) -> Token {
        self.stream
            .path_keys()
            .unwrap()
            .token(self.ours, self.theirs)
    }

    fn data_hello(&self, token: Token) -> [u8; HELLO_LEN] {
        let hello = DataHello {
            session: self.theirs,
            token,
            stream: 0,
            streams: 1,
            verdict: Verdict::Welcome,
        };
        hello.encode()
    }
}

/// What becomes of a data connection that begins so.
fn verdict(data: SocketAddr, hello: &[u8]) -> Option<(TcpStream, Verdict)> {
    let mut socket = TcpStream::connect(data).unwrap();
    socket.set_read_timeout(Some(GENEROUS)).unwrap();
    socket.write_all(hello).unwrap();
    let mut answer = [0; HELLO_LEN];
    match socket.read_exact(&mut answer) {
        Ok(()) => Some((socket, DataHello::parse(&answer).unwrap().verdict)),
        Err(error) => {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no answer");
            None
        }
    }
}

fn judged(data: SocketAddr, hello: &[u8]) -> Option<Verdict> {
    verdict(data, hello).map(|(_, verdict)| verdict)
}

const SLOW: &str = "--liveness=10s";

#[tokio::test]
async fn a_hello_under_another_name_than_the_certificates_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let b = start(folder.path(), "b", &ca.issue("b"), &[SLOW]);
    let mut stream = Peer::introduce(b.listen, &ca.issue("c"), "c", "a").await;
    let answer: Message = frame::read(&mut stream, frame::BODY_MAX).await.unwrap();
    let Message::Bye { reason, .. } = answer else {
        panic!("{answer:?}");
    };
    assert!(reason.contains("certificate is another node's"), "{reason}");
    assert_eq!(b.status()["identity"]["refused_peers"], 1);
}

#[tokio::test]
async fn a_data_connection_needs_the_token_of_its_own_session() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let b = start(folder.path(), "b", &ca.issue("b"), &[SLOW, "--streams=1"]);
    let c = Peer::ask(&b, b.listen, &ca.issue("c"), "c").await;
    let d = Peer::ask(&b, b.listen, &ca.issue("d"), "d").await;
    assert_ne!(c.token().0, d.token().0);
    let refused = Some(Verdict::UnknownSession);
    assert_eq!(judged(c.data, &c.data_hello(Token([0; 16]))), refused);
    // What was sent instead of being derived does not count.
    assert_eq!(judged(c.data, &c.data_hello(Token([1; 16]))), refused);
    assert_eq!(judged(c.data, &c.data_hello(d.token())), refused);
    let (_held, welcome) = verdict(c.data, &c.data_hello(c.token())).unwrap();
    assert_eq!(welcome, Verdict::Welcome);
    // Even who has seen the token finds the place taken.
    let again = judged(c.data, &c.data_hello(c.token()));
    assert_eq!(again, Some(Verdict::WrongStream));
}

/// Stands between a dialler and an agent, and writes down what the dialler says.
fn recorder(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let record: Arc<Mutex<Vec<u8>>> = Arc::default();
    let kept = Arc::clone(&record);
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(to).unwrap();
        let (mut from, mut back) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from, &mut back));
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = client.read(&mut bytes) {
            kept.lock().unwrap().extend(&bytes[..len]);
            if server.write_all(&bytes[..len]).is_err() {
                break;
            }
        }
    });
    (address, record)
}

#[tokio::test]
async fn a_session_that_was_recorded_cannot_be_replayed() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new(folder.path(), "ca");
    let b = start(
        folder.path(),
        "b",
        &ca.issue("b"),
        &["--liveness=3s", "--streams=1"],
    );
    let (proxy, record) = recorder(b.listen);
    let c = Peer::ask(&b, proxy, &ca.issue("c"), "c").await;
    let data = c.data_hello(c.token());
    let (held, welcome) = verdict(c.data, &data).unwrap();
    assert_eq!(welcome, Verdict::Welcome, "the original must work");
    let at = c.data;
    drop((c, held));
    let control = record.lock().unwrap().clone();
    assert!(control.len() > 1000, "{} bytes", control.len());
    assert_eq!(control[0], 22, "a TLS handshake");

    let before = b.status()["identity"]["refused_peers"].as_u64().unwrap();
    let mut socket = TcpStream::connect(b.listen).unwrap();
    socket.set_read_timeout(Some(GENEROUS)).unwrap();
    // It may be refused before all of it is written.
    let _ = socket.write_all(&control);
    let _ = socket.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let ended = socket.read_to_end(&mut answer);
    let waits = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
    assert!(!ended.as_ref().is_err_and(waits), "{ended:?}");
    eventually("the replay was refused", || {
        let refused = b.status()["identity"]["refused_peers"].as_u64().unwrap();
        (refused == before + 1).then_some(())
    });
    assert_eq!(
        judged(at, &data).unwrap_or(Verdict::UnknownSession),
        Verdict::UnknownSession
    );
    assert_eq!(b.status()["sessions"].as_array().unwrap().len(), 0);
}
