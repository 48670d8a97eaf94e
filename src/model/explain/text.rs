//! An explanation as a person reads it.

use std::fmt;

use super::{AnswerExplanation, Explanation, RequestExplanation, TokenExplanation};
use crate::policy::{self, Verdict};

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} to {} port {}: {}", self.from, self.to, self.port, in_words(self.verdict))?;
        writeln!(f, "  because {}", self.summary)?;
        if let Some(reason) = &self.reason {
            writeln!(f, "  reason  {reason}")?;
        }
        if let Some(waypoint) = &self.through {
            writeln!(f, "  through waypoint {waypoint}")?;
        }
        for endpoint in &self.endpoints {
            let workload = endpoint.workload.as_deref().map(|name| format!(" (pod {name})")).unwrap_or_default();
            let way = match &*endpoint.path {
                "tunnel" => "through the tunnel",
                "same-node" => "joined by its node's agent, off the wire",
                "plaintext" => "in plaintext",
                _ => "nothing is sent",
            };
            writeln!(f, "\n  {}{workload}: {}, {way}", endpoint.address, in_words(endpoint.verdict))?;
            // Of one endpoint everything has been said above.
            if self.endpoints.len() > 1 {
                writeln!(f, "    because {}", endpoint.summary)?;
            }
            if let Some(identity) = &endpoint.source_identity {
                writeln!(f, "    source  {identity}")?;
            }
            endpoint.token.iter().try_for_each(|token| write_token(f, token))?;
            if let Some(note) = &endpoint.note {
                writeln!(f, "    note    {note}")?;
            }
            endpoint.policies.iter().try_for_each(|policies| write_policies(f, &policies.policies))?;
        }
        Ok(())
    }
}

impl fmt::Display for RequestExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} to {} port {}: {}", self.from, self.to, self.port, self.request)?;
        writeln!(f, "  because {}", self.summary)?;
        if let Some(waypoint) = &self.through {
            writeln!(f, "  through waypoint {waypoint}")?;
        }
        if let Some(answer) = &self.answer {
            writeln!(f, "\n  it is answered with {answer}")?;
        }
        for backend in &self.backends {
            write!(f, "\n  {} of {} go to {}", backend.weight, backend.of, backend.to)?;
            if let Some(request) = &backend.request {
                write!(f, ", as {request}")?;
            }
            match (&backend.answer, &backend.connection) {
                (Some(answer), _) => writeln!(f, ": answered with {answer}")?,
                (None, Some(connection)) => {
                    writeln!(f, ": {}", in_words(connection.verdict))?;
                    writeln!(f, "    because {}", connection.summary)?;
                    if let Some(reason) = &connection.reason {
                        writeln!(f, "    reason  {reason}")?;
                    }
                    // Those of one Service have their tokens judged alike, as a rule.
                    let mut tokens: Vec<_> = connection.endpoints.iter().filter_map(|one| one.token.as_ref()).collect();
                    tokens.dedup();
                    tokens.into_iter().try_for_each(|token| write_token(f, token))?;
                }
                (None, None) => writeln!(f)?,
            }
            for traffic in &backend.traffic {
                writeln!(f, "    {} of {}", traffic.field, traffic.from)?;
            }
        }
        Ok(())
    }
}

fn write_token(f: &mut fmt::Formatter<'_>, token: &TokenExplanation) -> fmt::Result {
    // That one is refused has been said: it is why.
    if token.answer.is_some() {
        return Ok(());
    }
    writeln!(f, "    token   {}", token.summary)?;
    token.headers.iter().try_for_each(|header| writeln!(f, "            gives {header}"))
}

impl fmt::Display for AnswerExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.grpc_status {
            Some(status) => write!(f, "gRPC status {status}")?,
            None => write!(f, "{}", self.status)?,
        }
        self.location.iter().try_for_each(|location| write!(f, ", location {location}"))
    }
}

fn in_words(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allow => "allowed",
        Verdict::Deny => "denied",
    }
}

/// Those that stand over the endpoint with all their rules, the others by name alone.
fn write_policies(f: &mut fmt::Formatter<'_>, policies: &[policy::Considered]) -> fmt::Result {
    let (standing, others): (Vec<_>, Vec<_>) = policies.iter().partition(|policy| policy.stands);
    for policy in standing {
        let mark = if policy.matched { "matches" } else { "does not match" };
        write!(f, "    - {} {} ({}) {mark}", policy.kind, policy.policy, policy.action)?;
        match &policy.rules[..] {
            [] | [_] => writeln!(f, ": {}", policy.why)?,
            rules => {
                writeln!(f)?;
                for rule in rules {
                    writeln!(f, "        {} {}", if rule.matched { "yes" } else { "no " }, rule.why)?;
                }
            }
        }
    }
    if others.is_empty() {
        return Ok(());
    }
    let names: Vec<String> =
        others.iter().take(SHOWN).map(|other| format!("{} {}", other.kind, other.policy)).collect();
    let more = others.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    writeln!(f, "    - not over this endpoint: {}{more}", names.join(", "))
}

/// How many policies that do not stand over an endpoint are named.
const SHOWN: usize = 5;
