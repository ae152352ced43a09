//! Windows and notifications, as programs ask for them.

use std::sync::{Arc, Weak};
use std::time::Duration;

use genie_client::TensorInfo;
use genie_client::protocol::{Answer, ArenaId, Direction, Memory};
use tokio::time::timeout;

use super::{Application, ApplicationError, MemoryError, remote};
use crate::store::{Store, Window, window_bytes};
use crate::tensor::check_name;
use crate::transfer::{self, Progress, TransferError, windows};

/// The longest that a program can wait for a notification in one request.
const AWAIT_MAX: Duration = Duration::from_secs(3600);

/// Windows that are memory of this program's; gone when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Windows {
    registered: Vec<(String, Weak<Window>)>,
    store: Option<Store>,
}

impl Drop for Windows {
    fn drop(&mut self) {
        let Some(store) = &self.store else { return };
        for (name, window) in &self.registered {
            store.unregister(name, window);
        }
    }
}

impl Application {
    pub(super) async fn make_window(
        &mut self,
        to: Option<String>,
        name: &str,
        bytes: u64,
        memory: Memory,
    ) -> Result<(), ApplicationError> {
        let (node, owner, kind) = (Arc::clone(&self.node), self.owner(), memory.kind());
        let operation = async move {
            let _busy = node.begin().ok_or(TransferError::Stopping)?;
            match remote(&node, to) {
                Some(peer) => {
                    let session = node.session(&peer).await?;
                    transfer::make_window(&session, name.to_owned(), bytes, kind).await
                }
                None => windows::make(&node, name, bytes, kind, &owner).await,
            }
        };
        let made = self.attend(operation, &Progress::default()).await?;
        self.done(made.map(|()| 0)).await
    }

    pub(super) async fn register(
        &mut self,
        name: &str,
        arena: ArenaId,
        offset: u64,
        bytes: u64,
    ) -> Result<(), ApplicationError> {
        let registered = self.try_register(name, arena, offset, bytes);
        self.done(registered.map(|()| 0)).await
    }

    fn try_register(
        &mut self,
        name: &str,
        arena: ArenaId,
        offset: u64,
        bytes: u64,
    ) -> Result<(), MemoryError> {
        check_name(name)?;
        // Others will write into it.
        let place = self.arenas.place(arena, offset, bytes, Direction::Read)?;
        let store = &self.node.store;
        let charge = store.budget().charge(window_bytes(name));
        let charge = charge.map_err(TransferError::from)?;
        let window = store.register(name, place, &self.owner(), charge);
        let window = window.map_err(TransferError::from)?;
        self.windows.store = Some(store.clone());
        let registered = &mut self.windows.registered;
        registered.retain(|(_, window)| window.strong_count() > 0);
        registered.push((name.to_owned(), window));
        Ok(())
    }

    pub(super) async fn seal(
        &mut self,
        to: Option<String>,
        name: &str,
        tensors: Vec<(TensorInfo, u64)>,
    ) -> Result<(), ApplicationError> {
        let (node, owner) = (Arc::clone(&self.node), self.owner());
        let operation = async move {
            let _busy = node.begin().ok_or(TransferError::Stopping)?;
            match remote(&node, to) {
                Some(peer) => {
                    let session = node.session(&peer).await?;
                    transfer::seal(&session, name.to_owned(), tensors).await
                }
                None => windows::seal(&node, name, &tensors, &owner).await.map(drop),
            }
        };
        let sealed = self.attend(operation, &Progress::default()).await?;
        self.done(sealed.map(|()| 0)).await
    }

    pub(super) async fn listen(&mut self, prefix: String) -> Result<(), ApplicationError> {
        let listens = check_name(&prefix).map_err(MemoryError::from).map(|()| {
            let listener = self.node.notifications.listen(prefix, self.owner());
            self.listener = Some(listener);
            0
        });
        self.done(listens).await
    }

    pub(super) async fn notification(&mut self, limit_ms: u64) -> Result<(), ApplicationError> {
        let Some(listener) = self.listener.take() else {
            let error = MemoryError::NotListening;
            return self.fail(error).await;
        };
        let limit = Duration::from_millis(limit_ms).min(AWAIT_MAX);
        let next = async { Ok::<_, TransferError>(timeout(limit, listener.next()).await.ok()) };
        let notified = self.attend(next, &Progress::default()).await?;
        self.listener = Some(listener);
        match notified {
            Ok(notified) => self.send(&Answer::Notified(notified)).await,
            Err(error) => self.fail(error).await,
        }
    }

    pub(super) async fn notify(
        &mut self,
        to: Option<String>,
        name: &str,
        message: Vec<u8>,
    ) -> Result<(), ApplicationError> {
        let (node, owner) = (Arc::clone(&self.node), self.owner());
        let operation = async move {
            let _busy = node.begin().ok_or(TransferError::Stopping)?;
            match remote(&node, to) {
                Some(peer) => {
                    let session = node.session(&peer).await?;
                    transfer::notify(&session, name.to_owned(), message).await
                }
                None => windows::notify(&node, name, &message, &owner),
            }
        };
        let told = self.attend(operation, &Progress::default()).await?;
        self.done(told).await
    }

    async fn done(
        &mut self,
        result: Result<u64, impl Into<MemoryError>>,
    ) -> Result<(), ApplicationError> {
        match result {
            Ok(listeners) => self.send(&Answer::Done { listeners }).await,
            Err(error) => self.fail(error).await,
        }
    }
}
