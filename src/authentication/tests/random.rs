//! Bytes from outside: nothing of them panics, and nothing that was changed holds.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::mutation::mutated_text;

static SIGNER: LazyLock<Signer> = LazyLock::new(Signer::edwards);
static GOOD: LazyLock<String> = LazyLock::new(|| SIGNER.token(Algorithm::EdDsa, &claims()));
static SET: LazyLock<String> = LazyLock::new(|| {
    let keys = [Signer::rsa(), Signer::elliptic(Algorithm::Es256), Signer::edwards()]
        .map(|signer| signer.published(Some("k")));
    json!({"keys": keys}).to_string()
});

fn scene() -> Vec<Arc<Rule>> {
    vec![Arc::new(rule(keys(&[SIGNER.published(None)])))]
}

proptest! {
    #[test]
    fn a_token_that_was_changed_anywhere_does_not_hold(text in mutated_text(&[&GOOD])) {
        prop_assume!(text != *GOOD);
        let rule = rule(keys(&[SIGNER.published(None)]));
        let held = Token::parse(&text).and_then(|token| rule.verify(&token, NOW));
        prop_assert!(held.is_err(), "{text}");
    }

    #[test]
    fn any_text_is_read_as_a_token_or_refused(text in "[A-Za-z0-9_.=-]{0,200}|.{0,100}") {
        let _ = Token::parse(&text);
    }

    #[test]
    fn the_claims_of_a_token_may_be_any_json(text in mutated_text(&["{\"iss\":\"https://issuer.example\",\"exp\":1800000300,\"aud\":[\"a\",\"b\"],\"sub\":\"x\",\"nbf\":1.5e9}"])) {
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode("{\"alg\":\"EdDSA\"}"), URL_SAFE_NO_PAD.encode(&text));
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(SIGNER.sign(Algorithm::EdDsa, signed.as_bytes())));
        let rule = rule(keys(&[SIGNER.published(None)]));
        if let Ok(principal) = Token::parse(&token).and_then(|token| rule.verify(&token, NOW)) {
            prop_assert_eq!(&*principal.issuer, ISSUER);
        }
    }

    #[test]
    fn any_set_of_keys_is_read_or_refused(text in mutated_text(&[&SET, "{\"keys\":[{\"kty\":\"oct\"}]}"])) {
        let _ = KeySet::parse(&text);
    }

    #[test]
    fn any_header_and_query_is_searched_and_no_token_is_found_twice(
        header in mutated_text(&["Bearer a.b.c", "Bearer  x, Bearer y"]), query in mutated_text(&["a=b&access_token=x.y.z&c"]),
    ) {
        let mut rules = scene();
        Arc::make_mut(&mut rules[0]).places.push(Place::Parameter("access_token".into()));
        let Ok(target) = format!("/p?{query}").parse::<http::Uri>() else { return Ok(()) };
        let mut request = Request::new(());
        *request.uri_mut() = target;
        if let Ok(value) = http::HeaderValue::from_bytes(header.as_bytes()) {
            request.headers_mut().insert("authorization", value);
        }
        let mut head = request.into_parts().0;
        let found = authenticate(&rules, &mut head, NOW);
        prop_assert!(matches!(found, Ok(None) | Err(_)), "{found:?}");
    }
}
