use proptest::prelude::*;

use super::*;

fn lease(holder: Option<&str>, renewed: i64) -> Lease {
    let spec = LeaseSpec {
        holder_identity: holder.map(str::to_owned),
        lease_duration_seconds: Some(15),
        renew_time: Some(MicroTime(Timestamp::from_second(renewed).unwrap())),
        ..LeaseSpec::default()
    };
    Lease { spec: Some(spec), ..Lease::default() }
}

#[test]
fn a_lease_that_nobody_holds_is_taken() {
    let mut observed = Observed::default();
    let now = Instant::now();
    assert_eq!(observed.judge(None, "me", now), Claim::Create);
    assert_eq!(observed.judge(Some(&lease(None, 1)), "me", now), Claim::Take);
    assert_eq!(observed.judge(Some(&lease(Some(""), 1)), "me", now), Claim::Take);
    assert_eq!(observed.judge(Some(&lease(Some("me"), 1)), "me", now), Claim::Renew);
}

#[test]
fn anothers_lease_is_taken_only_once_it_has_not_moved_for_its_duration() {
    let mut observed = Observed::default();
    let began = Instant::now();
    let at = |seconds| began + Duration::from_secs(seconds);
    // Times written by another clock, here one of long ago, mean nothing.
    assert_eq!(observed.judge(Some(&lease(Some("other"), 1)), "me", at(0)), Claim::Wait);
    assert_eq!(observed.judge(Some(&lease(Some("other"), 1)), "me", at(14)), Claim::Wait);
    assert_eq!(observed.judge(Some(&lease(Some("other"), 2)), "me", at(16)), Claim::Wait);
    assert_eq!(observed.judge(Some(&lease(Some("other"), 2)), "me", at(31)), Claim::Wait);
    assert_eq!(observed.judge(Some(&lease(Some("other"), 2)), "me", at(32)), Claim::Take);
}

/// One replica, as the election sees it.
struct Replica {
    name: String,
    observed: Observed,
    leads_until: Option<Instant>,
}

proptest! {
    /// Replicas that look whenever they happen to, and calls that get lost: at no time do two lead.
    #[test]
    fn no_two_replicas_ever_lead(turns in prop::collection::vec((0..3_usize, 0..9_000_u64, any::<bool>()), 1..200)) {
        let mut replicas: Vec<Replica> = (0..3)
            .map(|n| Replica { name: format!("replica-{n}"), observed: Observed::default(), leads_until: None })
            .collect();
        let mut stored: Option<(Lease, u64)> = None;
        let mut now = Instant::now();
        let mut stamp = 0;
        for (who, pause, is_lost) in turns {
            now += Duration::from_millis(pause);
            let replica = &mut replicas[who];
            // A call that does not reach the API server changes nothing.
            if !is_lost {
                let claim = replica.observed.judge(stored.as_ref().map(|(lease, _)| lease), &replica.name, now);
                if claim == Claim::Wait {
                    replica.leads_until = None;
                } else {
                    stamp += 1;
                    let written = lease(Some(&replica.name), stamp);
                    replica.observed.judge(Some(&written), &replica.name, now);
                    replica.leads_until = Some(now + RENEW_DEADLINE);
                    stored = Some((written, 0));
                }
            }
            let leaders = replicas.iter().filter(|replica| replica.leads_until.is_some_and(|until| now < until));
            prop_assert!(leaders.count() <= 1);
        }
    }
}
