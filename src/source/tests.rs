//! Whatever bytes a folder holds: nothing panics, nothing grows out of proportion, and the model stays usable.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::folder::{Folder, Scan, Seen, Stamp};
use crate::mesh::{Destination, MeshSettings, NamespacedName};
use crate::model::Model;
use crate::model::explain::{Party, Question, explain, explain_request};
use crate::mutation::mutated;

const PODS: &str = "apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {selvedge.dev/mesh: required}, labels: {selvedge.dev/exclude-inbound-ports: '9, 10'}}
---
# A pod with all that is read of one.
apiVersion: v1
kind: Pod
metadata:
  name: cart-5d8-x
  namespace: shop
  uid: u-1
  labels: {app: cart, pod-template-hash: 5d8}
  annotations: {selvedge.dev/mesh: enabled, selvedge.dev/exclude-outbound-cidrs: 'fd00::/8,192.0.2.1/32'}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: cart-5d8, uid: u, controller: true}]
spec:
  nodeName: one
  serviceAccountName: cart
  initContainers: [{name: side, restartPolicy: Always, ports: [{containerPort: 9, name: side}]}]
  containers:
  - name: main
    ports: [{containerPort: 8080, name: http}, {containerPort: 53, protocol: UDP}]
    livenessProbe: {httpGet: {port: http, path: /}}
    startupProbe: {grpc: {port: 8082}}
    lifecycle: {preStop: {httpGet: {port: '8083'}}}
status:
  phase: Running
  podIPs: [{ip: 10.0.1.2}, {ip: 'fd00::2'}]
";
const NODES: &str = "apiVersion: v1
kind: Node
metadata: {name: one, labels: {topology.kubernetes.io/zone: z}}
spec: {podCIDRs: [10.0.1.0/24, 'fd00::/64']}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: Hostname, address: one}]}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: default}
spec: {cidrs: [10.96.0.0/16]}
---
&common
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata: &meta {name: other}
- apiVersion: v1
  kind: Pod
  metadata: {<<: *meta, namespace: other}
";
const SERVICES: &str = "%YAML 1.2
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  externalIPs: [192.0.2.1]
  selector: {app: cart}
  sessionAffinity: ClientIP
  internalTrafficPolicy: Local
  trafficDistribution: PreferClose
  ports: [{name: http, port: 80, targetPort: http}, {name: raw, port: 81}]
...
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- addresses: [10.0.1.2]
  conditions: {ready: false, serving: true, terminating: true}
  hints: {forZones: [{name: z}]}
  targetRef: {kind: Pod, name: cart-5d8-x}
";
const POLICIES: &str = "apiVersion: selvedge.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: shop, annotations: {selvedge.dev/dry-run: 'false'}}
spec:
  selector: {matchLabels: {app: cart}}
  action: ALLOW
  rules:
  - from: [{source: {principals: ['cluster.local/ns/*', '*/cart'], notIpBlocks: [10.0.0.0/8, 'fd00::1']}}]
    to: [{operation: {ports: ['8080'], notPorts: ['81']}}]
    when: [{key: source.namespace, values: [shop], notValues: ['*']}]
---
apiVersion: selvedge.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: selvedge-system}
spec: {action: DENY, targetRefs: [{kind: Service, name: cart}], rules: [{}]}
---
apiVersion: selvedge.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop, creationTimestamp: 2026-01-31T12:00:00Z}
spec: {mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}}
";
const ROUTES: &str = "apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {selvedge.dev/mesh: enabled, selvedge.dev/waypoint: node}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop, creationTimestamp: 2026-01-31T12:00:00Z}
spec:
  parentRefs: [{group: '', kind: Service, name: cart, sectionName: http}]
  rules:
  - name: some
    matches:
    - {path: {type: RegularExpression, value: '/a/(b|c)+'}, method: GET, headers: [{name: x, value: y}]}
    - {path: {type: Exact, value: /a}, queryParams: [{type: RegularExpression, name: q, value: '[ab]'}]}
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: host, value: a}], remove: [b]}}
    - {type: RequestMirror, requestMirror: {backendRef: {name: cart, port: 80}, fraction: {numerator: 1}}}
    - {type: CORS, cors: {allowOrigins: ['https://*.example.com:8443'], allowMethods: ['*']}}
    timeouts: {request: 1h30m, backendRequest: 500ms}
    retry: {attempts: 2, backoff: 10ms, codes: [503]}
    backendRefs: [{name: cart, port: 80, weight: 3}, {name: cart, namespace: web, port: 81}]
  - filters: [{type: RequestRedirect, requestRedirect: {scheme: https, path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: raw, namespace: shop}
spec:
  parentRefs: [{group: core, kind: Service, name: cart, port: 81}]
  rules: [{matches: [{method: {service: a.B, method: C}}], backendRefs: [{name: cart, port: 81}]}]
";
const JSON: &str = r#"{"apiVersion":"v1","kind":"PodList","items":[{"metadata":{"name":"a","namespace":"shop"},
"status":{"podIP":"10.0.1.3","conditions":[{"type":"Ready","status":"True"}]}}]}"#;

fn seeds() -> Vec<Vec<u8>> {
    [PODS, NODES, SERVICES, POLICIES, ROUTES, JSON].map(|text| text.as_bytes().to_vec()).into()
}

/// Each file as one of a folder, in the order of time.
fn told(versions: &[Vec<u8>]) -> Model {
    let settings = MeshSettings { trust_domain: "cluster.local".parse().unwrap(), cluster_cidrs: Vec::new() };
    let model = Model::new(settings);
    let mut folder = Folder::default();
    let mut now = Instant::now();
    for (version, bytes) in versions.iter().enumerate() {
        let stamp = Stamp { inode: version as u64, ..Stamp::default() };
        let path = Path::new(if version % 2 == 0 { "a.yaml" } else { "b.yaml" });
        let seen = Seen { path: path.to_owned(), stamp, age: Duration::ZERO };
        // The other file is as it was.
        folder.scan(Scan { files: vec![seen], unlisted: vec!["".into()], ..Scan::default() }, now);
        now += Duration::from_secs(1);
        folder.read(path, stamp, Ok(bytes), now);
        let step = folder.settle(now);
        let said: usize = step.problems.iter().map(|problem| problem.to_string().len()).sum();
        let given: usize = versions[..=version].iter().map(Vec::len).sum();
        assert!(said <= 4_096 + 400 * given, "{said} bytes of problems for {given} of manifests");
        model.apply(step.deltas);
    }
    model
}

fn use_all(model: &Model) {
    let state = model.read();
    for address in ["10.96.0.1:80", "10.0.1.2:8080", "192.0.2.1:80", "[fd00::2]:81", "192.168.0.1:10250"] {
        let address: SocketAddr = address.parse().unwrap();
        if let Destination::Service(found) = state.mesh.destination(address) {
            assert!(found.candidates.len() < 100);
        }
        let from = Party::Named(NamespacedName::new("shop", "cart-5d8-x"));
        let question = Question { from, to: Party::Address(address.ip()), port: Some(address.port()) };
        let _ = explain(&state, &question);
        for uri in ["/", "/a/b?q=a", "/a.B/C"] {
            let (head, ()) = http::Request::get(uri).header("x", "y").body(()).unwrap().into_parts();
            let _ = explain_request(&state, &question, &head, 0);
        }
    }
}

#[test]
fn the_seeds_are_what_they_are_taken_for() {
    let model = told(&[PODS, NODES, SERVICES, POLICIES].map(|text| text.as_bytes().to_vec()));
    let state = model.read();
    let cart = state.mesh.workload_by_name(&NamespacedName::new("shop", "cart-5d8-x"));
    // Of each file the last version counts.
    assert!(cart.is_none() && state.mesh.services().count() == 1 && state.policies.iter().count() == 3);
    for seed in seeds() {
        let content = super::decode::file(Path::new("a.yaml"), &seed);
        assert!(content.problems.is_empty() && !content.objects.is_empty(), "{:#?}", content.problems);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn manifests_with_changed_bytes_never_panic_and_never_say_more_than_they_hold(
        versions in prop::collection::vec(mutated(seeds()), 1..4),
    ) {
        use_all(&told(&versions));
    }

    #[test]
    fn bytes_of_any_kind_are_read_as_a_file(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        use_all(&told(&[PODS.as_bytes().to_vec(), bytes]));
    }
}
