use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::mesh::{Identity, Membership, NamespacedName, Owner, Phase, Pod, PodUid, Reason, Settings, Workload};

mod authentication;
mod closed;
mod cost;
mod documented;
mod oracle;
mod peer;
mod requests;
mod rules;

/// A pod `shop/cart` with labels app=cart, at 10.0.0.9 and fd00::9.
fn workload() -> Workload {
    workload_of("shop", "cart", &[("app", "cart")])
}

fn workload_of(namespace: &str, name: &str, labels: &[(&str, &str)]) -> Workload {
    let pod = Pod {
        uid: PodUid::new(format!("{namespace}-{name}")),
        name: NamespacedName::new(namespace, name),
        node: None,
        ips: vec!["10.0.0.9".parse().unwrap(), "fd00::9".parse().unwrap()],
        labels: labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<BTreeMap<_, _>>().into(),
        service_account: name.into(),
        phase: Phase::Running,
        host_network: false,
        host_users: true,
        deleting: false,
        settings: Settings::default(),
        container_ports: Vec::new(),
        probes: Vec::new(),
        owner: Owner { kind: "Pod".into(), name: name.into() },
    };
    Workload {
        pod: Arc::new(pod),
        identity: None,
        membership: Membership::Outside("test"),
        captured: false,
        zone: None,
        connect: None,
    }
}

fn authorization(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": { "namespace": namespace, "name": name }, "spec": spec,
    })
}

fn peer(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "PeerAuthentication",
        "metadata": { "namespace": namespace, "name": name }, "spec": spec,
    })
}

fn kind_of(value: &Value) -> PolicyKind {
    match value["kind"].as_str() {
        Some("PeerAuthentication") => PolicyKind::PeerAuthentication,
        Some("RequestAuthentication") => PolicyKind::RequestAuthentication,
        _ => PolicyKind::AuthorizationPolicy,
    }
}

/// As `source` does without a last good version.
fn read(value: &Value) -> PolicyObject {
    let kind = kind_of(value);
    decode(kind, value).unwrap_or_else(|error| {
        let metadata = &value["metadata"];
        let name = NamespacedName::new(metadata["namespace"].as_str().unwrap(), metadata["name"].as_str().unwrap());
        malformed(kind, name, value, &error)
    })
}

fn store(values: &[Value]) -> Policies {
    let mut policies = Policies::new("cluster.local".parse().unwrap());
    values.iter().for_each(|value| drop(policies.apply(Delta::Apply(read(value)))));
    policies
}

/// A connection to `shop/cart`; the source is `namespace/account@ip`, or an address alone.
#[derive(Clone, Debug)]
struct Case {
    ip: IpAddr,
    identity: Option<Identity>,
    to: SocketAddr,
    services: Vec<NamespacedName>,
    requests: bool,
}

fn from(source: &str) -> Case {
    let (identity, ip) = match source.split_once('@') {
        Some((account, ip)) => {
            let (namespace, account) = account.split_once('/').unwrap();
            (Some(format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().unwrap()), ip)
        }
        None => (None, source),
    };
    Case {
        ip: ip.parse().unwrap(),
        identity,
        to: "10.0.0.9:8080".parse().unwrap(),
        services: Vec::new(),
        requests: false,
    }
}

impl Case {
    fn to(mut self, to: &str) -> Self {
        self.to = to.parse().unwrap();
        self
    }

    fn by(mut self, service: &str) -> Self {
        let (namespace, name) = service.split_once('/').unwrap();
        self.services.push(NamespacedName::new(namespace, name));
        self
    }

    /// Whose requests are read.
    fn read(self) -> Self {
        Self { requests: true, ..self }
    }

    fn query<'a>(&'a self, destination: &'a Workload) -> Query<'a> {
        Query {
            source_ip: self.ip,
            source_identity: self.identity.as_ref(),
            destination,
            destination_addr: self.to,
            services: &self.services,
            requests: self.requests,
        }
    }

    fn allowed_to(&self, destination: &Workload, policies: &[Value]) -> bool {
        store(policies).decide(&self.query(destination)).verdict == Verdict::Allow
    }

    fn allowed(&self, policies: &[Value]) -> bool {
        self.allowed_to(&workload(), policies)
    }

    fn decide(&self, policies: &[Value]) -> Decision {
        store(policies).decide(&self.query(&workload()))
    }
}

/// `reason` of a denial, as the access log has it.
fn reason(decision: &Decision) -> String {
    decision.reason.as_ref().map(Reason::to_string).unwrap_or_default()
}
