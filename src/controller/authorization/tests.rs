use k8s_openapi::api::authentication::v1::UserInfo;
use proptest::prelude::*;

use super::*;
use crate::mutation::mutated_text;

fn rules() -> AgentRules {
    AgentRules {
        namespace: "selvedge-system".to_owned(),
        service_account: "selvedge-agent".to_owned(),
        daemon_set: "selvedge-agent".to_owned(),
        audience: "selvedge-ca".to_owned(),
        trust_domain: "cluster.local".parse().unwrap(),
    }
}

fn review() -> TokenReviewStatus {
    let extra = [(NODE_NAME, "node-1"), (POD_NAME, "agent-1"), (POD_UID, "uid-1")];
    TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(vec!["selvedge-ca".to_owned()]),
        user: Some(UserInfo {
            username: Some("system:serviceaccount:selvedge-system:selvedge-agent".to_owned()),
            extra: Some(extra.map(|(key, value)| (key.to_owned(), vec![value.to_owned()])).into()),
            ..UserInfo::default()
        }),
        error: None,
    }
}

fn bearer() -> Bearer {
    rules().bearer(&review()).unwrap()
}

fn agent() -> PodFacts {
    PodFacts {
        uid: "uid-1".into(),
        namespace: "selvedge-system".into(),
        name: "agent-1".into(),
        node: Some("node-1".into()),
        service_account: "selvedge-agent".into(),
        is_mirror: false,
        is_finished: false,
        daemon_set: Some("selvedge-agent".into()),
        gateway: None,
        is_ready: true,
    }
}

fn cart() -> PodFacts {
    PodFacts {
        uid: "uid-2".into(),
        namespace: "shop".into(),
        name: "cart-1".into(),
        service_account: "cart".into(),
        daemon_set: None,
        ..agent()
    }
}

fn identity() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
}

#[test]
fn an_agents_token_names_its_pod_and_node() {
    let wanted = Bearer {
        namespace: "selvedge-system".into(),
        service_account: "selvedge-agent".into(),
        role: Role::Agent,
        node: "node-1".into(),
        pod: "agent-1".into(),
        uid: "uid-1".into(),
    };
    assert_eq!(bearer(), wanted);
    assert_eq!(rules().check_bearer(&wanted, Some(&agent())), Ok(()));
}

#[test]
fn a_waypoint_gets_a_certificate_for_itself_alone() {
    let token = |account: &str| {
        let mut review = review();
        review.user.as_mut().unwrap().username = Some(format!("system:serviceaccount:shop:{account}"));
        rules().bearer(&review)
    };
    let pod = PodFacts {
        namespace: "shop".into(),
        service_account: "gw-selvedge-waypoint".into(),
        gateway: Some("gw".into()),
        daemon_set: None,
        ..agent()
    };
    let bearer = token("gw-selvedge-waypoint").unwrap();
    assert_eq!(bearer.role, Role::Waypoint);
    assert_eq!(rules().check_bearer(&bearer, Some(&pod)), Ok(()));
    let own = "spiffe://cluster.local/ns/shop/sa/gw-selvedge-waypoint".parse().unwrap();
    assert_eq!(rules().check_own(&bearer, &own), Ok(()));
    for other in ["ns/shop/sa/cart", "ns/infra/sa/gw-selvedge-waypoint", "ns/shop/sa/other-selvedge-waypoint"] {
        let identity = format!("spiffe://cluster.local/{other}").parse().unwrap();
        assert!(matches!(rules().check_own(&bearer, &identity), Err(Refusal::NotOwn { .. })), "{other}");
    }
    let changes: [fn(&mut PodFacts); 7] = [
        |pod| pod.uid = "uid-9".into(),
        |pod| pod.node = Some("node-2".into()),
        |pod| pod.gateway = None,
        |pod| pod.gateway = Some("other".into()),
        |pod| pod.service_account = "cart".into(),
        |pod| pod.is_finished = true,
        |pod| pod.is_mirror = true,
    ];
    for (index, change) in changes.into_iter().enumerate() {
        let mut changed = pod.clone();
        change(&mut changed);
        let refused = rules().check_bearer(&bearer, Some(&changed));
        assert!(matches!(refused, Err(Refusal::NotAWaypoint { .. })), "{index}: {refused:?}");
    }
    assert!(matches!(rules().check_bearer(&bearer, None), Err(Refusal::NotAWaypoint { .. })));
    assert!(matches!(token("cart"), Err(Refusal::NotTheAgent { .. })));
}

#[test]
fn a_token_that_is_not_genuine_is_refused() {
    let changes: [fn(&mut TokenReviewStatus); 6] = [
        |review| review.authenticated = Some(false),
        |review| review.authenticated = None,
        |review| review.error = Some("expired".to_owned()),
        |review| review.audiences = None,
        |review| review.audiences = Some(vec!["istio-ca".to_owned()]),
        |review| review.user = None,
    ];
    for change in changes {
        let mut review = review();
        change(&mut review);
        assert!(matches!(rules().bearer(&review), Err(Refusal::BadToken(_))), "{review:?}");
    }
}

#[test]
fn a_token_of_anybody_else_is_refused() {
    for name in
        ["system:serviceaccount:shop:selvedge-agent", "system:serviceaccount:selvedge-system:default", "admin", ""]
    {
        let mut review = review();
        review.user.as_mut().unwrap().username = Some(name.to_owned());
        assert!(matches!(rules().bearer(&review), Err(Refusal::NotTheAgent { .. })), "{name}");
    }
}

#[test]
fn a_token_that_is_bound_to_no_pod_or_node_is_refused() {
    for key in [NODE_NAME, POD_NAME, POD_UID] {
        for values in [None, Some(vec![]), Some(vec![String::new()]), Some(vec!["a".to_owned(), "b".to_owned()])] {
            let mut review = review();
            let extra = review.user.as_mut().unwrap().extra.as_mut().unwrap();
            extra.remove(key);
            extra.extend(values.map(|values| (key.to_owned(), values)));
            assert_eq!(rules().bearer(&review), Err(Refusal::Unbound(key)));
        }
    }
}

#[test]
fn a_pod_that_is_no_agent_on_that_node_is_refused() {
    let changes: [fn(&mut PodFacts); 6] = [
        |pod| pod.uid = "uid-9".into(),
        |pod| pod.node = Some("node-2".into()),
        |pod| pod.node = None,
        |pod| pod.service_account = "default".into(),
        |pod| pod.daemon_set = None,
        |pod| pod.daemon_set = Some("other".into()),
    ];
    for change in changes {
        let mut pod = agent();
        change(&mut pod);
        let refusal = rules().check_bearer(&bearer(), Some(&pod)).unwrap_err();
        assert!(matches!(refusal, Refusal::NotAnAgentPod { .. }) && refusal.may_be_news(), "{pod:?}");
    }
    assert!(rules().check_bearer(&bearer(), None).unwrap_err().may_be_news());
}

#[test]
fn an_identity_of_a_pod_on_the_node_is_signed_for() {
    assert_eq!(rules().check_identity(&bearer(), &identity(), [&agent(), &cart()]), Ok(()));
}

#[test]
fn an_identity_that_no_live_pod_of_the_node_runs_as_is_refused() {
    let changes: [fn(&mut PodFacts); 6] = [
        |pod| pod.node = Some("node-2".into()),
        |pod| pod.node = None,
        |pod| pod.is_mirror = true,
        |pod| pod.is_finished = true,
        |pod| pod.namespace = "other".into(),
        |pod| pod.service_account = "".into(),
    ];
    for change in changes {
        let mut pod = cart();
        change(&mut pod);
        let refusal = rules().check_identity(&bearer(), &identity(), [&pod, &agent()]).unwrap_err();
        assert!(matches!(refusal, Refusal::NotOnNode { .. }) && refusal.may_be_news(), "{pod:?}");
    }
}

#[test]
fn an_empty_service_account_is_nobody() {
    let refusal = rules().identity(Some("spiffe://cluster.local/ns/shop/sa/")).unwrap_err();
    assert!(matches!(refusal, Refusal::BadIdentity(_)));
    assert_eq!(rules().identity(None), Err(Refusal::NoIdentity));
    let refusal = rules().identity(Some("spiffe://elsewhere/ns/shop/sa/cart")).unwrap_err();
    assert!(matches!(refusal, Refusal::OtherTrustDomain { .. }));
}

proptest! {
    /// Whatever pods there are: what is signed for, some live pod of that node runs as, and nothing else.
    #[test]
    fn nothing_is_signed_for_without_a_pod_that_proves_it(
        pods in prop::collection::vec(any_pod(), 0..6),
        node in "node-[12]",
        namespace in "(shop|other)",
        account in "(cart|till)",
    ) {
        let bearer = Bearer { node: node.as_str().into(), ..bearer() };
        let identity: Identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().unwrap();
        let proof = pods.iter().any(|pod| {
            pod.node.as_deref() == Some(&*node)
                && !pod.is_mirror
                && !pod.is_finished
                && *pod.namespace == *namespace
                && *pod.service_account == *account
        });
        prop_assert_eq!(rules().check_identity(&bearer, &identity, &pods).is_ok(), proof);
    }

    #[test]
    fn what_is_asked_for_in_odd_letters_is_refused_or_says_what_it_means(
        text in mutated_text(&["spiffe://cluster.local/ns/shop/sa/cart"]),
    ) {
        if let Ok(identity) = rules().identity(Some(&text)) {
            prop_assert_eq!(identity.to_string(), text);
        }
    }
}

fn any_pod() -> impl Strategy<Value = PodFacts> {
    let node = prop_oneof![Just(None), "node-[12]".prop_map(|node| Some(node.as_str().into()))];
    (node, "(shop|other)", "(|cart|till)", any::<bool>(), any::<bool>()).prop_map(
        |(node, namespace, account, is_mirror, is_finished)| PodFacts {
            node,
            namespace: namespace.as_str().into(),
            service_account: account.as_str().into(),
            is_mirror,
            is_finished,
            ..cart()
        },
    )
}
