use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::{Check, Client, ClientIo, Version};
use super::executor::OnThread;
use super::place::Place;
use super::record::{reason, refused};
use super::request::answer;
use super::room::Windows;
use super::session::Session;
use super::upstream::{MOST_BUFFERED, MOST_HEAD, MOST_UNSENT};
use super::wire::Violation;

/// Serves the requests of one client until it has no more. New ones are to go elsewhere once the pod or the agent
/// leaves; dropped, it resets the client.
pub async fn serve(client: Client, place: Rc<dyn Place>) {
    match client.speaks {
        Version::Http1 => serve_http1(client, place).await,
        Version::Http2 => serve_http2(client, place).await,
    }
}

async fn serve_http1(client: Client, place: Rc<dyn Place>) {
    let check = Rc::new(Check::new(place.room().clone()));
    let session = Session::new(place, Some(check.clone()));
    let io = TokioIo::new(ClientIo::new(client, Some(check.clone())));
    let serving = session.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        serving.check.iter().for_each(|check| check.begin());
        Box::pin(answer(serving.clone(), request))
    });
    let mut builder = http1::Builder::new();
    builder.auto_date_header(false).header_read_timeout(None).max_buf_size(MOST_BUFFERED);
    let mut connection = builder.serve_connection(io, service);
    // Looked at only once it has something to say, and not whenever a request moves on.
    let mut endings: FuturesUnordered<LocalBoxFuture<'_, ()>> = FuturesUnordered::new();
    endings.push(retirement(&session).boxed_local());
    // The answers that it waits for come first.
    endings.push(check.over().boxed_local());
    let mut left = pin!(session.place.left());
    let outcome = poll_fn(|cx| {
        while let Poll::Ready(Some(())) = endings.poll_next_unpin(cx) {
            Pin::new(&mut connection).graceful_shutdown();
        }
        if check.is_closed() && left.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(()));
        }
        connection.poll_without_shutdown(cx).map_err(drop)
    })
    .await;
    drop(endings);
    let parts = connection.into_parts();
    let client = parts.io.into_inner();
    if let Some(tunnel) = session.tunnel.take() {
        check.upgraded();
        return tunnel.carry(client, parts.read_buf).await;
    }
    match (outcome, check.refused()) {
        (_, Some(violation)) => farewell(client, check.is_head().then_some(violation), &session).await,
        (Ok(()), None) => farewell(client, None, &session).await,
        // An answer was broken off: the client must not take it for whole. Or there is no client any more.
        (Err(()), None) => drop(client),
    }
}

async fn serve_http2(client: Client, place: Rc<dyn Place>) {
    let session = Session::new(place, None);
    let io = TokioIo::new(ClientIo::new(client, None));
    let serving = session.clone();
    let service = service_fn(move |request: Request<Incoming>| Box::pin(answer(serving.clone(), request)));
    let windows = Windows::of(session.place.room());
    let mut builder = http2::Builder::new(OnThread);
    builder
        .auto_date_header(false)
        .enable_connect_protocol()
        .initial_stream_window_size(windows.stream)
        .initial_connection_window_size(windows.connection)
        .max_concurrent_streams(MOST_STREAMS)
        .max_header_list_size(MOST_HEAD)
        .max_send_buf_size(MOST_UNSENT);
    let mut connection = pin!(builder.serve_connection(io, service));
    let mut leaving = pin!(leaving(&session));
    tokio::select! {
        // Whatever broke it, each request has told it by itself.
        _ = connection.as_mut() => {}
        () = &mut leaving => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

/// Completes when the client is to take new requests elsewhere.
async fn leaving(session: &Session) {
    tokio::select! {
        () = session.place.leaving() => session.retire(),
        () = session.retiring() => {}
    }
}

/// Completes a while after that. A client of HTTP/1 hears of it in its next answer; one that is silent meanwhile could be about
/// to send a request as its connection is closed, which the pause makes unlikely.
async fn retirement(session: &Session) {
    leaving(session).await;
    tokio::time::sleep(GRACE).await;
}

/// Ends in order. A client that is still speaking is heard for a moment: a reset could overtake what it was told (RFC 9112,
/// section 9.6).
async fn farewell(mut client: ClientIo, violation: Option<Violation>, session: &Session) {
    if let Some(violation) = violation {
        refused(session, violation);
        let _ = client.write_all(&last_word(violation)).await;
    }
    if client.shutdown().await.is_err() {
        return;
    }
    let mut rest = client.into_rest();
    let listening = async {
        let mut room = vec![0; 16 * 1024];
        let mut heard = 0;
        while heard < MOST_HEARD {
            match rest.read(&mut room).await {
                Ok(read) if read > 0 => heard += read,
                _ => return,
            }
        }
    };
    let _ = tokio::time::timeout(FAREWELL, listening).await;
}

/// What a client is told whose bytes were refused before anybody had seen them.
fn last_word(violation: Violation) -> Vec<u8> {
    let (status, reason) = (violation.status(), reason(violation));
    let (code, phrase, reason) = (status.as_u16(), status.canonical_reason().unwrap_or_default(), reason.code());
    format!("HTTP/1.1 {code} {phrase}\r\nselvedge-reason: {reason}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        .into_bytes()
}

const MOST_STREAMS: u32 = 256;
const GRACE: Duration = Duration::from_secs(2);
const FAREWELL: Duration = Duration::from_secs(2);
/// More than a socket holds: a client that is told that nobody wants its body may have sent as much.
const MOST_HEARD: usize = 16 << 20;
