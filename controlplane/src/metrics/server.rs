//! The HTTP server behind the metrics.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::exposition;
use crate::node::Node;

/// Connections at a time; scrapers have one or two.
const CONNECTIONS_MAX: usize = 32;

/// How long a connection may take to say what it wants.
const HEADER_LIMIT: Duration = Duration::from_secs(5);

/// How long a connection may stay.
const CONNECTION_LIMIT: Duration = Duration::from_secs(60);

/// Nobody asks with a longer request.
const REQUEST_MAX: usize = 16 << 10;

/// Serves whoever asks, until dropped.
pub async fn serve(node: &Arc<Node>, listener: Option<TcpListener>) {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = Arc::clone(&places).acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let node = Arc::clone(node);
        tokio::spawn(async move {
            let _permit = permit;
            let answer = service_fn(|request| {
                let response = answer(&node, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_LIMIT)
                .max_buf_size(REQUEST_MAX)
                .serve_connection(TokioIo::new(stream), answer);
            // A scraper that stays too long is only cut off.
            let served = tokio::time::timeout(CONNECTION_LIMIT, connection).await;
            if let Ok(Err(error)) = served {
                tracing::debug!(%error, "a connection for metrics failed");
            }
        });
    }
}

fn answer(node: &Node, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return response(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET only\n");
    }
    match request.uri().path() {
        "/metrics" => response(
            StatusCode::OK,
            "text/plain; version=0.0.4; charset=utf-8",
            // Counters of users are theirs and root's.
            exposition(&node.status(0), &node.counters.moved()),
        ),
        "/health" => health(node),
        "/status.json" => match serde_json::to_string(&public(node)) {
            Ok(json) => response(StatusCode::OK, "application/json", json + "\n"),
            Err(error) => response(
                StatusCode::INTERNAL_SERVER_ERROR,
                "text/plain",
                format!("{error}\n"),
            ),
        },
        _ => response(
            StatusCode::NOT_FOUND,
            "text/plain",
            "/metrics, /health or /status.json\n",
        ),
    }
}

/// What anybody may see who reaches the address: no other user's arenas.
fn public(node: &Node) -> crate::status::AgentStatus {
    let mut status = node.status(0);
    status.users.clear();
    status
}

fn health(node: &Node) -> Response<Full<Bytes>> {
    if node.is_stopping() {
        response(StatusCode::SERVICE_UNAVAILABLE, "text/plain", "stopping\n")
    } else {
        response(StatusCode::OK, "text/plain", "ok\n")
    }
}

fn response(
    status: StatusCode,
    kind: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
