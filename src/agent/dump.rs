use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::admin::Dump;
use crate::capture::show::CaptureStatus;
use crate::mesh::{NamespacedName, PodUid, Service, ServiceDestination, ServiceKind, Workload};
use crate::proxy::{ConnectionStatus, Proxy};
use crate::source::Report;
use crate::transport::hbone::PoolStatus;

/// All that the agent knows and does, for people: no key, no secret.
pub struct AgentDump {
    node: String,
    proxy: Arc<Proxy>,
    capture: CaptureStatus,
    report: Arc<Report>,
}

impl AgentDump {
    pub fn new(node: &str, proxy: Arc<Proxy>, capture: CaptureStatus, report: Arc<Report>) -> Self {
        Self { node: node.to_owned(), proxy, capture, report }
    }

    fn pools(&self) -> Vec<PoolStatus> {
        let found: Arc<Mutex<Vec<PoolStatus>>> = Arc::default();
        let (done, answers) = std::sync::mpsc::channel();
        let into = found.clone();
        self.proxy.workers.on_each(move |thread| {
            let mut found = into.lock().unwrap_or_else(PoisonError::into_inner);
            found.extend(thread.pool.snapshot());
            found.extend(thread.fast.snapshot());
            let _ = done.send(());
        });
        // A thread that is too busy to answer is left out: a dump must not wait for what it is to explain.
        for _ in 0..self.proxy.workers.count() {
            if answers.recv_timeout(Duration::from_millis(250)).is_err() {
                break;
            }
        }
        std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Dump for AgentDump {
    fn dump(&self) -> Value {
        let pools = self.pools();
        let connections = self.proxy.connections.all();
        // All from one version of the model.
        let (names, mut workloads, mut services, policies, routes, traffic) = {
            let state = self.proxy.model.read();
            let name_of = |uid: &PodUid| Some((uid.clone(), state.mesh.workload(uid)?.name().clone()));
            let names: HashMap<PodUid, NamespacedName> = connections.iter().filter_map(|c| name_of(&c.pod)).collect();
            let workloads: Vec<Arc<Workload>> = state.mesh.workloads().cloned().collect();
            let ports = |service: &Arc<Service>| -> Vec<ServiceDestination> {
                service.ports.iter().filter_map(|port| state.mesh.service_destination(service, port.port)).collect()
            };
            let services: Vec<_> = state.mesh.services().map(|service| (service.clone(), ports(service))).collect();
            let policies = state.policies.iter().cloned().collect::<Vec<_>>();
            // Those of Gateways alone are not ours to speak of.
            let routes = state.routes.all().filter(|route| !route.parents.is_empty()).cloned().collect::<Vec<_>>();
            (names, workloads, services, policies, routes, state.traffic.all().cloned().collect::<Vec<_>>())
        };
        workloads.sort_by(|one, other| one.name().cmp(other.name()));
        services.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
        json!({
            "node": self.node,
            "version": env!("CARGO_PKG_VERSION"),
            "synced": self.proxy.model.is_synced(),
            "modelAgeSeconds": self.report.age().map(|age| age.as_secs_f64()),
            "manifestProblems": &*self.report.problems(),
            "capture": self.capture.snapshot(),
            "workloads": workloads.into_iter().map(|workload| json!({
                "name": workload.name().to_string(),
                "uid": workload.uid().as_str(),
                "node": workload.pod.node,
                "ips": workload.pod.ips,
                "identity": workload.identity.as_ref().map(ToString::to_string),
                "joined": workload.membership.is_joined(),
                "captured": workload.captured,
                "zone": workload.zone,
            })).collect::<Vec<_>>(),
            "services": services.into_iter().map(|(service, ports)| json!({
                "name": service.name.to_string(),
                "addresses": match &service.kind {
                    ServiceKind::ClusterIp(ips) => json!(ips),
                    ServiceKind::Headless => json!("headless"),
                    ServiceKind::ExternalName => json!("externalName"),
                },
                "externalAddresses": service.external_ips,
                "ports": ports.iter().map(|found| json!({
                    "name": &*found.port.name,
                    "port": found.port.port,
                    "endpoints": found.candidates.iter().map(|candidate| json!({
                        "address": candidate.addr,
                        "ready": candidate.ready,
                    })).collect::<Vec<_>>(),
                })).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
            "policies": policies.iter().map(|policy| json!({
                "name": policy.reference().to_string(),
                "scope": policy.scope().to_string(),
                "notEnforced": policy.unenforced().iter()
                    .map(|part| format!("{}: {}", part.field, part.cause)).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
            "routes": routes.iter().map(|route| json!({
                "kind": route.kind.as_str(),
                "name": route.name.to_string(),
                "parents": route.parents.iter().map(|parent| parent.service.to_string()).collect::<Vec<_>>(),
                "rules": route.rules.len(),
                "notEnforced": route.notes.iter()
                    .map(|note| format!("{}: {}", note.field, note.cause)).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
            "trafficPolicies": traffic.iter().map(|policy| json!({
                "name": policy.name.to_string(),
                "targets": policy.targets.iter().map(|target| target.target.to_string()).collect::<Vec<_>>(),
                "fields": policy.fields.names().collect::<Vec<_>>(),
                "notEnforced": policy.notes.iter()
                    .map(|note| format!("{}: {}", note.field, note.cause)).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
            "connections": connections.iter()
                .map(|c| ConnectionStatus::of(c, names.get(&c.pod))).collect::<Vec<_>>(),
            "certificates": self.proxy.identities.status(),
            "trustAnchors": self.proxy.identities.trust().certificates().len(),
            "pools": pools,
        })
    }
}
