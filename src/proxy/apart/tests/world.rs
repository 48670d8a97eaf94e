//! A server's agent, and where asked for a waypoint before it, with nothing between them but the code that decides.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use http::Request;
use http::request::Parts;
use serde_json::Value;

use super::super::Relayed;
use super::Outcome;
use crate::capture::{CapturedPod, NetNs};
use crate::identity::{EmbeddedCa, Identities, IdentitySettings};
use crate::mesh::{Identity, MeshSettings, NamespacedName, OwnWaypoint};
use crate::model::explain::{Explanation, Party as Asker, Question, explain_request};
use crate::model::{Delta, Model};
use crate::policy::tests::read;
use crate::policy::{self, PolicyRef, Reads, RequestHead};
use crate::proxy::connections::{Opening, Registered};
use crate::proxy::inbound::{Arrival, allowed};
use crate::proxy::inward::Inward;
use crate::proxy::pods::ServedPod;
use crate::proxy::tunnel::Source;
use crate::proxy::workers::Thread;
use crate::proxy::{Connections, Limits, PortRanges, Proxy, ProxySettings, SameNode, Workers};
use crate::source::fixture;
use crate::telemetry::{AccessLog, ConnectionInfo, Direction, MetricsSettings, Party, Telemetry, Traces, Transport};
use crate::transport::tls::{Offer, Tls};
use crate::transport::{Behalf, fast, hbone};
use crate::waypoint::{self, Refusal};

/// Where requests to `shop/cart` are judged.
#[derive(Clone, Copy, PartialEq)]
pub enum Place {
    Node,
    Apart,
}

/// One request, and whose it is.
#[derive(Clone, Debug)]
pub struct Asked {
    /// `namespace/account`.
    pub client: Option<&'static str>,
    pub ip: &'static str,
    pub port: u16,
    pub head: Parts,
}

impl Asked {
    fn identity(&self) -> Option<Identity> {
        let (namespace, account) = self.client?.split_once('/')?;
        Identity::new(&domain(), &namespace.into(), &account.into())
    }

    fn from(&self) -> SocketAddr {
        SocketAddr::new(self.ip.parse().expect("it is an address"), 4321)
    }

    /// The endpoint.
    fn to(&self) -> SocketAddr {
        SocketAddr::new([10, 0, 0, 9].into(), self.port)
    }
}

#[derive(Clone)]
pub struct World {
    model: Arc<Model>,
    /// The server's agent, and its pod `shop/cart`.
    agent: (Arc<Proxy>, Arc<ServedPod>),
    waypoint: Option<(Arc<Proxy>, Arc<ServedPod>)>,
    enforced: Arc<Mutex<Vec<PolicyRef>>>,
}

impl World {
    pub fn new(place: Place) -> Self {
        let settings =
            MeshSettings { trust_domain: domain(), cluster_cidrs: vec!["10.0.0.0/8".parse().expect("a range")] };
        let model = Arc::new(Model::new(settings));
        let key = if place == Place::Node { "node" } else { "infra/gw" };
        let loaded = fixture::load(&OBJECTS.replace("WAYPOINT", key));
        assert_eq!(loaded.problems, []);
        model.apply(loaded.deltas);
        model.set_synced();
        let agent = served(&model, None, "shop/cart-1");
        let waypoint = (place == Place::Apart).then(|| served(&model, Some(gateway()), "infra/gw-1"));
        Self { model, agent, waypoint, enforced: Arc::default() }
    }

    /// Puts these policies in the place of those before.
    pub fn enforce(&self, policies: &[Value]) {
        let mut enforced = self.enforced.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = enforced.drain(..).map(policy::Delta::Delete);
        let objects: Vec<_> = policies.iter().map(read).collect();
        let names: Vec<PolicyRef> = objects.iter().map(policy::PolicyObject::reference).collect();
        let deltas = gone.chain(objects.into_iter().map(policy::Delta::Apply)).map(Delta::Policy);
        self.model.apply(deltas);
        *enforced = names;
    }

    /// Runs a job where connections live.
    pub fn on_worker(&self, job: impl FnOnce(&Self) + Send + 'static) {
        let (own, (proxy, _)) = (self.clone(), self.waypoint.as_ref().unwrap_or(&self.agent));
        proxy.workers.spawn_on(0, |_| async move { job(&own) });
    }

    /// What becomes of a request to the Service, on its way to the one endpoint.
    pub fn judge(&self, asked: &Asked) -> Outcome {
        match &self.waypoint {
            Some(waypoint) => self.relay(waypoint, asked).map_err(told),
            None => self.arrive(asked, asked.head.clone(), None).map_err(told),
        }
        .map(|head| written(&head))
    }

    /// The same of one that comes to the endpoint's own address.
    pub fn beside(&self, asked: &Asked) -> Outcome {
        self.arrive(asked, asked.head.clone(), None).map(|head| written(&head)).map_err(told)
    }

    /// What a person is told of it who asks.
    pub fn explain(&self, asked: &Asked) -> Told {
        let question = Question {
            from: Asker::Address(asked.from().ip()),
            to: Asker::Address(SERVICE.into()),
            port: Some(asked.port),
        };
        let now = k8s_openapi::jiff::Timestamp::now().as_second();
        let told = explain_request(&self.model.read(), &question, &asked.head, now).expect("it is a question");
        let backend = told.backends.into_iter().next().expect("no route leads it elsewhere");
        Told { connection: backend.connection.expect("there is a way") }
    }

    /// The waypoint's part, and then the agent's behind it.
    fn relay(&self, (proxy, pod): &(Arc<Proxy>, Arc<ServedPod>), asked: &Asked) -> Result<Parts, Refusal> {
        let identity = asked.identity().expect("a tunnel proves who its client is");
        let source = Source { address: asked.from(), identity: identity.clone(), via: None };
        let place = Relayed {
            proxy: proxy.clone(),
            thread: Thread::here().expect("it runs on a worker"),
            pod: pod.clone(),
            behalf: Rc::new(Behalf { identity, address: asked.from() }),
            peer: None,
            source: Rc::new(source.party(proxy)),
            dialled: SocketAddr::new(SERVICE.into(), asked.port),
            connection: None,
        };
        let head = through(&place, asked.to(), asked.head.clone())?;
        let own = OwnWaypoint::of(&gateway(), &domain()).expect("it has a name").identity;
        assert!(self.model.read().mesh.is_own_waypoint(&own, asked.to()), "its word is not believed");
        self.arrive(asked, head, Some(own))
    }

    /// The part of the endpoint's agent.
    fn arrive(&self, asked: &Asked, head: Parts, via: Option<Identity>) -> Result<Parts, Refusal> {
        let ((proxy, pod), to) = (&self.agent, asked.to());
        let (client, identity) = (asked.from(), asked.identity());
        let connection = self.connection(asked, via.as_ref());
        let arrival = Arrival { proxy, pod, client, identity: identity.as_ref(), via: via.as_ref(), to };
        arrival.check_source().map_err(Refusal::unreached)?;
        let decided = arrival.decide(&connection).map_err(Refusal::unreached)?;
        allowed(&decided.decision).map_err(Refusal::unreached)?;
        if decided.reads == Reads::Nothing {
            return Ok(head);
        }
        assert!(via.is_none(), "what a waypoint has judged is judged once more");
        let (proxy, pod, seen) = (proxy.clone(), pod.clone(), client.ip());
        let place =
            Inward { proxy, pod, client, identity, via, peer: None, seen, to }.place(connection.shared().clone(), None);
        through(&place, to, head)
    }

    fn connection(&self, asked: &Asked, via: Option<&Identity>) -> Registered {
        let (proxy, pod) = &self.agent;
        let info = ConnectionInfo {
            direction: Direction::Inbound,
            transport: Transport::Hbone,
            source: Party::stranger(asked.from()),
            destination: Party::of(asked.to(), &pod.captured.workload),
            service: None,
            requested: None,
            key_exchange: None,
        };
        let (source, dialled) = (asked.from(), asked.to());
        let opening = Opening { pod: pod.uid(), source, dialled, peer: asked.identity(), via: via.cloned(), info };
        proxy.connections.register(&proxy.telemetry, opening)
    }
}

/// What `explain` says of a request.
pub struct Told {
    pub connection: Explanation,
}

impl Told {
    /// What its client is told, and why, where it is refused.
    pub fn ended(&self) -> Option<(u16, String)> {
        let reason = self.connection.reason.clone()?;
        let answer = self.connection.endpoints.iter().find_map(|one| one.token.as_ref()?.answer.as_ref());
        let status = match answer {
            Some(answer) => answer.status,
            None if reason == "protocol" => 400,
            None => 403,
        };
        Some((status, reason))
    }
}

/// As each try of a request goes: its token, its policies; nobody else is asked.
fn through(place: &dyn waypoint::Place, endpoint: SocketAddr, mut head: Parts) -> Result<Parts, Refusal> {
    place.settle(endpoint, &mut head)?;
    let request = Request::from_parts(head, ());
    let permit = place.judge(endpoint, &RequestHead::of(&request))?;
    assert!(permit.is_none_or(|permit| permit.is_last && permit.asks.is_empty()));
    place.judge_again(endpoint, &RequestHead::of(&request))?;
    Ok(request.into_parts().0)
}

fn told(refusal: Refusal) -> (u16, String) {
    (refusal.status.as_u16(), refusal.reason.to_string())
}

fn written(head: &Parts) -> String {
    let mut headers: Vec<String> = head.headers.iter().map(|(name, value)| format!("{name}: {value:?}")).collect();
    headers.sort();
    format!("{} {} {headers:?}", head.method, head.uri)
}

/// A proxy that serves one pod of the model.
fn served(model: &Arc<Model>, gateway: Option<NamespacedName>, pod: &str) -> (Arc<Proxy>, Arc<ServedPod>) {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = EmbeddedCa::open(folder.path(), &domain()).expect("a CA");
    let trust = ca.trust();
    let identities = Identities::new(domain(), ca, trust, IdentitySettings::default());
    let connections = Arc::new(Connections::default());
    let settings = ProxySettings {
        node: "a".into(),
        cluster: "c".to_owned(),
        source_ports: PortRanges::default(),
        node_netns: NetNs::current().expect("a namespace"),
        tunnel: Offer::Both,
        same_node: SameNode::Tunnel,
        gateway,
        tunnel_idle: std::time::Duration::from_secs(60),
    };
    let workers = Workers::start(1, &hbone::PoolSettings::default(), &fast::PoolSettings::default());
    let proxy = Proxy::new(
        settings,
        model.clone(),
        identities.clone(),
        Tls::new(identities),
        Telemetry::new(&MetricsSettings::default(), 100, AccessLog::off(), Traces::default()),
        connections.clone(),
        Limits::new(1000, connections),
        workers.expect("a worker"),
    );
    let (namespace, name) = pod.split_once('/').expect("two words");
    let workload = model.read().mesh.workload_by_name(&NamespacedName::new(namespace, name)).cloned();
    let workload = workload.unwrap_or_else(|| panic!("there is no pod {pod}"));
    let captured = CapturedPod::own(workload.clone(), Some([127, 0, 0, 1].into()), 0).expect("a port");
    proxy.serve(Arc::new(captured));
    let pod = proxy.pods.get(workload.uid()).expect("it is served");
    (proxy, pod)
}

fn gateway() -> NamespacedName {
    NamespacedName::new("infra", "gw")
}

fn domain() -> crate::mesh::TrustDomain {
    "cluster.local".parse().expect("a trust domain")
}

const SERVICE: [u8; 4] = [10, 96, 0, 9];

/// One endpoint of two Services, of which one is said to have its requests told apart; a waypoint; and clients.
const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {selvedge.dev/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bank, annotations: {selvedge.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: web-1, uid: web-1}
spec: {nodeName: b, serviceAccountName: web}
status: {phase: Running, podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: bank, name: web-1, uid: bank-web-1}
spec: {nodeName: b, serviceAccountName: web}
status: {phase: Running, podIPs: [{ip: 10.0.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: cart-client, uid: cart-client}
spec: {nodeName: b, serviceAccountName: cart}
status: {phase: Running, podIPs: [{ip: 10.0.0.3}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: bank, name: teller-1, uid: teller-1}
spec: {nodeName: b, serviceAccountName: teller}
status: {phase: Running, podIPs: [{ip: 11.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: cart-1, uid: cart-1, labels: {app: cart}}
spec: {nodeName: a, serviceAccountName: cart, containers: [{name: main, image: cart}]}
status: {phase: Running, podIPs: [{ip: 10.0.0.9}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: cart, annotations: {selvedge.dev/waypoint: WAYPOINT}}
spec:
  clusterIP: 10.96.0.9
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: 80}, {name: any, port: 8080, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
spec:
  clusterIP: 10.96.0.10
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: infra, name: gw}
spec:
  gatewayClassName: selvedge-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]
---
apiVersion: v1
kind: Service
metadata: {namespace: infra, name: gw-selvedge-waypoint}
spec:
  clusterIP: 10.96.0.11
  selector: {gateway.networking.k8s.io/gateway-name: gw}
  ports: [{name: tunnel, port: 15008, targetPort: 15008}]
---
apiVersion: v1
kind: Pod
metadata:
  namespace: infra
  name: gw-1
  uid: gw-1
  labels: {gateway.networking.k8s.io/gateway-name: gw}
spec: {nodeName: a, serviceAccountName: gw-selvedge-waypoint, containers: [{name: waypoint, image: selvedge}]}
status: {phase: Running, podIPs: [{ip: 10.0.0.20}], conditions: [{type: Ready, status: "True"}]}
"#;
