//! What comes to a waypoint: a client's flow, for a Service.

use std::net::SocketAddr;
use std::rc::Rc;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};

use super::super::baggage::baggage;
use super::super::connections::{Opening, Registered};
use super::super::counted::Counted;
use super::super::failure::{Failure, Finding};
use super::super::line::Line;
use super::super::requests::{SILENCE, foreign, only_http};
use super::super::resolve::resolve;
use super::super::tunnel::{Arriving, Source, refusal};
use super::Relayed;
use crate::mesh::{AppProtocol, Destination, Reason, ServiceDestination};
use crate::telemetry::{ConnectionInfo, Party};
use crate::transport::hbone::Refusal;
use crate::transport::{Behalf, Stream, fast, hbone};
use crate::waypoint::wire::{self, Heard};
use crate::waypoint::{self, Client, Version};

/// A client's flow that may begin.
pub struct Admitted {
    place: Relayed,
    service: ServiceDestination,
    connection: Registered,
    /// Of a port that declares another protocol than HTTP: somebody has accepted already.
    upstream: Option<(Line, Option<Counted>)>,
}

impl Arriving {
    /// One stream of an HBONE tunnel, to its end.
    pub async fn relay(self, mut request: hbone::Request) {
        let to = canonical(request.authority);
        let (place, connection) = self.welcome(to);
        let admitted = tokio::select! {
            admitted = Box::pin(self.admit_to(&place, to)) => admitted,
            () = request.abandoned() => Err(Failure::new(Reason::Reset, "the client gave it up while connecting")),
        };
        let (service, upstream) = match admitted {
            Ok(admitted) => admitted,
            Err(failure) => {
                request.refuse(refusal(&failure));
                return connection.failed(&failure);
            }
        };
        let own = baggage(&self.proxy.settings.cluster, &self.pod.captured.workload);
        match request.accept(&own) {
            Ok(flow) => Admitted { place, service, connection, upstream }.carry(Stream::hbone(flow)).await,
            Err(error) => connection.failed(&Failure::new(Reason::Reset, error.to_string())),
        }
    }

    /// What becomes of a flow of the fast tunnel that is asked for.
    ///
    /// # Errors
    /// What is left of the tunnel; the client has been told no.
    pub async fn admit_relayed(&self, mut request: fast::Request<'_>) -> Result<Admitted, fast::After> {
        let to = match request.header() {
            Ok(header) => canonical(header.destination),
            Err(_) => return Err(request.refuse(Refusal::Malformed)),
        };
        let (place, connection) = self.welcome(to);
        let admitted = tokio::select! {
            admitted = Box::pin(self.admit_to(&place, to)) => admitted,
            () = request.abandoned() => {
                connection.failed(&Failure::new(Reason::Reset, "the client gave it up while connecting"));
                return Err(fast::After::Spent);
            }
        };
        match admitted {
            Ok((service, upstream)) => Ok(Admitted { place, service, connection, upstream }),
            Err(failure) => {
                connection.failed(&failure);
                Err(request.refuse(refusal(&failure)))
            }
        }
    }

    /// Carries such a flow to its end; what can take the next is returned.
    pub async fn relay_fast(
        &self,
        mut tunnel: fast::Server,
        asked: Result<Admitted, fast::After>,
    ) -> Option<fast::Server> {
        let admitted = match asked {
            Ok(admitted) => admitted,
            Err(after) => return tunnel.settled(after).await.then_some(tunnel),
        };
        match tunnel.into_stream() {
            Ok((stream, lent)) => {
                admitted.carry(Stream::Fast(stream)).await;
                lent.returned().await
            }
            Err(error) => {
                admitted.connection.failed(&Failure::new(Reason::Reset, error.to_string()));
                None
            }
        }
    }

    fn welcome(&self, to: SocketAddr) -> (Relayed, Registered) {
        let source = Source { address: self.client, identity: self.peer.identity.clone(), via: None };
        let place = Relayed {
            proxy: self.proxy.clone(),
            thread: self.thread.clone(),
            pod: self.pod.clone(),
            behalf: Rc::new(Behalf { identity: self.peer.identity.clone(), address: self.client }),
            peer: Some(self.peer.clone()),
            source: Rc::new(source.party(&self.proxy)),
            dialled: to,
            connection: None,
        };
        let info = ConnectionInfo {
            transport: self.transport,
            destination: Party::stranger(to),
            key_exchange: Some(self.peer.key_exchange),
            requested: None,
            ..place.info()
        };
        let opening = Opening {
            pod: self.pod.uid(),
            source: self.client,
            dialled: to,
            peer: Some(self.peer.identity.clone()),
            via: None,
            info,
        };
        let connection = self.proxy.connections.register(&self.proxy.telemetry, opening);
        (place, connection)
    }

    /// The Service that is dialled, if it is one that the waypoint stands before.
    async fn admit_to(
        &self,
        place: &Relayed,
        to: SocketAddr,
    ) -> Result<(ServiceDestination, Option<(Line, Option<Counted>)>), Failure> {
        if !self.proxy.limits.admits(self.pod.uid()) {
            let text = "too many connections; raise the descriptor limit of the waypoint, or its replicas";
            return Err(Failure::new(Reason::Limit, text));
        }
        match resolve(&self.proxy.model, to).await {
            Destination::Service(_) => {}
            Destination::NoSuchPort(service) => {
                let text = format!("Service {} has no TCP port {}", service.name, to.port());
                return Err(Failure::new(Reason::NoEndpoint, text));
            }
            _ => return Err(Failure::new(Reason::Protocol, format!("{to} is no address of a Service"))),
        }
        let Some((service, true)) = place.service() else {
            // The client, or this process, may not have heard yet what changed.
            let text = format!("the Service at {to} has not got this waypoint");
            return Err(Failure { finding: Finding::Passing, retry: true, ..Failure::new(Reason::Waypoint, text) });
        };
        if service.port.protocol().is_none_or(AppProtocol::is_http) {
            return Ok((service, None));
        }
        let line = place.any_line(&service).await?;
        Ok((service, Some(line)))
    }
}

/// What a client turned out to want.
enum Wanted {
    Requests(Version),
    /// Its bytes carried; with an endpoint, and what that has said.
    Bytes(Option<Box<(Line, Option<Counted>)>>, BytesMut),
}

impl Admitted {
    async fn carry(self, stream: Stream) {
        let mut ear = Ear { stream, said: BytesMut::new(), is_over: false };
        let Self { mut place, service, connection, upstream } = self;
        place.connection = Some(connection.shared().clone());
        let control = &connection.control;
        let heard = match upstream {
            Some(line) => Ok(Wanted::Bytes(Some(Box::new(line)), BytesMut::new())),
            None => tokio::select! {
                heard = Box::pin(ear.hear(&place, &service)) => heard,
                reason = control.reset_requested() => Err(Failure::new(reason, "ended before a request")),
            },
        };
        match heard {
            Ok(Wanted::Requests(speaks)) => {
                connection.telemetry.told_by_requests();
                let client = Client { stream: ear.stream, said: ear.said, speaks };
                tokio::select! {
                    () = Box::pin(waypoint::serve(client, Rc::new(place))) => {}
                    // Dropped halfway, it resets.
                    _ = control.reset_requested() => {}
                }
            }
            Ok(Wanted::Bytes(upstream, heard)) => {
                let line = match upstream {
                    Some(line) => Ok(*line),
                    None => place.any_line(&service).await,
                };
                match line {
                    Ok((line, _counted)) => {
                        // The line tells of it.
                        connection.telemetry.told_by_requests();
                        tokio::select! {
                            () = Box::pin(join(ear, line, heard)) => {}
                            _ = control.reset_requested() => {}
                        }
                    }
                    Err(failure) => connection.failed(&failure),
                }
            }
            Err(failure) => connection.failed(&failure),
        }
    }
}

/// Bytes both ways until both have ended; broken, either is reset as it is dropped.
async fn join(mut ear: Ear, mut line: Line, heard: BytesMut) {
    let joining = async {
        line.write_all(&ear.said).await?;
        ear.stream.write_all(&heard).await?;
        copy_bidirectional_with_sizes(&mut ear.stream, &mut line, CHUNK, CHUNK).await
    };
    // How it went is the line's to tell.
    let _ = joining.await;
}

/// What a client says before anybody knows what it is.
struct Ear {
    stream: Stream,
    said: BytesMut,
    /// Nothing more comes.
    is_over: bool,
}

impl Ear {
    async fn hear(&mut self, place: &Relayed, service: &ServiceDestination) -> Result<Wanted, Failure> {
        let only_http = only_http(&place.proxy.model, service, &place.behalf.identity.namespace);
        let mut upstream: Option<(Line, Option<Counted>)> = None;
        loop {
            match wire::hear(&self.said, only_http, self.is_over) {
                Heard::Requests(speaks) => return Ok(Wanted::Requests(speaks)),
                Heard::Bytes => return Ok(Wanted::Bytes(upstream.map(Box::new), BytesMut::new())),
                Heard::Foreign => return Err(foreign(service)),
                Heard::NotYet => {}
            }
            match &mut upstream {
                _ if only_http => self.more().await,
                None => {
                    if tokio::time::timeout(SILENCE, self.more()).await.is_err() {
                        // The server may be the one who speaks first.
                        upstream = Some(place.any_line(service).await?);
                    }
                }
                Some((line, _)) => {
                    let mut heard = BytesMut::new();
                    tokio::select! {
                        () = self.more() => {}
                        // Also where it ended, or broke: whoever joins the two finds that out.
                        _ = line.read_buf(&mut heard) => return Ok(Wanted::Bytes(upstream.map(Box::new), heard)),
                    }
                }
            }
        }
    }

    /// Waits for more; none once it has ended, or broken.
    async fn more(&mut self) {
        let read = self.stream.read_buf(&mut self.said).await;
        self.is_over = !matches!(read, Ok(1..));
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

const CHUNK: usize = 16 * 1024;
