//! Properties over random policies and connections, against an evaluator that reads Istio's rules straight from JSON.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::requests::Ask;
use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn decide_and_explain_agree_with_the_oracle(policies in policies(), case in case()) {
        let cart = workload();
        let policies: Vec<Value> = number(policies);
        let store = store(&policies);
        let query = case.query(&cart);
        let expected = oracle(&policies, &case, None);
        let decision = store.decide(&query);
        prop_assert_eq!(decision.verdict == Verdict::Allow, expected, "{:?}", decision);
        prop_assert_eq!(decision.reason.is_some(), !expected);
        let explanation = store.explain(&query);
        prop_assert_eq!(explanation.verdict, decision.verdict);
        prop_assert_eq!(explanation.reason, decision.reason.as_ref().map(ToString::to_string));
        prop_assert_eq!(explanation.rule, decision.clause.as_ref().and_then(|clause| clause.rule));
        if let Some(clause) = &decision.clause {
            let told = explanation.policies.iter().find(|told| format!("{} {}", told.kind, told.policy) == clause.policy.to_string());
            let told = told.expect("the policy that decided is among those considered");
            prop_assert!(told.stands);
            prop_assert!(clause.rule.is_none() || told.rules.iter().any(|rule| rule.rule == clause.rule && rule.matched));
        }
        for told in explanation.policies.iter().filter(|told| told.matched && told.action == "DENY") {
            prop_assert!(told.stands && !expected);
        }
    }

    #[test]
    fn the_order_in_which_policies_came_does_not_matter(policies in policies(), case in case(), turn in 0usize..6) {
        let cart = workload();
        let policies = number(policies);
        let mut turned = policies.clone();
        turned.rotate_left(turn % policies.len().max(1));
        turned.reverse();
        let query = case.query(&cart);
        let mut late = store(&[]);
        for policy in &turned {
            late.decide(&query);
            late.apply(Delta::Apply(read(policy)));
        }
        prop_assert_eq!(store(&policies).decide(&query), late.decide(&query));
    }

    #[test]
    fn taking_a_policy_away_leaves_no_trace(policies in policies(), extra in policy(false), case in case()) {
        let cart = workload();
        let policies = number(policies);
        let query = case.query(&cart);
        let mut changed = store(&policies);
        let extra = read(&named(extra, "extra"));
        changed.apply(Delta::Apply(extra.clone()));
        changed.decide(&query);
        changed.apply(Delta::Delete(extra.reference()));
        prop_assert_eq!(changed.decide(&query), store(&policies).decide(&query));
        prop_assert_eq!(changed.problems().count(), 0);
    }

    #[test]
    fn a_field_that_cannot_be_enforced_never_widens(
        policies in policies(), which in any::<prop::sample::Index>(), place in any::<prop::sample::Index>(), case in case(),
        layer7 in any::<bool>(),
    ) {
        prop_assume!(!policies.is_empty());
        let before = number(policies);
        let mut after = before.clone();
        let changed = which.index(after.len());
        insert_unknown(&mut after[changed], place, layer7);
        let allowed = |policies: &[Value]| case.allowed(policies);
        prop_assert!(!allowed(&after) || allowed(&before), "{} became {}", before[changed], after[changed]);
        prop_assert!(layer7 || store(&after).problems().count() > 0);
    }

    #[test]
    fn requests_are_decided_as_the_oracle_does(
        policies in policies_of_requests(), case in case(), ask in ask(),
    ) {
        let cart = workload();
        let policies: Vec<Value> = number(policies);
        let store = store(&policies);
        let (read, unread) = (Case { requests: true, ..case.clone() }, case.clone());
        let decision = store.decide_request(&read.query(&cart), &ask.head());
        let allowed = decision.verdict == Verdict::Allow;
        prop_assert_eq!(allowed, oracle(&policies, &read, Some(&ask)), "{:?}", decision);
        let explanation = store.explain_request(&read.query(&cart), &ask.head());
        prop_assert_eq!(explanation.reason, decision.reason.as_ref().map(ToString::to_string));
        // What is thought of a connection holds for each of its requests.
        let connection = store.decide(&read.query(&cart)).verdict == Verdict::Allow;
        prop_assert!(connection || !allowed, "the connection is denied, and {:?} is not", ask);
        let unread = store.decide(&unread.query(&cart)).verdict == Verdict::Allow;
        prop_assert!(!unread || allowed, "without a look at requests all are let in, and {:?} is denied", ask);
        // Where nothing reads requests, all are as their connection.
        if store.reads(&read.query(&cart)) == Reads::Nothing {
            prop_assert_eq!((connection, unread), (allowed, allowed));
        }
    }

    #[test]
    fn a_malformed_policy_never_widens(policies in policies(), which in any::<prop::sample::Index>(), case in case()) {
        prop_assume!(!policies.is_empty());
        let before = number(policies);
        let mut after = before.clone();
        let changed = which.index(after.len());
        prop_assume!(after[changed]["spec"]["action"] != "AUDIT");
        let field = if after[changed]["kind"] == "PeerAuthentication" { "mtls" } else { "rules" };
        after[changed]["spec"][field] = json!(7);
        prop_assert!(!case.allowed(&after) || case.allowed(&before), "{}", after[changed]);
    }

    #[test]
    fn any_bytes_of_json_are_decoded_or_refused(text in "[\\{\\}\\[\\]\":,a-z0-9*/.]{0,60}") {
        let spec: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        for kind in ["AuthorizationPolicy", "PeerAuthentication"] {
            let policy = json!({ "kind": kind, "metadata": { "namespace": "shop", "name": "x" }, "spec": spec });
            from("10.0.0.1").decide(&[policy]);
        }
    }
}

/// Whether a connection to `shop/cart` is allowed, or a request of it.
fn oracle(policies: &[Value], case: &Case, ask: Option<&Ask>) -> bool {
    let over = |policy: &&Value| {
        let namespace = policy["metadata"]["namespace"].as_str().unwrap();
        let spec = &policy["spec"];
        if let Some(targets) = spec["targetRefs"].as_array() {
            return namespace == "shop"
                && targets.iter().any(|target| {
                    let name = NamespacedName::new(namespace, target["name"].as_str().unwrap());
                    case.services.contains(&name)
                });
        }
        let labelled = spec["selector"]["matchLabels"]
            .as_object()
            .is_none_or(|labels| labels.iter().all(|(key, value)| key == "app" && value == "cart"));
        (namespace == "shop" || namespace == ROOT_NAMESPACE) && labelled
    };
    let standing: Vec<&Value> = policies.iter().filter(over).collect();
    if strict(&standing, case.to.port()) && case.identity.is_none() {
        return false;
    }
    let authorization = standing.iter().filter(|policy| policy["kind"] == "AuthorizationPolicy");
    let authorization: Vec<_> =
        authorization.filter(|policy| policy["metadata"]["annotations"]["selvedge.dev/dry-run"] != "true").collect();
    let matches = |policy: &Value| {
        policy["spec"]["rules"].as_array().is_some_and(|rules| rules.iter().any(|rule| rule_matches(rule, case, ask)))
    };
    let action = |policy: &Value| policy["spec"]["action"].as_str().unwrap_or("ALLOW").to_owned();
    if authorization.iter().any(|policy| action(policy) == "DENY" && matches(policy)) {
        return false;
    }
    let allow: Vec<_> = authorization.iter().filter(|policy| action(policy) == "ALLOW").collect();
    allow.is_empty() || allow.iter().any(|policy| matches(policy))
}

fn strict(standing: &[&Value], port: u16) -> bool {
    for (root, labelled) in [(false, true), (false, false), (true, true), (true, false)] {
        let mut level: Vec<&&Value> = standing
            .iter()
            .filter(|policy| policy["kind"] == "PeerAuthentication")
            .filter(|policy| (policy["metadata"]["namespace"] == ROOT_NAMESPACE) == root)
            .filter(|policy| policy["spec"]["selector"]["matchLabels"].is_object() == labelled)
            .collect();
        level.sort_by_key(|policy| policy["metadata"]["name"].as_str());
        let Some(spec) = level.first().map(|policy| &policy["spec"]) else { continue };
        let by_port = &spec["portLevelMtls"][port.to_string()]["mode"];
        for mode in [by_port, &spec["mtls"]["mode"]] {
            match mode.as_str() {
                Some("STRICT") => return true,
                Some("PERMISSIVE") => return false,
                _ => {}
            }
        }
    }
    false
}

fn rule_matches(rule: &Value, case: &Case, ask: Option<&Ask>) -> bool {
    let one_of = |list: &Value, name: &str| {
        list.as_array().is_none_or(|entries| {
            entries.iter().any(|entry| {
                entry[name].as_object().unwrap().iter().all(|(key, list)| field_matches(key, list, case, ask))
            })
        })
    };
    let conditions = rule["when"].as_array().is_none_or(|conditions| {
        conditions.iter().all(|condition| {
            let key = condition["key"].as_str().unwrap();
            let any = |list: &Value| texts(list).iter().any(|value| value_matches(key, value, case, ask));
            (condition["values"].is_null() || any(&condition["values"]))
                && (condition["notValues"].is_null() || !any(&condition["notValues"]))
        })
    });
    one_of(&rule["from"], "source") && one_of(&rule["to"], "operation") && conditions
}

fn field_matches(key: &str, list: &Value, case: &Case, ask: Option<&Ask>) -> bool {
    let (key, wanted) = match key.strip_prefix("not") {
        Some(rest) => (rest[..1].to_lowercase() + &rest[1..], false),
        None => (key.to_owned(), true),
    };
    texts(list).iter().any(|value| value_matches(&key, value, case, ask)) == wanted
}

fn value_matches(key: &str, value: &str, case: &Case, ask: Option<&Ask>) -> bool {
    let like = |text: &str| match value {
        "*" => !text.is_empty(),
        _ if value.starts_with('*') => text.ends_with(&value[1..]),
        _ if value.ends_with('*') => text.starts_with(&value[..value.len() - 1]),
        _ => text == value,
    };
    let inside = |ip: IpAddr| match value.parse::<ipnet::IpNet>() {
        Ok(net) => net.contains(&ip.to_canonical()),
        Err(_) => value.parse::<IpAddr>().unwrap() == ip.to_canonical(),
    };
    let identity = case.identity.as_ref();
    match key {
        "principals" | "source.principal" => {
            identity.is_some_and(|id| like(id.to_string().strip_prefix("spiffe://").unwrap()))
        }
        "namespaces" | "source.namespace" => identity.is_some_and(|id| like(&id.namespace)),
        "serviceAccounts" => identity.is_some_and(|id| {
            let full = if value.contains('/') { value.to_owned() } else { format!("shop/{value}") };
            full == format!("{}/{}", id.namespace, id.service_account)
        }),
        "ipBlocks" | "source.ip" => inside(case.ip),
        "destination.ip" => inside(case.to.ip()),
        "ports" | "destination.port" => value == case.to.port().to_string(),
        _ => {
            let ask = ask.expect("a connection has no request");
            let claims = ask.principal.as_ref().map(|principal| &principal.claims);
            match key {
                "methods" => like(ask.method),
                "paths" => like(&ask.path),
                "hosts" => like(&ask.host) || ask.host.split_once(':').is_some_and(|(host, _)| like(host)),
                "remoteIpBlocks" | "remote.ip" => inside(case.ip),
                "requestPrincipals" | "request.auth.principal" => claims
                    .is_some_and(|c| like(&format!("{}/{}", c["iss"].as_str().unwrap(), c["sub"].as_str().unwrap()))),
                "request.auth.claims[groups]" => {
                    claims.is_some_and(|c| c["groups"].as_array().unwrap().iter().any(|g| like(g.as_str().unwrap())))
                }
                "request.headers[x-team]" => ask.headers.get("x-team").is_some_and(|team| like(team.to_str().unwrap())),
                _ => unreachable!("{key}"),
            }
        }
    }
}

fn texts(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|value| value.as_str().unwrap()).collect()
}

fn insert_unknown(policy: &mut Value, place: prop::sample::Index, layer7: bool) {
    let mut places = vec!["/spec".to_owned()];
    collect(&policy["spec"], "/spec", &mut places);
    let place = place.get(&places);
    let object = policy.pointer_mut(place).unwrap().as_object_mut().unwrap();
    let field = match () {
        () if layer7 && place.ends_with("/source") => "notRequestPrincipals",
        () if layer7 && place.ends_with("/operation") => "methods",
        () => "bogus",
    };
    object.insert(field.to_owned(), json!(["x"]));
}

fn collect(value: &Value, path: &str, places: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect(),
        _ => return,
    };
    for (key, child) in children {
        let path = format!("{path}/{key}");
        // Free keys: nothing in these two is unknown.
        if child.is_object() && key != "matchLabels" && key != "portLevelMtls" {
            places.push(path.clone());
        }
        collect(child, &path, places);
    }
}

pub fn number(policies: Vec<Value>) -> Vec<Value> {
    policies.into_iter().enumerate().map(|(index, policy)| named(policy, &format!("p{index}"))).collect()
}

fn named(mut policy: Value, name: &str) -> Value {
    policy["metadata"]["name"] = name.into();
    policy
}

fn case() -> impl Strategy<Value = Case> {
    let source = select(vec![
        "10.0.0.1",
        "11.0.0.1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "shop/web@10.0.0.1",
        "bank/web@10.0.0.2",
        "shop/cart@fd00::2",
    ]);
    let to = select(vec!["10.0.0.9:80", "10.0.0.9:8080", "[fd00::9]:80"]);
    let services = subsequence(vec!["shop/cart", "shop/web", "bank/cart"], 0..=3);
    (source, to, services).prop_map(|(source, to, services)| services.into_iter().fold(from(source).to(to), Case::by))
}

fn ask() -> impl Strategy<Value = Ask> {
    let token = select(vec![
        None,
        Some(json!({ "iss": "https://id", "sub": "ann", "groups": ["staff", "admin"] })),
        Some(json!({ "iss": "https://id", "sub": "ben", "groups": [] })),
    ]);
    (
        select(vec!["GET", "PUT", "DELETE"]),
        select(vec!["cart.shop", "cart.shop:80", "other"]),
        select(vec!["/", "/a", "/a/b", "/admin"]),
        select(vec![None, Some("a"), Some("bc")]),
        token,
    )
        .prop_map(|(method, host, path, team, token)| {
            let ask = Ask { method, host: host.into(), ..Ask::get(path) };
            let ask = team.into_iter().fold(ask, |ask, team| ask.with("x-team", team));
            token.into_iter().fold(ask, Ask::from)
        })
}

fn policies() -> impl Strategy<Value = Vec<Value>> {
    prop::collection::vec(policy(false), 0..6)
}

pub fn policies_of_requests() -> impl Strategy<Value = Vec<Value>> {
    prop::collection::vec(policy(true), 0..6)
}

/// `layer7`: whether it may speak of requests.
fn policy(layer7: bool) -> impl Strategy<Value = Value> {
    let namespace = select(vec!["shop", "shop", "shop", "bank", ROOT_NAMESPACE]);
    prop_oneof![
        4 => (namespace.clone(), authorization_spec(layer7), prop::bool::weighted(0.1)).prop_map(|(namespace, spec, dry)| {
            let mut policy = authorization(namespace, "p", spec);
            // Bare names of accounts are the policy's own namespace's; the oracle knows `shop` alone.
            if namespace != "shop" && policy.to_string().contains("erviceAccounts") {
                policy["metadata"]["namespace"] = "shop".into();
            }
            if dry {
                policy["metadata"]["annotations"] = json!({ "selvedge.dev/dry-run": "true" });
            }
            policy
        }),
        1 => (namespace, selector(), mode(), mode(), any::<bool>()).prop_map(|(namespace, selector, all, port, by_port)| {
            let mut spec = merged(selector, json!({ "mtls": { "mode": all } }));
            if by_port {
                spec["portLevelMtls"] = json!({ "80": { "mode": port } });
            }
            peer(namespace, "p", spec)
        }),
    ]
}

fn mode() -> impl Strategy<Value = &'static str> {
    select(vec!["STRICT", "PERMISSIVE", "UNSET"])
}

fn selector() -> impl Strategy<Value = Value> {
    select(vec![
        json!({}),
        json!({ "selector": { "matchLabels": { "app": "cart" } } }),
        json!({ "selector": { "matchLabels": { "app": "web" } } }),
    ])
}

fn authorization_spec(layer7: bool) -> impl Strategy<Value = Value> {
    let target = subsequence(vec!["cart", "web"], 1..=2).prop_map(|names| {
        let target = |name| json!({ "group": "", "kind": "Service", "name": name });
        json!({ "targetRefs": names.into_iter().map(target).collect::<Vec<_>>() })
    });
    let scope = prop_oneof![3 => selector(), 1 => target];
    let action = select(vec![
        json!({}),
        json!({ "action": "ALLOW" }),
        json!({ "action": "DENY" }),
        json!({ "action": "AUDIT" }),
    ]);
    (scope, action, prop::collection::vec(rule(layer7), 0..3))
        .prop_map(|(scope, action, rules)| merged(merged(scope, action), json!({ "rules": rules })))
}

fn rule(layer7: bool) -> impl Strategy<Value = Value> {
    let principals = values(&["cluster.local/ns/shop/sa/web", "cluster.local/ns/bank/*", "*/sa/cart", "*"]);
    let namespaces = values(&["shop", "ba*", "*op", "*"]);
    let accounts = values(&["web", "bank/web", "cart"]);
    let blocks = values(&["10.0.0.0/8", "10.0.0.1", "fd00::/16", "::/0", "0.0.0.0/0"]);
    let ports = values(&["80", "8080"]);
    let people = values(&["https://id/ann", "https://id/*", "*/ben", "*"]);
    let methods = values(&["GET", "P*", "*"]);
    let paths = values(&["/a", "/a*", "*/b", "*"]);
    let hosts = values(&["cart.shop", "cart.shop:80", "*.shop", "oth*"]);
    let mut source = vec![
        ("principals", principals.clone()),
        ("notPrincipals", principals.clone()),
        ("namespaces", namespaces.clone()),
        ("notNamespaces", namespaces.clone()),
        ("serviceAccounts", accounts.clone()),
        ("notServiceAccounts", accounts),
        ("ipBlocks", blocks.clone()),
        ("notIpBlocks", blocks.clone()),
    ];
    let mut operation = vec![("ports", ports.clone()), ("notPorts", ports.clone())];
    if layer7 {
        source.push(("requestPrincipals", people.clone()));
        source.push(("notRequestPrincipals", people.clone()));
        source.push(("remoteIpBlocks", blocks.clone()));
        for (field, not_field, list) in
            [("methods", "notMethods", &methods), ("paths", "notPaths", &paths), ("hosts", "notHosts", &hosts)]
        {
            operation.extend([(field, list.clone()), (not_field, list.clone())]);
        }
    }
    let (source, operation) = (fields(source), fields(operation));
    let condition = |key: &'static str, list: BoxedStrategy<Value>| {
        (list, select(vec!["values", "notValues"]))
            .prop_map(move |(list, field)| json!({ "key": key, field: list }))
            .boxed()
    };
    let when = prop_oneof![
        condition("source.ip", blocks.clone()),
        condition("source.namespace", namespaces),
        condition("source.principal", principals),
        condition("destination.ip", blocks),
        condition("destination.port", ports),
    ];
    let of_requests = prop_oneof![
        condition("request.headers[x-team]", values(&["a", "b*", "*"])),
        condition("request.auth.claims[groups]", values(&["admin", "st*"])),
        condition("request.auth.principal", people),
    ];
    let when = if layer7 { prop_oneof![when, of_requests].boxed() } else { when.boxed() };
    let from_ = list("from", source.prop_map(|source| json!({ "source": source })).boxed());
    let to_ = list("to", operation.prop_map(|operation| json!({ "operation": operation })).boxed());
    (from_, to_, list("when", when)).prop_map(|(from, to, when)| merged(merged(from, to), when))
}

fn list(name: &'static str, entry: BoxedStrategy<Value>) -> impl Strategy<Value = Value> {
    prop_oneof![Just(json!({})), prop::collection::vec(entry, 1..3).prop_map(move |entries| json!({ name: entries })),]
}

fn fields(all: Vec<(&'static str, BoxedStrategy<Value>)>) -> impl Strategy<Value = Value> {
    subsequence(all, 1..=2).prop_flat_map(|chosen| {
        let (names, lists): (Vec<_>, Vec<_>) = chosen.into_iter().unzip();
        lists.prop_map(move |lists| Value::Object(names.iter().map(|name| (*name).to_owned()).zip(lists).collect()))
    })
}

fn values(all: &[&'static str]) -> BoxedStrategy<Value> {
    subsequence(all.to_vec(), 1..=2).prop_map(|values| json!(values)).boxed()
}

fn merged(mut one: Value, other: Value) -> Value {
    one.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
    one
}
