//! Policies about traffic, on real traffic: what is sent again, held back, failed on purpose, and where it goes.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Pod, PodSpec, Request, Response, ServiceSpec, eventually, trial_with};
use serde_json::{Value, json};

use super::protocols::call_method as call;
use super::routes::Versions;
use super::server::Application;
use super::vip;
use crate::lab;
use crate::waypoints::Place;

pub fn trials() -> Vec<Trial> {
    type Body = fn(&Lab, Place) -> Result<()>;
    let everywhere: [(&str, Body); 13] = [
        ("a_request_is_sent_again_within_its_budget", sent_again_within_its_budget),
        ("an_experimental_policy_bounds_what_is_sent_again", an_experimental_policy),
        ("a_policy_bounds_the_time_of_a_request_and_of_a_try", bounds_the_time),
        ("a_full_backend_is_given_no_more", a_full_backend),
        ("an_endpoint_that_fails_is_left_out", an_endpoint_that_fails),
        ("faults_befall_whom_they_are_meant_for", faults),
        ("a_header_leads_to_one_endpoint_from_everywhere", a_header_leads),
        ("a_cookie_leads_to_one_endpoint_from_everywhere", a_cookie_leads),
        ("a_session_outlives_the_weight_of_its_backend", a_session),
        ("a_slow_endpoint_is_given_less", a_slow_endpoint),
        ("an_endpoint_that_comes_is_warmed_up", an_endpoint_that_comes),
        ("a_route_limits_the_rate", a_route_limits),
        ("a_service_is_limited_where_its_requests_are_judged", a_service_is_limited),
    ];
    let mut trials = vec![
        trial_with("http::traffic::connections_take_turns", lab(), connections_take_turns),
        trial_with("http::traffic::an_endpoint_that_fails_in_its_trailers_is_left_out", lab(), fails_in_trailers),
        trial_with("http::traffic::a_call_that_fails_at_once_is_sent_again", lab(), fails_at_once),
    ];
    for place in Place::BOTH {
        trials.extend(everywhere.iter().map(|(name, body)| {
            let body = *body;
            trial_with(&place.title("traffic", name), lab(), move |lab| body(lab, place))
        }));
    }
    trials
}

fn sent_again_within_its_budget(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::at(place, lab)?;
    let retry = json!({"codes": [503], "attempts": 3, "backoff": "5ms"});
    policy(lab, "v1", json!({"retry": retry}))?;
    let run = place.run(lab)?;
    let ask = |body: &str| shop.web.http((vip(2), 80), &Request::post("/status/503", body.to_owned()));
    ensure!(ask("body")?.status == 503);
    ensure!(shop.v1.heard() == ["POST /status/503"; 4], "{:?}", shop.v1.heard());
    let large = "x".repeat(100_000);
    ensure!(ask(&large)?.status == 503);
    ensure!(shop.v1.heard().len() == 5, "what is not at hand any more was sent again: {:?}", shop.v1.heard());
    let constraint = json!({"budget": {"percent": 0}, "minRetryRate": {"count": 1, "interval": "1h"}});
    policy(lab, "v1", json!({"retry": retry, "retryConstraint": constraint}))?;
    eventually("the budget holds", BOUND, || {
        let answer = ask("body").ok()?;
        (answer.header("selvedge-reason") == Some("retry-budget")).then_some(())
    })?;
    let before = shop.v1.heard().len();
    ensure!(ask("body")?.status == 503 && shop.v1.heard().len() == before + 1, "the budget is spent");
    run.access_line("the budget", |line| line["reason"] == "retry-budget")?;
    let metrics = run.metrics()?;
    ensure!(metrics.sum("selvedge_http_retries_withheld_total", &[]) >= 2.0);
    ensure!(metrics.sum("selvedge_http_retries_total", &[("why", "status")]) >= 4.0);
    Ok(())
}

fn an_experimental_policy(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::both(place, lab)?;
    shop.route(lab, json!([{"name": "all", "retry": {"codes": [503], "attempts": 3, "backoff": "5ms"}}]))?;
    lab.put(&json!({
        "apiVersion": "gateway.networking.x-k8s.io/v1alpha1",
        "kind": "XBackendTrafficPolicy",
        "metadata": {"namespace": "shop", "name": "cart"},
        "spec": {
            "targetRefs": [{"group": "", "kind": "Service", "name": "cart"}],
            "retryConstraint": {"budget": {"percent": 0, "interval": "10s"}, "minRetryRate": {"count": 1, "interval": "1h"}},
            "sessionPersistence": {"sessionName": "seat", "type": "Header"},
        },
    }))?;
    let run = place.run(lab)?;
    let at = (vip(1), 80);
    ensure!(shop.web.http_get(at, "/status/503")?.header("selvedge-reason") == Some("retry-budget"));
    let heard = [shop.v1.heard(), shop.v2.heard()].concat();
    ensure!(heard == ["GET /status/503"; 2], "one repetition is free, and no more: {heard:?}");
    run.access_line("the budget", |line| line["reason"] == "retry-budget")?;
    // Each session stays where it began.
    let mut seen = BTreeSet::new();
    for _ in 0..20 {
        let first = shop.web.http_get(at, "/x")?;
        let seat = first.header("seat").context("no session")?.to_owned();
        let pod = first.json()?["pod"].clone();
        for _ in 0..3 {
            let again = shop.web.http(at, &Request::get("/x").header("seat", &seat))?.json()?;
            ensure!(again["pod"] == pod, "a session was moved from {pod} to {again}");
        }
        seen.insert(pod.to_string());
    }
    ensure!(seen.len() == 2, "twenty sessions began at one of two: {seen:?}");
    Ok(())
}

fn bounds_the_time(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::at(place, lab)?;
    let retry = json!({"attempts": 2, "backoff": "1ms"});
    policy(lab, "v1", json!({"timeouts": {"backendRequest": "300ms"}, "retry": retry}))?;
    policy(lab, "v2", json!({"timeouts": {"request": "300ms"}, "retry": retry}))?;
    let _run = place.run(lab)?;
    for (service, application, tries) in [(2, &shop.v1, 3), (3, &shop.v2, 1)] {
        let answer = shop.web.http_get((vip(service), 80), "/sleep/20000")?;
        ensure!(answer.status == 504 && answer.header("selvedge-reason") == Some("timeout"), "{answer:?}");
        ensure!(application.heard().len() == tries, "{tries}: {:?}", application.heard());
    }
    Ok(())
}

fn a_full_backend(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::at(place, lab)?;
    policy(lab, "v1", json!({"circuitBreaker": {"maxRequests": 2}}))?;
    policy(lab, "v2", json!({"circuitBreaker": {"maxConnections": 1, "maxPendingRequests": 1}}))?;
    let run = place.run(lab)?;
    let is_refused =
        |answer: &Response| answer.status == 503 && answer.header("selvedge-reason") == Some("circuit-breaker");

    let at = (vip(2), 80);
    let held = [Unfinished::begin(&shop.web, at, &shop.v1)?, Unfinished::begin(&shop.web, at, &shop.v1)?];
    let refused = shop.web.http_get(at, "/third")?;
    ensure!(is_refused(&refused), "{refused:?}");
    held.into_iter().try_for_each(Unfinished::finish)?;
    eventually("there is room again", BOUND, || (shop.web.http_get(at, "/after").ok()?.status == 200).then_some(()))?;

    let at = (vip(3), 80);
    shop.web.http_get(at, "/first")?;
    let held = Unfinished::begin(&shop.web, at, &shop.v2)?;
    std::thread::scope(|scope| -> Result<()> {
        let (told, hear) = std::sync::mpsc::channel();
        for _ in 0..2 {
            let (told, web) = (told.clone(), &shop.web);
            scope.spawn(move || told.send(web.http_get(at, "/waits")));
        }
        let refused = hear.recv_timeout(BOUND)??;
        ensure!(is_refused(&refused), "two wait where one may: {refused:?}");
        held.finish()?;
        let waited = hear.recv_timeout(BOUND)??;
        ensure!(waited.status == 200, "{waited:?}");
        Ok(())
    })?;
    for what in ["requests", "pending"] {
        eventually(&format!("the refusal for {what} is counted"), BOUND, || {
            let metrics = run.metrics().ok()?;
            (metrics.sum("selvedge_http_circuit_breaker_refused_total", &[("what", what)]) >= 1.0).then_some(())
        })?;
    }
    Ok(())
}

/// A request that is under way until the test ends it.
struct Unfinished(std::net::TcpStream);

impl Unfinished {
    /// Returns once the application has heard of it.
    fn begin(from: &Pod, to: (std::net::IpAddr, u16), application: &Application) -> Result<Self> {
        let before = application.heard().len();
        let mut stream = from.connect(to)?;
        stream.write_all(b"POST /unfinished HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n1")?;
        eventually("the application hears of it", BOUND, || (application.heard().len() > before).then_some(()))?;
        Ok(Self(stream))
    }

    fn finish(mut self) -> Result<()> {
        self.0.write_all(b"2")?;
        let answer = super::protocols::hear_until(&mut self.0, "\"length\":2")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(())
    }
}

fn an_endpoint_that_fails(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::both(place, lab)?;
    let outliers = json!({"consecutive5xxErrors": 1, "baseEjectionTime": "10m", "maxEjectionPercent": 50});
    policy(lab, "cart", json!({"outlierDetection": outliers}))?;
    let run = place.run(lab)?;
    let ask = |path: &str| shop.web.http_get((vip(1), 80), path);
    ensure!(ask("/status/500")?.status == 500);
    let failed = if shop.v1.heard().is_empty() { "v2" } else { "v1" };
    for _ in 0..30 {
        let answer = ask("/x")?.json()?;
        ensure!(answer["pod"] != failed, "{failed} failed, and was asked again: {answer}");
    }
    // The last one is never left out.
    for _ in 0..3 {
        ensure!(ask("/status/500")?.status == 500);
    }
    ensure!(ask("/x")?.json()?["pod"] != failed);
    ensure!(run.metrics()?.sum("selvedge_http_ejections_total", &[]) == 1.0);
    Ok(())
}

/// What went wrong is known by the end of the answer: too late for another try, but not for the next request.
fn fails_in_trailers(lab: &Lab) -> Result<()> {
    let shop = Versions::both(Place::Node, lab)?;
    let outliers = json!({"consecutive5xxErrors": 1, "baseEjectionTime": "10m", "maxEjectionPercent": 50});
    let retry = json!({"grpcCodes": ["UNAVAILABLE"], "attempts": 3, "backoff": "5ms"});
    policy(lab, "cart", json!({"outlierDetection": outliers, "retry": retry}))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let heard = || [shop.v1.heard(), shop.v2.heard()].map(|heard| heard.len());
    // NOT_FOUND is the caller's affair.
    for _ in 0..6 {
        ensure!(code_of(call(&shop.web, vip(1), "/shop.Cart/5")) == tonic::Code::NotFound);
    }
    ensure!(code_of(call(&shop.web, vip(1), "/shop.Cart/14")) == tonic::Code::Unavailable);
    ensure!(heard().iter().sum::<usize>() == 7, "it was sent again behind its head: {:?}", heard());
    let failed = usize::from(shop.v2.heard().iter().any(|asked| asked.ends_with("/14")));
    let before = heard();
    for _ in 0..20 {
        ensure!(code_of(call(&shop.web, vip(1), "/shop.Cart/0")) == tonic::Code::Ok);
    }
    ensure!(heard()[failed] == before[failed], "it failed, and was asked again: {:?}", heard());
    let metrics = agents[0].metrics()?;
    ensure!(metrics.sum("selvedge_http_ejections_total", &[]) == 1.0);
    for (code, count) in [("14", 1.0), ("5", 6.0), ("0", 20.0)] {
        let labels = [("request_protocol", "grpc"), ("response_code", "200"), ("grpc_response_status", code)];
        ensure!(metrics.sum("selvedge_http_requests_total", &labels) == count, "{code}");
    }
    let line = agents[0].access_line("the failed call", |line| line["path"] == "/shop.Cart/14")?;
    ensure!(line["grpc_status"] == "14" && line["status"] == 200, "{line}");
    Ok(())
}

/// An answer of trailers alone: gRPC over HTTP/2 has it, and its head says how it went.
fn fails_at_once(lab: &Lab) -> Result<()> {
    let shop = Versions::open(lab)?;
    let retry = json!({"grpcCodes": ["UNAVAILABLE"], "attempts": 2, "backoff": "5ms"});
    policy(lab, "v1", json!({"retry": retry}))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    ensure!(code_of(call(&shop.web, vip(2), "/shop.Cart/now/14")) == tonic::Code::Unavailable);
    ensure!(shop.v1.heard() == ["POST /shop.Cart/now/14"; 3], "{:?}", shop.v1.heard());
    ensure!(code_of(call(&shop.web, vip(2), "/shop.Cart/now/13")) == tonic::Code::Internal);
    ensure!(shop.v1.heard().len() == 4, "nobody asked for it to be sent again: {:?}", shop.v1.heard());
    ensure!(agents[0].metrics()?.sum("selvedge_http_retries_total", &[("why", "grpc-status")]) == 2.0);
    Ok(())
}

fn code_of(outcome: std::result::Result<(), tonic::Status>) -> tonic::Code {
    outcome.err().map_or(tonic::Code::Ok, |status| status.code())
}

fn faults(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::at(place, lab)?;
    let chaos = json!([{"name": "x-chaos", "value": "yes"}]);
    policy(
        lab,
        "v1",
        json!({"retry": {"codes": [418]}, "faultInjection": {
            "headers": chaos, "delay": {"fixedDelay": "200ms"}, "abort": {"httpStatus": 418},
        }}),
    )?;
    policy(lab, "v2", json!({"faultInjection": {"abort": {"grpcStatus": "DATA_LOSS"}}}))?;
    let run = place.run(lab)?;
    ensure!(shop.web.http_get((vip(2), 80), "/x")?.status == 200);
    let began = Instant::now();
    let answer = shop.web.http((vip(2), 80), &Request::get("/x").header("x-chaos", "yes"))?;
    ensure!(answer.status == 418 && answer.header("selvedge-reason") == Some("fault"), "{answer:?}");
    ensure!(began.elapsed() >= Duration::from_millis(200), "it was not kept waiting");
    ensure!(shop.v1.heard() == ["GET /x"], "{:?}", shop.v1.heard());
    ensure!(shop.web.http_get((vip(3), 80), "/x")?.status == 200, "it is for clients of gRPC");
    let grpc = Request::post("/shop.Cart/Get", "").header("content-type", "application/grpc");
    let answer = shop.web.http((vip(3), 80), &grpc)?;
    ensure!(answer.header("grpc-status") == Some("15"), "{answer:?}");
    let metrics = run.metrics()?;
    let counted = |fault| metrics.sum("selvedge_http_faults_total", &[("fault", fault)]);
    ensure!((counted("delay"), counted("abort")) == (1.0, 2.0));
    Ok(())
}

fn a_header_leads(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::both(place, lab)?;
    let other = lab.pod(PodSpec::new("shop/other", "node-b"))?;
    policy(lab, "cart", json!({"loadBalancer": {"consistentHash": {"httpHeaderName": "x-user"}}}))?;
    let _run = place.run(lab)?;
    let ask = |from: &Pod, user: &str| -> Result<String> {
        let answer = from.http((vip(1), 80), &Request::get("/x").header("x-user", user))?.json()?;
        Ok(answer["pod"].as_str().unwrap_or_default().to_owned())
    };
    let mut seen = BTreeSet::new();
    for user in ["ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "jim", "kim", "lee"] {
        let pod = ask(&shop.web, user)?;
        for from in [&shop.web, &other, &shop.web] {
            ensure!(ask(from, user)? == pod, "{user} was led elsewhere");
        }
        seen.insert(pod);
    }
    ensure!(seen.len() == 2, "nobody is led to one of the two: {seen:?}");
    Ok(())
}

fn a_cookie_leads(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::both(place, lab)?;
    let other = lab.pod(PodSpec::new("shop/other", "node-b"))?;
    let cookie = json!({"name": "seat", "path": "/shop", "ttl": "1h"});
    policy(lab, "cart", json!({"loadBalancer": {"consistentHash": {"httpCookie": cookie}}}))?;
    let _run = place.run(lab)?;
    let mut seen = BTreeSet::new();
    for _ in 0..16 {
        let first = shop.web.http_get((vip(1), 80), "/x")?;
        let given = first.header("set-cookie").context("no cookie")?.to_owned();
        ensure!(given.contains("Path=/shop") && given.contains("Max-Age=3600"), "{given}");
        let pod = first.json()?["pod"].clone();
        let seat = given.split(';').next().unwrap_or_default();
        for from in [&shop.web, &other, &shop.web] {
            let again = from.http((vip(1), 80), &Request::get("/x").header("cookie", &format!("a=b; {seat}")))?;
            ensure!(again.header("set-cookie").is_none() && again.json()?["pod"] == pod, "{pod}: {again:?}");
        }
        seen.insert(pod.to_string());
    }
    ensure!(seen.len() == 2, "sixteen cookies lead to one of two: {seen:?}");
    Ok(())
}

fn a_session(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::at(place, lab)?;
    let weights = |one: u32, two: u32| {
        json!([{
            "name": "split", "sessionPersistence": {"sessionName": "seat"},
            "backendRefs": [{"name": "v1", "port": 80, "weight": one}, {"name": "v2", "port": 80, "weight": two}],
        }])
    };
    shop.route(lab, weights(0, 1))?;
    let _run = place.run(lab)?;
    let at = (vip(1), 80);
    let first = shop.web.http_get(at, "/x")?;
    let cookie = first.header("set-cookie").context("no cookie")?;
    let cookie = cookie.split(';').next().unwrap_or_default().to_owned();
    ensure!(cookie.starts_with("seat=") && first.json()?["pod"] == "v2", "{first:?}");
    shop.route(lab, weights(1, 0))?;
    eventually("newcomers go to the other one", BOUND, || {
        (shop.web.http_get(at, "/x").ok()?.json().ok()?["pod"] == "v1").then_some(())
    })?;
    let seated = Request::get("/x").header("cookie", &format!("a=b; {cookie}"));
    for _ in 0..5 {
        let answer = shop.web.http(at, &seated)?;
        ensure!(answer.header("set-cookie").is_none(), "it was told what it knows: {answer:?}");
        ensure!(answer.json()?["pod"] == "v2", "{answer:?}");
    }
    Ok(())
}

fn a_slow_endpoint(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::both(place, lab)?;
    for service in ["cart", "v2"] {
        policy(lab, service, json!({"loadBalancer": {"simple": "PEAK_EWMA"}}))?;
    }
    let _run = place.run(lab)?;
    // What one Service finds out about a pod holds for all that lead to it.
    ensure!(shop.web.http_get((vip(3), 80), "/sleep/3000")?.status == 200);
    let before = shop.v2.heard().len();
    for _ in 0..20 {
        ensure!(shop.web.http_get((vip(1), 80), "/x")?.json()?["pod"] == "v1");
    }
    ensure!(shop.v2.heard().len() == before, "the slow one was asked: {:?}", shop.v2.heard());
    Ok(())
}

fn an_endpoint_that_comes(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::at(place, lab)?;
    policy(lab, "cart", json!({"loadBalancer": {"warmup": {"duration": "1h", "minimumPercent": 0}}}))?;
    let run = place.run(lab)?;
    let ask = || Ok::<_, anyhow::Error>(shop.web.http_get((vip(1), 80), "/x")?.json()?["pod"] == "v2");
    ensure!(!ask()?, "an endpoint of another Service answered");
    shop.lead_to_both(lab, place)?;
    lab.settle(&run.agents)?;
    let mut early = 0;
    for _ in 0..40 {
        early += usize::from(ask()?);
    }
    ensure!(early <= 4, "{early} of 40 requests went to an endpoint that has just come");
    policy(lab, "cart", json!({"loadBalancer": {"warmup": {"duration": "1ms"}}}))?;
    eventually("it is warm", BOUND, || ask().ok()?.then_some(()))
}

fn a_route_limits(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::at(place, lab)?;
    shop.route(lab, json!([{"name": "all", "backendRefs": [{"name": "v1", "port": 80}]}]))?;
    let limits = json!([{"requests": 2, "interval": "1h", "by": "Header", "header": "x-tenant"}]);
    let target = json!({
        "group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "cart", "sectionName": "all",
    });
    policy_on(lab, "limits", target, json!({"rateLimits": limits}))?;
    let run = place.run(lab)?;
    let ask = |tenant: &str| -> Result<Response> {
        shop.web.http((vip(1), 80), &Request::get("/x").header("x-tenant", tenant))
    };
    for tenant in ["a", "b"] {
        let answers = (0..3).map(|_| ask(tenant)).collect::<Result<Vec<_>>>()?;
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        ensure!(statuses == [200, 200, 429], "{tenant}: {statuses:?}");
        let wait: u64 = answers[2].header("retry-after").context("no retry-after")?.parse()?;
        ensure!((1..=1800).contains(&wait), "{wait}");
        ensure!(answers[2].header("selvedge-reason") == Some("rate-limit"), "{answers:?}");
    }
    let line = run.access_line("the limit", |line| line["status"] == 429)?;
    ensure!(line["reason"] == "rate-limit" && line["route"] == "shop/cart", "{line}");
    ensure!(run.metrics()?.sum("selvedge_http_rate_limited_total", &[]) == 2.0);
    Ok(())
}

/// Clients of two nodes are counted together, and each identity by itself: by the servers' agents, or by the waypoint.
fn a_service_is_limited(lab: &Lab, place: Place) -> Result<()> {
    let shop = Versions::at(place, lab)?;
    let other = lab.pod(PodSpec::new("shop/other", "node-b").service_account("other"))?;
    policy(lab, "v1", json!({"rateLimits": [{"requests": 3, "interval": "1h"}]}))?;
    policy(lab, "v2", json!({"rateLimits": [{"requests": 1, "interval": "1h", "by": "Identity"}]}))?;
    let run = place.run(lab)?;
    let ask = |from: &Pod, service: u8| from.http_get((vip(service), 80), "/x").map(|answer| answer.status);
    let all = [ask(&shop.web, 2)?, ask(&other, 2)?, ask(&shop.web, 2)?, ask(&other, 2)?, ask(&shop.web, 2)?];
    ensure!(all == [200, 200, 200, 429, 429], "{all:?}");
    let each = [ask(&shop.web, 3)?, ask(&shop.web, 3)?, ask(&other, 3)?, ask(&other, 3)?];
    ensure!(each == [200, 429, 200, 429], "{each:?}");
    ensure!((shop.v1.heard().len(), shop.v2.heard().len()) == (3, 2), "what was held back was heard");
    if place == Place::Apart {
        let line = run.access_line("the limit", |line| line["status"] == 429 && line["service"] == "shop/v1")?;
        ensure!(line["reason"] == "rate-limit" && line["direction"] == "relayed", "{line}");
        ensure!(run.metrics()?.sum("selvedge_http_rate_limited_total", &[]) == 4.0);
        return Ok(());
    }
    let server = &run.agents[1];
    let inbound = |line: &Value| line["direction"] == "inbound" && line["status"] == 429;
    let line = server.access_line("the limit", inbound)?;
    ensure!(line["reason"] == "rate-limit" && line["destination_pod"] == "shop/v1", "{line}");
    ensure!(server.metrics()?.sum("selvedge_http_rate_limited_total", &[]) == 2.0);
    Ok(())
}

/// What no agent reads the requests of.
fn connections_take_turns(lab: &Lab) -> Result<()> {
    let shop = Versions::both(Place::Node, lab)?;
    let [one, other] = &shop.pods;
    let plain = ServiceSpec::new("shop/plain").cluster_ip(vip(9)).port("tcp", 80, 8080);
    lab.service(&plain.endpoint(one).endpoint(other))?;
    policy(lab, "plain", json!({"loadBalancer": {"simple": "ROUND_ROBIN"}}))?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let mut pods = Vec::new();
    for _ in 0..10 {
        pods.push(shop.web.http_get((vip(9), 80), "/x")?.json()?["pod"].clone());
    }
    ensure!(pods.windows(2).all(|pair| pair[0] != pair[1]), "{pods:?}");
    Ok(())
}

/// On a Service, under its name.
fn policy(lab: &Lab, service: &str, spec: Value) -> Result<()> {
    policy_on(lab, service, json!({"group": "", "kind": "Service", "name": service}), spec)
}

fn policy_on(lab: &Lab, name: &str, target: Value, mut spec: Value) -> Result<()> {
    spec["targetRefs"] = json!([target]);
    lab.put(&json!({
        "apiVersion": "selvedge.dev/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": {"namespace": "shop", "name": name},
        "spec": spec,
    }))
}
