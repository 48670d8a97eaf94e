use super::*;

fn rules(mode: Mode) -> RuleSet {
    RuleSet {
        mode,
        phase: Phase::Capturing,
        marks: Marks { own: 0x539a, outbound: 0x222a, back: 0x111a },
        ports: Ports::default(),
        exclusions: Exclusions::default(),
        probes: None,
        hold: false,
    }
}

fn chain<'a>(text: &'a str, table: &str, chain: &str) -> Vec<&'a str> {
    let start = text.find(&format!("*{table}\n")).expect("the table is there");
    let text = &text[start..];
    let text = &text[..text.find("COMMIT").expect("the table ends")];
    text.lines().filter_map(|line| line.strip_prefix(&format!("-A {chain} "))).collect()
}

#[test]
fn tproxy_rules_are_in_the_order_that_was_tried() {
    let text = rules(Mode::Tproxy).program(IpVersion::V4, &InPlace::default());
    assert_eq!(
        chain(&text, "mangle", OUT),
        [
            "-m mark --mark 0x539a/0xffff -j RETURN",
            "-m connmark --mark 0x111a/0xffff -j MARK --set-xmark 0x111a/0xffff",
            "-m connmark --mark 0x111a/0xffff -j RETURN",
            "-m connmark --mark 0x222a/0xffff -j MARK --set-xmark 0x222a/0xffff",
            "-m connmark --mark 0x222a/0xffff -j RETURN",
            "-o lo -j RETURN",
            "-d 169.254.0.0/16 -j RETURN",
            "-d 224.0.0.0/4 -j RETURN",
            "-d 255.255.255.255/32 -j RETURN",
            "-p tcp --syn -m conntrack --ctstate NEW -j CONNMARK --set-xmark 0x222a/0xffff",
            "-m connmark --mark 0x222a/0xffff -j MARK --set-xmark 0x222a/0xffff",
        ]
    );
    assert_eq!(
        chain(&text, "mangle", IN),
        [
            "-i lo -p tcp --syn -m mark --mark 0x539a/0xffff -j CONNMARK --set-xmark 0x111a/0xffff",
            "-i lo -p tcp -m mark --mark 0x222a/0xffff -j TPROXY --on-port 15001 --on-ip 127.0.0.1 --tproxy-mark 0x222a/0xffff",
            "-i lo -j RETURN",
            "-m connmark --mark 0x111a/0xffff -j DROP",
            "-p tcp --dport 15008 -j RETURN",
            "-p tcp -m socket --transparent -j RETURN",
            "-m addrtype ! --dst-type LOCAL -j RETURN",
            "-p tcp ! --syn -m socket -j RETURN",
            "-p tcp -j TPROXY --on-port 15006 --on-ip 127.0.0.1",
        ]
    );
    assert!(!text.contains("*nat"), "{text}");
}

#[test]
fn a_syn_is_held_after_every_exception_and_before_it_is_captured() {
    for mode in [Mode::Tproxy, Mode::Redirect] {
        let text = RuleSet { hold: true, ..rules(mode) }.program(IpVersion::V4, &InPlace::default());
        let out = chain(&text, "mangle", OUT);
        let held = out.iter().position(|rule| rule.contains("NFQUEUE")).expect("outbound SYNs are held");
        assert_eq!(
            out[held - 1..=held],
            [
                "-d 255.255.255.255/32 -j RETURN",
                "-p tcp --syn -m conntrack --ctstate NEW -m mark --mark 0x0/0x40000 -j NFQUEUE --queue-num 15001",
            ]
        );
        assert_eq!(out[held + 1..].is_empty(), mode == Mode::Redirect, "{text}");
        let arriving = chain(&text, "mangle", IN);
        let held = arriving.iter().position(|rule| rule.contains("NFQUEUE")).expect("inbound SYNs are held");
        let last_exception = match mode {
            Mode::Tproxy => "-p tcp ! --syn -m socket -j RETURN",
            Mode::Redirect => "-m addrtype ! --dst-type LOCAL -j RETURN",
        };
        assert!(arriving[..held].contains(&"-p tcp --dport 15008 -j RETURN"), "{text}");
        assert_eq!(
            arriving[held - 1..=held],
            [last_exception, "-p tcp --syn -m mark --mark 0x0/0x40000 -j NFQUEUE --queue-num 15001",]
        );
        assert!(!text.contains("queue-bypass"), "a SYN would pass undecided: {text}");
        assert!(!text.contains("*filter"), "every packet would pass by it: {text}");
        let (in_place, _) = InPlace::parse(&text);
        for gone in [rules(mode), RuleSet { hold: true, phase: Phase::Leaving, ..rules(mode) }] {
            let text = gone.program(IpVersion::V4, &in_place);
            assert!(!text.contains("NFQUEUE"), "{text}");
        }
    }
}

#[test]
fn what_an_earlier_version_had_in_the_filter_table_goes() {
    let (in_place, _) = InPlace::parse(
        "*filter\n:SELVEDGE_IN - [0:0]\n-A INPUT -p tcp -j SELVEDGE_IN\n-A SELVEDGE_IN -p tcp -j REJECT\nCOMMIT\n",
    );
    for hold in [true, false] {
        let text = RuleSet { hold, ..rules(Mode::Tproxy) }.program(IpVersion::V4, &in_place);
        let (_, filter) = text.split_once("*filter").expect("the table is changed");
        assert!(filter.contains("-D INPUT -p tcp -j SELVEDGE_IN") && filter.contains("-X SELVEDGE_IN"), "{text}");
    }
}

#[test]
fn exclusions_and_probes_are_of_their_own_family_and_split_by_fifteen_ports() {
    let mut rules = rules(Mode::Tproxy);
    rules.exclusions.inbound_ports = (1..=16).collect();
    rules.exclusions.outbound_cidrs = ["10.1.2.3/8".parse().unwrap(), "fd00::/8".parse().unwrap()].into();
    rules.probes = Some(Probes {
        queue: 7,
        ports: [8080].into(),
        node_addresses: ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()].into(),
    });
    let text = rules.program(IpVersion::V6, &InPlace::default());
    let inbound = chain(&text, "mangle", IN);
    assert!(inbound.contains(&"-p tcp -m multiport --dports 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15 -j RETURN"), "{text}");
    assert!(inbound.contains(&"-p tcp -m multiport --dports 16 -j RETURN"), "{text}");
    let probes: Vec<_> = inbound.iter().filter(|rule| rule.contains("NFQUEUE")).collect();
    assert_eq!(
        probes,
        [
            &"-s fd00::1 -p tcp --syn -m multiport --dports 8080 -m mark ! --mark 0x10000/0x10000 -j NFQUEUE --queue-num 7"
        ]
    );
    let outbound = chain(&text, "mangle", OUT);
    assert!(outbound.contains(&"-d fd00::/8 -j RETURN") && !text.contains("10.0.0.0"), "{text}");
    assert!(rules.program(IpVersion::V4, &InPlace::default()).contains("-d 10.0.0.0/8 -j RETURN"));
}

#[test]
fn redirect_translates_in_nat_and_keeps_the_client_address_by_mangle() {
    let text = rules(Mode::Redirect).program(IpVersion::V6, &InPlace::default());
    assert!(!text.contains("TPROXY") && !text.contains("-m socket"), "{text}");
    assert_eq!(chain(&text, "nat", OUT).last(), Some(&"-p tcp --syn -j REDIRECT --to-ports 15001"));
    assert_eq!(chain(&text, "nat", IN).last(), Some(&"-p tcp --syn -j REDIRECT --to-ports 15006"));
    assert!(
        chain(&text, "mangle", OUT).contains(&"-m connmark --mark 0x111a/0xffff -j MARK --set-xmark 0x111a/0xffff")
    );
}

#[test]
fn leaving_captures_nothing_new_and_restores_every_mark() {
    for mode in [Mode::Tproxy, Mode::Redirect] {
        let text = RuleSet { phase: Phase::Leaving, ..rules(mode) }.program(IpVersion::V4, &InPlace::default());
        assert!(!text.contains("--ctstate NEW") && !text.contains("15006") && !text.contains("REDIRECT"), "{text}");
        assert!(text.contains("-m connmark --mark 0x111a/0xffff -j MARK --set-xmark 0x111a/0xffff"), "{text}");
        assert!(mode == Mode::Redirect || text.contains("--on-port 15001"), "{text}");
    }
}

#[test]
fn jumps_in_place_are_taken_out_before_they_go_in_first() {
    let saved = "*mangle\n:PREROUTING ACCEPT [0:0]\n:SELVEDGE_OUT - [0:0]\n-A OUTPUT -j MARK --set-xmark 0x1/0x1\n\
                 -A OUTPUT -p tcp -j SELVEDGE_OUT\n-A OUTPUT -p tcp -j SELVEDGE_OUT\nCOMMIT\n";
    let (in_place, other) = InPlace::parse(saved);
    assert_eq!(other, None);
    assert!(!in_place.tables[0].jumps_first);
    let text = rules(Mode::Tproxy).program(IpVersion::V4, &in_place);
    assert_eq!(text.matches("-D OUTPUT -p tcp -j SELVEDGE_OUT").count(), 2, "{text}");
    assert_eq!(text.matches("-I OUTPUT 1 -p tcp -j SELVEDGE_OUT").count(), 1, "{text}");
    let gone = removal(&in_place).expect("there is something to remove");
    assert_eq!(gone.matches("-D OUTPUT").count(), 2, "{gone}");
    assert!(gone.contains("-X SELVEDGE_OUT") && !gone.contains("SELVEDGE_IN"), "{gone}");
    assert_eq!(removal(&InPlace::default()), None);
}

#[test]
fn marks_are_drawn_apart_and_read_back_in_either_mode_and_phase() {
    let mut numbers = [0, 0x539, 5, 5, 6, 5, 6, 7].into_iter();
    assert_eq!(Marks::draw(|| numbers.next().unwrap()), Marks { own: 5, outbound: 6, back: 7 });
    for mode in [Mode::Tproxy, Mode::Redirect] {
        for phase in [Phase::Capturing, Phase::Leaving] {
            let rules = RuleSet { phase, ..rules(mode) };
            let (in_place, _) = InPlace::parse(&rules.program(IpVersion::V4, &InPlace::default()));
            let read = Marks::read(&in_place).expect("the marks are there");
            assert_eq!((read.own, read.back), (0x539a, 0x111a));
            assert!(mode == Mode::Redirect || read.outbound == 0x222a);
        }
    }
}

#[test]
fn rules_of_another_mesh_are_known_by_their_chains() {
    for (chain, mesh) in [("ISTIO_PRERT", "Istio"), ("PROXY_INIT_OUTPUT", "Linkerd"), ("KUMA_MESH_INBOUND", "Kuma")] {
        let (_, other) = InPlace::parse(&format!("*nat\n:PREROUTING ACCEPT [0:0]\n:{chain} - [0:0]\nCOMMIT\n"));
        assert_eq!(other, Some(OtherMesh { mesh: mesh.into(), chain: chain.into() }));
    }
}
