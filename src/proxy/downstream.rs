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
use crate::transport::fast::Early;
use crate::transport::relay::TcpEnd;

/// As it comes, not yet tied to a thread.
pub enum Downstream {
    /// The client is connected already.
    Accepted { stream: std::net::TcpStream, client: SocketAddr, dialled: SocketAddr },
    /// Its `connect()` waits.
    Held(HeldSyn),
}

/// As a thread has taken it up.
pub enum Client {
    /// Only a reset can tell it more.
    Connected(TcpEnd),
    /// Its `connect()` waits.
    Waiting(HeldSyn),
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

    pub fn take_up(self, pod: &ServedPod) -> io::Result<Client> {
        match self {
            Self::Accepted { stream, .. } => prepare(pod, stream).map(Client::Connected),
            Self::Held(syn) => Ok(Client::Waiting(syn)),
        }
    }
}

impl Client {
    /// What it says before anybody has accepted it: nothing, while it waits to be connected.
    pub fn early(&self) -> Early {
        match self {
            Self::Connected(application) => Early::of(application),
            Self::Waiting(_) => Early::none(),
        }
    }

    pub fn waits(&self) -> bool {
        matches!(self, Self::Waiting(_))
    }

    /// Connects the client, if it is not: there is somebody to talk to. For `accept` see [`HeldSyn::connect`].
    pub async fn connected(self, pod: &ServedPod, accept: impl FnMut() -> bool) -> Result<TcpEnd, Failure> {
        match self {
            Self::Connected(application) => Ok(application),
            Self::Waiting(syn) => {
                let connected = async {
                    let application = prepare(pod, syn.connect(accept).await?)?;
                    // The reactor is to know it before anything is relayed: of a server that has spoken and reset
                    // meanwhile, the words are lost to a client that cannot take them at once.
                    application.stream().writable().await?;
                    Ok::<_, io::Error>(application)
                };
                connected.await.map_err(|cause| Failure::new(Reason::Reset, format!("the client's side: {cause}")))
            }
        }
    }

    /// Tells the client that nothing came of it: in words of `connect()`, or by a reset.
    pub fn refuse(self, failure: &Failure) {
        match self {
            // SO_LINGER {1,0}: the client sees a reset.
            Self::Connected(application) => drop(application),
            Self::Waiting(syn) => syn.refuse(failure.finding.answer()),
        }
    }

    /// Completes when a client whose `connect()` waits is there no more.
    pub async fn gone(&self, pod: &ServedPod) {
        match self {
            Self::Connected(_) => std::future::pending().await,
            Self::Waiting(syn) => syn.gone(pod).await,
        }
    }
}

fn prepare(pod: &ServedPod, stream: std::net::TcpStream) -> io::Result<TcpEnd> {
    socket::prepare_accepted(&stream, &dial::application_options(pod))?;
    TcpEnd::new(TcpStream::from_std(stream)?)
}
