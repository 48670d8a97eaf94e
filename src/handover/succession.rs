//! Several agents of one node: one of them, who holds the lock, programs rules; the next one asks it for its listeners.
//!
//! In a folder that they share are the lock (`agent.lock`, flock(2)) and the socket of who holds it (`agent.sock`):
//!
//! | from | message | descriptor |
//! | --- | --- | --- |
//! | successor | `"succeed"` | |
//! | predecessor, which has stopped to program rules | `{"offer":{"key":..}}`, once for each listener | the listener |
//! | predecessor, which has let go of the lock | `{"offered":{"count":n}}` | |
//! | successor, once every pod is captured | `"taken"`: the predecessor stops to accept | |
//! | successor, of a pod that left | `{"forget":{"pod":..}}` | |
//!
//! The connection stays. When it ends before the predecessor has, the successor is dead: the predecessor takes the lock
//! again as soon as it is free, and goes on with the listeners, which it never closed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::ListenerKey;
use super::channel::{Channel, Door};

/// The folder that agents of one node share.
#[derive(Clone, Debug)]
pub struct Succession(PathBuf);

/// It is this agent's turn: it alone programs rules, until this is dropped.
#[derive(Debug)]
pub struct Turn {
    door: Door,
    _lock: Flock<File>,
}

/// The agent before this one, which may still serve connections.
#[derive(Debug)]
pub struct Predecessor(Channel);

/// The agent after this one.
#[derive(Debug)]
pub struct Successor(Channel);

/// What a successor says.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// It asks for the listeners.
    Succeed,
    /// Every pod is captured by it.
    Taken,
    /// A pod has left: its listeners are to be closed.
    Forget { pod: String },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    Offer { key: ListenerKey },
    Offered { count: usize },
}

/// What came with the turn.
#[derive(Debug)]
pub struct Inheritance {
    pub turn: Turn,
    pub listeners: Vec<(ListenerKey, OwnedFd)>,
    /// Where there was one.
    pub predecessor: Option<Predecessor>,
}

impl Succession {
    pub fn new(shared: &Path) -> Self {
        Self(shared.to_owned())
    }

    /// Asks whoever has the turn for it, and waits until it is this agent's.
    pub async fn ask(&self) -> io::Result<Inheritance> {
        loop {
            if let Some(turn) = self.turn()? {
                return Ok(Inheritance { turn, listeners: Vec::new(), predecessor: None });
            }
            match self.succeed().await {
                Ok(inheritance) => return Ok(inheritance),
                // It has ended, or has not opened its door yet.
                Err(error) => tracing::debug!(%error, "The agent that has the turn does not hand it over yet."),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until the turn is free, and takes it: for an agent whose successor is gone.
    pub async fn take_back(&self) -> io::Result<Turn> {
        loop {
            if let Some(turn) = self.turn()? {
                return Ok(turn);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn succeed(&self) -> io::Result<Inheritance> {
        let channel = Channel::connect(&self.0.join(SOCKET))?;
        channel.send(&Progress::Succeed, None).await?;
        let mut listeners = Vec::new();
        loop {
            match tokio::time::timeout(PATIENCE, channel.receive()).await.map_err(io::Error::from)?? {
                Some((Word::Offer { key }, Some(fd))) => listeners.push((key, fd)),
                Some((Word::Offer { key }, None)) => {
                    return Err(io::Error::other(format!("the {key} did not arrive: no descriptor is left")));
                }
                Some((Word::Offered { count }, _)) if count == listeners.len() => break,
                Some((Word::Offered { .. }, _)) => return Err(io::Error::other("not every listener arrived")),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let turn = tokio::time::timeout(PATIENCE, self.take_back()).await.map_err(io::Error::from)??;
        Ok(Inheritance { turn, listeners, predecessor: Some(Predecessor(channel)) })
    }

    fn turn(&self) -> io::Result<Option<Turn>> {
        let file = File::options().create(true).truncate(false).write(true).open(self.0.join(LOCK))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Turn { door: Door::open(&self.0.join(SOCKET))?, _lock: lock })),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, error)) => Err(error.into()),
        }
    }
}

impl Turn {
    /// The next agent, once it asks.
    pub async fn successor(&self) -> Successor {
        loop {
            let asked = async {
                let channel = self.door.caller().await?;
                let heard =
                    tokio::time::timeout(PATIENCE, channel.receive::<Progress>()).await.map_err(io::Error::from)??;
                Ok::<_, io::Error>(heard.filter(|(word, _)| *word == Progress::Succeed).map(|_| Successor(channel)))
            };
            match asked.await {
                Ok(Some(successor)) => return successor,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "An agent that asked for its turn was not understood.");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }
}

impl Successor {
    /// Hands the listeners over, and the turn.
    pub async fn inherit(&self, listeners: &[(ListenerKey, OwnedFd)], turn: Turn) -> io::Result<()> {
        for (key, fd) in listeners {
            self.0.send(&Word::Offer { key: key.clone() }, Some(fd.as_fd())).await?;
        }
        drop(turn);
        self.0.send(&Word::Offered { count: listeners.len() }, None).await
    }

    /// What it says next; none once it is gone.
    pub async fn next(&self) -> Option<Progress> {
        self.0.receive().await.ok().flatten().map(|(progress, _)| progress)
    }
}

impl Predecessor {
    /// Says that it need not accept any more. One that is gone need not hear it.
    pub async fn tell(&self, progress: Progress) {
        let _ = self.0.send(&progress, None).await;
    }
}

const LOCK: &str = "agent.lock";
const SOCKET: &str = "agent.sock";
const LOOK: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::handover::{Family, Role};
    use crate::mesh::PodUid;

    fn key() -> ListenerKey {
        ListenerKey { pod: PodUid::new("a"), role: Role::Tunnel, family: Family::V4, netns: (4, 5) }
    }

    #[tokio::test]
    async fn the_turn_goes_from_agent_to_agent_and_back_when_the_next_one_dies() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Succession::new(dir.path());
        let first = shared.ask().await.unwrap();
        assert!(first.predecessor.is_none() && first.listeners.is_empty());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();

        let next = tokio::spawn({
            let shared = shared.clone();
            async move { shared.ask().await.unwrap() }
        });
        let successor = first.turn.successor().await;
        successor.inherit(&[(key(), listener.into())], first.turn).await.unwrap();
        let mut second = next.await.unwrap();
        let (held, fd) = second.listeners.pop().unwrap();
        assert_eq!(held, key());
        let client = TcpStream::connect(address).unwrap();
        assert_eq!(TcpListener::from(fd).accept().unwrap().1, client.local_addr().unwrap());
        let predecessor = second.predecessor.take().unwrap();
        predecessor.tell(Progress::Taken).await;
        predecessor.tell(Progress::Forget { pod: "a".into() }).await;
        assert_eq!(successor.next().await, Some(Progress::Taken));
        assert_eq!(successor.next().await, Some(Progress::Forget { pod: "a".into() }));

        assert!(shared.turn().unwrap().is_none(), "two agents had the turn");
        drop((second, predecessor));
        assert_eq!(successor.next().await, None);
        shared.take_back().await.unwrap();
    }
}
