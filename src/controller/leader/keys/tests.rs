use super::*;

const URL: &str = "https://issuer.example/keys";

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn held(jwks: Option<&str>, fetched: &str, error: Option<&str>) -> Held {
    Held {
        jwks: jwks.map(str::to_owned),
        fetched: jwks.map(|_| at(fetched)),
        error: error.map(str::to_owned),
        due: Instant::now(),
        is_fetching: false,
        failures: 0,
    }
}

fn written(source: &str, jwks: &str, time: &str) -> RequestAuthenticationStatus {
    let keys = FetchedKeys { source: source.to_owned(), jwks: jwks.to_owned(), fetch_time: time.to_owned() };
    RequestAuthenticationStatus { conditions: Vec::new(), keys: vec![keys] }
}

fn tell(source: &str, held: &Held, before: &RequestAuthenticationStatus) -> (Vec<(String, String)>, String, String) {
    let (keys, condition) = wanted(&[(source, Some(held))], before, 3, at("2027-01-15T10:00:00Z"));
    let condition = condition.unwrap();
    let keys = keys.into_iter().map(|keys| (keys.jwks, keys.fetch_time)).collect();
    (keys, format!("{}/{}", condition.status, condition.reason), condition.message)
}

fn pair(jwks: &str, time: &str) -> Vec<(String, String)> {
    vec![(jwks.to_owned(), time.to_owned())]
}

#[test]
fn what_was_fetched_is_written_and_written_again_by_the_hour() {
    let now = held(Some("a"), "2027-01-15T10:00:00Z", None);
    let none = RequestAuthenticationStatus::default();
    assert_eq!(
        tell(URL, &now, &none),
        (pair("a", "2027-01-15T10:00:00Z"), "True/Fetched".into(), "The keys of every issuer are there.".into())
    );
    let lately = written(URL, "a", "2027-01-15T09:10:00Z");
    assert_eq!(tell(URL, &now, &lately).0, pair("a", "2027-01-15T09:10:00Z"), "not again within the hour");
    let long_ago = written(URL, "a", "2027-01-15T08:59:00Z");
    assert_eq!(tell(URL, &now, &long_ago).0, pair("a", "2027-01-15T10:00:00Z"));
    let others = written(URL, "b", "2027-01-15T09:59:00Z");
    assert_eq!(tell(URL, &now, &others).0, pair("a", "2027-01-15T10:00:00Z"), "other keys at once");
}

#[test]
fn what_cannot_be_fetched_stays_as_old_as_it_is_and_that_is_told() {
    let failing = held(None, "", Some("refused"));
    let before = written(URL, "a", "2027-01-14T12:00:00Z");
    let (keys, condition, message) = tell(URL, &failing, &before);
    assert_eq!((keys, condition.as_str()), (pair("a", "2027-01-14T12:00:00Z"), "False/Failing"));
    assert!(message.contains("refused"), "{message}");
    let (keys, condition, message) = tell(URL, &failing, &RequestAuthenticationStatus::default());
    assert_eq!((keys.len(), condition.as_str()), (0, "False/NotFetched"));
    assert!(message.contains(URL) && message.contains("refused"), "{message}");
}

#[test]
fn a_new_leader_keeps_what_the_last_one_fetched_until_it_has_its_own() {
    let not_yet = held(None, "", None);
    let before = written(URL, "a", "2027-01-15T09:00:00Z");
    assert_eq!(tell(URL, &not_yet, &before).0, pair("a", "2027-01-15T09:00:00Z"));
}

#[test]
fn a_config_map_that_goes_takes_its_keys_with_it() {
    let source = "configmap/keys/jwks.json";
    let gone = held(None, "", Some("there is no ConfigMap shop/keys"));
    let (keys, condition, _) = tell(source, &gone, &written(source, "a", "2027-01-15T09:59:00Z"));
    assert_eq!((keys.len(), condition.as_str()), (0, "False/NotFetched"));
}

#[test]
fn what_nothing_asks_for_any_more_is_not_written() {
    let before = written("https://other.example/", "a", "2027-01-15T09:59:00Z");
    let now = held(Some("b"), "2027-01-15T10:00:00Z", None);
    assert_eq!(tell(URL, &now, &before).0, pair("b", "2027-01-15T10:00:00Z"));
    assert_eq!(wanted(&[], &before, 1, at("2027-01-15T10:00:00Z")), (Vec::new(), None));
}
