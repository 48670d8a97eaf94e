//! Rules and routes, as they go into a namespace and out of it.

use super::*;

const MARKS: Marks = Marks { own: 0x539a, outbound: 0x222a, back: 0x111a };

fn rules(mode: Mode) -> RuleSet {
    RuleSet {
        mode,
        phase: Phase::Capturing,
        marks: MARKS,
        ports: Ports::default(),
        exclusions: Exclusions::default(),
        hold: true,
        probes: Some(Probes {
            queue: 7,
            ports: [8080].into(),
            node_addresses: ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()].into(),
        }),
    }
}

fn every_way() -> impl Iterator<Item = Chosen> {
    [BackEnd::Nft, BackEnd::Legacy].into_iter().flat_map(|back_end| {
        [Mode::Tproxy, Mode::Redirect]
            .into_iter()
            .map(move |mode| Chosen::detect(Some(mode), Some(back_end)).expect("it works here"))
    })
}

#[test]
fn rules_go_in_once_and_come_out_by_every_way() {
    for chosen in every_way() {
        in_namespace(|| {
            for phase in [Phase::Capturing, Phase::Capturing, Phase::Leaving, Phase::Capturing] {
                let found = chosen.program(&RuleSet { phase, ..rules(chosen.mode) }).unwrap();
                assert_eq!(found.places.len(), 2, "both families: {found:?}");
                for place in &found.places {
                    assert_eq!(place.back_end, chosen.back_end);
                    for table in &place.in_place.tables {
                        let jumps = table.rules.iter().filter(|rule| !rule.starts_with("-A SELVEDGE_")).count();
                        assert_eq!(jumps, 2, "{table:?}");
                        assert!(table.jumps_first);
                        assert_eq!(table.chains.len(), 2);
                    }
                }
                let read = found.marks().unwrap();
                assert_eq!((read.own, read.back), (MARKS.own, MARKS.back));
            }
            chosen.remove().unwrap();
            assert!(chosen.found().unwrap().is_empty());
            let left = sh("iptables-nft-save; ip6tables-nft-save; iptables-legacy-save; ip6tables-legacy-save");
            assert!(!left.contains("SELVEDGE"), "{left}");
        });
    }
}

#[test]
fn rules_left_in_the_other_back_end_are_found_with_their_marks_and_removed() {
    let nft = Chosen::detect(Some(Mode::Tproxy), Some(BackEnd::Nft)).unwrap();
    let legacy = Chosen::detect(Some(Mode::Redirect), Some(BackEnd::Legacy)).unwrap();
    in_namespace(|| {
        legacy.program(&rules(Mode::Redirect)).unwrap();
        let marks = nft.found().unwrap().marks().unwrap();
        let found = nft.program(&RuleSet { marks, ..rules(Mode::Tproxy) }).unwrap();
        assert!(found.places.iter().all(|place| place.back_end == BackEnd::Nft), "{found:?}");
        assert_eq!(found.marks().unwrap().own, MARKS.own);
    });
}

#[test]
fn rules_of_another_mesh_are_found_in_either_back_end() {
    let chosen = Chosen::detect(None, None).unwrap();
    for tool in ["iptables-nft", "ip6tables-legacy"] {
        in_namespace(|| {
            sh(&format!("{tool} -w -t nat -N ISTIO_OUTPUT"));
            assert_eq!(chosen.found().unwrap().other_mesh.unwrap().mesh, "Istio", "{tool}");
        });
    }
}

#[test]
fn a_fingerprint_changes_with_the_rules_and_not_with_traffic() {
    for back_end in [BackEnd::Nft, BackEnd::Legacy] {
        in_namespace(|| {
            let name = back_end.name();
            let tables = [format!("iptables-{name} -t mangle"), format!("ip6tables-{name} -t mangle")];
            for table in &tables {
                sh(&format!("{table} -A OUTPUT -p udp --dport 7 -j ACCEPT; {table} -A OUTPUT -p udp --dport 8"));
            }
            let before = Fingerprint::take();
            for to in ["127.0.0.1:7", "[::1]:8"] {
                let socket =
                    std::net::UdpSocket::bind(if to.contains('[') { "[::1]:0" } else { "127.0.0.1:0" }).unwrap();
                socket.send_to(b"counted", to.parse::<std::net::SocketAddr>().unwrap()).unwrap();
            }
            let counted = sh(&format!("{} -nvxL OUTPUT; {} -nvxL OUTPUT", tables[0], tables[1]));
            assert_eq!(counted.lines().filter(|line| line.trim().starts_with("1 ")).count(), 2, "{counted}");
            assert_eq!(Fingerprint::take(), before, "{name}: traffic alone");
            let mut known = before;
            for change in ["-R OUTPUT 1 -p udp --dport 9 -j ACCEPT", "-R OUTPUT 2 -p udp --sport 8", "-P OUTPUT DROP"] {
                for table in &tables {
                    sh(&format!("{table} {change}"));
                    let now = Fingerprint::take();
                    assert_ne!(now, known, "{table} {change}");
                    known = now;
                }
            }
        });
    }
}

#[test]
fn routes_are_there_exactly_once_and_go() {
    in_namespace(|| {
        for version in [IpVersion::V4, IpVersion::V6] {
            assert!(Routing::ensure(version, &MARKS).unwrap());
            assert!(!Routing::ensure(version, &MARKS).unwrap(), "nothing to repair");
            assert_eq!(Routing::read(version).unwrap(), Routing::wanted(&MARKS));
        }
        sh("ip rule add fwmark 0x7/0xffff lookup 15001; ip route flush table 15001; ip rule del fwmark 0x222a/0xffff");
        assert!(Routing::ensure(IpVersion::V4, &MARKS).unwrap());
        assert_eq!(Routing::read(IpVersion::V4).unwrap(), Routing::wanted(&MARKS));
        for version in [IpVersion::V4, IpVersion::V6] {
            Routing::remove(version).unwrap();
            assert_eq!(Routing::read(version).unwrap(), Routing::default());
        }
        assert!(!sh("ip rule; ip -6 rule; ip route show table all").contains("15001"));
    });
}

#[test]
fn half_closed_flows_are_remembered_for_a_day_and_the_old_values_come_back() {
    let chosen = Chosen::detect(None, None).unwrap();
    in_namespace(|| {
        chosen.program(&rules(chosen.mode)).unwrap();
        assert_eq!(raise_timeouts().unwrap(), Timeouts::DEFAULT);
        assert!(Timeouts::read().unwrap().are_raised());
        let before = raise_timeouts().unwrap();
        before.write().unwrap();
        assert_eq!(Timeouts::read().unwrap(), Timeouts::DEFAULT);
    });
}

#[test]
fn a_look_from_outside_sees_what_is_in_place() {
    let chosen = Chosen::detect(None, None).unwrap();
    in_namespace(|| {
        chosen.program(&rules(chosen.mode)).unwrap();
        let here = NetNs::current().unwrap();
        let found = Found::look(&here).unwrap();
        assert_eq!(found.marks().unwrap().own, MARKS.own);
        Ok::<_, io::Error>(())
    })
    .unwrap();
}
