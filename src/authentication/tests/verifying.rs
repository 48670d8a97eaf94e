use super::*;

fn verify(rule: &Rule, token: &str) -> Result<Principal, Fault> {
    rule.verify(&Token::parse(token)?, NOW)
}

#[test]
fn a_token_of_every_algorithm_holds_by_the_key_that_it_was_signed_with() {
    let rsa = Signer::rsa();
    let signers = [
        (Signer::elliptic(Algorithm::Es256), vec![Algorithm::Es256]),
        (Signer::elliptic(Algorithm::Es384), vec![Algorithm::Es384]),
        (Signer::elliptic(Algorithm::Es512), vec![Algorithm::Es512]),
        (Signer::edwards(), vec![Algorithm::EdDsa]),
        (rsa, Algorithm::ALL[..6].to_vec()),
    ];
    let all: Vec<Value> = signers.iter().map(|(signer, _)| signer.published(None)).collect();
    let rule = rule(keys(&all));
    for (signer, algorithms) in &signers {
        for algorithm in algorithms {
            let token = signer.token(*algorithm, &claims());
            let principal = verify(&rule, &token).unwrap_or_else(|fault| panic!("{algorithm}: {fault}"));
            assert_eq!(principal.name().as_deref(), Some("https://issuer.example/alice"));
            let mut other = claims();
            other["sub"] = "mallory".into();
            let (_, signature) = token.rsplit_once('.').unwrap();
            let (forged, _) =
                signer.token(*algorithm, &other).rsplit_once('.').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
            assert_eq!(verify(&rule, &format!("{forged}.{signature}")), Err(Fault::Signature), "{algorithm}");
        }
    }
}

#[test]
fn no_signature_and_a_shared_secret_are_never_taken() {
    let signer = Signer::rsa();
    let rule = rule(keys(&[signer.published(None)]));
    for name in ["none", "None", "NONE", "HS256", "HS384", "HS512", "", "rs256", "RS1", "dir"] {
        let token = signer.token_with(Algorithm::Rs256, &json!({"alg": name}), &claims());
        assert_eq!(verify(&rule, &token), Err(Fault::Algorithm(name.to_owned())), "{name}");
        let (unsigned, _) = token.rsplit_once('.').unwrap();
        assert!(matches!(verify(&rule, &format!("{unsigned}.")), Err(Fault::Algorithm(_))), "{name}");
    }
    // The public key as the secret of an HMAC, the classic confusion.
    let secret = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, signer.published(None).to_string().as_bytes());
    let token = signer.token_with(Algorithm::Rs256, &json!({"alg": "HS256"}), &claims());
    let (signed, _) = token.rsplit_once('.').unwrap();
    let tag = URL_SAFE_NO_PAD.encode(aws_lc_rs::hmac::sign(&secret, signed.as_bytes()));
    assert_eq!(verify(&rule, &format!("{signed}.{tag}")), Err(Fault::Algorithm("HS256".to_owned())));
}

#[test]
fn a_key_is_used_for_what_it_is_for_and_nothing_else() {
    let (rsa, elliptic) = (Signer::rsa(), Signer::elliptic(Algorithm::Es256));
    let restricted = |signer: &Signer, field: &str, value: Value| {
        let mut key = signer.published(None);
        key[field] = value;
        key
    };
    let only_256 = rule(keys(&[restricted(&rsa, "alg", json!("RS256"))]));
    assert!(verify(&only_256, &rsa.token(Algorithm::Rs256, &claims())).is_ok());
    let fault = verify(&only_256, &rsa.token(Algorithm::Ps256, &claims()));
    assert_eq!(fault, Err(Fault::UnknownKey(None, Algorithm::Ps256)));
    for (field, value) in
        [("use", json!("enc")), ("key_ops", json!(["encrypt"])), ("alg", json!("ES256")), ("alg", json!("RSA-OAEP"))]
    {
        let set = json!({"keys": [restricted(&rsa, field, value.clone())]}).to_string();
        assert!(matches!(KeySet::parse(&set), Err(KeySetError::Empty(_))), "{field} {value}");
    }
    // The header says one type of key and its issuer has another.
    let of_rsa = rule(keys(&[rsa.published(None)]));
    let fault = verify(&of_rsa, &elliptic.token(Algorithm::Es256, &claims()));
    assert_eq!(fault, Err(Fault::UnknownKey(None, Algorithm::Es256)));
    let lying = elliptic.token_with(Algorithm::Es256, &json!({"alg": "RS256"}), &claims());
    assert_eq!(verify(&of_rsa, &lying), Err(Fault::Signature));
}

#[test]
fn the_name_of_a_key_chooses_it_where_both_sides_name_one() {
    let (one, two) = (Signer::edwards(), Signer::edwards());
    let named = rule(keys(&[one.published(Some("one")), two.published(Some("two"))]));
    let token = |signer: &Signer, id: Value| {
        signer.token_with(Algorithm::EdDsa, &json!({"alg": "EdDSA", "kid": id}), &claims())
    };
    assert!(verify(&named, &token(&one, json!("one"))).is_ok());
    assert_eq!(verify(&named, &token(&one, json!("two"))), Err(Fault::Signature));
    let unknown = verify(&named, &token(&one, json!("three")));
    assert_eq!(unknown, Err(Fault::UnknownKey(Some("three".to_owned()), Algorithm::EdDsa)));
    assert!(verify(&named, &two.token(Algorithm::EdDsa, &claims())).is_ok(), "a token that names none");
    let unnamed = rule(keys(&[one.published(None)]));
    assert!(verify(&unnamed, &token(&one, json!("any"))).is_ok(), "a key that has none");
}

#[test]
fn a_token_holds_from_its_beginning_to_its_end_and_a_minute_around() {
    let signer = Signer::edwards();
    let rule = rule(keys(&[signer.published(None)]));
    let at = |claims: Value| verify(&rule, &signer.token(Algorithm::EdDsa, &claims)).map(drop);
    for (name, value, wanted) in [
        ("exp", json!(NOW - 59), Ok(())),
        ("exp", json!(NOW - 60), Err(Fault::Expired(NOW - 60))),
        ("exp", json!((NOW - 60) as f64 + 0.5), Err(Fault::Expired(NOW - 60))),
        ("exp", json!(NOW as f64 + 0.5), Ok(())),
        ("nbf", json!(NOW + 60), Ok(())),
        ("nbf", json!(NOW + 61), Err(Fault::NotYet(NOW + 61))),
        ("iat", json!(NOW + 61), Err(Fault::NotYet(NOW + 61))),
        ("iat", json!(NOW - 1_000_000), Ok(())),
        ("exp", json!(i64::MAX), Ok(())),
    ] {
        assert_eq!(at(with(name, value.clone())), wanted, "{name} {value}");
    }
    for (name, value) in [("exp", json!("soon")), ("exp", json!(null)), ("nbf", json!([1])), ("exp", json!(1e300))] {
        assert!(matches!(at(with(name, value.clone())), Err(Fault::Malformed(_))), "{name} {value}");
    }
    let mut endless = claims();
    endless.as_object_mut().unwrap().remove("exp");
    assert_eq!(at(endless), Err(Fault::NoExpiry));
}

#[test]
fn a_token_is_for_one_of_the_audiences_or_for_nobody_here() {
    let signer = Signer::edwards();
    let rule = Rule { audiences: vec!["shop".into(), "bank".into()], ..rule(keys(&[signer.published(None)])) };
    let at = |audience: Value| verify(&rule, &signer.token(Algorithm::EdDsa, &with("aud", audience))).map(drop);
    assert_eq!(at(json!("bank")), Ok(()));
    assert_eq!(at(json!(["a", "shop"])), Ok(()));
    for audience in [json!("shop2"), json!(["a", "b"]), json!([]), json!("")] {
        assert_eq!(at(audience.clone()), Err(Fault::Audience), "{audience}");
    }
    assert!(matches!(at(json!(7)), Err(Fault::Malformed(_))));
    let mut without = claims();
    without.as_object_mut().unwrap().remove("aud");
    assert_eq!(verify(&rule, &signer.token(Algorithm::EdDsa, &without)), Err(Fault::Audience));
}

#[test]
fn without_keys_that_hold_now_no_token_does() {
    let signer = Signer::edwards();
    let token = signer.token(Algorithm::EdDsa, &claims());
    let of = |found: Option<Found>| rule(Keys { source: KeySource::Url("https://issuer.example/keys".into()), found });
    let missing = Err(Fault::NoKeys(ISSUER.to_owned()));
    assert_eq!(verify(&of(None), &token), missing);
    let set = keys(&[signer.published(None)]).found.unwrap().set;
    let until = |until| Some(Found { set: set.clone(), until: Some(until) });
    assert_eq!(verify(&of(until(NOW)), &token), missing);
    assert!(verify(&of(until(NOW + 1)), &token).is_ok());
}

#[test]
fn what_is_no_token_is_refused_and_why() {
    let signer = Signer::edwards();
    let good = signer.token(Algorithm::EdDsa, &claims());
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let (header, payload) = signed.split_once('.').unwrap();
    let text = |text: &str| URL_SAFE_NO_PAD.encode(text);
    for bad in [
        String::new(),
        "a.b".to_owned(),
        format!("{good}.more"),
        format!("{signed}.{signature}="),
        format!("{header} .{payload}.{signature}"),
        format!("{}.{payload}.{signature}", text("[]")),
        format!("{}.{payload}.{signature}", text("{\"alg\":\"EdDSA\",\"alg\":\"RS256\"}")),
        format!("{}.{payload}.{signature}", text("{\"alg\":\"EdDSA\",\"crit\":[\"b64\"],\"b64\":false}")),
        format!("{}.{payload}.{signature}", text("{\"kid\":\"1\"}")),
        format!("{header}.{}.{signature}", text("{\"iss\":\"a\",\"iss\":\"b\"}")),
        format!("{header}.{}.{signature}", text("7")),
        format!("{good}{}", "A".repeat(20_000)),
    ] {
        assert!(matches!(Token::parse(&bad), Err(Fault::Malformed(_))), "{bad:.80}");
    }
}

#[test]
fn a_set_of_keys_keeps_what_is_of_use_and_says_what_is_not() {
    let signer = Signer::edwards();
    let short = json!({"kty": "RSA", "n": URL_SAFE_NO_PAD.encode([255; 128]), "e": "AQAB"});
    let off_curve = json!({"kty": "EC", "crv": "P-256", "x": URL_SAFE_NO_PAD.encode([1; 32]), "y": URL_SAFE_NO_PAD.encode([1; 32])});
    let shared = json!({"kty": "oct", "k": "AAAA"});
    let others = [short, off_curve, shared, json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}), json!(7)];
    let all: Vec<Value> = others.iter().cloned().chain([signer.published(None)]).collect();
    let set = KeySet::parse(&json!({"keys": all, "more": 1}).to_string()).unwrap();
    assert_eq!((set.len(), set.passed_over().len()), (1, 5));
    assert!(set.passed_over()[0].contains("1024 bits"), "{:?}", set.passed_over());
    let none = KeySet::parse(&json!({"keys": others}).to_string()).unwrap_err();
    assert!(none.to_string().contains("keys[2] is of type \"oct\""), "{none}");
    for text in ["", "[]", "{}", "{\"keys\": {}}"] {
        assert!(matches!(KeySet::parse(text), Err(KeySetError::Malformed(_))), "{text}");
    }
    assert_eq!(KeySet::parse(&" ".repeat(300 << 10)).unwrap_err(), KeySetError::Large);
}
