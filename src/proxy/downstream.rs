//! The client's end of a connection that is being made.

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpStream;

use super::dial;
use super::failure::Failure;
use super::held::HeldSyn;
use super::pods::ServedPod;
use crate::capture::socket;
use crate::mesh::Reason;

pub enum Downstream {
    /// The client is connected already: only a reset can tell it more.
    Accepted { stream: std::net::TcpStream, client: SocketAddr, dialled: SocketAddr },
    /// Its `connect()` waits.
    Held(HeldSyn),
}

impl Downstream {
    /// A captured connection that was accepted before anything was known of it.
    pub fn accepted(pod: &ServedPod, stream: std::net::TcpStream, client: SocketAddr) -> io::Result<Self> {
        let dialled = socket::original_destination(&stream, pod.captured.mode)?;
        Ok(Self::Accepted { stream, client, dialled })
    }

    /// The client, and where it meant to go.
    pub fn ends(&self) -> (SocketAddr, SocketAddr) {
        match self {
            Self::Accepted { client, dialled, .. } => (*client, *dialled),
            Self::Held(syn) => (syn.client, syn.dialled),
        }
    }

    /// Connects the client, if it is not: there is somebody to talk to.
    pub async fn connected(self, pod: &ServedPod) -> Result<TcpStream, Failure> {
        let prepared = async {
            let stream = match self {
                Self::Accepted { stream, .. } => stream,
                Self::Held(syn) => syn.connect().await?,
            };
            socket::prepare_accepted(&stream, &dial::application_options(pod))?;
            TcpStream::from_std(stream)
        };
        prepared.await.map_err(|cause| Failure::new(Reason::Reset, format!("the client's side: {cause}")))
    }

    /// Tells the client that nothing came of it: in words of `connect()`, or by a reset.
    pub fn refuse(self, failure: &Failure) {
        match self {
            // SO_LINGER {1,0}: the client sees a reset.
            Self::Accepted { stream, .. } => drop(stream),
            Self::Held(syn) => syn.refuse(failure.answer()),
        }
    }

    /// Completes when a client whose `connect()` waits is there no more.
    pub async fn gone(&self, pod: &ServedPod) {
        let Self::Held(syn) = self else { return std::future::pending().await };
        syn.gone(pod).await;
    }
}
