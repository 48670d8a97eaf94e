use serde_json::json;

use super::*;
use crate::route::{Action, Backend, Filters, Place, Share, Timeouts};

fn http(rules: Value) -> Route {
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "r", "namespace": "shop"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "cart"}], "rules": rules},
    });
    decode(RouteKind::Http, &route).unwrap()
}

fn filter(filter: Value) -> (Action, Vec<String>) {
    let route = http(json!([{"filters": [filter], "backendRefs": [{"name": "a", "port": 80}]}]));
    (route.rules[0].action.clone(), told(&route))
}

fn told(route: &Route) -> Vec<String> {
    route.notes.iter().map(|note| format!("{}: {}", note.field, note.cause)).collect()
}

#[test]
fn parents_are_services_however_their_group_is_written() {
    let parents = json!([
        {"name": "gateway"},
        {"kind": "Service", "name": "no-core-group"},
        {"group": "", "kind": "Service", "name": "a"},
        {"group": "core", "kind": "Service", "name": "b", "port": 80},
        {"group": "", "kind": "Service", "name": "c", "namespace": "other", "sectionName": "http"},
        {"group": "", "kind": "Service", "name": "d", "port": 80, "sectionName": "http"},
    ]);
    let route = json!({"metadata": {"name": "r", "namespace": "shop"}, "spec": {"parentRefs": parents}});
    let route = decode(RouteKind::Http, &route).unwrap();
    let parents: Vec<_> = route.parents.iter().map(|p| (p.index, p.service.to_string(), p.port.clone())).collect();
    let wanted = [
        (2, "shop/a", ParentPort::All),
        (3, "shop/b", ParentPort::Number(80)),
        (4, "other/c", ParentPort::Name("http".into())),
        (5, "shop/d", ParentPort::Both(80, "http".into())),
    ];
    assert_eq!(parents, wanted.map(|(index, service, port)| (index, service.to_owned(), port)));
}

#[test]
fn of_a_route_of_gateways_nothing_more_is_read() {
    let route = json!({
        "metadata": {"name": "r"},
        "spec": {"parentRefs": [{"name": "gateway"}], "rules": [{"matches": [{"path": {"type": "Unheard"}}]}]},
    });
    let route = decode(RouteKind::Http, &route).unwrap();
    assert_eq!((route.rules, route.notes), (Vec::new(), Vec::new()));
}

#[test]
fn what_is_left_out_is_as_the_gateway_api_documents_it() {
    let route = http(json!(null));
    assert_eq!(route.rules.len(), 1, "a route without rules takes every request");
    let route = http(json!([{"backendRefs": [{"name": "a", "port": 80}]}, {}]));
    assert_eq!(route.notes, []);
    let rule = &route.rules[0];
    assert_eq!(rule.matches[0].place, Place::Path(crate::route::PathMatch::Prefix(crate::route::Prefix::new("/"))));
    assert_eq!(rule.timeouts, Timeouts::default());
    let Action::Backends(backends) = &rule.action else { panic!("{:?}", rule.action) };
    let [Backend { weight: 1, to: Some(to), filters, .. }] = &backends[..] else { panic!("{backends:?}") };
    assert_eq!(*filters, Filters::NONE);
    assert_eq!((to.service.to_string(), to.port), ("shop/a".to_owned(), 80));
    assert_eq!(route.rules[1].action, Action::Parent);
    assert_eq!(route.created, None);
}

#[test]
fn a_rule_with_a_match_that_cannot_be_read_is_dropped_and_the_others_hold() {
    for (written, field) in [
        (json!({"path": {"type": "Unheard", "value": "/"}}), "path.type"),
        (json!({"path": {"type": "Exact", "value": "a"}}), "path.value"),
        (json!({"path": {"type": "RegularExpression", "value": "("}}), "path.value"),
        (json!({"method": "BREW"}), "method"),
        (json!({"headers": [{"name": "a b", "value": "x"}]}), "headers[0].name"),
        (json!({"headers": [{"name": "a"}]}), "headers[0]"),
        (json!({"headers": [{"type": "Prefix", "name": "a", "value": "x"}]}), "headers[0].type"),
        (json!({"queryParams": [{"type": "RegularExpression", "name": "a", "value": "["}]}), "queryParams[0].value"),
        (json!({"cookies": []}), "cookies"),
        (json!({"path": {"valeu": "/"}}), "path.valeu"),
    ] {
        let route = http(json!([{"matches": [{}, written]}, {"name": "other"}]));
        assert_eq!(route.rules.iter().map(|rule| rule.index).collect::<Vec<_>>(), [1], "{written}");
        let [note] = &route.notes[..] else { panic!("{written}: {:?}", route.notes) };
        assert_eq!((note.field.as_str(), note.why), (&*format!("spec.rules[0].matches[1].{field}"), Why::Dropped(0)));
    }
}

#[test]
fn a_route_may_have_so_many_regular_expressions_and_no_more() {
    let header = |n: usize| json!({"name": format!("h{n}"), "value": "a.*", "type": "RegularExpression"});
    let rule = |headers: usize| json!({"matches": [{"headers": (0..headers).map(header).collect::<Vec<_>>()}]});
    let route = http(json!([rule(40), rule(25), rule(0)]));
    assert_eq!(route.rules.iter().map(|rule| rule.index).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(route.notes[0].field, "spec.rules[1].matches[0].headers[24].value");
    assert_eq!(http(json!([rule(40), rule(24)])).notes, []);
}

#[test]
fn a_filter_that_cannot_be_honoured_refuses() {
    for (written, field) in [
        (json!({"type": "ExternalAuth"}), "externalAuth"),
        (json!({"type": "ExtensionRef", "extensionRef": {"group": "a", "kind": "B", "name": "c"}}), "extensionRef"),
        (json!({"type": "Unheard"}), "type"),
        (json!({"type": "URLRewrite"}), "urlRewrite"),
        (json!({"type": "URLRewrite", "urlRewrite": {"hostname": "*.a"}}), "urlRewrite.hostname"),
        (
            json!({"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplaceFullPath", "replaceFullPath": "a"}}}),
            "urlRewrite.path",
        ),
        (json!({"type": "RequestRedirect", "requestRedirect": {"statusCode": 304}}), "requestRedirect.statusCode"),
        (json!({"type": "RequestRedirect", "requestRedirect": {"scheme": "ftp"}}), "requestRedirect.scheme"),
        (
            json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {"remove": ["Transfer-Encoding"]}}),
            "requestHeaderModifier",
        ),
        (
            json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {"add": [{"name": "host", "value": "a"}]}}),
            "requestHeaderModifier",
        ),
        (
            json!({"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "a", "port": 1}, "percent": 101}}),
            "requestMirror",
        ),
        (json!({"type": "CORS", "cors": {"allowOrigins": ["nowhere"]}}), "cors.allowOrigins"),
        (json!({"type": "CORS", "cors": {"allowOrigin": []}}), "cors.allowOrigin"),
    ] {
        let (action, told) = filter(written.clone());
        assert_eq!(action, Action::Refuse, "{written}");
        let [told] = &told[..] else { panic!("{written}: {told:?}") };
        assert!(told.starts_with(&format!("spec.rules[0].filters[0].{field}: ")), "{told}");
        assert!(told.contains("500"), "{told}");
    }
}

#[test]
fn filters_that_do_not_go_together_refuse() {
    let redirect = json!({"type": "RequestRedirect", "requestRedirect": {}});
    let rewrite = json!({"type": "URLRewrite", "urlRewrite": {"hostname": "a"}});
    let prefix = json!({
        "type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/a"}},
    });
    let exact = json!([{"path": {"type": "Exact", "value": "/a"}}]);
    for rule in [
        json!({"filters": [redirect, rewrite]}),
        json!({"filters": [rewrite, rewrite]}),
        json!({"filters": [redirect, redirect]}),
        json!({"filters": [prefix], "matches": exact}),
    ] {
        let route = http(json!([rule]));
        assert_eq!(route.rules[0].action, Action::Refuse, "{rule}");
        assert_eq!(route.notes[0].why, Why::Refused(0), "{rule}");
    }
}

#[test]
fn a_backend_that_cannot_be_used_is_refused_in_its_share() {
    for (backend, why) in [
        (json!({"name": "a"}), Why::Backend),
        (json!({"name": "a", "port": 0}), Why::Backend),
        (json!({"group": "x", "kind": "Y", "name": "a", "port": 80}), Why::InvalidKind),
        (json!({"name": "a", "port": 80, "filters": [{"type": "Unheard"}]}), Why::Backend),
        (
            json!({"name": "a", "port": 80, "filters": [{"type": "RequestRedirect", "requestRedirect": {}}]}),
            Why::Backend,
        ),
        (json!({"name": "a", "port": 80, "filters": [{"type": "CORS", "cors": {}}]}), Why::Backend),
    ] {
        let route = http(json!([{"backendRefs": [backend, {"name": "b", "port": 80, "weight": 3}]}]));
        let Action::Backends(backends) = &route.rules[0].action else { panic!("{backend}") };
        assert_eq!(backends.iter().map(|b| (b.to.is_some(), b.weight)).collect::<Vec<_>>(), [(false, 1), (true, 3)]);
        assert_eq!(route.notes.iter().map(|note| note.why).collect::<Vec<_>>(), [why], "{backend}");
    }
}

#[test]
fn a_mirror_to_no_service_is_dropped_and_said() {
    let (action, told) = filter(json!({
        "type": "RequestMirror", "requestMirror": {"backendRef": {"kind": "Bucket", "name": "a"}},
    }));
    assert!(matches!(action, Action::Backends(_)));
    assert!(told[0].starts_with("spec.rules[0].filters[0].requestMirror.backendRef.kind: "), "{told:?}");
}

#[test]
fn the_share_of_a_mirror_is_a_percentage_or_a_fraction() {
    for (said, numerator, denominator) in [
        (json!({}), 1, 1),
        (json!({"percent": 42}), 42, 100),
        (json!({"percent": 0}), 0, 100),
        (json!({"fraction": {"numerator": 5}}), 5, 100),
        (json!({"fraction": {"numerator": 5, "denominator": 1000}}), 5, 1000),
    ] {
        let mut mirror = json!({"backendRef": {"name": "a", "port": 80}});
        mirror.as_object_mut().unwrap().extend(said.as_object().unwrap().clone());
        let route = http(json!([{"filters": [{"type": "RequestMirror", "requestMirror": mirror}]}]));
        assert_eq!(route.rules[0].filters.mirrors[0].share, Share { numerator, denominator }, "{said}");
    }
}

#[test]
fn timeouts_retries_and_sessions_are_read_and_refused_by_field() {
    let route = http(json!([{
        "timeouts": {"request": "10s", "backendRequest": "0s"},
        "retry": {"attempts": 3, "backoff": "100ms", "codes": [500, 503]},
        "sessionPersistence": {"sessionName": "s", "type": "Header", "idleTimeout": "1h"},
    }]));
    assert_eq!(route.notes, []);
    let rule = &route.rules[0];
    assert_eq!(rule.timeouts.request.unwrap().as_secs(), 10);
    assert_eq!(rule.timeouts.backend_request, Some(std::time::Duration::ZERO), "0s is said, and no limit");
    assert_eq!(rule.retry.as_ref().unwrap().codes.len(), 2);
    assert_eq!(rule.session.as_ref().unwrap().kind, crate::route::SessionKind::Header);
    for (rule, field) in [
        (json!({"timeouts": {"request": "10"}}), "timeouts.request"),
        (json!({"retry": {"codes": [200]}}), "retry.codes[0]"),
        (json!({"retry": {"backoff": "soon"}}), "retry.backoff"),
        (json!({"sessionPersistence": {"type": "Token"}}), "sessionPersistence.type"),
        (json!({"backendRefs": [{"name": 7}]}), "backendRefs[0].name"),
    ] {
        let route = http(json!([rule]));
        assert_eq!(route.notes[0].field, format!("spec.rules[0].{field}"));
        assert_eq!((route.rules.len(), route.notes[0].why), (0, Why::Dropped(0)));
    }
}

#[test]
fn a_route_that_is_about_nobody_knows_what_is_refused() {
    for (spec, field) in [
        (json!({"parentRefs": [{"group": "", "kind": "Service", "name": "a", "port": 0}]}), "spec.parentRefs[0].port"),
        (
            json!({"parentRefs": [{"group": "", "kind": "Service", "name": "a", "port": 70_000}]}),
            "spec.parentRefs[0].port",
        ),
        (json!({"parentRefs": [{"group": "", "kind": "Service"}]}), "spec.parentRefs[0].name"),
        (json!({"parentRefs": "all"}), "spec.parentRefs"),
    ] {
        let error = decode(RouteKind::Http, &json!({"metadata": {"name": "r"}, "spec": spec})).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    }
}

#[test]
fn of_grpc_routes_services_and_methods_are_read() {
    let route = json!({
        "metadata": {"name": "r", "creationTimestamp": "1970-01-01T00:01:00Z"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "a"}],
            "rules": [
                {"matches": [{"method": {"service": "a.B", "method": "C"}, "headers": [{"name": "x", "value": "y"}]}]},
                {"matches": [{"method": {"type": "RegularExpression", "service": "a.*"}}]},
                {"filters": [{"type": "URLRewrite", "urlRewrite": {}}]},
            ],
        },
    });
    let route = decode(RouteKind::Grpc, &route).unwrap();
    assert_eq!((route.created, route.rules.len()), (Some(60), 3));
    assert_eq!(route.rules[2].action, Action::Refuse);
    assert_eq!(route.notes.len(), 1);
}

mod anything {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated_text;

    const ROUTE: &str = r#"{"metadata":{"name":"r","namespace":"s","creationTimestamp":"2026-01-01T00:00:00Z"},"spec":{
        "parentRefs":[{"group":"","kind":"Service","name":"a","port":80}],"rules":[{"name":"n","matches":[{"path":{"type":
        "PathPrefix","value":"/a"},"method":"GET","headers":[{"name":"a","value":"b"}],"queryParams":[{"name":"a","value":
        "b"}]}],"filters":[{"type":"CORS","cors":{"allowOrigins":["https://a"]}}],"backendRefs":[{"name":"a","port":80,
        "weight":1}],"timeouts":{"request":"1s"}}]}}"#;

    proptest! {
        #[test]
        fn whatever_is_written_is_read_or_refused(text in mutated_text(&[ROUTE])) {
            if let Ok(value) = serde_json::from_str(&text) {
                for kind in [RouteKind::Http, RouteKind::Grpc] {
                    if let Ok(route) = decode(kind, &value) {
                        let mut table = crate::route::Table::default();
                        table.apply(crate::route::Delta::Apply(Arc::new(route.clone())));
                        table.apply(crate::route::Delta::Delete(route.reference()));
                    }
                }
            }
        }
    }
}
