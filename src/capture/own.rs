//! A pod that nothing is captured of: the process serves the pod that it runs in, through its tunnel port alone.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};

use super::netns::NetNs;
use super::pod::{CapturedPod, Listeners};
use super::rules::{Marks, Mode, Ports};
use crate::mesh::Workload;

impl CapturedPod {
    /// This process's own pod. Its sockets have neither a mark nor another's address, so it needs no privilege.
    ///
    /// # Errors
    /// The tunnel port cannot be listened on.
    pub fn own(workload: Arc<Workload>, bind: Option<IpAddr>, port: u16) -> io::Result<Self> {
        let everywhere = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
        let ips = bind.map_or_else(|| everywhere.to_vec(), |ip| vec![ip]);
        let mut tunnel = Vec::new();
        for ip in ips {
            match listener(SocketAddr::new(ip, port)) {
                Ok(listener) => tunnel.push(listener),
                // A pod of one family has no sockets of the other.
                Err(cause) if cause.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                Err(cause) => {
                    return Err(io::Error::new(cause.kind(), format!("cannot listen on {ip}:{port}: {cause}")));
                }
            }
        }
        Ok(Self {
            workload,
            netns: NetNs::current()?,
            marks: Marks { own: 0, outbound: 0, back: 0 },
            mode: Mode::Tproxy,
            ports: Ports { tunnel: port, ..Ports::default() },
            listeners: Listeners { tunnel, ..Listeners::default() },
            hold: None,
        })
    }
}

fn listener(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Bounded by `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
