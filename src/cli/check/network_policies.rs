//! NetworkPolicies that close the tunnel's port to joined pods, and those whose other port rules it makes void.

use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::facts::Facts;
use super::{Area, Findings};
use crate::mesh::{Labels, TUNNEL_PORT};
use crate::model::State;

pub fn judge(facts: &Facts, state: &State, findings: &mut Findings) {
    let policies = match &facts.network_policies {
        Ok(policies) => policies,
        Err(cause) => return findings.unknown(Area::NetworkPolicies, format!("the NetworkPolicies: {cause}")),
    };
    let before = findings.0.len();
    for policy in policies.iter().filter(|policy| selects_joined(policy, state)) {
        let name = policy.metadata.name.as_deref().unwrap_or_default();
        let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
        for finding in findings_of(policy) {
            match finding {
                Rule::Closed(rule) => findings.error(
                    Area::NetworkPolicies,
                    format!("NetworkPolicy {namespace}/{name}: {rule} names ports, and {TUNNEL_PORT} is not among them"),
                    format!("add `- port: {TUNNEL_PORT}` there: between joined pods everything arrives on it"),
                ),
                Rule::Void(rule) => findings.warn(
                    Area::NetworkPolicies,
                    format!("NetworkPolicy {namespace}/{name}: {rule} admits port {TUNNEL_PORT} among others"),
                    "through it joined peers reach every port: say which ones by an AuthorizationPolicy (to.operation.ports)",
                ),
            }
        }
    }
    if findings.0.len() == before {
        findings
            .ok(Area::NetworkPolicies, format!("no NetworkPolicy stands between joined pods and port {TUNNEL_PORT}"));
    }
}

/// What a rule makes of the tunnel's port.
#[derive(PartialEq, Eq, Debug)]
enum Rule {
    Closed(String),
    Void(String),
}

fn findings_of(policy: &NetworkPolicy) -> Vec<Rule> {
    let Some(spec) = &policy.spec else { return Vec::new() };
    let ingress = spec.ingress.iter().flatten().map(|rule| &rule.ports);
    let egress = spec.egress.iter().flatten().map(|rule| &rule.ports);
    let named = |kind: &'static str| move |(index, ports)| (format!("spec.{kind}[{index}]"), ports);
    let rules = ingress.enumerate().map(named("ingress")).chain(egress.enumerate().map(named("egress")));
    let judged = rules.filter_map(|(rule, ports)| {
        // Without ports a rule is about all of them.
        let ports = ports.as_deref().filter(|ports| !ports.is_empty())?;
        // What is about UDP alone, such as DNS, is not about the tunnel.
        let tcp: Vec<_> = ports.iter().filter(|port| port.protocol.as_deref().is_none_or(|it| it == "TCP")).collect();
        match tcp.iter().any(|port| admits_tunnel(port)) {
            true if tcp.len() > 1 => Some(Rule::Void(rule)),
            false if !tcp.is_empty() => Some(Rule::Closed(rule)),
            _ => None,
        }
    });
    judged.collect()
}

fn admits_tunnel(port: &NetworkPolicyPort) -> bool {
    let tunnel = i32::from(TUNNEL_PORT);
    match (&port.port, port.end_port) {
        (None, _) => true,
        (Some(IntOrString::Int(from)), Some(to)) => (*from..=to).contains(&tunnel),
        (Some(IntOrString::Int(port)), None) => *port == tunnel,
        (Some(IntOrString::String(_)), _) => false,
    }
}

fn selects_joined(policy: &NetworkPolicy, state: &State) -> bool {
    let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
    let Some(spec) = &policy.spec else { return false };
    state.mesh.workloads().any(|workload| {
        workload.membership.is_joined()
            && &*workload.name().namespace == namespace
            && matches(spec.pod_selector.as_ref(), &workload.pod.labels)
    })
}

/// As the API conventions say it: an absent or empty selector selects everything.
fn matches(selector: Option<&LabelSelector>, labels: &Labels) -> bool {
    let Some(selector) = selector else { return true };
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    equal
        && selector.match_expressions.iter().flatten().all(|requirement| {
            let value = labels.get(&requirement.key);
            let listed = || value.is_some_and(|value| requirement.values.iter().flatten().any(|it| it == value));
            match &*requirement.operator {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(spec: &str) -> Vec<Rule> {
        let policy = format!("{{metadata: {{name: a, namespace: shop}}, spec: {{podSelector: {{}}, {spec}}}}}");
        findings_of(&serde_yaml::from_str(&policy).unwrap())
    }

    #[test]
    fn a_rule_that_names_other_ports_closes_the_tunnel() {
        assert_eq!(rules("ingress: [{ports: [{port: 8080}]}]"), [Rule::Closed("spec.ingress[0]".into())]);
        assert_eq!(rules("ingress: [{ports: [{port: http}]}]"), [Rule::Closed("spec.ingress[0]".into())]);
        assert_eq!(
            rules("egress: [{}, {ports: [{port: 443, protocol: TCP}]}]"),
            [Rule::Closed("spec.egress[1]".into())]
        );
    }

    #[test]
    fn a_rule_that_admits_the_tunnel_makes_its_other_ports_void() {
        assert_eq!(rules("ingress: [{ports: [{port: 8080}, {port: 15008}]}]"), [Rule::Void("spec.ingress[0]".into())]);
        assert_eq!(rules("ingress: [{ports: [{port: 15000, endPort: 15100}]}]"), []);
    }

    #[test]
    fn a_rule_without_ports_or_of_another_protocol_says_nothing_of_the_tunnel() {
        assert_eq!(rules("ingress: [{}, {ports: []}]"), []);
        assert_eq!(rules("egress: [{ports: [{port: 53, protocol: UDP}]}]"), []);
        assert_eq!(rules("policyTypes: [Ingress]"), []);
    }
}
