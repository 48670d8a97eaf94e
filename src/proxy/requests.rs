//! A connection to a Service whose requests are told apart: what its client speaks, and who serves it then.

use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;

use super::Proxy;
use super::failure::Failure;
use super::onward::Onward;
use super::outbound::{Attempt, Upstream, Way};
use crate::mesh::{AppProtocol, Reason, ServiceDestination, Waypoint};
use crate::model::Model;
use crate::transport::fast::Early;
use crate::transport::relay::TcpEnd;
use crate::transport::{Socket, Stream};
use crate::waypoint::wire::{self, Heard};
use crate::waypoint::{self, Client, Version};

/// Whether requests decide where they go: the Service asks for it, and its port may speak HTTP.
pub fn decide(proxy: &Proxy, service: &ServiceDestination) -> bool {
    let on_node = *proxy.model.read().mesh.waypoint_of(&service.service) == Waypoint::Node;
    on_node && service.port.protocol().is_none_or(AppProtocol::is_http)
}

/// Whether nothing but requests is for a port: it declares so, or a route of the client's names this very port.
pub fn only_http(model: &Model, service: &ServiceDestination, client_namespace: &Arc<str>) -> bool {
    let is_named = || {
        let state = model.read();
        let routes = state.routes.routes(&service.service.name, &service.port, client_namespace);
        routes.is_some_and(|routes| routes.names_port())
    };
    service.port.protocol().is_some() || is_named()
}

/// Such a port's client says something else.
pub fn foreign(service: &ServiceDestination) -> Failure {
    let (port, name) = (service.port.port, &service.service.name);
    Failure::new(Reason::Protocol, format!("port {port} of Service {name} speaks HTTP, and what came is none"))
}

/// What a client turned out to want.
enum Wanted {
    Requests(Version),
    /// Its bytes carried, to an endpoint that is connected already, or not.
    Bytes(Option<Box<Upstream>>),
}

impl Attempt<'_> {
    /// Serves the client's requests; what is none goes on as it is, unless the port is said to speak HTTP.
    pub async fn requests(&self, application: TcpEnd, service: &ServiceDestination) {
        let (stream, said, broken) = application.into_parts();
        let mut ear = Ear { stream, said: BytesMut::from(&said[..]), ended: false, broken };
        let heard = tokio::select! {
            heard = Box::pin(self.hear(&mut ear, service)) => heard,
            reason = self.connection.control.reset_requested() => Err(Failure::new(reason, "ended before a request")),
        };
        match heard {
            Ok(Wanted::Requests(speaks)) => {
                self.connection.telemetry.told_by_requests();
                let client = Client { stream: Stream::Tcp(Socket::new(ear.stream)), said: ear.said, speaks };
                let onward = Onward::new(self.proxy, self.thread, self.pod, self.connection.source, self.dialled);
                tokio::select! {
                    () = Box::pin(waypoint::serve(client, Rc::new(onward))) => {}
                    // Dropped halfway, it resets.
                    _ = self.connection.control.reset_requested() => {}
                }
            }
            Ok(Wanted::Bytes(upstream)) => self.carry_on(ear, service, upstream).await,
            Err(failure) => self.connection.failed(&failure),
        }
    }

    async fn hear(&self, ear: &mut Ear, service: &ServiceDestination) -> Result<Wanted, Failure> {
        let only_http = only_http(&self.proxy.model, service, &self.pod.captured.workload.name().namespace);
        let mut upstream: Option<Box<Upstream>> = None;
        loop {
            match wire::hear(&ear.said, only_http, ear.is_over()) {
                Heard::Requests(speaks) => return Ok(Wanted::Requests(speaks)),
                Heard::Bytes => return Ok(Wanted::Bytes(upstream)),
                Heard::Foreign => return Err(foreign(service)),
                Heard::NotYet => {}
            }
            match &mut upstream {
                _ if only_http => ear.hear().await,
                None => {
                    if tokio::time::timeout(SILENCE, ear.hear()).await.is_err() {
                        // The server may be the one who speaks first.
                        upstream = Some(self.connect(service).await?);
                    }
                }
                Some(connected) => tokio::select! {
                    () = ear.hear() => {}
                    () = connected.way.spoken() => return Ok(Wanted::Bytes(upstream)),
                },
            }
        }
    }

    /// As any TCP connection to the Service.
    async fn carry_on(&self, mut ear: Ear, service: &ServiceDestination, upstream: Option<Box<Upstream>>) {
        let connected = tokio::select! {
            connected = async {
                match upstream {
                    Some(upstream) => Ok(upstream),
                    None => self.connect(service).await,
                }
            } => connected,
            reason = self.connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
        };
        let Upstream { mut way, endpoint: _counted } = match connected {
            Ok(upstream) => *upstream,
            Err(failure) => return self.connection.failed(&failure),
        };
        // The fast tunnel reads the client's socket itself: what was heard before goes ahead.
        if let Way::Fast(flow) = &mut way
            && let Err(cause) = flow.say(&ear.said.split()).await
        {
            return self.connection.failed(&Failure::new(Reason::Reset, cause.to_string()));
        }
        let application = TcpEnd::of_parts(ear.stream, ear.said.freeze(), ear.broken);
        self.relay(application, way).await;
    }

    /// An endpoint for a client of which nothing is sent with the opening.
    async fn connect(&self, service: &ServiceDestination) -> Result<Box<Upstream>, Failure> {
        self.early.set(Some(Early::none()));
        self.any_endpoint(service).await.map(Box::new)
    }
}

impl Way {
    /// Completes when the far side has said something, or has gone: nothing of it is taken.
    async fn spoken(&mut self) {
        // Also where it broke: whoever carries it finds that out.
        match self {
            Self::Fast(flow) => poll_fn(|cx| flow.poll_spoken(cx)).await,
            Self::Hbone(flow) => poll_fn(|cx| flow.poll_spoken(cx)).await,
            Self::Plain(stream) => drop(stream.readable().await),
            Self::SameNode(reached) => drop(reached.stream.readable().await),
        }
    }
}

/// What a client says before anybody knows what it is.
struct Ear {
    stream: Arc<TcpStream>,
    said: BytesMut,
    /// It has closed its direction.
    ended: bool,
    broken: Option<io::Error>,
}

impl Ear {
    /// Nothing more comes.
    fn is_over(&self) -> bool {
        self.ended || self.broken.is_some()
    }

    /// Waits for more.
    async fn hear(&mut self) {
        let mut room = [0; CHUNK];
        loop {
            let outcome = match self.stream.readable().await {
                Ok(()) => self.stream.try_read(&mut room),
                Err(error) => Err(error),
            };
            match outcome {
                Ok(read) => {
                    self.ended = read == 0;
                    return self.said.extend_from_slice(&room[..read]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.broken = Some(error);
                    return;
                }
            }
        }
    }
}

/// For how long a client of a port that declares nothing is listened to before an endpoint is connected.
pub const SILENCE: Duration = Duration::from_millis(100);
const CHUNK: usize = 4096;
