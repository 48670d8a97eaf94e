use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tracing::warn;

/// Accepts from one listener until told to stop, and hands each socket on, not yet tied to any thread's reactor.
///
/// A descriptor or memory shortage is waited out: the kernel keeps the queue meanwhile, and old connections live.
pub async fn accept_loop(
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
    mut each: impl FnMut(TcpStream, SocketAddr),
) {
    let listener = match AsyncFd::new(listener) {
        Ok(listener) => listener,
        Err(cause) => {
            warn!(%cause, "A listener could not be watched; connections to it will wait.");
            return;
        }
    };
    loop {
        let ready = tokio::select! {
            ready = listener.readable() => ready,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let Ok(mut ready) = ready else { return };
        // A burst is taken in one turn, bounded, so that a flood on one listener does not starve the thread.
        for _ in 0..BURST {
            match ready.try_io(|listener| listener.get_ref().accept()) {
                Ok(Ok((stream, peer))) => each(stream, peer),
                Ok(Err(cause)) if is_passing(&cause) => continue,
                Ok(Err(cause)) => {
                    warn!(%cause, "Accepting a connection failed; trying again in a moment.");
                    metrics::counter!("selvedge_accept_errors_total").increment(1);
                    tokio::time::sleep(SHORTAGE_PAUSE).await;
                    break;
                }
                Err(_would_block) => break,
            }
        }
        tokio::task::yield_now().await;
    }
}

// accept(2): errors of the connection that was to be accepted, not of the listener.
fn is_passing(cause: &io::Error) -> bool {
    matches!(
        cause.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

const BURST: usize = 32;
const SHORTAGE_PAUSE: Duration = Duration::from_millis(50);
