use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use http::request::Parts;

use super::answer::Refusal;
use super::room::Room;
use super::{Bond, Failure, Line, Pool};
use crate::authorizer::Authorizer;
use crate::mesh::{AppProtocol, NamespacedName, ServiceDestination};
use crate::model::Model;
use crate::policy::RequestHead;
use crate::proxy::{Choosing, Counted, RequestPlace};
use crate::route::Routes;
use crate::telemetry::{ConnectionInfo, Telemetry};

/// Where the requests of one client are served, and on whose behalf: at the agent of the client's node, at the agent of
/// the server's, or in a process that is there for nothing else. It says what differs between them: who the client is,
/// which routes there are, who judges a request, and how an endpoint is reached.
pub trait Place {
    fn model(&self) -> &Model;

    fn telemetry(&self) -> &Telemetry;

    /// Connections to applications that wait for their next request.
    fn pool(&self) -> &Pool;

    /// The client's own connection, as far as requests that are answered here tell of it.
    fn describe(&self) -> ConnectionInfo;

    /// Where the client's own connection went to.
    fn dialled(&self) -> SocketAddr;

    /// What the model says now of where requests go.
    fn look(&self) -> Look;

    /// How many requests of the pod are under way; each counts for as long as what is returned lives.
    fn count_request(&self) -> RequestPlace;

    /// What those requests may hold.
    fn room(&self) -> &Arc<Room>;

    /// Completes when the client is to take new requests elsewhere.
    fn leaving(&self) -> LocalBoxFuture<'static, ()>;

    /// Of a client that has closed its direction: completes when nobody waits for its answers any more, where that can be
    /// told.
    fn left(&self) -> LocalBoxFuture<'static, ()> {
        std::future::pending().boxed_local()
    }

    /// Whether connections may be kept for later requests.
    fn keeps(&self) -> bool;

    /// The endpoint for one request, other than those tried already.
    fn pick(&self, to: &Receiver, tried: &[SocketAddr]) -> Option<SocketAddr>;

    /// How endpoints of Services are chosen for the client, where policies about traffic have a say; none where that
    /// has been seen to before.
    fn choosing(&self) -> Option<Choosing> {
        None
    }

    /// Brings a request into the form that the application at the endpoint gets, where policy is decided here. Returns it as
    /// it was, where another endpoint would get another.
    ///
    /// # Errors
    /// It has none; what the client is told instead.
    fn settle(&self, endpoint: SocketAddr, request: &mut Parts) -> Result<Option<Parts>, Refusal>;

    /// Whether policy lets the endpoint have a request; none where somebody further on decides.
    ///
    /// # Errors
    /// What the client is told instead.
    fn judge(&self, endpoint: SocketAddr, request: &RequestHead<'_>) -> Result<Option<Permit>, Refusal>;

    /// Whether it still does, once an external authorizer has changed the request.
    ///
    /// # Errors
    /// What the client is told instead.
    fn judge_again(&self, endpoint: SocketAddr, request: &RequestHead<'_>) -> Result<(), Refusal>;

    /// Counts a request for an endpoint for as long as what is returned lives.
    fn counted(&self, endpoint: SocketAddr) -> Option<Counted>;

    /// Says how reaching an endpoint went.
    fn reached(&self, endpoint: SocketAddr, well: bool);

    /// What a connection to the endpoint has to be like now; none where none may be kept.
    fn bond(&self, endpoint: SocketAddr) -> Option<Bond>;

    /// Where questions to an external authorizer are sent from; none: nobody can be asked.
    fn asker(&self, authorizer: &ServiceDestination) -> Option<Rc<dyn Place>>;

    /// Connects to an endpoint.
    fn connect<'a>(&'a self, to: &'a Receiver, endpoint: SocketAddr) -> LocalBoxFuture<'a, Result<Line, Failure>>;
}

/// That policy lets a request pass.
#[derive(Clone, Debug)]
pub struct Permit {
    /// What says so; none where nothing stands over the endpoint.
    pub policy: Option<NamespacedName>,
    /// Who else has to let it pass.
    pub asks: Vec<Arc<Authorizer>>,
    /// Nobody reads it behind this place; who does gets it as it came.
    pub is_last: bool,
}

/// What the model says of where requests go.
pub struct Look {
    /// None: there is no such thing any more.
    pub view: Option<View>,
    /// Whether requests are still to be told apart here; else the client is to connect anew.
    pub stays: bool,
}

pub struct View {
    /// Whom requests go to that no route sends elsewhere.
    pub to: Receiver,
    pub routes: Option<Arc<Routes>>,
}

/// Whom a request goes to.
#[derive(Clone)]
pub enum Receiver {
    /// An endpoint of a Service.
    Service(ServiceDestination),
    /// The one address that the client is connected to.
    Endpoint(SocketAddr),
}

impl Receiver {
    pub fn service(&self) -> Option<&NamespacedName> {
        match self {
            Self::Service(service) => Some(&service.service.name),
            Self::Endpoint(_) => None,
        }
    }

    /// What its port declares.
    pub fn protocol(&self) -> Option<AppProtocol> {
        match self {
            Self::Service(service) => service.port.protocol(),
            // Whoever sent it here knew that, and speaks it.
            Self::Endpoint(_) => None,
        }
    }
}

impl fmt::Display for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(service) => write!(f, "Service {} at port {}", service.service.name, service.port.port),
            Self::Endpoint(endpoint) => write!(f, "the application at {endpoint}"),
        }
    }
}
