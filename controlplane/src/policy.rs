//! How long a program wants its requests to be tried, and how often.

use std::time::Duration;

use genie_client::FailureKind;
use genie_dataplane::engine::FailReason;
use tokio::time::Instant;

use crate::frame::FrameError;
use crate::node::{self, Node};
use crate::session::SessionError;
use crate::transfer::TransferError;

/// The first pause between two attempts, at most.
const PAUSE_FIRST: Duration = Duration::from_millis(50);

/// Any pause between two attempts, at most.
const PAUSE_MOST: Duration = Duration::from_secs(2);

/// What a program asked for, of all requests on its connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// A request that takes longer fails.
    pub deadline: Option<Duration>,
    /// A request whose session is lost, or cannot be opened, is tried again for
    /// so long.
    pub retry: Option<Duration>,
}

/// The attempts to do one request.
#[derive(Debug)]
pub struct Attempts {
    retry: Option<Duration>,
    began: Instant,
    failed: u32,
}

impl Policy {
    /// Before the first attempt.
    pub fn attempts(&self) -> Attempts {
        Attempts {
            retry: self.retry,
            began: Instant::now(),
            failed: 0,
        }
    }
}

impl Attempts {
    /// After an attempt that failed: pauses before the next one, or returns why
    /// there shall be none. A node that stops makes no more attempts.
    pub async fn again(&mut self, node: &Node, error: TransferError) -> Result<(), TransferError> {
        let pause = pause(self.failed, u32::from_ne_bytes(node::random()));
        let in_time = |limit| self.began.elapsed() + pause < limit;
        if !is_passing(&error) || !self.retry.is_some_and(in_time) {
            return Err(error);
        }
        tracing::info!(%error, ?pause, "trying again");
        tokio::select! {
            biased;
            () = node.until_stopping() => return Err(TransferError::Stopping),
            () = tokio::time::sleep(pause) => {}
        }
        self.failed += 1;
        Ok(())
    }

    /// Whether an attempt was made before.
    pub fn are_repeated(&self) -> bool {
        self.failed > 0
    }
}

/// Between nothing and twice as much as the time before, so that those who lost
/// the same peer do not come back together ("full jitter").
fn pause(attempt: u32, random: u32) -> Duration {
    let most = PAUSE_FIRST.saturating_mul(1 << attempt.min(16));
    most.min(PAUSE_MOST)
        .mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// Whether a failure may be gone the next time: the session's, not the request's.
fn is_passing(error: &TransferError) -> bool {
    match error {
        TransferError::Session(error) => match error {
            // Another version, or no agent at all, stays so.
            SessionError::Frame { source, .. } => {
                matches!(source, FrameError::Io(_) | FrameError::Closed)
            }
            SessionError::Unreachable { .. }
            | SessionError::Slow { .. }
            | SessionError::Silent { .. }
            | SessionError::Crowded
            | SessionError::NoPath { .. }
            | SessionError::Ended(_) => true,
            SessionError::Refused { passing, .. } => *passing,
            SessionError::UnknownPeer { .. }
            | SessionError::Untrusted { .. }
            | SessionError::Denied { .. }
            | SessionError::Unexpected { .. } => false,
        },
        TransferError::Failed(reason) => match reason {
            FailReason::Closed | FailReason::PathLost(_) | FailReason::Stopped => true,
            FailReason::DigestMismatch
            | FailReason::Cancelled
            | FailReason::CancelledByPeer
            | FailReason::Unread(_)
            | FailReason::Protocol(_)
            | FailReason::Refused(_) => false,
        },
        TransferError::Peer { kind, .. } => match kind {
            // It is about to be restarted, presumably, or has enough of us at the
            // moment.
            FailureKind::Stopping => true,
            FailureKind::Limited { .. } => kind.is_retryable(),
            // Whichever end was the first to notice: a stall, or that the path
            // or the session between the two was lost.
            FailureKind::Stalled | FailureKind::Peer => true,
            _ => false,
        },
        TransferError::Stalled { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> TransferError {
        SessionError::Ended("it is gone".into()).into()
    }

    async fn attempts(policy: Policy, mut until: impl FnMut(u32) -> Option<TransferError>) -> u32 {
        let node = crate::session::testing::node();
        let mut attempts = policy.attempts();
        let mut made = 0;
        while let Some(error) = until(made) {
            assert_eq!(attempts.are_repeated(), made > 0);
            made += 1;
            if attempts.again(&node, error).await.is_err() {
                return made;
            }
        }
        made + 1
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_session_is_tried_again_for_as_long_as_was_asked() {
        let retry = |seconds| Policy {
            retry: Some(Duration::from_secs(seconds)),
            deadline: None,
        };
        assert_eq!(attempts(Policy::default(), |_| Some(lost())).await, 1);
        assert_eq!(
            attempts(retry(60), |n| (n < 5).then(lost)).await,
            6,
            "the sixth succeeds"
        );
        let began = Instant::now();
        let made = attempts(retry(60), |_| Some(lost())).await;
        assert!(made > 30, "no pause is longer than 2 s: {made}");
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_request_itself_is_refused_for_is_not_tried_again() {
        let policy = Policy {
            retry: Some(Duration::from_secs(60)),
            deadline: None,
        };
        assert_eq!(
            attempts(policy, |_| Some(TransferError::Cancelled)).await,
            1
        );
        let unknown = |_| {
            Some(TransferError::from(SessionError::UnknownPeer {
                name: "x".into(),
                known: String::new(),
            }))
        };
        assert_eq!(attempts(policy, unknown).await, 1);
    }

    fn patient() -> Policy {
        Policy {
            retry: Some(Duration::from_secs(60)),
            deadline: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_passes_is_tried_again_whichever_end_notices_it_first() {
        let stalled = || TransferError::Stalled {
            peer: "b".into(),
            limit: Duration::from_secs(30),
        };
        let path_lost = || TransferError::Failed(FailReason::PathLost("silent".into()));
        let ways: [(&dyn Fn() -> TransferError, _); 3] = [
            (&stalled, FailureKind::Stalled),
            (&path_lost, FailureKind::Peer),
            (&lost, FailureKind::Peer),
        ];
        for (ours, told) in ways {
            // As the peer tells it, when it is the first.
            let theirs = || TransferError::Peer {
                peer: "b".into(),
                kind: crate::transfer::kind_of(&ours()),
                reason: ours().to_string(),
            };
            assert_eq!(attempts(patient(), |n| (n < 3).then(ours)).await, 4);
            assert_eq!(attempts(patient(), |n| (n < 3).then(theirs)).await, 4);
            let relayed = crate::transfer::kind_of(&theirs());
            assert_eq!(relayed, told, "what the program is told");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_tried_again_if_it_may_be_gone() {
        let refused = |passing| {
            TransferError::from(SessionError::Refused {
                peer: "b".into(),
                reason: "no".into(),
                passing,
            })
        };
        let made = attempts(patient(), |n| (n < 3).then(|| refused(true))).await;
        assert_eq!(made, 4);
        assert_eq!(attempts(patient(), |_| Some(refused(false))).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_stops_makes_no_more_attempts() {
        let node = crate::session::testing::node();
        let mut attempts = patient().attempts();
        attempts.again(&node, lost()).await.unwrap();
        // Long pauses by now: the end comes in the middle of one.
        attempts.failed = 10;
        let waits = tokio::spawn({
            let node = std::sync::Arc::clone(&node);
            async move { attempts.again(&node, lost()).await }
        });
        tokio::task::yield_now().await;
        let began = Instant::now();
        node.stop();
        let refused = waits.await.unwrap();
        assert!(matches!(refused, Err(TransferError::Stopping)));
        assert_eq!(began.elapsed(), Duration::ZERO, "at once");
        let refused = patient().attempts().again(&node, lost()).await;
        assert!(matches!(refused, Err(TransferError::Stopping)));
    }

    #[test]
    fn pauses_grow_to_a_limit_and_differ() {
        assert_eq!(pause(0, u32::MAX), PAUSE_FIRST);
        assert_eq!(pause(2, u32::MAX), PAUSE_FIRST * 4);
        assert_eq!(pause(60, u32::MAX), PAUSE_MOST);
        assert_eq!(pause(60, 0), Duration::ZERO);
    }
}
