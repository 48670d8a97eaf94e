use std::time::SystemTime;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use proptest::prelude::*;

use super::*;
use crate::controller::root::material::ROTATE;
use crate::identity::hash_of;
use crate::mesh::TrustDomain;

/// The cluster's side of a rotation: what is stored, and what agents hold.
struct Cluster {
    secret: Secret,
    bundle: ConfigMap,
    /// What each node's agent has read of the bundle.
    held: Vec<Vec<CertificateDer<'static>>>,
    /// Under which anchor the certificates of each node's pods are, until when they are valid.
    certificates: Vec<(CertificateDer<'static>, Timestamp)>,
    now: Timestamp,
}

fn domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

const LONGEST: Duration = Duration::from_secs(3600);

impl Cluster {
    fn new(nodes: usize) -> Self {
        let secret = CaSecret::first("selvedge-system", &domain(), SystemTime::now()).unwrap();
        let read = CaSecret::read(secret.clone()).unwrap();
        let bundle = Bundle::first("selvedge-system", &read.current);
        let anchors = read.current.anchors;
        let now = Timestamp::now();
        Self {
            secret,
            bundle,
            held: vec![anchors.clone(); nodes],
            certificates: vec![(anchors[0].clone(), now + LONGEST); nodes],
            now,
        }
    }

    fn secret(&self) -> CaSecret {
        CaSecret::read(self.secret.clone()).unwrap()
    }

    fn bundle(&self) -> Bundle {
        Bundle::read(self.bundle.clone()).unwrap()
    }

    fn nodes(&self) -> Vec<NodeTrust> {
        let node =
            |(number, held): (usize, &Vec<_>)| NodeTrust { node: format!("node-{number}"), hash: Some(hash_of(held)) };
        self.held.iter().enumerate().map(node).collect()
    }

    fn ask(&mut self) {
        self.secret.metadata.annotations.get_or_insert_default().insert(ROTATE.to_owned(), "now".to_owned());
    }

    /// One step of whoever leads: nothing is remembered from one to the next.
    fn step(&mut self) -> Step {
        let (secret, bundle) = (self.secret(), self.bundle());
        let step = next(&secret, &bundle, &self.nodes(), self.now, LONGEST);
        match &step {
            Step::Nothing | Step::AwaitNodes(_) | Step::AwaitRenewal(_) => {}
            Step::MakeRoot => self.secret = secret.with_new_root(&domain(), SystemTime::now()).unwrap(),
            Step::DropRequest => self.secret = secret.without_request(),
            Step::Introduce(missing) => self.bundle = bundle.with(missing),
            Step::Switch => self.bundle = bundle.switched(&secret.current.anchors, self.now),
            Step::Retire => self.bundle = bundle.retired(&secret.current.anchors),
            Step::DropPrevious => self.secret = secret.without_previous(),
        }
        step
    }

    /// The agent of a node reads the bundle.
    fn deliver(&mut self, node: usize) {
        self.held[node] = self.bundle().anchors;
    }

    /// A pod of a node gets a new certificate; whether somebody signs.
    fn renew(&mut self, node: usize) -> bool {
        let (secret, bundle) = (self.secret(), self.bundle());
        let Some(pair) = signing_pair(&secret, &bundle) else { return false };
        self.certificates[node] = (pair.signing().unwrap().anchor.unwrap(), self.now + LONGEST);
        true
    }

    /// Every node believes every certificate that is valid.
    fn all_believe(&self) -> bool {
        let valid = self.certificates.iter().filter(|(_, until)| *until > self.now);
        valid.into_iter().all(|(anchor, _)| self.held.iter().all(|held| held.contains(anchor)))
    }
}

#[test]
fn a_rotation_goes_through_its_phases_and_ends_with_one_root() {
    let mut cluster = Cluster::new(2);
    let old = cluster.bundle().anchors;
    assert_eq!(cluster.step(), Step::Nothing);
    cluster.ask();
    assert_eq!(cluster.step(), Step::MakeRoot);
    assert_eq!(Phase::of(&cluster.secret(), &cluster.bundle()), Phase::Introducing);
    assert!(matches!(cluster.step(), Step::Introduce(_)));
    assert_eq!(cluster.step(), Step::AwaitNodes(vec!["node-0".to_owned(), "node-1".to_owned()]));
    cluster.deliver(0);
    assert_eq!(cluster.step(), Step::AwaitNodes(vec!["node-1".to_owned()]));
    cluster.deliver(1);
    assert_eq!(cluster.step(), Step::Switch);
    assert_eq!(Phase::of(&cluster.secret(), &cluster.bundle()), Phase::Retiring);
    assert!(matches!(cluster.step(), Step::AwaitRenewal(_)));
    cluster.now += LONGEST + MARGIN;
    assert_eq!(cluster.step(), Step::Retire);
    assert_eq!(cluster.step(), Step::DropPrevious);
    assert_eq!(cluster.step(), Step::Nothing);
    let new = cluster.bundle().anchors;
    assert!(new.len() == 1 && new != old);
    assert_eq!(new, cluster.secret().current.anchors);
    assert!(cluster.secret().previous.is_none());
}

#[test]
fn a_root_that_was_brought_is_not_replaced_on_request_but_followed() {
    let mut cluster = Cluster::new(1);
    cluster.secret.metadata.annotations = None;
    cluster.ask();
    assert_eq!(cluster.step(), Step::DropRequest);
    assert_eq!(cluster.step(), Step::Nothing);
    // cert-manager writes another.
    let other = CaSecret::first("selvedge-system", &domain(), SystemTime::now()).unwrap();
    cluster.secret.data = other.data;
    assert!(matches!(cluster.step(), Step::Introduce(_)));
    assert!(signing_pair(&cluster.secret(), &cluster.bundle()).is_none(), "signed by what nobody trusts yet");
    cluster.deliver(0);
    assert_eq!(cluster.step(), Step::Switch);
    assert!(signing_pair(&cluster.secret(), &cluster.bundle()).is_some());
}

#[test]
fn a_node_that_says_nothing_is_waited_for() {
    let mut cluster = Cluster::new(1);
    cluster.ask();
    cluster.step();
    cluster.step();
    let nodes = [NodeTrust { node: "silent".to_owned(), hash: None }];
    let step = next(&cluster.secret(), &cluster.bundle(), &nodes, cluster.now, LONGEST);
    assert_eq!(step, Step::AwaitNodes(vec!["silent".to_owned()]));
}

#[derive(Clone, Debug)]
enum Move {
    Ask,
    Step,
    Deliver(usize),
    Renew(usize),
    Pass(u64),
}

fn any_move() -> impl Strategy<Value = Move> {
    prop_oneof![
        1 => Just(Move::Ask),
        6 => Just(Move::Step),
        4 => (0..3_usize).prop_map(Move::Deliver),
        4 => (0..3_usize).prop_map(Move::Renew),
        2 => (0..2_000_u64).prop_map(Move::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes when, and whoever leads: each agent that hears within the hour believes all others, always, and
    /// somebody signs, always.
    #[test]
    fn no_certificate_is_ever_used_that_somebody_does_not_believe(moves in prop::collection::vec(any_move(), 1..80)) {
        let mut cluster = Cluster::new(3);
        for one in moves {
            match one {
                Move::Ask => cluster.ask(),
                Move::Step => drop(cluster.step()),
                Move::Deliver(node) => cluster.deliver(node),
                Move::Renew(node) => prop_assert!(cluster.renew(node), "nobody signs"),
                Move::Pass(seconds) => cluster.now += Duration::from_secs(seconds),
            }
            prop_assert!(cluster.all_believe());
        }
    }
}
