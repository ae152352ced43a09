//! Agents that are killed, closed, stopped, cut off, filled up and starved at random
//! moments of a transfer: nothing hangs, nothing is lost or doubled, and
//! everything is given back.
//!
//! `GENIE_CHAOS_ROUNDS` sets how many rounds there are of each kind of path,
//! `GENIE_CHAOS_SEED` repeats a run.

mod fault;
mod world;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fastrand::Rng;
use genie_client::{Arena, Client, ClientError, Dtype, Memory, Tensor};
use genie_tests::{GENEROUS, model};

use fault::{End, Fault, Outcome};
use world::{Kind, World, connect};

/// All that a round moves at the most.
const BYTES_MAX: usize = 64 << 20;

/// Rounds by kind of path, unless the environment says otherwise: 200 in all.
const ROUNDS: [(Kind, u64); 3] = [(Kind::Tcp, 90), (Kind::Shm, 60), (Kind::Dpdk, 50)];

/// One transfer and what befalls it.
#[derive(Debug)]
struct Round {
    number: u64,
    put: bool,
    lengths: Vec<usize>,
    fault: Fault,
    after: Duration,
}

/// How the rounds with one fault ended.
#[derive(Debug, Default)]
struct Ends {
    done: u64,
    failed: u64,
    longest: Duration,
}

#[test]
fn tcp_sessions_survive_what_may_happen() {
    run(Kind::Tcp);
}

#[test]
fn sessions_within_a_host_survive_what_may_happen() {
    run(Kind::Shm);
}

#[test]
fn dpdk_sessions_survive_what_may_happen() {
    run(Kind::Dpdk);
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text}: not a number")),
    )
}

/// Two agents fill a small machine: one kind at a time.
static TURN: Mutex<()> = Mutex::new(());

fn run(kind: Kind) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let mut world = match World::start(kind, folder.path()) {
        Ok(world) => world,
        Err(reason) => {
            let required = kind == Kind::Dpdk && std::env::var_os("GENIE_REQUIRE_DPDK").is_some();
            assert!(!required, "DPDK is required: {reason}");
            println!("skipped: {kind:?}: {reason}");
            return;
        }
    };
    let seed = setting("GENIE_CHAOS_SEED").unwrap_or_else(|| Rng::new().u64(..1 << 32));
    let (_, rounds) = ROUNDS.into_iter().find(|(one, _)| *one == kind).unwrap();
    let rounds = setting("GENIE_CHAOS_ROUNDS").unwrap_or(rounds);
    println!("{kind:?}: {rounds} rounds, GENIE_CHAOS_SEED={seed}");
    let noise = model::noise(seed, 2 * BYTES_MAX);
    let mut ended = BTreeMap::<String, Ends>::new();
    for number in 0..rounds {
        let mut random = Rng::with_seed(seed.wrapping_mul(1 << 20).wrapping_add(number));
        let round = Round::new(kind, number, &mut random);
        let bytes = &noise[random.usize(..BYTES_MAX)..];
        let (done, took) = round
            .play(&mut world, bytes)
            .unwrap_or_else(|wrong| panic!("seed {seed}: {round:?}: {wrong}"));
        let ends = ended.entry(format!("{:?}", round.fault)).or_default();
        *if done {
            &mut ends.done
        } else {
            &mut ends.failed
        } += 1;
        ends.longest = ends.longest.max(took);
    }
    for (fault, ends) in ended {
        println!(
            "{kind:?} {fault}: {} done, {} failed with a reason, at most {:.1?} after it",
            ends.done, ends.failed, ends.longest
        );
    }
}

impl Round {
    fn new(kind: Kind, number: u64, random: &mut Rng) -> Self {
        let count = [1, 3, 40][random.usize(..3)];
        let most = BYTES_MAX / count;
        let fault = Fault::pick(kind, random);
        Self {
            number,
            put: random.bool() || fault == Fault::FullStore,
            lengths: (0..count).map(|_| random.usize(..most)).collect(),
            fault,
            after: Duration::from_micros(random.u64(..25_000)),
        }
    }

    /// Says whether the request was done, and how long after the fault it ended.
    fn play(&self, world: &mut World, bytes: &[u8]) -> Result<(bool, Duration), String> {
        let prefix = format!("r{}", self.number);
        let mut client = connect(&world.a.agent)?;
        if !self.put {
            let mut at_b = connect(&world.b.agent)?;
            let (_arena, tensors) = self.tensors(&mut at_b, bytes)?;
            let put = at_b.put(None, &prefix, &tensors, None);
            put.map_err(|error| format!("a local put: {error}"))?;
        }
        self.fault.prepare(world);
        let cancel = client.canceller();
        let (asked, request) = (Instant::now(), {
            let (prefix, round) = (prefix.clone(), self.lengths.clone());
            let bytes = bytes[..self.total()].to_vec();
            let sources = if self.put {
                Some(self.tensors(&mut client, &bytes)?)
            } else {
                None
            };
            std::thread::spawn(move || {
                let result = match sources {
                    Some((_arena, tensors)) => {
                        client.put(Some("b"), &prefix, &tensors, None).map(drop)
                    }
                    None => fetch(&mut client, Some("b"), &prefix, &round, &bytes),
                };
                (result, Instant::now())
            })
        });
        std::thread::sleep(self.after);
        let struck = Instant::now();
        self.fault.strike(world, &cancel);
        while !request.is_finished() {
            if asked.elapsed() > GENEROUS + self.fault_time() {
                return Err("the request hangs".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // It holds the connection.
        drop(cancel);
        let (result, ended) = request
            .join()
            .map_err(|_| "what was got differs".to_owned())?;
        let took = ended.saturating_duration_since(struck);
        if let Some(end) = self.fault.ended() {
            world.hosts()[usize::from(end == End::Far)].restart();
        }
        if let (Err(error), Outcome::Done) = (&result, self.fault.outcome()) {
            return Err(format!("it failed: {error}"));
        }
        self.check_store(world, &prefix, bytes, result.is_ok())?;
        world.settle()?;
        Ok((result.is_ok(), took))
    }

    fn fault_time(&self) -> Duration {
        match self.fault {
            Fault::BlackOut(time) => time,
            _ => Duration::ZERO,
        }
    }

    fn total(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn tensors(&self, client: &mut Client, bytes: &[u8]) -> Result<(Arena, Vec<Tensor>), String> {
        let room = self.total() + (self.lengths.len() + 1) * 4096;
        let arena = client.arena(room as u64, Memory::Auto);
        let arena = arena.map_err(|error| format!("an arena: {error}"))?;
        let mut at = 0;
        let mut tensors = Vec::new();
        for (index, len) in self.lengths.iter().enumerate() {
            let tensor = arena.tensor(index.to_string(), Dtype::U8, &[*len as u64]);
            let tensor = tensor.map_err(|error| error.to_string())?;
            tensor.write(0, &bytes[at..at + len]);
            at += len;
            tensors.push(tensor);
        }
        Ok((arena, tensors))
    }

    /// All of it is at `b` and right, or nothing of it is; then takes it away.
    fn check_store(
        &self,
        world: &World,
        prefix: &str,
        bytes: &[u8],
        done: bool,
    ) -> Result<(), String> {
        let mut at_b = connect(&world.b.agent)?;
        let listed = at_b.list(None).map_err(|error| error.to_string())?;
        let was_lost = self.fault.ended() == Some(End::Far);
        let must_be = (done || !self.put) && !was_lost;
        if listed.is_empty() {
            return if must_be {
                Err("it is lost".into())
            } else {
                Ok(())
            };
        }
        if listed.len() != self.lengths.len() {
            return Err(format!(
                "{} of {} are stored",
                listed.len(),
                self.lengths.len()
            ));
        }
        let got = fetch(&mut at_b, None, prefix, &self.lengths, bytes);
        got.map_err(|error| format!("what is stored: {error}"))?;
        for one in listed {
            let removed = at_b.remove(None, &one.name);
            removed.map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// Gets tensors of these lengths, which must have these bytes.
fn fetch(
    client: &mut Client,
    node: Option<&str>,
    prefix: &str,
    lengths: &[usize],
    bytes: &[u8],
) -> Result<(), ClientError> {
    let got = client.get(node, prefix, Memory::Auto)?;
    let mut at = 0;
    for (index, len) in lengths.iter().enumerate() {
        let tensor = got.to_vec(&index.to_string()).expect("it is among them");
        assert!(tensor == bytes[at..at + len], "tensor {index} differs");
        at += len;
    }
    Ok(())
}
