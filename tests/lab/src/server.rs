//! Plain servers with a thread a connection.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use anyhow::{Context, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use socket2::SockRef;

use crate::{health, http};

/// A server that runs until it is dropped; then its listener and its connections are gone.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// Serves each connection by `serve`, on a thread of its own.
    pub fn start(listener: TcpListener, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = Arc::new(listener);
        let address = listener.local_addr().unwrap_or_else(|error| panic!("a listener without an address: {error}"));
        let server = Self { address, listener: listener.clone(), state: Arc::default() };
        let (state, serve) = (server.state.clone(), Arc::new(serve));
        thread::spawn(move || {
            for id in 0_u64.. {
                // Shutting the listener down, as drop does, ends accept with an error.
                let Ok((stream, peer)) = listener.accept() else { return };
                let Ok(held) = stream.try_clone() else { return };
                let mut now = lock(&state);
                now.peers.push(canonical(peer));
                now.live.insert(id, held);
                drop(now);
                let (state, serve) = (state.clone(), serve.clone());
                thread::spawn(move || {
                    serve(stream);
                    lock(&state).live.remove(&id);
                });
            }
        });
        server
    }

    /// Answers who asked, and what, as JSON: `pod`, `peer`, `peerPort`, `local`, `method`, `path`, `headers`, `body`.
    pub fn http(listener: TcpListener, name: &str) -> Self {
        let name = name.to_owned();
        // A client that goes away ends the connection, which is all there is to say about it.
        Self::start(listener, move |stream| drop(http::answer(stream, &name, "200 OK")))
    }

    /// The same, of an application that fails: each answer is 500.
    pub fn failing_http(listener: TcpListener, name: &str) -> Self {
        let name = name.to_owned();
        Self::start(listener, move |stream| drop(http::answer(stream, &name, "500 Internal Server Error")))
    }

    /// Answers with the files of a folder, by HTTP or, with a certificate and its key in PEM, by HTTPS.
    ///
    /// # Errors
    /// A certificate or key that is none.
    pub fn files(listener: TcpListener, folder: &Path, certificate: Option<(&[u8], &[u8])>) -> Result<Self> {
        let folder = folder.to_owned();
        let Some((certificate, key)) = certificate else {
            return Ok(Self::start(listener, move |stream| drop(http::answer_file(stream, &folder))));
        };
        let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>().context("no certificate")?;
        let key = PrivateKeyDer::from_pem_slice(key).context("no key")?;
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
        let config = Arc::new(config);
        let serve = move |stream: TcpStream| {
            let connection = ServerConnection::new(config.clone())?;
            let mut stream = StreamOwned::new(connection, stream);
            http::answer_file(&mut stream, &folder)?;
            stream.conn.send_close_notify();
            Ok::<_, anyhow::Error>(stream.flush()?)
        };
        Ok(Self::start(listener, move |stream| drop(serve(stream))))
    }

    /// Sends back what it receives, half-close included.
    pub fn echo(listener: TcpListener) -> Self {
        Self::start(listener, |stream| drop(echo(stream)))
    }

    /// Speaks first, then sends back what it receives.
    pub fn greeting(listener: TcpListener, greeting: &str) -> Self {
        let greeting = greeting.to_owned();
        Self::start(listener, move |mut stream| drop(stream.write_all(greeting.as_bytes()).and_then(|()| echo(stream))))
    }

    /// Answers the health checks of gRPC: that it is well.
    pub fn grpc_health(listener: TcpListener) -> Self {
        Self::start(listener, |stream| drop(health::answer(stream)))
    }

    /// Reads to the end and says nothing.
    pub fn sink(listener: TcpListener) -> Self {
        Self::start(listener, |mut stream| drop(io::copy(&mut stream, &mut io::sink())))
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who connected, in order, as the application saw it.
    pub fn peers(&self) -> Vec<SocketAddr> {
        lock(&self.state).peers.clone()
    }

    /// How many connections are open now.
    pub fn live(&self) -> usize {
        lock(&self.state).live.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Either may be over already.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        for stream in lock(&self.state).live.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    peers: Vec<SocketAddr>,
    live: HashMap<u64, TcpStream>,
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.shutdown(Shutdown::Write),
            count => stream.write_all(&buffer[..count])?,
        }
    }
}

fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
