//! What is done to two agents while bytes move between them.

use std::time::Duration;

use fastrand::Rng;
use genie_client::{Canceller, Memory};
use rustix::process::{Pid, Resource, Rlimit, Signal};

use super::world::{self, Kind, World, connect};

/// What makes a store of [`STORE`](world::STORE) full, unless little is put.
const FILLER: u64 = 240 << 20;

/// A link that is down for longer than anybody waits.
const LINK_DOWN: Duration = Duration::from_secs(5);

/// A network device that is gone and comes back.
const DEVICE_GONE: Duration = Duration::from_millis(500);

/// How much longer than anybody waits an agent is stopped.
const LATER: Duration = Duration::from_secs(1);

/// What nobody may mind.
const MOMENT: Duration = Duration::from_millis(300);

/// Whom it befalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The agent whose program asked.
    Near,
    /// Its peer.
    Far,
}

/// One misfortune.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `kill -9`, and a restart.
    Kill(End),
    /// It is told to end, and started again. Over virtio_user and vhost the
    /// far one closes the vhost side.
    Close(End),
    /// SIGSTOP, for longer than anybody waits.
    Stop(End),
    /// SIGSTOP for a moment that nobody may mind.
    Pause(End),
    /// The link loses everything.
    BlackOut(Duration),
    /// The network device is removed, at both ends; later there is another one.
    RemoveDevice,
    /// The receiver's store has little room, for a moment.
    FullStore,
    /// An agent may open no more descriptors.
    NoDescriptors(End),
    /// The program gives its request up.
    Cancel,
}

/// What must be true of the request afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was done.
    Done,
    /// It was done, or failed with a reason.
    Either,
}

impl Fault {
    /// One that can befall this kind of path.
    pub(crate) fn pick(kind: Kind, random: &mut Rng) -> Self {
        let end = if random.bool() { End::Near } else { End::Far };
        match random.u32(0..if kind == Kind::Tcp { 18 } else { 15 }) {
            0..4 => Self::Kill(end),
            4..6 => Self::Close(end),
            6..8 => Self::Stop(end),
            8..10 => Self::Pause(end),
            10..12 => Self::FullStore,
            12..14 => Self::NoDescriptors(end),
            14 => Self::Cancel,
            15 => Self::RemoveDevice,
            // A second is within the limit, ten are not.
            16 => Self::BlackOut(Duration::from_secs(1)),
            _ => Self::BlackOut(if random.u32(0..4) == 0 {
                Duration::from_secs(10)
            } else {
                LINK_DOWN
            }),
        }
    }

    pub(crate) fn outcome(self) -> Outcome {
        match self {
            Self::Pause(_) => Outcome::Done,
            Self::BlackOut(time) if time < LINK_DOWN => Outcome::Done,
            _ => Outcome::Either,
        }
    }

    /// The agent that is gone afterwards.
    pub(crate) fn ended(self) -> Option<End> {
        match self {
            Self::Kill(end) | Self::Close(end) => Some(end),
            _ => None,
        }
    }

    /// What has to be there before the request is made.
    pub(crate) fn prepare(self, world: &World) {
        if self == Self::FullStore {
            fill(world);
        }
    }

    /// Does it, and mends it again.
    pub(crate) fn strike(self, world: &mut World, cancel: &Canceller) {
        let index = |end: End| usize::from(end == End::Far);
        match self {
            Self::Kill(end) => world.hosts()[index(end)].kill(),
            Self::Close(end) => world.hosts()[index(end)].close(),
            Self::Stop(end) => stop(world, index(end), world.kind.liveness() + LATER),
            Self::Pause(end) => stop(world, index(end), MOMENT),
            Self::BlackOut(time) => world.black_out(time),
            Self::RemoveDevice => world.remove_device(DEVICE_GONE),
            Self::FullStore => drain(world),
            Self::NoDescriptors(end) => exhaust(world, index(end)),
            Self::Cancel => cancel.cancel(),
        }
    }
}

fn stop(world: &mut World, index: usize, time: Duration) {
    let agent = &world.hosts()[index].agent;
    agent.signal(Signal::STOP);
    std::thread::sleep(time);
    agent.signal(Signal::CONT);
    world::answers(agent);
}

/// Takes most of the far store.
fn fill(world: &World) {
    let mut at_b = connect(&world.b.agent).expect("nothing has befallen it yet");
    let arena = at_b.arena(FILLER, Memory::Host);
    let arena = arena.expect("there is room for an arena");
    let tensor = arena.tensor("t", genie_client::Dtype::U8, &[FILLER]);
    let tensor = tensor.expect("it is as large");
    let put = at_b.put(None, "filler", &[tensor], None);
    put.expect("the store was empty");
}

fn drain(world: &World) {
    let mut at_b = connect(&world.b.agent).expect("nothing has befallen it");
    let removed = at_b.remove(None, "filler/t");
    removed.expect("it was there");
}

fn exhaust(world: &mut World, index: usize) {
    let agent = &world.hosts()[index].agent;
    let pid = Pid::from_raw(agent.pid() as i32);
    let now = agent.descriptors() as u64;
    let was = set_limit(pid, Some(now));
    std::thread::sleep(Duration::from_millis(100));
    set_limit(pid, was);
    world::answers(agent);
}

fn set_limit(pid: Option<Pid>, current: Option<u64>) -> Option<u64> {
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit { current, maximum };
    let was = rustix::process::prlimit(pid, Resource::Nofile, limit);
    was.expect("it is our child").current
}
