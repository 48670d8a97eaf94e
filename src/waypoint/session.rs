use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{Notify, watch};

use super::Onward;
use super::client::Check;
use super::upgrade::Tunnel;
use crate::mesh::{AppProtocol, Destination, ServiceDestination, Waypoint};
use crate::route::{BackendRef, Routes, Target};

/// What the requests of one client connection share.
pub struct Session {
    pub onward: Onward,
    /// Of an HTTP/1 client.
    pub check: Option<Rc<Check>>,
    /// What becomes of the connection behind the answer that is on its way.
    pub tunnel: RefCell<Option<Tunnel>>,
    moves: RefCell<watch::Receiver<u64>>,
    view: RefCell<Option<Rc<View>>>,
    retired: Cell<bool>,
    retiring: Notify,
}

/// What the model says of the dialled Service.
pub struct View {
    pub service: ServiceDestination,
    pub routes: Option<Arc<Routes>>,
}

impl Session {
    pub fn new(onward: Onward, check: Option<Rc<Check>>) -> Rc<Self> {
        let moves = onward.model().subscribe();
        Rc::new(Self {
            onward,
            check,
            tunnel: RefCell::default(),
            moves: RefCell::new(moves),
            view: RefCell::default(),
            retired: Cell::new(false),
            retiring: Notify::new(),
        })
    }

    /// The dialled Service as it is now; none where it has gone.
    pub fn view(&self) -> Option<Rc<View>> {
        // The sender lives as long as the model does.
        if !self.moves.borrow().has_changed().unwrap_or(false)
            && let Some(view) = &*self.view.borrow()
        {
            return Some(view.clone());
        }
        self.moves.borrow_mut().borrow_and_update();
        let (view, stays) = self.look();
        let view = view.map(Rc::new);
        self.view.replace(view.clone());
        if !stays {
            self.retire();
        }
        view
    }

    /// And whether its requests are still to be told apart here.
    fn look(&self) -> (Option<View>, bool) {
        let state = self.onward.model().read();
        let Destination::Service(service) = state.mesh.destination(self.onward.dialled) else { return (None, false) };
        let stays = *state.mesh.waypoint_of(&service.service) == Waypoint::Node
            && service.port.protocol().is_none_or(AppProtocol::is_http);
        let client = &self.onward.workload().name().namespace;
        let routes = state.routes.routes(&service.service.name, &service.port, client).filter(|_| stays);
        (Some(View { service, routes }), stays)
    }

    /// The Service port that a request goes to; none where the model has no such thing.
    pub fn destination(&self, view: &View, target: Target<'_>) -> Option<ServiceDestination> {
        match target {
            Target::Parent => Some(view.service.clone()),
            Target::Backend(backend) => self.backend(backend),
        }
    }

    pub fn backend(&self, backend: &BackendRef) -> Option<ServiceDestination> {
        let state = self.onward.model().read();
        let service = state.mesh.service(&backend.service)?;
        state.mesh.service_destination(service, backend.port)
    }

    /// Whether an answer is to say that the connection takes no more requests.
    pub fn is_retired(&self) -> bool {
        self.retired.get()
    }

    /// The connection is to take no more requests: its next answer says so.
    pub fn retire(&self) {
        self.retired.set(true);
        self.retiring.notify_one();
    }

    pub async fn retiring(&self) {
        while !self.retired.get() {
            self.retiring.notified().await;
        }
    }
}
