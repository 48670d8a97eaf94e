use std::collections::BTreeSet;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::health::{EJECTION, FAILURES};
use super::{Strategy, *};
use crate::mesh::{
    Candidate, InternalTrafficPolicy, Service, ServiceKind, ServicePort, Settings, TargetPort, TrafficDistribution,
};

fn candidate(n: u8) -> Candidate {
    Candidate {
        addr: SocketAddr::new([10, 0, 0, n].into(), 80),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(format!("n{}", n % 2).into()),
        zone: Some(format!("z{}", n % 2).into()),
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
        pod: None,
        key: stable_hash(&[n]),
    }
}

fn destination(candidates: Vec<Candidate>, change: impl FnOnce(&mut Service)) -> ServiceDestination {
    let port = ServicePort { name: "".into(), port: 80, target: TargetPort::Number(80), app_protocol: None };
    let mut service = Service {
        name: NamespacedName::new("shop", "cart"),
        kind: ServiceKind::ClusterIp(vec![[10, 96, 0, 1].into()]),
        external_ips: Vec::new(),
        ports: vec![port.clone()],
        session_affinity: None,
        internal_traffic_policy: InternalTrafficPolicy::Cluster,
        traffic_distribution: None,
        publish_not_ready_addresses: false,
        settings: Settings::default(),
    };
    change(&mut service);
    ServiceDestination { service: Arc::new(service), port, candidates: candidates.into() }
}

fn client() -> Client {
    Client { ip: [10, 0, 1, 1].into(), node: Some("n1".into()), zone: Some("z1".into()) }
}

/// The last bytes of all addresses that a hundred picks choose.
fn picked(balancer: &Balancer, destination: &ServiceDestination, exclude: &[SocketAddr], now: Instant) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(7);
    let pick = |_| balancer.pick(destination, &client(), exclude, now, &mut random);
    let all: BTreeSet<_> = (0..100).filter_map(pick).collect();
    all.into_iter().map(|addr| if let IpAddr::V4(ip) = addr.ip() { ip.octets()[3] } else { 0 }).collect()
}

fn chosen(destination: &ServiceDestination) -> Vec<u8> {
    picked(&Balancer::new(), destination, &[], Instant::now())
}

#[test]
fn ready_endpoints_are_chosen_and_terminating_ones_only_without_them() {
    let mut all: Vec<Candidate> = (1..=4).map(candidate).collect();
    all[0].ready = false;
    all[1] = Candidate { ready: false, terminating: true, ..candidate(2) };
    assert_eq!(chosen(&destination(all.clone(), |_| ())), [3, 4]);
    assert_eq!(chosen(&destination(all.clone(), |s| s.publish_not_ready_addresses = true)), [1, 2, 3, 4]);
    assert_eq!(chosen(&destination(all[..2].to_vec(), |_| ())), [2]);
    assert_eq!(chosen(&destination(all[..1].to_vec(), |_| ())), Vec::<u8>::new());
    assert_eq!(chosen(&destination(Vec::new(), |_| ())), Vec::<u8>::new());
}

#[test]
fn a_local_service_never_leaves_the_node() {
    let local = |s: &mut Service| s.internal_traffic_policy = InternalTrafficPolicy::Local;
    assert_eq!(chosen(&destination((1..=4).map(candidate).collect(), local)), [1, 3]);
    assert_eq!(chosen(&destination(vec![candidate(2)], local)), Vec::<u8>::new());
}

#[test]
fn hints_count_only_if_every_endpoint_has_them_and_some_name_us() {
    let hinted = |n, zone: &str| Candidate { zone_hints: vec![zone.into()], ..candidate(n) };
    assert_eq!(chosen(&destination(vec![hinted(1, "z0"), hinted(2, "z1")], |_| ())), [2]);
    assert_eq!(chosen(&destination(vec![hinted(1, "z0"), candidate(2)], |_| ())), [1, 2]);
    assert_eq!(chosen(&destination(vec![hinted(1, "z0"), hinted(2, "z0")], |_| ())), [1, 2]);
    let node = |n| Candidate { node_hints: vec!["n1".into()], ..hinted(n, "z1") };
    let other = Candidate { node_hints: vec!["n0".into()], ..hinted(3, "z1") };
    assert_eq!(chosen(&destination(vec![node(2), other], |_| ())), [2]);
}

#[test]
fn a_preference_falls_back_when_nothing_is_near_or_all_of_it_was_tried() {
    let zone = |s: &mut Service| s.traffic_distribution = Some(TrafficDistribution::PreferSameZone);
    let node = |s: &mut Service| s.traffic_distribution = Some(TrafficDistribution::PreferSameNode);
    let elsewhere = |n| Candidate { node: Some("n9".into()), ..candidate(n) };
    assert_eq!(chosen(&destination((1..=4).map(candidate).collect(), zone)), [1, 3]);
    assert_eq!(chosen(&destination(vec![candidate(1), elsewhere(3)], node)), [1]);
    assert_eq!(chosen(&destination(vec![candidate(2), elsewhere(3)], node)), [3]);
    assert_eq!(chosen(&destination(vec![candidate(2), candidate(4)], zone)), [2, 4]);
    let both = destination(vec![candidate(1), candidate(2)], zone);
    assert_eq!(picked(&Balancer::new(), &both, &[candidate(1).addr], Instant::now()), [2]);
    assert_eq!(
        picked(&Balancer::new(), &both, &[candidate(1).addr, candidate(2).addr], Instant::now()),
        Vec::<u8>::new()
    );
}

#[test]
fn the_family_that_was_dialled_is_kept_if_possible() {
    let v6 = Candidate { addr: "[fd00::1]:80".parse().unwrap(), ..candidate(1) };
    assert_eq!(chosen(&destination(vec![v6.clone(), candidate(2)], |_| ())), [2]);
    assert_eq!(chosen(&destination(vec![v6], |_| ())), [0]);
}

#[test]
fn a_client_sticks_until_the_time_is_up_or_its_endpoint_goes() {
    let sticky = |s: &mut Service| s.session_affinity = Some(Duration::from_secs(10));
    let all = destination((1..=50).map(candidate).collect(), sticky);
    let (balancer, start) = (Balancer::new(), Instant::now());
    let first = picked(&balancer, &all, &[], start);
    assert_eq!(first.len(), 1);
    assert_eq!(picked(&balancer, &all, &[], start + Duration::from_secs(9)), first);
    assert_eq!(picked(&balancer, &all, &[], start + Duration::from_secs(18)), first, "each use begins it anew");
    let without = destination((1..=50).filter(|n| *n != first[0]).map(candidate).collect(), sticky);
    let second = picked(&balancer, &without, &[], start);
    assert!(second.len() == 1 && second != first);
    balancer.expire(start + Duration::from_secs(3600));
    assert!(balancer.affinity.len() == 0 && balancer.choices.len() == 0);
}

#[test]
fn the_less_loaded_of_two_is_taken() {
    let two = destination(vec![candidate(1), candidate(2)], |_| ());
    let balancer = Balancer::new();
    balancer.opened(candidate(1).addr);
    assert_eq!(picked(&balancer, &two, &[], Instant::now()), [2]);
    balancer.closed(candidate(1).addr);
    assert_eq!(picked(&balancer, &two, &[], Instant::now()), [1, 2]);
    assert!(balancer.endpoints.len() == 0, "an idle endpoint in order is not remembered");
}

#[test]
fn an_endpoint_that_keeps_failing_is_left_out_tried_and_taken_back() {
    let two = destination(vec![candidate(1), candidate(2)], |_| ());
    let (bad, start) = (candidate(1).addr, Instant::now());
    let balancer = Balancer::new();
    (1..FAILURES).for_each(|_| balancer.failed(bad, start));
    assert_eq!(picked(&balancer, &two, &[], start), [1, 2]);
    balancer.failed(bad, start);
    assert_eq!(picked(&balancer, &two, &[], start), [2]);
    // Its time is up: of a hundred connections one tries it, and the others wait for what comes of it.
    let after = start + EJECTION;
    let mut random = StdRng::seed_from_u64(1);
    let tries = (0..100).filter(|_| balancer.pick(&two, &client(), &[], after, &mut random) == Some(bad)).count();
    assert_eq!(tries, 1);
    balancer.failed(bad, after);
    assert!(balancer.is_ejected(bad, after + EJECTION), "the second ejection lasts longer than the first");
    let later = after + 2 * EJECTION;
    assert_eq!(picked(&balancer, &two, &[], later), [1, 2]);
    balancer.succeeded(bad, later);
    assert_eq!(picked(&balancer, &two, &[], later), [1, 2]);
    assert!(balancer.endpoints.len() == 0);
}

#[test]
fn when_all_keep_failing_all_are_tried() {
    let two = destination(vec![candidate(1), candidate(2)], |_| ());
    let (balancer, now) = (Balancer::new(), Instant::now());
    for n in [1, 2, 1, 2, 1, 2] {
        balancer.failed(candidate(n).addr, now);
    }
    assert_eq!(picked(&balancer, &two, &[], now), [1, 2]);
    assert_eq!(picked(&balancer, &two, &[candidate(1).addr], now), [2]);
}

#[test]
fn load_is_spread_and_a_choice_is_worked_out_once() {
    let many: Vec<Candidate> = (0..10_000u32)
        .map(|n| Candidate { addr: SocketAddr::new((0x0a00_0000 + n).to_be_bytes().into(), 80), ..candidate(1) })
        .collect();
    let destination = destination(many, |_| ());
    let (balancer, now, mut random) = (Balancer::new(), Instant::now(), StdRng::seed_from_u64(3));
    for _ in 0..20_000 {
        let addr = balancer.pick(&destination, &client(), &[], now, &mut random).unwrap();
        balancer.opened(addr);
    }
    assert_eq!(balancer.choices.len(), 1);
    let most = balancer.endpoints.parts().flat_map(|part| part.values().map(|h| h.in_flight).max()).max();
    assert!(most <= Some(6), "two choices keep the fullest near the mean of 2, but it has {most:?}");
}

#[test]
fn of_many_threads_one_connection_tries_an_endpoint_that_failed() {
    let two = destination(vec![candidate(1), candidate(2)], |_| ());
    let (balancer, start, bad) = (Balancer::new(), Instant::now(), candidate(1).addr);
    (0..FAILURES).for_each(|_| balancer.failed(bad, start));
    let tries = |seed| {
        let mut random = StdRng::seed_from_u64(seed);
        let picks = (0..500).map(|_| balancer.pick(&two, &client(), &[], start + EJECTION, &mut random));
        picks.filter(|picked| *picked == Some(bad)).count()
    };
    let tried: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|seed| scope.spawn(move || tries(seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(tried, 1);
}

#[test]
fn what_many_threads_open_and_close_counts_up_and_down_to_nothing() {
    let two = destination(vec![candidate(1), candidate(2)], |_| ());
    let balancer = Balancer::new();
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (balancer, two) = (&balancer, &two);
            scope.spawn(move || {
                let (now, mut random) = (Instant::now(), StdRng::seed_from_u64(seed));
                let mut open = Vec::new();
                for _ in 0..500 {
                    let addr = balancer.pick(two, &client(), &[], now, &mut random).unwrap();
                    balancer.opened(addr);
                    open.push(addr);
                }
                open.into_iter().for_each(|addr| balancer.closed(addr));
            });
        }
    });
    assert_eq!(balancer.endpoints.len(), 0);
}

#[test]
fn a_choice_of_endpoints_that_changed_takes_the_place_of_the_former() {
    let mut all = destination((1..=9).map(candidate).collect(), |_| ());
    let (balancer, now) = (Balancer::new(), Instant::now());
    for n in 1..=9 {
        all.candidates = (1..=n).map(candidate).collect::<Vec<_>>().into();
        assert_eq!(picked(&balancer, &all, &[], now), (1..=n).collect::<Vec<_>>());
    }
    assert_eq!(balancer.choices.len(), 1);
}

/// How often each of nine endpoints is chosen of so many picks, `wish` made anew for each.
fn shares(
    balancer: &Balancer,
    destination: &ServiceDestination,
    count: usize,
    now: Instant,
    wish: impl Fn(usize) -> Wish<'static>,
) -> Vec<usize> {
    let mut random = StdRng::seed_from_u64(11);
    let mut counts = vec![0; 10];
    for n in 0..count {
        let picked = balancer.pick_as(destination, &client(), &wish(n), &[], now, &mut random).unwrap();
        if let IpAddr::V4(ip) = picked.ip() {
            counts[usize::from(ip.octets()[3])] += 1;
        }
    }
    counts.remove(0);
    counts
}

#[test]
fn round_robin_gives_each_its_turn() {
    let nine = destination((1..=9).map(candidate).collect(), |_| ());
    let wish = |_| Wish { strategy: Strategy::RoundRobin, ..Wish::default() };
    assert_eq!(shares(&Balancer::new(), &nine, 90, Instant::now(), wish), [10; 9]);
}

#[test]
fn a_hash_leads_to_one_endpoint_and_little_moves_when_one_goes() {
    let nine = destination((1..=9).map(candidate).collect(), |_| ());
    let eight = destination((1..=8).map(candidate).collect(), |_| ());
    let (balancer, now) = (Balancer::new(), Instant::now());
    let mut random = StdRng::seed_from_u64(3);
    let mut lead = |balancer: &Balancer, to: &ServiceDestination, n: u64| {
        let wish = Wish { strategy: Strategy::Hash(stable_hash(&n.to_be_bytes())), ..Wish::default() };
        balancer.pick_as(to, &client(), &wish, &[], now, &mut random).unwrap()
    };
    let last = candidate(9).addr;
    for n in 0..1000 {
        let (before, after) = (lead(&balancer, &nine, n), lead(&balancer, &eight, n));
        assert!(before == after || before == last, "{n} moved from {before} to {after}");
        assert_eq!(before, lead(&Balancer::new(), &nine, n), "another agent has another ring");
    }
    let shares = shares(&balancer, &nine, 9000, now, |n| Wish {
        strategy: Strategy::Hash(stable_hash(&n.to_be_bytes())),
        ..Wish::default()
    });
    assert!(shares.iter().all(|share| (600..1500).contains(share)), "{shares:?}");
}

#[test]
fn the_slow_get_little_and_are_tried_again_later() {
    let nine = destination((1..=9).map(candidate).collect(), |_| ());
    let (balancer, now) = (Balancer::new(), Instant::now());
    for n in 1..=9 {
        balancer.took(candidate(n).addr, Duration::from_millis(if n == 5 { 500 } else { 5 }), now);
    }
    let wish = |_| Wish { strategy: Strategy::PeakEwma, ..Wish::default() };
    let shares_now = shares(&balancer, &nine, 900, now, wish);
    assert_eq!(shares_now[4], 0, "of two the other one is always faster: {shares_now:?}");
    let later = now + Duration::from_secs(200);
    balancer.expire(later);
    assert!(shares(&balancer, &nine, 900, later, wish)[4] > 50, "long ago it was slow");
}

#[test]
fn one_that_comes_takes_its_share_little_by_little() {
    let warmup = Some(Warmup { length: Duration::from_secs(100), least: 10 });
    for strategy in [Strategy::LeastRequest, Strategy::RoundRobin, Strategy::Random] {
        let (balancer, now) = (Balancer::new(), Instant::now());
        let wish = |_| Wish { strategy, warmup, ..Wish::default() };
        let mut nine = destination((1..=8).map(candidate).collect(), |_| ());
        assert_eq!(shares(&balancer, &nine, 800, now, wish).iter().filter(|share| **share > 0).count(), 8);
        nine.candidates = (1..=9).map(candidate).collect::<Vec<_>>().into();
        let at_first = shares(&balancer, &nine, 9000, now, wish)[8];
        let halfway = shares(&balancer, &nine, 9000, now + Duration::from_secs(50), wish)[8];
        let warm = shares(&balancer, &nine, 9000, now + Duration::from_secs(100), wish)[8];
        assert!((20..250).contains(&at_first), "{strategy:?}: {at_first}");
        assert!((350..800).contains(&halfway), "{strategy:?}: {halfway}");
        assert!((850..1150).contains(&warm), "{strategy:?}: {warm}");
    }
}

#[test]
fn a_zone_is_preferred_where_a_policy_says_so_and_what_is_avoided_serves_where_nothing_else_does() {
    let four = destination((1..=4).map(candidate).collect(), |_| ());
    let (balancer, now) = (Balancer::new(), Instant::now());
    let near = Some(Some(TrafficDistribution::PreferSameZone));
    let chosen = shares(&balancer, &four, 100, now, |_| Wish { distribution: near, ..Wish::default() });
    assert!(chosen[1] == 0 && chosen[3] == 0 && chosen[0] > 0, "{chosen:?}");
    let odd = |addr: SocketAddr| addr == candidate(1).addr || addr == candidate(3).addr;
    let mut random = StdRng::seed_from_u64(5);
    for avoid in [&odd as &dyn Fn(SocketAddr) -> bool, &|_| true] {
        let wish = Wish { distribution: near, avoid: Some(avoid), ..Wish::default() };
        let picked = balancer.pick_as(&four, &client(), &wish, &[], now, &mut random).unwrap();
        assert_eq!(odd(picked), avoid(candidate(2).addr), "{picked}");
    }
}

#[test]
fn whoever_sticks_to_an_endpoint_finds_it_by_its_key() {
    let four = destination((1..=4).map(candidate).collect(), |_| ());
    let (balancer, now) = (Balancer::new(), Instant::now());
    let addr = candidate(3).addr;
    let key = balancer.key_of(&four, &client(), addr, now).unwrap();
    assert_eq!(key, stable_hash(&[3]));
    assert_eq!(balancer.of_key(&four, &client(), key, now), Some(addr));
    assert_eq!(balancer.of_key(&four, &client(), 1, now), None);
    let chosen = shares(&balancer, &four, 20, now, |_| Wish { stuck: Some(candidate(3).addr), ..Wish::default() });
    assert_eq!(chosen[2], 20);
}

proptest! {
    /// Whatever happens, a pick is an eligible endpoint that was not tried, and there is one whenever there can be.
    #[test]
    fn a_pick_is_always_eligible(
        seed: u64,
        flags in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>()), 0..8),
        steps in prop::collection::vec((0u8..8, 0u8..5, 0u64..20), 0..60),
        sticky: bool,
    ) {
        let candidates: Vec<Candidate> = flags.iter().zip(1..).map(|((ready, serving, terminating), n)| Candidate {
            ready: *ready, serving: *serving, terminating: *terminating, ..candidate(n)
        }).collect();
        let ready: Vec<_> = candidates.iter().filter(|c| c.ready).map(|c| c.addr).collect();
        let ending: Vec<_> = candidates.iter().filter(|c| c.serving && c.terminating).map(|c| c.addr).collect();
        let eligible = if ready.is_empty() { ending } else { ready };
        let destination = destination(candidates, |s| s.session_affinity = sticky.then_some(Duration::from_secs(9)));
        let (balancer, mut now, mut random) = (Balancer::new(), Instant::now(), StdRng::seed_from_u64(seed));
        for (n, act, seconds) in steps {
            let addr = candidate(n).addr;
            now += Duration::from_secs(seconds);
            match act {
                0 => balancer.opened(addr),
                1 => balancer.closed(addr),
                2 => balancer.succeeded(addr, now),
                3 => balancer.failed(addr, now),
                _ => balancer.expire(now),
            }
            let left: Vec<_> = eligible.iter().copied().filter(|other| *other != addr).collect();
            let picked = balancer.pick(&destination, &client(), &[addr], now, &mut random);
            prop_assert_eq!(picked.is_some(), !left.is_empty());
            prop_assert!(picked.is_none_or(|picked| left.contains(&picked)));
        }
    }
}
