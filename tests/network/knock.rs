//! One call as an application makes it, and how it ends.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use selvedge_lab::{Pod, connect};
use socket2::{Domain, Socket, Type};

/// How a call ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ended {
    /// With what a greeting server said.
    Greeted(String),
    /// Before any byte: `connect()` was told no, or a reset followed it.
    Refused,
    /// In any other way.
    Otherwise(String),
}

#[derive(Clone, Debug)]
pub struct Knock {
    /// The client's own address and port; what the access log has as the source.
    pub from: SocketAddr,
    pub ended: Ended,
}

/// Connects to a server that speaks first, and listens.
pub fn knock(pod: &Pod, to: impl Into<SocketAddr>) -> io::Result<Knock> {
    let to = to.into();
    let own = pod.ips().iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).ok_or(io::ErrorKind::Unsupported)?;
    pod.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        // Bound first: a socket that was reset has forgotten its port.
        socket.bind(&SocketAddr::new(*own, 0).into())?;
        let from = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
        Ok(Knock { from, ended: listen(socket, to) })
    })
}

fn listen(socket: Socket, to: SocketAddr) -> Ended {
    let mut answer = [0; 256];
    let heard = connect(&socket, to, BOUND).and_then(|()| {
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(BOUND))?;
        stream.read(&mut answer)
    });
    match heard {
        Ok(0) => Ended::Otherwise("closed in order without a word".into()),
        Ok(count) => Ended::Greeted(String::from_utf8_lossy(&answer[..count]).into_owned()),
        Err(error) if is_refusal(error.kind()) => Ended::Refused,
        Err(error) => Ended::Otherwise(error.to_string()),
    }
}

/// Whether an application hears by this that its call is not wanted.
pub fn is_refusal(kind: io::ErrorKind) -> bool {
    matches!(
        kind,
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::PermissionDenied
    )
}

const BOUND: Duration = Duration::from_secs(20);
