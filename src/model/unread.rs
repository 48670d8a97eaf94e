//! Policies that speak of requests, or of their tokens, where nobody reads them.

use std::collections::HashSet;
use std::net::IpAddr;

use super::State;
use crate::mesh::{NamespacedName, Workload};
use crate::policy::{Action, PolicyObject, Problem, Rule, Scope, Selection};

impl State {
    /// Policies that are not enforced as written: for what they say, or for where they stand.
    pub fn not_enforced(&self) -> Vec<Problem> {
        self.policies.problems().cloned().chain(self.unread()).collect()
    }

    /// Those that speak of requests and stand over pods to which nobody reads any.
    pub fn unread(&self) -> Vec<Problem> {
        let reading = self.policies.iter().filter_map(|policy| {
            let (field, what, effect) = match policy {
                PolicyObject::Authorization(policy) if policy.action == Action::Custom => {
                    let effect = "there what it matches is denied, for nobody can be asked about a connection";
                    ("spec.action".to_owned(), "asks about requests", effect)
                }
                PolicyObject::Authorization(policy) => {
                    let rule = policy.rules.iter().position(Rule::reads_requests)?;
                    let effect =
                        "there an ALLOW rule with it matches nothing, and a DENY rule matches whatever the request";
                    (format!("spec.rules[{rule}]"), "speaks of requests", effect)
                }
                PolicyObject::RequestAuthentication(_) => {
                    let effect = "there tokens and claims are neither verified nor taken out";
                    ("spec.jwtRules".to_owned(), "judges tokens of requests", effect)
                }
                PolicyObject::PeerAuthentication(_) | PolicyObject::Malformed(_) => return None,
            };
            Some((policy, field, what, effect))
        });
        let mut reading = reading.peekable();
        if reading.peek().is_none() {
            return Vec::new();
        }
        let read: HashSet<IpAddr> = self.mesh.read_addresses().map(|addr| addr.ip()).collect();
        let problems = reading.filter_map(|(policy, field, what, effect)| {
            let cause = self.cause(policy.scope(), &read)?;
            Some(Problem {
                policy: policy.reference(),
                field,
                cause: format!("it {what}, and {cause}: {effect}; {CURE}"),
            })
        });
        let mut problems: Vec<Problem> = problems.collect();
        problems.sort_by(|a, b| a.policy.cmp(&b.policy));
        problems
    }

    fn cause(&self, scope: &Scope, read: &HashSet<IpAddr>) -> Option<String> {
        if let Selection::Services(services) = &scope.selection {
            let unread = |name: &&NamespacedName| !self.mesh.is_read(name);
            let service = services.iter().filter(|name| self.mesh.service(name).is_some()).find(unread)?;
            return Some(format!("nobody reads those to Service {service}"));
        }
        let unread = |workload: &&Workload| {
            workload.membership.is_joined()
                && workload.pod.is_live()
                && scope.selects(&workload.pod)
                && !workload.pod.ips.iter().any(|ip| read.contains(&ip.to_canonical()))
        };
        let mut unread = self.mesh.workloads().map(|workload| &**workload).filter(unread).map(Workload::name);
        let first = unread.next()?;
        let (first, more) = unread.fold((first, 0), |(first, more), name| (first.min(name), more + 1));
        Some(match more {
            0 => format!("nobody reads those to pod {first}"),
            more => format!("nobody reads those to pod {first} and {more} more"),
        })
    }
}

const CURE: &str = "annotate a Service that leads there, or its namespace, with selvedge.dev/waypoint: node, and let its \
                    port declare http (by its name or appProtocol)";
