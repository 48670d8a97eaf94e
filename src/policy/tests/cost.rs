//! What deciding and changing cost, counted: policies looked at, and nodes of maps visited.

use super::*;
use crate::mesh::work;

/// Policies over pods of `shop` by their label `app`, as many of other namespaces, and a few over everything.
fn policies(count: usize) -> Policies {
    let over = |app: &str| json!({ "selector": { "matchLabels": { "tier": "front", "app": app } } });
    let mut all = vec![
        authorization("shop", "cart", over("cart")),
        authorization(
            "shop",
            "all",
            json!({ "action": "DENY", "rules": [{ "to": [{ "operation": { "ports": ["1"] } }] }] }),
        ),
        peer("selvedge-system", "mesh", json!({ "mtls": { "mode": "PERMISSIVE" } })),
        authorization("shop", "service", json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": "cart" }] })),
    ];
    for n in 0..count / 2 {
        all.push(authorization("shop", &format!("p{n}"), over(&format!("app-{n}"))));
        all.push(authorization(&format!("ns-{n}"), "p", json!({})));
    }
    store(&all)
}

fn cart() -> Workload {
    workload_of("shop", "cart", &[("app", "cart"), ("tier", "front"), ("version", "v1")])
}

#[test]
fn a_decision_looks_at_what_stands_over_the_destination_and_at_nothing_else() {
    let (few, many) = (policies(10), policies(4_000));
    let (workload, case) = (cart(), from("shop/web@10.0.0.1").by("shop/cart"));
    let cost = |policies: &Policies| {
        let first = work::of(|| policies.decide(&case.query(&workload)));
        let later = work::of(|| policies.decide(&case.query(&workload)));
        (first, later)
    };
    let ((first, later), (first_of_many, later_of_many)) = (cost(&few), cost(&many));
    // Four hundred times the policies: a node or two more in each map that is looked into.
    assert!(first_of_many <= first + 64, "the first costs {first_of_many} instead of {first}");
    assert!(later_of_many <= later + 16, "a later one costs {later_of_many} instead of {later}");
    assert_eq!(few.decide(&case.query(&workload)), many.decide(&case.query(&workload)));
    // So of requests.
    let ask = super::requests::Ask::get("/a");
    let read = Case { requests: true, ..case.clone() };
    let later = |policies: &Policies| work::of(|| policies.decide_request(&read.query(&workload), &ask.head()));
    let (few, many) = (later(&few), later(&many));
    assert!(many <= few + 16, "a request costs {many} instead of {few}");
}

#[test]
fn a_changed_policy_costs_what_it_stands_over() {
    let (few, many) = (policies(200), policies(4_000));
    let spec = json!({ "selector": { "matchLabels": { "tier": "front", "app": "app-7" } }, "action": "DENY" });
    let changed = authorization("shop", "p7", spec);
    let cost = |policies: &Policies| {
        let mut next = policies.clone();
        work::of(|| next.apply(Delta::Apply(read(&changed))))
    };
    let (few, many) = (cost(&few), cost(&many));
    assert!(many <= few * 3 + 256, "{many} instead of {few}");
}

#[test]
fn a_changed_policy_leaves_what_stands_over_other_namespaces_known() {
    let mut policies = policies(10);
    let (workload, case) = (cart(), from("10.0.0.1"));
    let decide = |policies: &Policies| work::of(|| policies.decide(&case.query(&workload)));
    decide(&policies);
    let known = decide(&policies);
    policies.apply(Delta::Apply(read(&authorization("elsewhere", "p", json!({})))));
    // Less than the fewest steps that working it out anew takes; where hashes meet, a look-up is a step longer.
    assert!(decide(&policies) <= known + 3);
    policies.apply(Delta::Apply(read(&authorization("shop", "p", json!({})))));
    assert!(decide(&policies) > known + 3);
    assert!(!case.allowed(&[authorization("shop", "p", json!({}))]));
}

#[test]
fn clones_that_went_apart_do_not_take_each_others_policies() {
    let before = policies(10);
    let (workload, case) = (cart(), from("10.0.0.1"));
    let (mut one, mut other) = (before.clone(), before.clone());
    one.apply(Delta::Apply(read(&authorization("shop", "p", json!({ "action": "DENY", "rules": [{}] })))));
    other.apply(Delta::Apply(read(&authorization("shop", "p", json!({ "action": "ALLOW", "rules": [{}] })))));
    for _ in 0..2 {
        let verdicts = [&before, &one, &other].map(|policies| policies.decide(&case.query(&workload)).verdict);
        assert_eq!(verdicts, [Verdict::Deny, Verdict::Deny, Verdict::Allow]);
    }
}
