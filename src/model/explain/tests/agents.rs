//! Whatever the model, explain says what the agents do: the same questions, in the order in which the proxy asks them.

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use super::*;
use crate::mesh::balance;
use crate::mesh::{OwnWaypoint, ServiceDestination};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn explain_agrees_with_the_agents(seed in any::<u64>()) {
        let mut random = StdRng::seed_from_u64(seed);
        let objects = world(&mut random);
        let model = model_of_objects(&objects);
        let state = model.read();
        for from in POD_NAMES {
            let Some(source) = state.mesh.workload_by_name(&named(from)).cloned() else { continue };
            for to in destinations(&state) {
                if !source.pod.ips.iter().any(|ip| ip.is_ipv4() == to.is_ipv4()) {
                    continue;
                }
                let question =
                    Question { from: Party::Named(named(from)), to: Party::Address(to.ip()), port: Some(to.port()) };
                let said = explain(&state, &question).unwrap();
                agrees(&state, &source, to, &said).map_err(|error| {
                    TestCaseError::fail(format!("{from} to {to}: {error}; explain says\n{said}\nof {}", json!(objects)))
                })?;
            }
        }
    }
}

fn agrees(state: &State, source: &Arc<Workload>, dialled: SocketAddr, said: &Explanation) -> Result<(), String> {
    let captured = match &source.membership {
        Membership::Joined(exclusions) => !exclusions.exclude_outbound(dialled),
        Membership::Outside(_) => false,
    };
    let whole = |reason: Reason| match (said.verdict, &said.reason) {
        (Verdict::Deny, Some(told)) if *told == reason.to_string() => Ok(()),
        _ => Err(format!("the agent says {reason}")),
    };
    if captured && is_reserved_port(dialled.port()) {
        return whole(Reason::Protocol);
    }
    let alone = |outcome: Result<(), Reason>| match outcome {
        Ok(()) if said.verdict == Verdict::Allow => Ok(()),
        Ok(()) => Err("the agent lets it through".to_owned()),
        Err(reason) => whole(reason),
    };
    match state.mesh.destination(dialled) {
        Destination::Service(found) => {
            let node = source.pod.node.clone();
            let zone = node.as_ref().and_then(|node| state.mesh.node(node)).and_then(|node| node.zone.clone());
            let client_ip = of_family(source, dialled.ip());
            let (first, _) = balance::endpoints(&found, &Client { ip: client_ip, node, zone });
            let through = match captured.then(|| way_through(state, source, &found)).flatten() {
                Some(Err(reason)) => return whole(reason),
                Some(Ok(through)) => Some(through),
                None => None,
            };
            if first.is_empty() {
                return whole(Reason::NoEndpoint);
            }
            for address in first {
                let endpoint = said.endpoints.iter().find(|endpoint| endpoint.address == address);
                let endpoint = endpoint.ok_or_else(|| format!("nothing of endpoint {address}"))?;
                let outcome = match &through {
                    Some(through) => relayed(state, source, through, address),
                    None => sent(state, source, address, captured),
                };
                let outcome = outcome.map_err(|reason| reason.to_string());
                if (endpoint.verdict == Verdict::Allow) != outcome.is_ok() || endpoint.reason != outcome.clone().err() {
                    return Err(format!("of endpoint {address} the agent says {outcome:?}"));
                }
            }
            Ok(())
        }
        Destination::NoSuchPort(_) => whole(Reason::NoEndpoint),
        Destination::Unknown if captured => whole(Reason::UnknownDestination),
        Destination::Workload(_) => alone(sent(state, source, dialled, captured)),
        Destination::Unknown | Destination::Node | Destination::Outside => alone(Ok(())),
    }
}

/// A waypoint of its own that the source's agent leads to, and one of its pods.
fn way_through(
    state: &State,
    source: &Workload,
    service: &ServiceDestination,
) -> Option<Result<(OwnWaypoint, Arc<Workload>), Reason>> {
    let waypoint = state.mesh.own_waypoint_of(&service.service, &service.port)?;
    let found = waypoint.ok().and_then(|waypoint| {
        let door = state.mesh.door_of(&waypoint).ok()?;
        let pod = state.mesh.ready_pod_of(&waypoint, &door)?.clone();
        Some((waypoint, pod))
    });
    Some(match found {
        None => Err(Reason::Waypoint),
        Some(_) if source.identity.is_none() => Err(Reason::Identity),
        Some(found) => Ok(found),
    })
}

/// What becomes of a connection that a waypoint carries on: it asks policy about its client, and the endpoint's agent takes its
/// word, or judges it too.
fn relayed(
    state: &State,
    source: &Workload,
    (waypoint, pod): &(OwnWaypoint, Arc<Workload>),
    to: SocketAddr,
) -> Result<(), Reason> {
    if let Destination::Workload(destination) = state.mesh.destination(to) {
        let (query, _) = state.query(of_family(source, to.ip()), source.identity.as_ref(), &destination, to);
        state.policies.decide(&query).reason.map_or(Ok(()), Err)?;
        let is_believed = state.mesh.own_waypoints_at(to).any(|own| own.gateway == waypoint.gateway);
        let is_tunnel = matches!(Path::between(pod, &destination, to.port()), Path::Tunnel { .. });
        if is_believed && is_tunnel && !is_reserved_port(to.port()) {
            return Ok(());
        }
    }
    sent(state, pod, to, true)
}

/// What becomes of a connection that one side sends to one address.
fn sent(state: &State, source: &Arc<Workload>, to: SocketAddr, captured: bool) -> Result<(), Reason> {
    let destination = match state.mesh.destination(to) {
        Destination::Workload(destination) => destination,
        Destination::Unknown if captured => return Err(Reason::UnknownDestination),
        _ => return Ok(()),
    };
    if !captured {
        return arrives(state, source, &destination, to, None);
    }
    match Path::between(source, &destination, to.port()) {
        Path::Plain(_) => arrives(state, source, &destination, to, None),
        Path::Tunnel { own, .. } => arrives(state, source, &destination, to, Some(&own)),
        Path::Refused(reason, _) => Err(reason),
        Path::Uncaptured => match state.policies.peer_mode(&destination, to.port()) {
            PeerMode::Strict(_) => Err(Reason::PeerUncaptured),
            PeerMode::Permissive => arrives(state, source, &destination, to, None),
        },
    }
}

/// What the destination's side makes of it.
fn arrives(
    state: &State,
    source: &Arc<Workload>,
    destination: &Arc<Workload>,
    to: SocketAddr,
    identity: Option<&Identity>,
) -> Result<(), Reason> {
    let Membership::Joined(exclusions) = &destination.membership else { return Ok(()) };
    if source.uid() == destination.uid() {
        return Ok(());
    }
    if identity.is_none() {
        if exclusions.inbound_ports.contains(&to.port()) {
            return Ok(());
        }
        if to.port() == TUNNEL_PORT {
            return Err(Reason::Tls);
        }
    }
    let client = of_family(source, to.ip());
    if !believable_source(client, &destination.pod.ips) {
        return Err(Reason::Source);
    }
    if is_reserved_port(to.port()) {
        return Err(Reason::Protocol);
    }
    let (query, reads) = state.query(client, identity, destination, to);
    let is_own = || state.mesh.own_waypoints_at(to).any(|waypoint| Some(&waypoint.identity) == identity);
    if reads == Reads::ToDecide && state.mesh.is_behind_waypoint(to) && !is_own() {
        return Err(Reason::Waypoint);
    }
    let decision = state.policies.decide(&query);
    decision.reason.map_or(Ok(()), Err)
}

fn of_family(source: &Workload, to: IpAddr) -> IpAddr {
    let same = source.pod.ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4());
    *same.unwrap_or(&source.pod.ips[0])
}

fn destinations(state: &State) -> Vec<SocketAddr> {
    let pods = POD_NAMES.into_iter().filter_map(|name| state.mesh.workload_by_name(&named(name)));
    let mut all: Vec<SocketAddr> = pods
        .flat_map(|workload| workload.pod.ips.clone())
        .flat_map(|ip| [8080, 9090, 15006, 15008].map(|port| SocketAddr::new(ip, port)))
        .collect();
    for text in ["10.96.0.1", "10.96.0.2", "10.96.0.77", "10.0.1.200", "192.0.2.1"] {
        all.extend([80, 81, 82, 15001].map(|port| SocketAddr::new(text.parse().unwrap(), port)));
    }
    all
}

fn model_of_objects(objects: &[Value]) -> Model {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    fixture::model_of(fixture::load(&list.to_string()))
}

fn named(name: &str) -> NamespacedName {
    let (namespace, name) = name.split_once('/').unwrap();
    NamespacedName::new(namespace, name)
}

fn world(random: &mut StdRng) -> Vec<Value> {
    let mut objects = vec![
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one"}, "spec": {"podCIDRs": ["10.0.1.0/24"]}}),
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "s"},
               "spec": {"cidrs": ["10.96.0.0/16"]}}),
    ];
    for name in ["shop", "bank"] {
        let mode = pick(random, &["enabled", "enabled", "required", "disabled"]);
        objects.push(json!({"apiVersion": "v1", "kind": "Namespace",
                            "metadata": {"name": name, "annotations": {"selvedge.dev/mesh": mode}}}));
    }
    for (at, name) in POD_NAMES.into_iter().enumerate() {
        objects.push(pod(random, at, &named(name)));
    }
    for number in 1..=2 {
        objects.extend(service(random, number));
    }
    objects.extend(waypoint(random));
    for at in 0..random.random_range(0..5) {
        objects.push(policy(random, at));
    }
    objects
}

/// A waypoint of its own; or what is left of one.
fn waypoint(random: &mut StdRng) -> Vec<Value> {
    let label = json!({"gateway.networking.k8s.io/gateway-name": "gw"});
    let from = *pick(random, &["All", "All", "All", "Same"]);
    let all = [
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "gw", "namespace": "infra"},
            "spec": {
                "gatewayClassName": "selvedge-waypoint",
                "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE", "allowedRoutes": {"namespaces": {"from": from}}}],
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "gw-selvedge-waypoint", "namespace": "infra"},
            "spec": {"clusterIP": "10.96.0.9", "selector": label, "ports": [{"port": 15008, "targetPort": 15008}]},
        }),
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "gw-1", "namespace": "infra", "labels": label},
            "spec": {"nodeName": "one", "serviceAccountName": "gw-selvedge-waypoint"},
            "status": {
                "podIPs": [{"ip": "10.0.1.100"}], "phase": "Running",
                "conditions": [{"type": "Ready", "status": pick(random, &["True", "True", "True", "False"])}],
            },
        }),
    ];
    all.into_iter().filter(|_| random.random_bool(0.95)).collect()
}

fn pod(random: &mut StdRng, at: usize, name: &NamespacedName) -> Value {
    let mut annotations = json!({});
    for (key, value, chance) in [
        ("selvedge.dev/mesh", "disabled", 0.15),
        ("selvedge.dev/mesh", "enabled", 0.15),
        ("selvedge.dev/exclude-inbound-ports", "9090,15006", 0.15),
        ("selvedge.dev/exclude-outbound-ports", "8080,81", 0.15),
        ("selvedge.dev/exclude-outbound-cidrs", "10.0.1.0/30,10.96.0.2/32", 0.15),
    ] {
        if random.random_bool(chance) {
            annotations[key] = value.into();
        }
    }
    let mut ips = vec![json!({"ip": format!("10.0.1.{}", at + 1)})];
    if random.random_bool(0.4) {
        ips.push(json!({"ip": format!("fd00::{}", at + 1)}));
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": *name.name, "namespace": *name.namespace, "annotations": annotations,
                     "labels": {"tier": pick(random, &["front", "back"])}},
        "spec": {
            "nodeName": pick(random, &["one", "two"]), "hostNetwork": random.random_bool(0.05),
            "serviceAccountName": pick(random, &["web", "cart", "teller", ""]),
        },
        "status": {"podIPs": ips, "phase": pick(random, &["Running", "Running", "Running", "Pending", "Succeeded"])},
    })
}

fn service(random: &mut StdRng, number: usize) -> [Value; 2] {
    let name = format!("service-{number}");
    let namespace = *pick(random, &["shop", "bank"]);
    let policy = pick(random, &["Cluster", "Cluster", "Local"]);
    let annotations = json!({"selvedge.dev/waypoint": pick(random, &["none", "node", "infra/gw", "infra/gw", "gw"])});
    let endpoints: Vec<Value> = (1..=POD_NAMES.len() + 1)
        .filter(|_| random.random_bool(0.4))
        .map(|at| json!({"addresses": [format!("10.0.1.{at}")], "nodeName": "one", "conditions": {"ready": at % 3 != 0}}))
        .collect();
    [
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": namespace, "annotations": annotations},
            "spec": {
                "clusterIP": format!("10.96.0.{number}"), "internalTrafficPolicy": policy,
                "ports": [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "odd", "port": 81, "targetPort": 15006}],
            },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "http", "port": 8080}, {"name": "odd", "port": 15006}], "endpoints": endpoints,
        }),
    ]
}

fn policy(random: &mut StdRng, at: usize) -> Value {
    let namespace = *pick(random, &["shop", "shop", "bank", "selvedge-system"]);
    let mut spec = match random.random_range(0..4) {
        0 => json!({"selector": {"matchLabels": {"tier": "front"}}}),
        1 => json!({"targetRefs": [{"kind": "Service", "name": pick(random, &["service-1", "service-2", "no"])}]}),
        _ => json!({}),
    };
    let kind = if random.random_bool(0.15) {
        spec["jwtRules"] = json!([{"issuer": "https://id", "jwksUri": "https://id/keys"}]);
        "RequestAuthentication"
    } else if random.random_bool(0.25) {
        spec["mtls"] = json!({"mode": pick(random, &["STRICT", "PERMISSIVE", "UNSET"])});
        "PeerAuthentication"
    } else {
        let sources = [
            json!({"principals": ["*"]}),
            json!({"namespaces": ["shop"]}),
            json!({"notNamespaces": ["bank"]}),
            json!({"ipBlocks": ["10.0.1.0/30", "fd00::1"]}),
            json!({"requestPrincipals": ["*"]}),
        ];
        let rules = [
            json!({}),
            json!({"from": [{"source": pick(random, &sources)}]}),
            json!({"to": [{"operation": {"ports": ["8080"]}}]}),
            json!({"to": [{"operation": {"methods": ["GET"]}}]}),
        ];
        spec["action"] = (*pick(random, &["ALLOW", "ALLOW", "DENY", "AUDIT", "PERMIT"])).into();
        spec["rules"] = json!([pick(random, &rules)]);
        "AuthorizationPolicy"
    };
    let mut metadata = json!({"namespace": namespace, "name": format!("p{at}")});
    if random.random_bool(0.05) {
        metadata["name"] = Value::Null;
    }
    json!({"apiVersion": "selvedge.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec})
}

fn pick<'a, T>(random: &mut StdRng, all: &'a [T]) -> &'a T {
    all.choose(random).unwrap()
}

const POD_NAMES: [&str; 5] = ["shop/web", "shop/cart", "bank/teller", "bank/vault", "old/stranger"];
