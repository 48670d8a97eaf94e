//! Endpoints of Services for which the folder has no EndpointSlice: no controller runs there, so we do its work.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::decode::{Item, Key, Kind};
use crate::mesh::{
    Endpoint, EndpointSlice, NamespacedName, Node, Object, Phase, Pod, Service, ServiceKind, TargetPort,
};

/// Adds slices, made from the Pods that match a Service's selector, for each Service that no EndpointSlice names.
pub(super) fn add_endpoint_slices(view: &mut BTreeMap<Key, Arc<Item>>) {
    let mut sliced = BTreeSet::new();
    let mut zones = BTreeMap::new();
    let mut pods: BTreeMap<&str, Vec<(&Pod, bool)>> = BTreeMap::new();
    for item in view.values() {
        match &**item {
            Item::Other(Object::EndpointSlice(slice)) => drop(sliced.insert(&slice.service)),
            Item::Other(Object::Node(Node { name, zone: Some(zone), .. })) => drop(zones.insert(name, zone)),
            Item::Pod(pod, ready) => pods.entry(&pod.name.namespace).or_default().push((pod, *ready)),
            _ => {}
        }
    }
    let mut derived = Vec::new();
    for item in view.values() {
        let Item::Service(service, selector) = &**item else { continue };
        let by_hand = sliced.contains(&service.name) || service.kind == ServiceKind::ExternalName;
        if by_hand || selector.is_empty() {
            continue;
        }
        let of_namespace = pods.get(&*service.name.namespace).map(Vec::as_slice).unwrap_or_default();
        let selected =
            of_namespace.iter().filter(|(pod, _)| selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v.as_str())));
        // A target port's name may mean another number in each pod, and a slice has one number for all its endpoints.
        let mut slices: BTreeMap<(bool, Vec<u16>), EndpointSlice> = BTreeMap::new();
        for (pod, ready) in selected {
            if matches!(pod.phase, Phase::Succeeded | Phase::Failed) {
                continue;
            }
            let ports = target_ports(service, pod);
            for ip in &pod.ips {
                let numbers = ports.iter().map(|(_, number)| *number).collect();
                let slice = slices.entry((ip.is_ipv6(), numbers)).or_insert_with_key(|(v6, numbers)| EndpointSlice {
                    name: name_of(service, *v6, numbers),
                    service: service.name.clone(),
                    ports: ports.clone(),
                    endpoints: Vec::new(),
                });
                let serving = *ready && pod.phase == Phase::Running;
                slice.endpoints.push(Endpoint {
                    addresses: vec![*ip],
                    ready: serving && !pod.deleting,
                    serving,
                    terminating: pod.deleting,
                    node: pod.node.clone(),
                    zone: pod.node.as_ref().and_then(|node| zones.get(node)).map(|zone| (*zone).clone()),
                    zone_hints: Vec::new(),
                    node_hints: Vec::new(),
                    pod: Some(pod.name.clone()),
                    pod_uid: Some(pod.uid.clone()),
                });
            }
        }
        derived.extend(slices.into_values());
    }
    for slice in derived {
        let key = Key { kind: Kind::EndpointSlice, name: slice.name.clone() };
        view.insert(key, Arc::new(Item::Other(Object::EndpointSlice(slice))));
    }
}

fn target_ports(service: &Service, pod: &Pod) -> Vec<(Arc<str>, u16)> {
    let number = |target: &TargetPort| match target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => pod.named_port(name),
    };
    service.ports.iter().filter_map(|port| Some((port.name.clone(), number(&port.target)?))).collect()
}

// No object of the folder can have such a name: a slash is not allowed in one.
fn name_of(service: &Service, v6: bool, numbers: &[u16]) -> NamespacedName {
    let family = if v6 { "ipv6" } else { "ipv4" };
    let numbers: Vec<String> = numbers.iter().map(u16::to_string).collect();
    let name = format!("{}/{family}/{}", service.name.name, numbers.join(","));
    NamespacedName { namespace: service.name.namespace.clone(), name: name.into() }
}
