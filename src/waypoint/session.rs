use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{Notify, watch};

use super::client::Check;
use super::place::{Look, Place, Receiver, View};
use super::upgrade::Tunnel;
use crate::route::{BackendRef, Target};
use crate::telemetry::RequestConnection;

/// What the requests of one client connection share.
pub struct Session {
    pub place: Rc<dyn Place>,
    /// Of an HTTP/1 client.
    pub check: Option<Rc<Check>>,
    /// What becomes of the connection behind the answer that is on its way.
    pub tunnel: RefCell<Option<Tunnel>>,
    client: OnceCell<Arc<RequestConnection>>,
    moves: RefCell<watch::Receiver<u64>>,
    view: RefCell<Option<Rc<View>>>,
    retired: Cell<bool>,
    retiring: Notify,
}

impl Session {
    pub fn new(place: Rc<dyn Place>, check: Option<Rc<Check>>) -> Rc<Self> {
        let moves = place.model().subscribe();
        Rc::new(Self {
            place,
            check,
            tunnel: RefCell::default(),
            client: OnceCell::new(),
            moves: RefCell::new(moves),
            view: RefCell::default(),
            retired: Cell::new(false),
            retiring: Notify::new(),
        })
    }

    /// The client's own connection, as requests tell of it that are answered here.
    pub fn client(&self) -> Arc<RequestConnection> {
        self.client.get_or_init(|| RequestConnection::new(self.place.describe())).clone()
    }

    /// Where requests go now; none where that has gone.
    pub fn view(&self) -> Option<Rc<View>> {
        // The sender lives as long as the model does.
        if !self.moves.borrow().has_changed().unwrap_or(false)
            && let Some(view) = &*self.view.borrow()
        {
            return Some(view.clone());
        }
        self.moves.borrow_mut().borrow_and_update();
        let Look { view, stays } = self.place.look();
        let view = view.map(Rc::new);
        self.view.replace(view.clone());
        if !stays {
            self.retire();
        }
        view
    }

    /// Whom a request goes to; none where the model has no such thing.
    pub fn receiver(&self, view: &View, target: Target<'_>) -> Option<Receiver> {
        match target {
            Target::Parent => Some(view.to.clone()),
            Target::Backend(backend) => self.backend(backend),
        }
    }

    pub fn backend(&self, backend: &BackendRef) -> Option<Receiver> {
        let state = self.place.model().read();
        let service = state.mesh.service(&backend.service)?;
        state.mesh.service_destination(service, backend.port).map(Receiver::Service)
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
