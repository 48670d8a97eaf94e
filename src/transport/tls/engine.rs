use std::io;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::kernel::KernelConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ConnectionTrafficSecrets, Error, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// One side's TLS, without a socket: ciphertext in, plaintext and ciphertext out.
pub(super) struct Engine {
    side: Side,
    /// Ciphertext that came and is not understood yet.
    pub incoming: Vec<u8>,
    /// Ciphertext that waits to be sent.
    pub outgoing: Vec<u8>,
    /// What was decrypted and nobody has read yet.
    pub plain: Vec<u8>,
}

enum Side {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// What else is to be encrypted, once that is possible.
#[derive(Clone, Copy)]
pub(super) enum Wanted<'a> {
    Nothing,
    Data(&'a [u8]),
    Close,
}

/// Where an engine stands once it can go no further by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stand {
    /// In the midst of the handshake; the peer's word is next.
    Handshaking,
    /// The handshake is done, and what was wanted lies in `outgoing`.
    Open,
    /// The peer has closed in order; said once. What is wanted is still to be encrypted.
    PeerClosed,
    /// Both have closed in order.
    Closed,
}

impl Engine {
    pub fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, Error> {
        Ok(Self::new(Side::Client(Box::new(UnbufferedClientConnection::new(config, name)?))))
    }

    pub fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self::new(Side::Server(Box::new(UnbufferedServerConnection::new(config)?))))
    }

    fn new(side: Side) -> Self {
        Self { side, incoming: Vec::new(), outgoing: Vec::new(), plain: Vec::new() }
    }

    pub fn state(&self) -> &CommonState {
        match &self.side {
            Side::Client(connection) => connection,
            Side::Server(connection) => connection,
        }
    }

    /// Goes on as far as what has come allows.
    ///
    /// # Errors
    /// The peer broke the protocol, or proved nothing. The alert that tells it so lies in `outgoing` then.
    pub fn advance(&mut self, wanted: Wanted<'_>) -> Result<Stand, Error> {
        loop {
            match self.step(wanted) {
                Ok(None) => {}
                Ok(Some(stand)) => return Ok(stand),
                Err(error) => {
                    // What is left to say is an alert.
                    while let Ok(None) = self.step(Wanted::Nothing) {}
                    return Err(error);
                }
            }
        }
    }

    fn step(&mut self, wanted: Wanted<'_>) -> Result<Option<Stand>, Error> {
        let Self { side, incoming, outgoing, plain } = self;
        let (discard, step) = match side {
            Side::Client(connection) => take(connection.process_tls_records(incoming), wanted, outgoing, plain),
            Side::Server(connection) => take(connection.process_tls_records(incoming), wanted, outgoing, plain),
        };
        incoming.drain(..discard.min(incoming.len()));
        step
    }

    /// Performs the handshake over a socket.
    pub async fn shake_hands(&mut self, tcp: &mut TcpStream) -> io::Result<()> {
        loop {
            let stand = self.advance(Wanted::Nothing);
            let sent = tcp.write_all(&self.outgoing).await;
            self.outgoing.clear();
            // What the peer did wrong says more than that it hung up on being told so.
            let stand = stand.map_err(tls_error)?;
            sent?;
            match stand {
                Stand::Open => return Ok(()),
                Stand::PeerClosed | Stand::Closed => return Err(io::ErrorKind::UnexpectedEof.into()),
                Stand::Handshaking => {}
            }
            if self.incoming.len() > MOST_HANDSHAKE {
                return Err(tls_error(Error::General("the handshake is longer than any certificate needs".to_owned())));
            }
            self.incoming.reserve(READ);
            if tcp.read_buf(&mut self.incoming).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Hands the keys over to somebody who encrypts by himself: this engine is gone then, and its own with it.
    pub fn into_keys(self) -> Result<Keys, Error> {
        let (secrets, rekey) = match self.side {
            Side::Client(connection) => {
                let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
                (secrets, Rekey::Client(kernel))
            }
            Side::Server(connection) => {
                let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
                (secrets, Rekey::Server(kernel))
            }
        };
        Ok(Keys { sending: secrets.tx, receiving: secrets.rx, rekey, plain: self.plain, incoming: self.incoming })
    }
}

/// What is left of an [`Engine`] that gave up its keys.
pub(in crate::transport) struct Keys {
    pub sending: (u64, ConnectionTrafficSecrets),
    pub receiving: (u64, ConnectionTrafficSecrets),
    pub rekey: Rekey,
    /// What came behind the handshake: decrypted, and not.
    pub plain: Vec<u8>,
    pub incoming: Vec<u8>,
}

/// Makes the next keys of a connection from those of now (RFC 8446, section 7.2).
pub(in crate::transport) enum Rekey {
    Client(KernelConnection<rustls::client::ClientConnectionData>),
    Server(KernelConnection<rustls::server::ServerConnectionData>),
}

impl Rekey {
    pub fn sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        }
    }

    pub fn receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        }
    }
}

/// How many bytes of the input are done with, and where that leads; `None` when there is more to do at once.
type Step = (usize, Result<Option<Stand>, Error>);

fn take<D>(
    status: UnbufferedStatus<'_, '_, D>,
    wanted: Wanted<'_>,
    outgoing: &mut Vec<u8>,
    plain: &mut Vec<u8>,
) -> Step {
    let UnbufferedStatus { mut discard, state } = status;
    let state = match state {
        Ok(state) => state,
        Err(error) => return (discard, Err(error)),
    };
    let step = match state {
        ConnectionState::ReadTraffic(mut traffic) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => {
                    discard += record.discard;
                    plain.extend_from_slice(record.payload);
                }
                Some(Err(error)) => break Err(error),
                None => break Ok(None),
            }
        },
        ConnectionState::EncodeTlsData(mut data) => appended(outgoing, |into| match data.encode(into) {
            Err(EncodeError::InsufficientSize(size)) => Err(Short::Needs(size.required_size)),
            Err(EncodeError::AlreadyEncoded) => Ok(0),
            Ok(written) => Ok(written),
        })
        .map(|()| None),
        ConnectionState::TransmitTlsData(data) => {
            // It lies in `outgoing`, which is sent in order.
            data.done();
            Ok(None)
        }
        ConnectionState::BlockedHandshake => Ok(Some(Stand::Handshaking)),
        ConnectionState::PeerClosed => Ok(Some(Stand::PeerClosed)),
        ConnectionState::Closed => Ok(Some(Stand::Closed)),
        ConnectionState::WriteTraffic(mut traffic) => appended(outgoing, |into| {
            let outcome = match wanted {
                Wanted::Nothing => return Ok(0),
                Wanted::Data(data) => traffic.encrypt(data, into),
                Wanted::Close => traffic.queue_close_notify(into),
            };
            outcome.map_err(|error| match error {
                EncryptError::InsufficientSize(size) => Short::Needs(size.required_size),
                EncryptError::EncryptExhausted => Short::Exhausted,
            })
        })
        .map(|()| Some(Stand::Open)),
        // TLS early data is refused by both configurations.
        _ => Err(Error::General("a TLS state that was never asked for".to_owned())),
    };
    (discard, step)
}

enum Short {
    Needs(usize),
    Exhausted,
}

/// Lets `write` put bytes behind what is there, with as much room as it asks for.
fn appended(into: &mut Vec<u8>, mut write: impl FnMut(&mut [u8]) -> Result<usize, Short>) -> Result<(), Error> {
    let start = into.len();
    let mut room = 0;
    loop {
        into.resize(start + room, 0);
        match write(&mut into[start..]) {
            Ok(written) => {
                into.truncate(start + written);
                return Ok(());
            }
            Err(Short::Needs(size)) if size > room => room = size,
            Err(_) => {
                into.truncate(start);
                return Err(Error::EncryptError);
            }
        }
    }
}

pub(super) fn tls_error(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A handshake flight of more than that is none.
const MOST_HANDSHAKE: usize = 128 * 1024;
pub(super) const READ: usize = 16 * 1024;
