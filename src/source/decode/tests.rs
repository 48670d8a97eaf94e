use super::*;
use crate::mesh::{
    LabelSelector, NamespacedName, Object, Phase, Pod, PodSelection, Probe, Service, ServiceKind, TargetPort,
};

fn read(text: &str) -> Content {
    file(Path::new("a.yaml"), text.as_bytes())
}

fn problems(text: &str) -> Vec<String> {
    read(text).problems.iter().map(Problem::to_string).collect()
}

fn pod_of(text: &str) -> Pod {
    let content = read(text);
    assert_eq!(content.problems, []);
    match &*content.objects[0].item {
        Item::Pod(pod, _) => pod.clone(),
        other => panic!("{other:?}"),
    }
}

fn service_of(text: &str) -> Service {
    let content = read(text);
    match &*content.objects.first().unwrap_or_else(|| panic!("{:?}", content.problems)).item {
        Item::Service(service, _) => service.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pod_is_read_with_all_that_matters() {
    let pod = pod_of(
        "apiVersion: v1
kind: Pod
metadata:
  name: cart-5d8-x
  namespace: shop
  uid: 0001
  labels: {app: cart, pod-template-hash: 5d8}
  annotations: {selvedge.dev/mesh: enabled}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: cart-5d8, uid: u, controller: true}]
spec:
  nodeName: one
  serviceAccountName: cart
  hostUsers: false
  initContainers:
  - {name: setup, ports: [{containerPort: 1}]}
  - {name: side, restartPolicy: Always, ports: [{containerPort: 9, name: side}]}
  containers:
  - name: main
    ports: [{containerPort: 8080, name: http}, {containerPort: 53, protocol: UDP}]
    livenessProbe: {httpGet: {port: http, path: /}}
    readinessProbe: {tcpSocket: {port: 8081}}
    startupProbe: {grpc: {port: 8082}}
    lifecycle: {preStop: {httpGet: {port: '8083'}}}
status:
  phase: Running
  podIPs: [{ip: 10.0.1.2}, {ip: 'fd00::2'}]
"
        .replace("uid: 0001", "uid: u-1")
        .as_str(),
    );
    assert_eq!(pod.uid.as_str(), "u-1");
    assert_eq!((&*pod.owner.kind, &*pod.owner.name), ("Deployment", "cart"));
    assert_eq!(pod.ips.len(), 2);
    assert_eq!(pod.named_port("side"), Some(9));
    assert_eq!(pod.container_ports.len(), 2);
    assert_eq!(pod.probes, [8080, 8081, 8082, 8083].map(|port| Probe { port }));
    assert!(!pod.host_users && !pod.host_network && !pod.deleting);
    assert_eq!(&*pod.service_account, "cart");
}

#[test]
fn what_a_pod_leaves_out_has_its_documented_meaning() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 10.0.0.1}\n";
    let pod = pod_of(text);
    assert_eq!(pod.name, NamespacedName::new("default", "a"));
    assert_eq!((&*pod.service_account, pod.phase, pod.host_users), ("default", Phase::Running, true));
    assert_eq!(&*pod.owner.kind, "Pod");
    assert_eq!(pod_of(text).uid, pod.uid, "a made UID is stable");
    assert_ne!(pod_of(&text.replace("10.0.0.1", "10.0.0.2")).uid, pod.uid, "another address is another pod");
    assert_eq!(pod_of("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n").phase, Phase::Pending);
    let nobody = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {serviceAccountName: ''}\n";
    assert_eq!(&*pod_of(nobody).service_account, "");
}

#[test]
fn jobs_of_a_cron_job_are_told_by_its_name() {
    let owned = |name: &str| {
        let owner = format!("[{{apiVersion: batch/v1, kind: Job, name: {name}, uid: u, controller: true}}]");
        let text = format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a, ownerReferences: {owner}}}\n");
        let owner = pod_of(&text).owner;
        format!("{}/{}", owner.kind, owner.name)
    };
    assert_eq!(owned("backup-28512345"), "CronJob/backup");
    assert_eq!(owned("backup-1"), "Job/backup-1");
}

#[test]
fn a_service_is_read_with_its_addresses_and_tcp_ports() {
    let service = service_of(
        "apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, 'fd00::1']
  externalIPs: [192.0.2.1]
  sessionAffinity: ClientIP
  trafficDistribution: PreferClose
  ports:
  - {name: http, port: 80, targetPort: web}
  - {name: dns, port: 53, protocol: UDP}
  - {name: raw, port: 81}
status: {loadBalancer: {ingress: [{ip: 192.0.2.2}, {ip: 192.0.2.3, ipMode: Proxy}]}}
",
    );
    let ServiceKind::ClusterIp(ips) = &service.kind else { panic!("{service:?}") };
    assert_eq!((ips.len(), service.external_ips.len()), (2, 2));
    assert_eq!(service.ports.len(), 2);
    assert_eq!(service.ports[0].target, TargetPort::Name("web".into()));
    assert_eq!(service.ports[1].target, TargetPort::Number(81));
    assert_eq!(service.session_affinity.map(|d| d.as_secs()), Some(10_800));
    let headless = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: None}\n";
    assert_eq!(service_of(headless).kind, ServiceKind::Headless);
    let alias = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {type: ExternalName, externalName: b.c}\n";
    assert_eq!(service_of(alias).kind, ServiceKind::ExternalName);
}

#[test]
fn conditions_that_are_absent_mean_what_the_api_says() {
    let content = read(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{port: 80}, {name: all}]
endpoints:
- addresses: [10.0.0.1]
- addresses: [10.0.0.2]
  conditions: {ready: false}
- addresses: [10.0.0.3]
  conditions: {ready: false, serving: true, terminating: true}
  hints: {forZones: [{name: z}], forNodes: [{name: n}]}
",
    );
    let Item::Other(Object::EndpointSlice(slice)) = &*content.objects[0].item else { panic!("{content:?}") };
    let states: Vec<_> = slice.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
    assert_eq!(states, [(true, true, false), (false, false, false), (false, true, true)]);
    assert_eq!(slice.ports, [("".into(), 80)]);
    assert_eq!((slice.endpoints[2].zone_hints.len(), slice.endpoints[2].node_hints.len()), (1, 1));
}

#[test]
fn a_bad_field_is_named_with_its_line_and_cure() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n";
    let service = "apiVersion: v1\nkind: Service\nmetadata:\n  name: a\n";
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: a\n";
    for (text, wanted) in [
        (format!("{pod}status:\n  podIPs:\n  - ip: 10.0.0\n"), "a.yaml:7: Pod default/a: status.podIPs[0].ip: \"10.0.0\" is no IP address"),
        (format!("{pod}spec:\n  nodeName: A_b\n"), "a.yaml:6: Pod default/a: spec.nodeName: \"A_b\" is no name"),
        (format!("{pod}spec:\n  containers:\n  - name: m\n    ports:\n    - containerPort: 0\n"), "a.yaml:9: Pod default/a: spec.containers[0].ports[0].containerPort: 0 is no port"),
        (format!("{pod}spec:\n  hostNetwork: maybe\n"), "a.yaml:6: Pod default/a: spec.hostNetwork: it is the text \"maybe\"; true or false"),
        (format!("{pod}  labels:\n    version: 1\n"), "a.yaml:6: Pod default/a: metadata.labels.version: it is 1; text is wanted"),
        (format!("{pod}  labels:\n    selvedge.dev/exclude-inbound-ports: x\n"), "a.yaml:6: Pod default/a: metadata.labels[selvedge.dev/exclude-inbound-ports]:"),
        (format!("{service}spec:\n  clusterIP: 10.96.0.1\n  ports:\n  - port: 80\n    targetPort: 0x\n    name: y\n  - port: 81\n"), "a.yaml:11: Service default/a: spec.ports[1].name: a Service of several ports"),
        (format!("{service}spec:\n  clusterIP: 10.96.0.1\n  ports:\n  - port: 80\n    targetPort: 70000\n"), "a.yaml:9: Service default/a: spec.ports[0].targetPort: 70000 is no port"),
        (format!("{service}spec:\n  ports: []\n"), "a.yaml:5: Service default/a: spec.clusterIP: nobody hands out"),
        (format!("{slice}addressType: FQDN\n"), "a.yaml:5: EndpointSlice default/a: addressType: FQDN endpoints"),
        (format!("{slice}addressType: IPv4\n"), "a.yaml:3: EndpointSlice default/a: metadata.labels: the label"),
        ("kind: Pod\n".to_owned(), "a.yaml:1: apiVersion: every object says"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {}\n".to_owned(), "a.yaml:3: Pod: metadata.name: every object needs a name"),
        ("apiVersion: selvedge.dev/v1alpha1\nkind: Wish\n".to_owned(), "a.yaml:2: Wish : kind: selvedge.dev has no kind \"Wish\""),
        ("apiVersion: selvedge.dev/v9\nkind: AuthorizationPolicy\nmetadata: {name: a}\n".to_owned(), "a.yaml:1: AuthorizationPolicy default/a: apiVersion: AuthorizationPolicy is read as"),
        ("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: A\n".to_owned(), "a.yaml:4: Namespace A: metadata.name: \"A\" is no name"),
        ("apiVersion: v1\nkind: Node\nmetadata:\n  name: n\nspec:\n  podCIDRs:\n  - 10.0.0.0\n".to_owned(), "a.yaml:7: Node n: spec.podCIDRs[0]: \"10.0.0.0\" is no range"),
        ("# a\n---\napiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata:\n    name: a\n  status:\n    podIP: x\n".to_owned(), "a.yaml:11: Pod default/a: status.podIP: \"x\" is no IP address"),
    ] {
        let found = problems(&text);
        assert!(found.iter().any(|problem| problem.starts_with(wanted)), "{found:#?} lacks {wanted}");
    }
}

#[test]
fn what_only_a_preference_or_a_probe_says_wrongly_leaves_the_object_in_force() {
    let pod = "apiVersion: v1
kind: Pod
metadata: {name: a}
spec:
  containers:
  - {name: m, readinessProbe: {httpGet: {port: nowhere}}, livenessProbe: {tcpSocket: {port: 81}}}
";
    let content = read(pod);
    let Item::Pod(found, _) = &*content.objects[0].item else { panic!("{content:?}") };
    assert_eq!(found.probes, [Probe { port: 81 }]);
    assert!(content.problems[0].to_string().starts_with("a.yaml:6: Pod default/a: spec.containers[0].readinessProbe"));
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: None, trafficDistribution: Far}\n";
    assert_eq!(service_of(service).traffic_distribution, None);
    assert_eq!(problems(service).len(), 1);
}

#[test]
fn one_bad_document_takes_no_other_with_it() {
    let content = read(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\nkind: [\n---\napiVersion: v1\nkind: Namespace\nmetadata: \
         {name: B}\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n---\napiVersion: \
         v1\nkind: Namespace\nmetadata: {name: c}\n",
    );
    let names: Vec<_> = content.objects.iter().map(|found| found.key.to_string()).collect();
    assert_eq!(names, ["Namespace a", "Namespace c"]);
    assert_eq!((content.problems.len(), content.broken.len(), content.ignored), (2, 1, 1));
    assert!(content.unparsed);
}

#[test]
fn a_list_is_its_items() {
    let text = "apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}\n";
    assert_eq!(read(text).objects.len(), 2);
    let json = "{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{\"name\":\"a\"}}]}";
    assert_eq!(read(json).objects.len(), 1);
}

#[test]
fn a_list_of_many_bad_objects_is_read_in_bounded_time() {
    let item = "- {apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIP: x}}\n";
    let content = read(&("apiVersion: v1\nkind: List\nitems:\n".to_owned() + &item.repeat(3_000)));
    assert_eq!(content.problems.len(), 3_000);
    assert_eq!((content.problems[0].line, content.problems[1].line, content.problems[2_999].line), (4, 5, 1));
}

#[test]
fn text_that_is_not_utf8_is_told_and_loses_nothing_else() {
    let bytes =
        [b"apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\nkind: ".as_slice(), &[0xff], b"\n"].concat();
    let content = file(Path::new("a.yaml"), &bytes);
    assert_eq!(content.problems[0].line, 5);
    assert_eq!(content.objects.len(), 1);
}

#[test]
fn network_policies_are_read_as_far_as_whom_they_select() {
    let policy = |api_version: &str, kind: &str, spec: &str| {
        let text =
            format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: np, namespace: shop}}\nspec: {spec}\n");
        let content = read(&text);
        let item = content.objects.first().map(|found| (*found.item).clone());
        match item {
            Some(Item::Other(Object::NetworkPolicy(policy))) => Ok(policy),
            None => Err(content.problems.iter().map(Problem::to_string).collect::<String>()),
            other => panic!("{other:?}"),
        }
    };
    let of_kubernetes = |spec: &str| policy("networking.k8s.io/v1", "NetworkPolicy", spec);
    let all = PodSelection::Matching(LabelSelector::default());
    assert_eq!(of_kubernetes("{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}").unwrap().selects, all);
    let selector =
        "{podSelector: {matchLabels: {app: cart}, matchExpressions: [{key: tier, operator: NotIn, values: [a, b]}]}}";
    let PodSelection::Matching(selector) = of_kubernetes(selector).unwrap().selects else { panic!("all") };
    assert_eq!((selector.labels["app"].as_str(), selector.expressions.len()), ("cart", 1));
    for (expression, field) in [
        ("{key: a, operator: in, values: [b]}", "operator"),
        ("{key: a, operator: In}", "values"),
        ("{key: a, operator: Exists, values: [b]}", "values"),
    ] {
        let error = of_kubernetes(&format!("{{podSelector: {{matchExpressions: [{expression}]}}}}")).unwrap_err();
        assert!(error.contains(&format!("spec.podSelector.matchExpressions[0].{field}")), "{error}");
    }
    // Of one name, and yet three objects.
    let names = [
        ("networking.k8s.io/v1", "NetworkPolicy"),
        ("projectcalico.org/v3", "NetworkPolicy"),
        ("cilium.io/v2", "CiliumNetworkPolicy"),
    ]
    .map(|(api_version, kind)| policy(api_version, kind, "{}").unwrap().name);
    assert!(names[0] != names[1] && names[1] != names[2], "{names:?}");
    assert!(names.iter().all(|name| &*name.namespace == "shop"), "{names:?}");
    let of_cluster = policy("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy", "{tier: Admin}").unwrap();
    assert!(of_cluster.name.namespace.is_empty() && of_cluster.selects == PodSelection::All);
    assert_eq!(read("apiVersion: example.com/v1\nkind: NetworkPolicy\nmetadata: {name: np}\n").ignored, 1);
}

#[test]
fn a_field_of_the_wrong_type_is_told_what_it_is_and_what_is_wanted() {
    let told = |kind: &str, fields: &str| {
        let (kind, version) = kind.split_once(' ').unwrap();
        let told = problems(&format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: a}}\n{fields}\n"));
        assert_eq!(told.len(), 1, "{told:?}");
        told[0].clone()
    };
    let list = "a list is wanted: lines that start with `- `, or [..., ...]";
    let names = "names with values are wanted: lines of `name: value`, or {name: value}";
    let (text, number) = ("text is wanted: put it into quotes", "a whole number is wanted, without quotes");
    for (kind, fields, field, found, wanted) in [
        ("Service v1", "spec: {ports: x}", "Service default/a: spec.ports:", "the text \"x\"", list),
        ("Service v1", "spec: {ports: [{port: eighty}]}", "spec.ports[0].port:", "the text \"eighty\"", number),
        ("Service v1", "spec: {selector: [a]}", "spec.selector:", "a list", names),
        ("Service v1", "spec: {selector: {app: 1}}", "spec.selector.app:", "1", text),
        ("Service v1", "spec: {clusterIP: {}}", "spec.clusterIP:", "an object with fields", text),
        ("Service v1", "spec: {ports: [80]}", "spec.ports[0]:", "80", "the fields of ServicePort are wanted"),
        ("Service v1", "spec: 1.5", "spec:", "1.5", "the fields of ServiceSpec are wanted"),
        ("Pod v1", "spec: {hostNetwork: 'yes'}", "spec.hostNetwork:", "the text \"yes\"", "true or false is wanted"),
        ("Pod v1", "spec: {containers: {}}", "spec.containers:", "an object with fields", list),
        ("Pod v1", "spec: {serviceAccountName: true}", "spec.serviceAccountName:", "true", text),
        ("Node v1", "spec: {podCIDRs: 10.0.0.0/24}", "Node a: spec.podCIDRs:", "the text \"10.0.0.0/24\"", list),
        ("EndpointSlice discovery.k8s.io/v1", "endpoints: 7", "endpoints:", "7", list),
        ("ConfigMap v1", "data: {a: 7}", "data.a:", "7", text),
    ] {
        let said = told(kind, fields);
        let wanted = format!("{field} it is {found}; {wanted}");
        assert!(said.contains(&wanted), "{said}\nshould say\n{wanted}");
    }
}
