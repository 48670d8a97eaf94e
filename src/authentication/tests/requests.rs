use super::*;

struct Scene {
    signer: Signer,
    rules: Vec<Arc<Rule>>,
}

impl Scene {
    fn new(change: impl FnOnce(&mut Rule)) -> Self {
        let signer = Signer::edwards();
        let mut rule = rule(keys(&[signer.published(None)]));
        change(&mut rule);
        Self { signer, rules: vec![Arc::new(rule)] }
    }

    fn token(&self) -> String {
        self.signer.token(Algorithm::EdDsa, &claims())
    }

    fn ask(&self, head: &mut Parts) -> Result<Option<String>, Fault> {
        authenticate(&self.rules, head, NOW).map(|principal| principal.and_then(|principal| principal.name()))
    }
}

const ALICE: &str = "https://issuer.example/alice";

#[test]
fn a_request_without_a_token_passes_and_has_no_principal() {
    let scene = Scene::new(|_| {});
    for value in [None, Some("Basic YTpi"), Some("Bearer"), Some("Bearers abc"), Some("")] {
        let mut head = head("/", &value.map(|value| ("authorization", value)).into_iter().collect::<Vec<_>>());
        assert_eq!(scene.ask(&mut head), Ok(None), "{value:?}");
        assert_eq!(head.headers.contains_key("authorization"), value.is_some());
    }
    assert_eq!(
        authenticate(&[], &mut head("/", &[("authorization", "Bearer x")]), NOW),
        Ok(None),
        "where no rule stands"
    );
}

#[test]
fn a_bearer_token_is_found_however_its_scheme_is_written_and_then_is_gone() {
    let scene = Scene::new(|_| {});
    for scheme in ["Bearer ", "bearer ", "BEARER   ", "Bearer\t"] {
        let mut head = head("/", &[("authorization", &format!("{scheme}{}", scene.token())), ("x-other", "1")]);
        assert_eq!(scene.ask(&mut head), Ok(Some(ALICE.to_owned())), "{scheme:?}");
        assert!(!head.headers.contains_key("authorization") && head.headers.contains_key("x-other"));
    }
    let bad = scene.ask(&mut head("/", &[("authorization", "Bearer abc")]));
    assert!(matches!(bad, Err(Fault::Malformed(_))));
}

#[test]
fn a_token_that_is_forwarded_stays() {
    let scene = Scene::new(|rule| rule.forward = true);
    let value = format!("Bearer {}", scene.token());
    let mut head = head("/", &[("authorization", &value)]);
    assert_eq!(scene.ask(&mut head), Ok(Some(ALICE.to_owned())));
    assert_eq!(head.headers["authorization"], value);
}

#[test]
fn tokens_are_found_in_other_headers_and_parameters_and_nowhere_else() {
    let scene = Scene::new(|rule| {
        let header =
            |name: &'static str, prefix: &str| Place::Header(http::HeaderName::from_static(name), prefix.into());
        rule.places =
            vec![header("x-token", ""), header("x-scheme", "Token "), Place::Parameter("access token".into())];
    });
    let token = scene.token();
    for (target, headers) in [
        ("/a?b=c".to_owned(), vec![("x-token", token.clone())]),
        ("/a?b=c".to_owned(), vec![("x-scheme", format!("token {token}"))]),
        (format!("/a?access+token={token}&b=c"), vec![]),
        (format!("/a?b=c&access%20token={token}"), vec![("x-token", token.clone())]),
    ] {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let mut head = head(&target, &headers);
        assert_eq!(scene.ask(&mut head), Ok(Some(ALICE.to_owned())), "{target} {headers:?}");
        assert_eq!(head.uri.to_string(), "/a?b=c");
        assert!(head.headers.is_empty(), "{:?}", head.headers);
    }
    let mut elsewhere = head("/?token=abc", &[("authorization", "Bearer abc")]);
    assert_eq!(scene.ask(&mut elsewhere), Ok(None));
}

#[test]
fn more_than_one_token_is_refused() {
    let scene = Scene::new(|rule| rule.places.push(Place::Parameter("t".into())));
    let (one, other) = (scene.token(), scene.signer.token(Algorithm::EdDsa, &with("sub", json!("bob"))));
    let bearer = |token: &str| format!("Bearer {token}");
    let mut twice = head("/", &[("authorization", &bearer(&one)), ("authorization", &bearer(&other))]);
    assert_eq!(scene.ask(&mut twice), Err(Fault::Several));
    let mut apart = head(&format!("/?t={other}"), &[("authorization", &bearer(&one))]);
    assert_eq!(scene.ask(&mut apart), Err(Fault::Several));
    let mut joined = head("/", &[("authorization", &format!("{}, {}", bearer(&one), bearer(&other)))]);
    assert!(matches!(scene.ask(&mut joined), Err(Fault::Malformed(_))));
}

#[test]
fn claims_are_written_to_headers_and_what_a_client_wrote_there_never_arrives() {
    let scene = Scene::new(|rule| {
        let to = |header: &'static str, claim: &str| ClaimHeader {
            header: http::HeaderName::from_static(header),
            claim: claim.into(),
        };
        rule.claim_headers = vec![
            to("x-sub", "sub"),
            to("x-level", "user.level"),
            to("x-groups", "groups"),
            to("x-admin", "admin"),
            to("x-dotted", "https://example.com/role"),
        ];
        rule.payload_header = Some(http::HeaderName::from_static("x-payload"));
    });
    let spoofed = [
        ("x-sub", "root"),
        ("x_sub", "root"),
        ("X-Groups", "admins"),
        ("x-admin", "true"),
        ("x-payload", "e30"),
        ("x-else", "1"),
    ];
    let mut without = head("/", &spoofed);
    assert_eq!(scene.ask(&mut without), Ok(None));
    assert_eq!(without.headers.keys().map(http::HeaderName::as_str).collect::<Vec<_>>(), ["x-else"]);
    let mut claims = claims();
    claims["user"] = json!({"level": 7});
    claims["groups"] = json!(["a", "b"]);
    claims["https://example.com/role"] = json!("cook");
    let token = scene.signer.token(Algorithm::EdDsa, &claims);
    let mut with = head("/", &spoofed);
    with.headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
    assert_eq!(scene.ask(&mut with), Ok(Some(ALICE.to_owned())));
    let groups = URL_SAFE_NO_PAD.encode("[\"a\",\"b\"]");
    for (name, value) in
        [("x-sub", "alice"), ("x-level", "7"), ("x-groups", &groups), ("x-dotted", "cook"), ("x-else", "1")]
    {
        assert_eq!(with.headers[name], value, "{name}");
    }
    assert_eq!(with.headers["x-payload"], token.split('.').nth(1).unwrap());
    assert!(!with.headers.contains_key("x-admin") && !with.headers.contains_key("x_sub"), "{:?}", with.headers);
}

#[test]
fn a_claim_that_is_no_header_value_is_left_out() {
    let scene = Scene::new(|rule| {
        rule.claim_headers = vec![ClaimHeader { header: http::HeaderName::from_static("x-sub"), claim: "sub".into() }];
    });
    let token = scene.signer.token(Algorithm::EdDsa, &with("sub", json!("a\r\nx-admin: true")));
    let mut head = head("/", &[("authorization", &format!("Bearer {token}")), ("x-sub", "root")]);
    assert!(scene.ask(&mut head).is_ok());
    assert!(head.headers.is_empty(), "{:?}", head.headers);
}

#[test]
fn each_issuer_has_its_own_rule_and_one_rule_of_several_is_enough() {
    let (one, two) = (Signer::edwards(), Signer::edwards());
    let of = |signer: &Signer, issuer: &str| Rule { issuer: issuer.into(), ..rule(keys(&[signer.published(None)])) };
    let narrow = Rule { audiences: vec!["nobody".into()], ..of(&one, ISSUER) };
    let rules: Vec<Arc<Rule>> = [narrow, of(&one, ISSUER), of(&two, "two")].map(Arc::new).to_vec();
    let ask = |token: &str| {
        let mut head = head("/", &[("authorization", &format!("Bearer {token}"))]);
        authenticate(&rules, &mut head, NOW).map(|principal| principal.map(|principal| principal.issuer.to_string()))
    };
    assert_eq!(ask(&one.token(Algorithm::EdDsa, &claims())), Ok(Some(ISSUER.to_owned())));
    assert_eq!(ask(&two.token(Algorithm::EdDsa, &with("iss", json!("two")))), Ok(Some("two".to_owned())));
    assert_eq!(ask(&two.token(Algorithm::EdDsa, &claims())), Err(Fault::Signature), "the other's name");
    for issuer in [json!("three"), json!(null), json!(7)] {
        let fault = ask(&one.token(Algorithm::EdDsa, &with("iss", issuer)));
        assert!(matches!(fault, Err(Fault::Issuer(_))), "{fault:?}");
    }
}

#[test]
fn a_rule_with_a_field_that_nobody_knows_takes_no_token() {
    let scene = Scene::new(|rule| rule.opaque = true);
    let mut head = head("/", &[("authorization", &format!("Bearer {}", scene.token()))]);
    assert_eq!(scene.ask(&mut head), Err(Fault::Unenforced(ISSUER.to_owned())));
}

#[test]
fn a_bad_token_is_answered_as_rfc_6750_has_it() {
    let challenge = Challenge::of(&Fault::Expired(7));
    assert_eq!(challenge.status, 401);
    let wanted = r#"Bearer realm="selvedge", error="invalid_token", error_description="the token has expired""#;
    assert_eq!(challenge.headers["www-authenticate"], wanted);
    assert_eq!(Challenge::of(&Fault::Several).status, 400);
}
