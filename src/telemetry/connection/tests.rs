use super::*;
use crate::telemetry::access_log::AccessLogFormat;
use crate::telemetry::metrics::recorder;

fn info(name: &str) -> ConnectionInfo {
    let party = |pod: &str| Party {
        addr: Some("10.0.0.1:80".parse().unwrap()),
        pod: Some(NamespacedName::new("shop", pod)),
        workload: Some(pod.into()),
        identity: Some(format!("spiffe://cluster.local/ns/shop/sa/{pod}").parse().unwrap()),
    };
    ConnectionInfo {
        direction: Direction::Outbound,
        transport: Transport::Hbone,
        source: party(name),
        destination: party("server"),
        service: Some(NamespacedName::new("shop", "web")),
        requested: None,
        key_exchange: Some("X25519MLKEM768"),
    }
}

fn rendered(cap: usize, story: impl FnOnce(&Telemetry)) -> String {
    let settings = MetricsSettings::default();
    let recorder = recorder(&settings).unwrap();
    let telemetry = Telemetry::new(&settings, cap, AccessLog::off(), Traces::default());
    metrics::with_local_recorder(&recorder, || story(&telemetry));
    recorder.handle().render()
}

fn sum(text: &str, name: &str, needle: &str) -> f64 {
    text.lines()
        .filter(|line| line.starts_with(&format!("{name}{{")) && line.contains(needle))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum()
}

#[test]
fn a_connection_is_counted_while_it_lives_and_once_at_its_end() {
    let text = rendered(10, |telemetry| {
        let one = telemetry.open(info("cart"));
        one.decision(Verdict::Allow, None);
        one.connected(Duration::from_millis(3));
        one.tick(100, 1000);
        one.tick(150, 1000);
        let two = telemetry.open(info("cart"));
        two.connected(Duration::from_millis(3));
        one.closed(200, 3000, None, "");
        std::mem::forget(two);
    });
    assert_eq!(sum(&text, catalogue::SENT, "source_workload=\"cart\""), 200.0);
    assert_eq!(sum(&text, catalogue::RECEIVED, "connection_security_policy=\"mutual_tls\""), 3000.0);
    assert_eq!(sum(&text, catalogue::OPENED, "destination_service=\"web\""), 2.0);
    assert_eq!(sum(&text, catalogue::CLOSED, "reporter=\"source\""), 1.0);
    assert_eq!(sum(&text, catalogue::OPEN, "transport=\"hbone\""), 1.0);
    assert_eq!(sum(&text, catalogue::FAILED, ""), 0.0);
    assert_eq!(sum(&text, catalogue::KEY_EXCHANGES, "key_exchange=\"X25519MLKEM768\""), 2.0);
}

#[test]
fn a_refused_connection_is_a_failure_and_never_was_open() {
    let text = rendered(10, |telemetry| {
        let policy = NamespacedName::new("shop", "deny");
        let refused = telemetry.open(info("cart"));
        refused.decision(Verdict::Deny, Some(&policy));
        refused.closed(0, 0, Some(Reason::Policy(policy)), "");
    });
    assert_eq!(sum(&text, catalogue::FAILED, "reason=\"policy\""), 1.0);
    assert_eq!(sum(&text, catalogue::DECISIONS, "policy=\"shop/deny\""), 1.0);
    assert_eq!(sum(&text, catalogue::OPENED, "") + sum(&text, catalogue::CLOSED, ""), 0.0);
}

#[test]
fn a_connection_that_is_dropped_ends_as_internal() {
    let text = rendered(10, |telemetry| {
        let lost = telemetry.open(info("cart"));
        lost.connected(Duration::ZERO);
    });
    assert_eq!(sum(&text, catalogue::FAILED, "reason=\"internal\""), 1.0);
    assert_eq!(sum(&text, catalogue::OPEN, ""), 0.0);
}

#[test]
fn label_sets_beyond_the_cap_are_counted_as_other() {
    let text = rendered(3, |telemetry| {
        for i in 0..50 {
            let one = telemetry.open(info(&format!("client-{i}")));
            one.connected(Duration::ZERO);
            one.closed(1, 1, None, "");
        }
    });
    assert_eq!(text.lines().filter(|line| line.starts_with(&format!("{}{{", catalogue::OPENED))).count(), 4);
    assert_eq!(sum(&text, catalogue::OPENED, "source_workload=\"other\""), 47.0);
    assert!(text.contains(&format!("{} 47", catalogue::OVERFLOW)), "{text}");
}

#[test]
fn what_is_learnt_later_is_in_the_log_and_the_labels() {
    let buffer = crate::telemetry::access_log::tests::Shared::default();
    let (log, writer) = AccessLog::start(AccessLogFormat::Json, buffer.clone()).unwrap();
    let settings = MetricsSettings::default();
    let telemetry = Telemetry::new(&settings, 10, log, Traces::default());
    let one = telemetry.open(ConnectionInfo { service: None, key_exchange: None, ..info("cart") });
    one.amend(|info| info.service = Some(NamespacedName::new("shop", "late")));
    one.decision(Verdict::Deny, Some(&NamespacedName::new("shop", "p")));
    one.closed(1, 2, Some(Reason::Policy(NamespacedName::new("shop", "p"))), "no \"ALLOW\" matches");
    assert!(writer.finish(Duration::from_secs(10)));
    let line: serde_json::Value = serde_json::from_str(buffer.text().trim()).unwrap();
    assert_eq!(line["service"], "shop/late");
    assert_eq!(line["verdict"], "deny");
    assert_eq!(line["reason"], "policy:shop/p");
    assert_eq!(line["source_identity"], "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(line["destination_identity"], "spiffe://cluster.local/ns/shop/sa/server");
    assert_eq!(line["bytes_received"], 2);
    assert_eq!(line["detail"], "no \"ALLOW\" matches");
}
