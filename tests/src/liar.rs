//! A peer that says whatever a test makes it say, and one that behaves.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};

use genie_controlplane::frame::{
    BODY_MAX, exchange_preamble_blocking, read_blocking, write_blocking,
};
use genie_controlplane::message::{Hello, Instance, Message};
use genie_controlplane::transport::{Local, Offer, Transport};
use genie_dataplane::SessionId;
use genie_dataplane::tcp::Token;
use genie_dataplane::tcp::frame::{
    HEADER_LEN, HELLO_LEN, Header, Hello as DataHello, Kind, Verdict,
};

use crate::model::{self, Tensor};
use crate::{Agent, GENEROUS};

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// A connection from this address of the loopback network: a host of its own.
///
/// # Errors
/// The kernel's.
pub fn connect_from(from: [u8; 4], to: SocketAddr) -> rustix::io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
    // Or agents that are started later would keep it open.
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::from(from), 0))?;
    connect(&socket, &to)?;
    let stream = TcpStream::from(socket);
    stream
        .set_read_timeout(Some(GENEROUS))
        .expect("not a time-out of zero");
    Ok(stream)
}

/// Puts a tensor to `b` and gets it back.
#[derive(Debug)]
pub struct Good {
    file: PathBuf,
    back: PathBuf,
}

impl Good {
    /// Writes its tensor into `folder`.
    pub fn new(folder: &Path) -> Self {
        let good = Self {
            file: folder.join("good.safetensors"),
            back: folder.join("back.safetensors"),
        };
        model::write(&good.file, &[Tensor::bytes("x", 100_000)], &[]);
        good
    }

    /// Does it once.
    ///
    /// # Panics
    /// If anything of it fails, or other bytes come back.
    pub fn exchange(&self, a: &Agent) {
        a.json(&["put", text(&self.file), "b:good"]);
        a.json(&["get", "b:good", text(&self.back)]);
        assert_eq!(model::read(&self.back), model::read(&self.file));
    }
}

/// A session of a peer that says whatever a test makes it say.
#[derive(Debug)]
pub struct Liar {
    /// Its control connection.
    pub control: TcpStream,
    _data: TcpStream,
}

impl Liar {
    /// Opens a session with `b` under this name.
    ///
    /// # Panics
    /// If `b` does not take it.
    pub fn connect(b: &Agent, name: &str) -> Self {
        let mut control = connect_from([127, 0, 0, 9], b.listen).expect("b takes it");
        exchange_preamble_blocking(&mut control).expect("b takes it");
        let (token, ours) = (Token([7; 16]), SessionId(77));
        write_blocking(&mut control, &Message::Hello(hello(name))).expect("b takes it");
        write_blocking(
            &mut control,
            &Message::Try {
                transport: Transport::Tcp,
                session: ours,
                token: Some(token),
                salt: None,
            },
        )
        .expect("b takes it");
        let mut next = || read_blocking::<Message>(&mut control, BODY_MAX).expect("b takes it");
        assert!(matches!(next(), Message::Hello(_)));
        let session = match next() {
            Message::Trying { session, .. } => session,
            other => panic!("{other:?}"),
        };
        let data = open_data(b.data.expect("b takes it"), session, token);
        match next() {
            Message::Opened { result } => result.expect("b takes it"),
            other => panic!("{other:?}"),
        }
        let chosen = Message::Chosen { refused: vec![] };
        write_blocking(&mut control, &chosen).expect("b takes it");
        Self {
            control,
            _data: data,
        }
    }

    /// Why `b` does not take a session under this name.
    ///
    /// # Panics
    /// If it does.
    pub fn refusal(b: &Agent, name: &str) -> String {
        let mut control = connect_from([127, 0, 0, 9], b.listen).expect("b listens");
        exchange_preamble_blocking(&mut control).expect("b is of this version");
        write_blocking(&mut control, &Message::Hello(hello(name))).expect("b reads it");
        let mut next = || read_blocking::<Message>(&mut control, BODY_MAX).expect("b says why");
        loop {
            match next() {
                Message::Hello(_) => {}
                Message::Bye { reason, .. } => return reason,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Says this.
    pub fn say(&mut self, message: &Message) {
        // It may be closed already; what was answered is what counts.
        let _ = write_blocking(&mut self.control, message);
    }

    /// The next thing it is told.
    ///
    /// # Panics
    /// If the session ends.
    pub fn hear(&mut self) -> Message {
        loop {
            match read_blocking::<Message>(&mut self.control, BODY_MAX) {
                Ok(Message::Ping) => self.say(&Message::Ping),
                Ok(message) => return message,
                Err(error) => panic!("no answer: {error}"),
            }
        }
    }

    /// What it is told before the session ends, or how its request ended.
    ///
    /// # Panics
    /// If it is told nothing.
    pub fn verdict(&mut self) -> String {
        loop {
            match read_blocking::<Message>(&mut self.control, BODY_MAX) {
                Ok(Message::Bye { reason, .. }) => return reason,
                Ok(Message::Done { result: Ok(_), .. }) => return "done".to_owned(),
                Ok(Message::Done {
                    result: Err(failure),
                    ..
                }) => return failure.message,
                Ok(_) => {}
                Err(error) => panic!("neither an answer nor a goodbye: {error}"),
            }
        }
    }
}

/// How a peer of this name introduces itself.
fn hello(name: &str) -> Hello {
    Hello {
        name: name.into(),
        instance: Instance([9; 16]),
        preference: "tcp".parse().expect("b takes it"),
        offers: vec![Offer {
            transport: Transport::Tcp,
            local: Ok(Local::Tcp {
                data: SocketAddr::from(([127, 0, 0, 9], 1)),
                streams: 1,
            }),
        }],
        liveness_ms: 60_000,
        range_bytes: None,
        data_security: Default::default(),
    }
}

fn open_data(address: SocketAddr, session: SessionId, token: Token) -> TcpStream {
    let mut stream = connect_from([127, 0, 0, 9], address).expect("b takes it");
    let hello = DataHello {
        session,
        token,
        stream: 0,
        streams: 1,
        verdict: Verdict::Welcome,
    };
    stream.write_all(&hello.encode()).expect("b takes it");
    let mut answer = [0; HELLO_LEN];
    stream.read_exact(&mut answer).expect("b takes it");
    let answer = DataHello::parse(&answer).expect("b takes it");
    assert_eq!(answer.verdict, Verdict::Welcome);
    let answering = stream.try_clone().expect("b takes it");
    std::thread::spawn(move || answer_pings(answering));
    stream
}

/// Keeps the path alive until it is closed.
fn answer_pings(mut stream: TcpStream) -> Option<()> {
    stream
        .write_all(&Header::plain(Kind::Ping, 1).encode())
        .ok()?;
    let mut header = [0; HEADER_LEN];
    loop {
        stream.read_exact(&mut header).ok()?;
        let header = Header::parse(&header).ok()?;
        if header.kind == Kind::Ping {
            let pong = Header::plain(Kind::Pong, header.offset);
            stream.write_all(&pong.encode()).ok()?;
        }
        let mut payload = vec![0; header.payload_len as usize];
        stream.read_exact(&mut payload).ok()?;
    }
}
