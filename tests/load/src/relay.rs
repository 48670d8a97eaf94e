//! The bare relay: what a hop through user space costs before capture, TLS and policy add anything.

use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::thread;

use anyhow::{Context, Error, Result};
use socket2::{Domain, Socket, Type};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;

/// A port to listen on, and where its connections go.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    port: u16,
    to: SocketAddr,
}

impl FromStr for Route {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (port, to) = text.split_once('=').with_context(|| format!("{text:?} is not PORT=ADDRESS:PORT"))?;
        let problem = || format!("{text:?} is not PORT=ADDRESS:PORT");
        Ok(Self { port: port.parse().with_context(problem)?, to: to.parse().with_context(problem)? })
    }
}

/// Relays for ever: one current-thread runtime a core, each with listeners of its own, as the agent has them.
pub fn run(routes: &[Route]) -> Result<()> {
    let workers = thread::available_parallelism()?.get();
    thread::scope(|scope| {
        let started: Vec<_> = (0..workers).map(|_| scope.spawn(|| work(routes))).collect();
        started
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn work(routes: &[Route]) -> Result<()> {
    Builder::new_current_thread().enable_io().build()?.block_on(async {
        for route in &routes[1..] {
            let listener = listen(route.port)?;
            tokio::spawn(accept(listener, route.to));
        }
        accept(listen(routes[0].port)?, routes[0].to).await
    })
}

fn listen(port: u16) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    socket.bind(&address.into()).with_context(|| format!("cannot listen on {address}"))?;
    socket.listen(4096)?;
    Ok(TcpListener::from_std(socket.into())?)
}

async fn accept(listener: TcpListener, to: SocketAddr) -> Result<()> {
    loop {
        let (client, _) = listener.accept().await?;
        tokio::spawn(async move {
            // A connection that fails ends; whoever made it notices.
            let _ = relay(client, to).await;
        });
    }
}

async fn relay(mut client: TcpStream, to: SocketAddr) -> Result<()> {
    let mut server = TcpStream::connect(to).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER, BUFFER).await?;
    Ok(())
}

const BUFFER: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn what_goes_in_comes_out_with_its_end() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = server.local_addr().unwrap();
        let free = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port();
        thread::spawn(move || run(&[Route { port: free, to }]));
        thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).unwrap();
            stream.write_all(&heard).unwrap();
        });
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut client = loop {
            match TcpStream::connect((Ipv4Addr::LOCALHOST, free)) {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        client.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "hello");
    }

    #[test]
    fn a_route_that_is_none_is_named() {
        assert!("80=10.0.0.1".parse::<Route>().unwrap_err().to_string().contains("80=10.0.0.1"));
        assert!("80".parse::<Route>().is_err());
        assert_eq!("80=10.0.0.1:81".parse::<Route>().unwrap().port, 80);
    }
}
