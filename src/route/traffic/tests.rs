use http::StatusCode;
use serde_json::{Value, json};

use super::status::conditions;
use super::*;
use crate::route::resilience::Abort;
use crate::route::tests::route_of;
use crate::route::{DecodeError, GrpcStatus, Route, RouteKind};

/// `spec` beside what it is about: the Service `cart`.
fn about_cart(name: &str, age: i64, mut spec: Value) -> TrafficPolicy {
    spec["targetRefs"] = json!([{"kind": "Service", "name": "cart"}]);
    read(name, age, spec).unwrap()
}

fn read(name: &str, age: i64, spec: Value) -> Result<TrafficPolicy, DecodeError> {
    let value = json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec});
    decode(TrafficKind::Traffic, &value).map(|policy| TrafficPolicy { created: Some(age), ..policy })
}

fn table(policies: &[&TrafficPolicy]) -> Table {
    let mut table = Table::default();
    policies.iter().for_each(|policy| drop(table.apply(Delta::Apply(Arc::new((*policy).clone())))));
    table
}

fn cart() -> NamespacedName {
    NamespacedName::new("shop", "cart")
}

fn route(rule: Value) -> Route {
    route_of(RouteKind::Http, "canary", json!({"name": "cart"}), json!([rule]))
}

#[test]
fn every_field_is_read() {
    let policy = about_cart(
        "all",
        1,
        json!({
            "timeouts": {"request": "10s", "backendRequest": "0s"},
            "retry": {"attempts": 3, "backoff": "100ms", "codes": [503], "grpcCodes": ["UNAVAILABLE"]},
            "retryConstraint": {"budget": {"percent": 30, "interval": "20s"}, "minRetryRate": {"count": 5}},
            "sessionPersistence": {"sessionName": "s", "type": "Cookie"},
            "faultInjection": {
                "headers": [{"name": "x-chaos", "value": "yes"}],
                "delay": {"fixedDelay": "1s", "percent": 50},
                "abort": {"grpcStatus": "DATA_LOSS", "fraction": {"numerator": 1, "denominator": 1000}},
            },
            "rateLimits": [
                {"requests": 10, "interval": "1m"},
                {"requests": 5, "burst": 1, "by": "Header", "header": "x-tenant"},
                {"requests": 1, "by": "Identity"},
            ],
            "circuitBreaker": {"maxConnections": 1, "maxPendingRequests": 2, "maxRequests": 3},
            "outlierDetection": {
                "consecutive5xxErrors": 7, "interval": "1s", "baseEjectionTime": "5s", "maxEjectionPercent": 50,
                "successRateStdevFactor": 1900, "successRateRequestVolume": 10,
            },
            "loadBalancer": {
                "consistentHash": {"httpCookie": {"name": "c", "path": "/", "ttl": "1h"}},
                "trafficDistribution": "PreferSameZone",
                "warmup": {"duration": "30s", "minimumPercent": 20},
            },
        }),
    );
    assert_eq!(policy.notes, []);
    assert_eq!(policy.fields.names().count(), 10);
    let fields = policy.fields;
    assert_eq!(fields.retry.unwrap().grpc_codes, [14]);
    let budget = fields.retry_constraint.unwrap();
    assert_eq!((budget.percent, budget.free, budget.free_interval.as_secs()), (30, 5, 1));
    let fault = fields.fault.unwrap();
    assert_eq!(fault.abort.unwrap().0, Abort::Grpc(GrpcStatus::DataLoss));
    let limits = fields.rate_limits.unwrap();
    assert_eq!((limits[0].rate.burst, limits[1].rate.burst, limits[2].by.clone()), (10, 1, RateBy::Identity));
    assert_eq!(fields.breaker.unwrap().pending, Some(2));
    assert_eq!(fields.outliers.unwrap().success_rate_deviation, 1900);
    let balance = fields.balance.unwrap();
    assert!(matches!(balance.way, Way::Hash(HashOn::Cookie { .. })));
    assert_eq!(balance.warmup.unwrap().least, 20);
}

#[test]
fn what_cannot_be_read_is_named_and_the_rest_holds() {
    for (field, written, at) in [
        ("timeouts", json!({"request": "soon"}), "spec.timeouts.request"),
        ("timeouts", json!([]), "spec.timeouts"),
        ("retry", json!({"codes": [200]}), "spec.retry.codes[0]"),
        ("retry", json!({"grpcCodes": ["OK"]}), "spec.retry.grpcCodes[0]"),
        ("retry", json!({"atempts": 1}), "spec.retry.atempts"),
        ("retryConstraint", json!({"budget": {"percent": 101}}), "spec.retryConstraint.budget.percent"),
        ("sessionPersistence", json!({"type": "Token"}), "spec.sessionPersistence.type"),
        ("faultInjection", json!({}), "spec.faultInjection"),
        ("faultInjection", json!({"abort": {}}), "spec.faultInjection.abort"),
        ("faultInjection", json!({"abort": {"httpStatus": 99}}), "spec.faultInjection.abort.httpStatus"),
        ("faultInjection", json!({"delay": {"percent": 1}}), "spec.faultInjection.delay.fixedDelay"),
        ("faultInjection", json!({"delay": {"fixedDelay": "1s", "percent": 101}}), "spec.faultInjection.delay"),
        ("rateLimits", json!([]), "spec.rateLimits"),
        ("rateLimits", json!([{"interval": "1s"}]), "spec.rateLimits[0].requests"),
        ("rateLimits", json!([{"requests": 1, "interval": "0s"}]), "spec.rateLimits[0].interval"),
        ("rateLimits", json!([{"requests": 1, "by": "Header"}]), "spec.rateLimits[0].header"),
        ("rateLimits", json!([{"requests": 1, "by": "Moon"}]), "spec.rateLimits[0].by"),
        ("circuitBreaker", json!({}), "spec.circuitBreaker"),
        ("outlierDetection", json!({"maxEjectionPercent": 101}), "spec.outlierDetection.maxEjectionPercent"),
        ("loadBalancer", json!({"simple": "BEST"}), "spec.loadBalancer.simple"),
        ("loadBalancer", json!({"simple": "RANDOM", "consistentHash": {"useSourceIp": true}}), "spec.loadBalancer"),
        ("loadBalancer", json!({"consistentHash": {}}), "spec.loadBalancer.consistentHash"),
        ("loadBalancer", json!({"trafficDistribution": "Near"}), "spec.loadBalancer.trafficDistribution"),
        ("moon", json!(1), "spec.moon"),
    ] {
        let mut spec = json!({"outlierDetection": {"consecutive5xxErrors": 1}, "timeouts": {"request": "1s"}});
        spec[field] = written.clone();
        let policy = about_cart("one", 1, spec);
        assert_eq!(policy.notes.iter().map(|note| note.field.as_str()).collect::<Vec<_>>(), [at], "{field}: {written}");
        assert!(policy.fields.names().count() >= 1, "{field}: {written}");
    }
}

#[test]
fn what_a_policy_is_about_must_be_known_and_in_its_namespace() {
    let http = "gateway.networking.k8s.io";
    for (target, wanted) in [
        (json!({"kind": "Service", "name": "cart"}), Ok("Service shop/cart")),
        (json!({"group": "core", "kind": "Service", "name": "cart"}), Ok("Service shop/cart")),
        (json!({"group": http, "kind": "HTTPRoute", "name": "r"}), Ok("HTTPRoute shop/r")),
        (
            json!({"group": http, "kind": "GRPCRoute", "name": "r", "sectionName": "x"}),
            Ok("rule x of GRPCRoute shop/r"),
        ),
        (json!({"kind": "HTTPRoute", "name": "r"}), Err("spec.targetRefs[0].kind")),
        (json!({"kind": "Gateway", "name": "r", "group": http}), Err("spec.targetRefs[0].kind")),
        (json!({"kind": "Service", "name": "cart", "sectionName": "http"}), Err("spec.targetRefs[0].sectionName")),
        (json!({"kind": "Service", "name": "cart", "namespace": "web"}), Err("spec.targetRefs[0].namespace")),
        (json!({"kind": "Service"}), Err("spec.targetRefs[0].name")),
    ] {
        let policy = read("one", 1, json!({"targetRefs": [target], "retry": {}})).unwrap();
        let found = policy.targets.first().map(|found| found.target.to_string());
        let found = found.ok_or_else(|| policy.notes[0].field.clone());
        assert_eq!(found.as_deref().map_err(String::as_str), wanted, "{target}");
    }
    assert_eq!(read("one", 1, json!({"retry": {}})).unwrap_err().field, "spec.targetRefs");
    assert!(read("one", 1, json!({"targetRefs": "cart"})).is_err());
}

#[test]
fn the_gateway_apis_own_kind_says_two_things() {
    let value = json!({"metadata": {"namespace": "shop", "name": "x"}, "spec": {
        "targetRefs": [{"group": "", "kind": "Service", "name": "cart"}],
        "retryConstraint": {"budget": {"percent": 10}}, "sessionPersistence": {}, "retry": {"attempts": 1},
    }});
    let policy = decode(TrafficKind::Backend, &value).unwrap();
    assert_eq!(policy.fields.names().collect::<Vec<_>>(), ["retryConstraint", "sessionPersistence"]);
    assert_eq!(policy.notes[0].field, "spec.retry");
}

#[test]
fn each_field_comes_from_the_nearest_that_says_it() {
    let http = "gateway.networking.k8s.io";
    let on = |name: &str, target: Value, spec: Value| {
        let mut spec = spec;
        spec["targetRefs"] = json!([target]);
        read(name, 1, spec).unwrap()
    };
    let on_rule = on(
        "rule",
        json!({"group": http, "kind": "HTTPRoute", "name": "canary", "sectionName": "one"}),
        json!({"timeouts": {"request": "1s", "backendRequest": "1s"}, "retry": {"attempts": 1}}),
    );
    let on_route = on(
        "route",
        json!({"group": http, "kind": "HTTPRoute", "name": "canary"}),
        json!({"retry": {"attempts": 2}, "faultInjection": {"delay": {"fixedDelay": "2s"}},
            "circuitBreaker": {"maxRequests": 2}}),
    );
    assert_eq!(on_route.notes[0].field, "spec.circuitBreaker");
    let on_service = about_cart(
        "service",
        1,
        json!({"retry": {"attempts": 3}, "faultInjection": {"delay": {"fixedDelay": "3s"}},
            "circuitBreaker": {"maxRequests": 3}}),
    );
    let table = table(&[&on_rule, &on_route, &on_service]);
    let route = route(json!({"name": "one", "timeouts": {"request": "0s"}}));
    let reference = route.reference();
    let found = table.in_force(Some((&reference, &route.rules[0])), &cart());
    assert_eq!(found.timeouts().request, None, "the rule says that there is none");
    assert_eq!(found.timeouts().backend_request, Some(Duration::from_secs(1)));
    assert_eq!(found.retry.as_ref().unwrap().attempts, Some(1));
    assert_eq!(found.fault.as_ref().unwrap().delay.unwrap().0.as_secs(), 2);
    assert_eq!(found.breaker.unwrap().requests, Some(3));
    let sources = table.sources(Some((&reference, &route.rules[0])), &cart());
    let words: Vec<_> = sources
        .iter()
        .map(|(field, from)| format!("{field} {}", from.as_ref().map_or("itself", |from| &from.name.name)))
        .collect();
    assert_eq!(
        words,
        [
            "timeouts.request itself",
            "timeouts.backendRequest rule",
            "retry rule",
            "faultInjection route",
            "circuitBreaker service",
        ]
    );
    let elsewhere = table.in_force(None, &NamespacedName::new("shop", "other"));
    assert_eq!(elsewhere.names().count(), 0);
    assert_eq!(table.of_service(&cart()).retry.as_ref().unwrap().attempts, Some(3));
}

#[test]
fn at_one_level_the_oldest_wins_and_the_other_is_told_so() {
    let old = about_cart("b", 1, json!({"retry": {"attempts": 1}}));
    let young = about_cart("a", 2, json!({"retry": {"attempts": 2}, "timeouts": {"request": "5s"}}));
    let loser = about_cart("c", 3, json!({"retry": {"attempts": 3}}));
    for order in [[&old, &young, &loser], [&loser, &young, &old]] {
        let table = table(&order);
        let found = table.of_service(&cart());
        assert_eq!(found.retry.as_ref().unwrap().attempts, Some(1));
        assert_eq!(found.timeouts().request, Some(Duration::from_secs(5)), "what nobody older says holds");
        let told = |policy: &TrafficPolicy| {
            let told = conditions(policy, &table, |_| Ok(()));
            told.into_iter().map(|one| format!("{}={}/{}", one.kind, one.is_true, one.reason)).collect::<Vec<_>>()
        };
        assert_eq!(told(&old), ["Accepted=true/Accepted", "Enforced=true/Enforced"]);
        assert_eq!(told(&young), ["Accepted=true/Accepted", "Enforced=false/Conflicted"]);
        assert_eq!(told(&loser), ["Accepted=false/Conflicted", "Enforced=false/Conflicted"]);
    }
    let mut table = table(&[&old, &young]);
    table.apply(Delta::Delete(old.name));
    assert_eq!(table.of_service(&cart()).retry.as_ref().unwrap().attempts, Some(2));
    table.apply(Delta::Delete(young.name));
    assert!(table.by_target_is_empty());
}

#[test]
fn a_policy_about_nothing_that_is_there_is_not_accepted() {
    let policy = about_cart("one", 1, json!({"retry": {"codes": [503]}}));
    let table = table(&[&policy]);
    let told = conditions(&policy, &table, |target| Err(("TargetNotFound", format!("There is no {target}."))));
    assert_eq!((told[0].is_true, told[0].reason, told[1].reason), (false, "TargetNotFound", "TargetNotFound"));
    let nothing = about_cart("two", 1, json!({"retry": {"codes": [1]}}));
    let told = conditions(&nothing, &table, |_| Ok(()));
    assert_eq!((told[0].is_true, told[0].reason), (false, "Invalid"));
    assert_eq!(StatusCode::SERVICE_UNAVAILABLE, policy.fields.retry.unwrap().codes[0]);
}
