use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::warn;

/// Accepts from one listener until told to stop, and hands each socket on, not yet tied to any thread's reactor.
///
/// A descriptor or memory shortage is waited out: the kernel keeps the queue meanwhile, and old connections live.
pub async fn accept_loop(
    listener: std::net::TcpListener,
    mut stop: watch::Receiver<bool>,
    mut each: impl FnMut(TcpStream, SocketAddr),
) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(cause) => {
            warn!(%cause, "A listener could not be watched; connections to it will wait.");
            return;
        }
    };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer))) {
            Ok((stream, peer)) => each(stream, peer),
            Err(cause) if is_passing(&cause) => {}
            Err(cause) => {
                warn!(%cause, "Accepting a connection failed; trying again in a moment.");
                metrics::counter!("selvedge_accept_errors_total").increment(1);
                tokio::time::sleep(SHORTAGE_PAUSE).await;
            }
        }
    }
}

// accept(2): errors of the connection that was to be accepted, not of the listener.
fn is_passing(cause: &io::Error) -> bool {
    matches!(
        cause.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

const SHORTAGE_PAUSE: Duration = Duration::from_millis(50);
