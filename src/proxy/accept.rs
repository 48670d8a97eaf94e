use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::sync::watch;
use tracing::warn;

use crate::capture::socket;
use crate::telemetry::Seldom;

/// Accepts from one listener until told to stop, and hands each socket on, not yet tied to any thread's reactor.
///
/// A descriptor or memory shortage is waited out: the kernel keeps the queue meanwhile, and old connections live.
pub async fn accept_loop(
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
    mut each: impl FnMut(TcpStream, SocketAddr),
) {
    let listener = match socket::watch_listener(listener) {
        Ok(listener) => listener,
        Err(cause) => {
            warn!(%cause, "A listener could not be watched; connections to it will wait.");
            return;
        }
    };
    for turn in 1_usize.. {
        let accepted = tokio::select! {
            accepted = listener.async_io(Interest::READABLE, socket::accept) => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, peer)) => each(stream, peer),
            Err(cause) if is_passing(&cause) => {}
            Err(cause) => {
                static WARNINGS: Seldom = Seldom::new();
                if let Some(left_out) = WARNINGS.speaks(Instant::now()) {
                    warn!(%cause, left_out, "Accepting a connection failed; trying again in a moment.");
                }
                metrics::counter!("selvedge_accept_errors_total").increment(1);
                tokio::time::sleep(SHORTAGE_PAUSE).await;
            }
        }
        if turn.is_multiple_of(ACCEPTS_A_TURN) {
            // A burst of connections leaves the others of this thread their turn.
            tokio::task::yield_now().await;
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

const ACCEPTS_A_TURN: usize = 16;
const SHORTAGE_PAUSE: Duration = Duration::from_millis(50);
