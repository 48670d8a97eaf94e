//! One network namespace: made, pinned, entered, furnished.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use socket2::{Domain, Socket, Type};

use crate::conversation::Conversation;
use crate::http::{self, Request, Response};
use crate::netfilter::Networking;
use crate::packets::Capture;
use crate::server::Server;
use crate::wait::{BOUND, eventually};

/// A network namespace: one of ours, pinned at a path until the last handle is dropped, or somebody else's.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<Pinned>);

impl Namespace {
    /// Makes a namespace, pins it at `path` the way a container runtime does, and brings its loopback up.
    pub fn create(path: &Path) -> Result<Self> {
        File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
        let file = on_a_thread(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            let none = None::<&str>;
            mount(Some("/proc/thread-self/ns/net"), path, none, MsFlags::MS_BIND, none)
                .with_context(|| format!("cannot pin a network namespace at {}", path.display()))?;
            Ok(File::open(path)?)
        })?;
        let namespace = Self(Arc::new(Pinned { file, path: path.to_owned(), ours: true }));
        namespace.ip_batch(["link set lo up"])?;
        Ok(namespace)
    }

    /// Opens a namespace that somebody else made, such as `/proc/PID/ns/net`. It is theirs when the handles are gone.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self(Arc::new(Pinned { file, path: path.to_owned(), ours: false })))
    }

    /// Where it is pinned, or was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Runs a closure on a thread of its own inside the namespace. What it makes (sockets) may be taken out.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        on_a_thread(|| {
            setns(&self.0.file, CloneFlags::CLONE_NEWNET)
                .unwrap_or_else(|error| panic!("cannot enter {}: {error}", self.0.path.display()));
            body()
        })
    }

    /// Starts a process inside the namespace.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.run(|| command.spawn())
    }

    /// Runs a process inside the namespace to its end.
    pub fn output(&self, command: &mut Command) -> io::Result<Output> {
        self.run(|| command.output())
    }

    /// Runs lines for `ip -batch`, all or as far as the first that fails.
    pub fn ip_batch(&self, lines: impl IntoIterator<Item = impl AsRef<str>>) -> Result<()> {
        let mut script = String::new();
        for line in lines {
            script.push_str(line.as_ref());
            script.push('\n');
        }
        // A user's PATH may lack the directory that has it.
        let found =
            ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip", "/bin/ip"].into_iter().find(|ip| Path::new(ip).exists());
        let mut command = Command::new(found.unwrap_or("ip"));
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = self.spawn(&mut command).context("cannot run ip: install the package iproute2")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(script.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("ip -batch failed: {}of\n{script}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Sets `net.*` knobs, such as `ipv4.ip_forward`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{}", name.replace('.', "/"));
        self.run(|| fs::write(&path, value)).with_context(|| format!("cannot write {value} to {path}"))
    }

    /// Listens inside the namespace, on the wildcard of both families (a bare port) or on an address.
    pub fn listen(&self, address: impl Into<ListenOn>) -> Result<TcpListener> {
        let address = address.into().0;
        self.run(|| -> io::Result<TcpListener> {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
                socket.set_only_v6(false)?;
            }
            socket.bind(&address.into())?;
            socket.listen(1024)?;
            Ok(socket.into())
        })
        .with_context(|| format!("cannot listen on {address} in {}", self.0.path.display()))
    }

    /// Connects from inside the namespace; an error is the kernel's own, so that a test can tell refused from reset.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        self.connect_within(to, CONNECT_BOUND)
    }

    /// The same with a bound of one's own, where nobody is to answer.
    pub fn connect_within(&self, to: impl Into<SocketAddr>, bound: Duration) -> io::Result<TcpStream> {
        let to = to.into();
        self.run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            connect(&socket, to, bound)?;
            Ok(socket.into())
        })
    }

    /// Connects from a chosen address and port.
    pub fn connect_from(&self, from: SocketAddr, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        self.run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            connect(&socket, to, CONNECT_BOUND)?;
            Ok(socket.into())
        })
    }

    /// Connects, to talk with an echo server for a while.
    pub fn converse(&self, to: impl Into<SocketAddr>) -> Result<Conversation> {
        let to = to.into();
        match self.connect(to) {
            Ok(stream) => Conversation::over(stream),
            Err(error) => Conversation::refused(error).with_context(|| format!("cannot connect to {to}")),
        }
    }

    /// Packet filter, routing and settings of the namespace as they are now.
    pub fn networking(&self) -> Result<Networking> {
        Networking::read(self)
    }

    /// Runs a shell script inside the namespace; fails where it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.output(Command::new("sh").args(["-ec", script]))?;
        if !output.status.success() {
            bail!("{script}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Answers HTTP on a port: who asked, and what, as JSON. See [`Server`].
    pub fn serve_http(&self, address: impl Into<ListenOn>, name: &str) -> Result<Server> {
        Ok(Server::http(self.listen(address)?, name))
    }

    /// Sends back what it receives, half-close included.
    pub fn serve_echo(&self, address: impl Into<ListenOn>) -> Result<Server> {
        Ok(Server::echo(self.listen(address)?))
    }

    /// Speaks first, then sends back what it receives.
    pub fn serve_greeting(&self, address: impl Into<ListenOn>, greeting: &str) -> Result<Server> {
        Ok(Server::greeting(self.listen(address)?, greeting))
    }

    /// Reads and says nothing.
    pub fn serve_sink(&self, address: impl Into<ListenOn>) -> Result<Server> {
        Ok(Server::sink(self.listen(address)?))
    }

    /// One GET on a connection of its own.
    pub fn http_get(&self, to: impl Into<SocketAddr>, path: &str) -> Result<Response> {
        self.http(to, &Request::get(path))
    }

    /// One request on a connection of its own.
    pub fn http(&self, to: impl Into<SocketAddr>, request: &Request) -> Result<Response> {
        let to = to.into();
        let mut stream = self.connect(to).with_context(|| format!("cannot connect to {to}"))?;
        stream.set_read_timeout(Some(ANSWER_BOUND))?;
        http::exchange(&mut stream, &to.to_string(), request)
            .with_context(|| format!("{} {} at {to}", request.method, request.path))
    }

    /// Captures what crosses an interface of the namespace, both ways.
    pub fn capture(&self, interface: &str) -> Result<Capture> {
        Capture::start(self, interface)
    }
}

/// Where to listen.
pub struct ListenOn(SocketAddr);

impl From<u16> for ListenOn {
    fn from(port: u16) -> Self {
        let any: IpAddr = match Path::new("/proc/sys/net/ipv6").exists() {
            true => Ipv6Addr::UNSPECIFIED.into(),
            false => std::net::Ipv4Addr::UNSPECIFIED.into(),
        };
        Self((any, port).into())
    }
}

impl From<SocketAddr> for ListenOn {
    fn from(address: SocketAddr) -> Self {
        Self(address)
    }
}

impl From<(IpAddr, u16)> for ListenOn {
    fn from(address: (IpAddr, u16)) -> Self {
        Self(address.into())
    }
}

#[derive(Debug)]
struct Pinned {
    file: File,
    path: PathBuf,
    ours: bool,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        // Whatever stays behind goes with the world.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&self.path);
    }
}

fn on_a_thread<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    match thread::scope(|scope| scope.spawn(body).join()) {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Connects within a bound, and says what the kernel says. Where an ICMP error comes, Linux wakes who polls when it queues the
/// message, and sets the socket's own error a moment later (tcp_v4_err): who looks in between finds none, and looks again.
pub fn connect(socket: &Socket, to: SocketAddr, bound: Duration) -> io::Result<()> {
    socket.connect_timeout(&to.into(), bound).map_err(|error| {
        if error.raw_os_error().is_some() || error.kind() == io::ErrorKind::TimedOut {
            return error;
        }
        let late = eventually("the socket's error is set", BOUND, || socket.take_error().ok().flatten());
        late.unwrap_or(error)
    })
}

const CONNECT_BOUND: Duration = Duration::from_secs(20);
const ANSWER_BOUND: Duration = Duration::from_secs(20);
