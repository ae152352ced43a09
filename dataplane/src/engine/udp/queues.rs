//! An engine for each queue of a device.

use std::sync::mpsc;

use super::thread::{SpawnError, spawn};
use super::{Config, Local};
use crate::device::Device;
use crate::endpoint::Running;
use crate::engine::steer::{self, Room, Steered};

/// Why the queues of a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QueuesError<E: std::error::Error + 'static> {
    /// The device could not be opened, or a thread not use it.
    #[error(transparent)]
    Device(E),
    /// The kernel refused a descriptor to wake the queues' threads with.
    #[error("cannot join the queues of the device")]
    Join(#[source] std::io::Error),
}

/// Starts an engine for each queue of a device, on threads of their own.
///
/// `open` runs on the first of them and gives its queue and the others, which
/// `enter` makes their own threads'. The first engine listens on the port of
/// `config`, each other on the next one, and frames that come to another queue
/// are passed on; see [`steer`].
pub fn spawn_queues<D, Q, E>(
    config: Config,
    open: impl FnOnce() -> Result<(D, Vec<Q>), E> + Send + 'static,
    enter: fn(Q) -> Result<D, E>,
) -> Result<Vec<(Running, Local)>, SpawnError<QueuesError<E>>>
where
    D: Device + 'static,
    Q: Send + 'static,
    E: std::error::Error + Send + 'static,
{
    let first_port = config.port;
    let (rest, others) = mpsc::channel();
    let first = spawn(config.clone(), move || {
        let (first, queues) = open().map_err(QueuesError::Device)?;
        let count = u16::try_from(queues.len() + 1).unwrap_or(u16::MAX);
        let places = steer::places(count, first_port, Room::of(first.capabilities()))
            .map_err(|errno| QueuesError::Join(errno.into()))?;
        let mut places = places.into_iter();
        let place = places.next().expect("there is one for each queue");
        for other in queues.into_iter().zip(places) {
            // Received below, once this engine has started.
            let _ = rest.send(other);
        }
        Ok(Steered::new(first, place))
    })?;
    let mut engines = vec![first];
    for (queue, place) in others {
        let config = Config {
            port: place.port(),
            ..config.clone()
        };
        let open = move || {
            let device = enter(queue).map_err(QueuesError::Device)?;
            Ok(Steered::new(device, place))
        };
        match spawn(config, open) {
            Ok(engine) => engines.push(engine),
            Err(error) => {
                end(engines);
                return Err(error);
            }
        }
    }
    Ok(engines)
}

/// Ends engines that nobody has used yet.
fn end(engines: Vec<(Running, Local)>) {
    for (running, _) in engines {
        running.endpoint.stop();
        // A panic of its was reported by its thread.
        let _ = running.thread.join();
    }
}
