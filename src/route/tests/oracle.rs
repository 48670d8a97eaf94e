//! The index against a reader of rules one by one.

use proptest::prelude::*;
use proptest::sample::select;

use super::super::head::Head;
use super::super::index::{Entry, RuleSet};
use super::*;

/// What every rule says, looked at in turn.
fn naive(routes: &[Arc<Route>], head: &Parts) -> Option<(String, usize)> {
    let entries = routes.iter().flat_map(|route| {
        let rules = route.rules.iter().enumerate();
        rules.flat_map(move |(rule, written)| {
            (0..written.matches.len()).map(move |at| Entry::new(route.clone(), rule, at))
        })
    });
    let head = Head::new(head);
    let best = entries.filter(|entry| entry.takes(&head)).min()?;
    Some((best.route().name.name.to_string(), best.rule().index))
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(select(vec!["a", "b", "ab", "", "c%2Fd"]), 0..4)
        .prop_map(|parts| format!("/{}", parts.join("/")))
}

fn http_match() -> impl Strategy<Value = Value> {
    let kind = select(vec!["Exact", "PathPrefix", "PathPrefix", "RegularExpression"]);
    let end = select(vec!["", "", "/.*", "*", "?", "(a|b)", "|/b", "+/[ab]*", "/(/a|.)b?"]);
    let pair = || (select(vec!["x", "y", "z"]), select(vec!["1", "2"]), select(vec!["Exact", "RegularExpression"]));
    let pairs = || prop::collection::vec(pair(), 0..3);
    let named = |pairs: Vec<(&str, &str, &str)>| -> Vec<Value> {
        pairs.iter().map(|(name, value, kind)| json!({"name": name, "value": value, "type": kind})).collect()
    };
    let method = prop::option::weighted(0.3, select(vec!["GET", "POST"]));
    (kind, (path(), end), method, pairs(), pairs()).prop_map(move |(kind, (path, end), method, headers, query)| {
        let end = if kind == "RegularExpression" { end } else { "" };
        json!({
            "path": {"type": kind, "value": format!("{path}{end}")},
            "method": method,
            "headers": named(headers),
            "queryParams": named(query),
        })
    })
}

fn grpc_match() -> impl Strategy<Value = Value> {
    let part = || prop::option::of(select(vec!["a", "b", "ab"]));
    let kind = select(vec!["Exact", "Exact", "RegularExpression"]);
    let header = prop::option::of(select(vec!["1", "2"]));
    (kind, part(), part(), header).prop_map(|(kind, service, method, header)| {
        let headers: Vec<_> = header.iter().map(|value| json!({"name": "x", "value": value})).collect();
        json!({"method": {"type": kind, "service": service, "method": method}, "headers": headers})
    })
}

fn routes(kind: RouteKind, one: impl Strategy<Value = Value> + 'static) -> impl Strategy<Value = Vec<Arc<Route>>> {
    let rule = prop::collection::vec(one, 1..4).prop_map(|matches| json!({"matches": matches}));
    let route = (prop::collection::vec(rule, 1..4), prop::option::of(0i64..3));
    prop::collection::vec(route, 0..6).prop_map(move |written| {
        let read = |(n, (rules, created)): (usize, (Vec<Value>, Option<i64>))| {
            let route = route_of(kind, &format!("r{n}"), json!({"name": "cart"}), json!(rules));
            assert_eq!(route.notes, []);
            Arc::new(Route { created, ..route })
        };
        written.into_iter().enumerate().map(read).collect()
    })
}

fn head() -> impl Strategy<Value = Parts> {
    let pairs = || prop::collection::vec((select(vec!["x", "y", "z"]), select(vec!["1", "2", "3"])), 0..3);
    (select(vec!["GET", "POST"]), path(), pairs(), pairs()).prop_map(|(method, path, headers, query)| {
        let query: Vec<_> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let headers: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        request(
            &format!("{method} {path}?{}", query.join("&")),
            &headers.iter().map(String::as_str).collect::<Vec<_>>(),
        )
    })
}

/// Added all, then some taken away again.
fn index(routes: &[Arc<Route>], gone: &[usize]) -> (RuleSet, Vec<Arc<Route>>) {
    let mut set = RuleSet::default();
    routes.iter().for_each(|route| set.add(route));
    let is_gone = |at: usize| gone.contains(&at);
    routes.iter().enumerate().filter(|(at, _)| is_gone(*at)).for_each(|(_, route)| set.remove(route));
    let left = routes.iter().enumerate().filter(|(at, _)| !is_gone(*at)).map(|(_, route)| route.clone()).collect();
    (set, left)
}

fn agrees(routes: &[Arc<Route>], gone: &[usize], heads: &[Parts]) -> Result<(), TestCaseError> {
    let (set, left) = index(routes, gone);
    for head in heads {
        let found = set.find(&Head::new(head)).map(|entry| (entry.route().name.name.to_string(), entry.rule().index));
        prop_assert_eq!(found, naive(&left, head), "{} {}", head.method, head.uri);
    }
    Ok(())
}

proptest! {
    #[test]
    fn the_index_finds_what_looking_at_every_http_rule_finds(
        routes in routes(RouteKind::Http, http_match()),
        gone in prop::collection::vec(0usize..6, 0..4),
        heads in prop::collection::vec(head(), 1..12),
    ) {
        agrees(&routes, &gone, &heads)?;
    }

    #[test]
    fn the_index_finds_what_looking_at_every_grpc_rule_finds(
        routes in routes(RouteKind::Grpc, grpc_match()),
        gone in prop::collection::vec(0usize..6, 0..4),
        heads in prop::collection::vec(head(), 1..12),
    ) {
        agrees(&routes, &gone, &heads)?;
    }

    #[test]
    fn the_order_of_arrival_does_not_matter(
        routes in routes(RouteKind::Http, http_match()),
        heads in prop::collection::vec(head(), 1..8),
    ) {
        let (forward, _) = index(&routes, &[]);
        let backward: Vec<_> = routes.iter().rev().cloned().collect();
        let (backward, _) = index(&backward, &[]);
        for head in &heads {
            let (one, other) = (forward.find(&Head::new(head)), backward.find(&Head::new(head)));
            prop_assert_eq!(one.map(Entry::matched), other.map(Entry::matched));
        }
    }
}
