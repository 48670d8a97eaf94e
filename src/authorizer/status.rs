//! Whether an authorizer can be asked, for its status.

use super::Authorizer;
use crate::mesh::AppProtocol;
use crate::route::status::{Condition, ServiceFacts, ServiceShape};

/// The one condition of an authorizer, by what is known of the Service that it names and of what its port declares.
pub fn accepted(authorizer: &Authorizer, service: Option<&ServiceFacts>, declared: Option<AppProtocol>) -> Condition {
    let (is_true, reason, message) = match problem(authorizer, service, declared) {
        None => (true, ACCEPTED, format!("Port {} of Service {} is asked.", authorizer.port, authorizer.service)),
        Some((reason, cause)) => (false, reason, format!("{cause} {REFUSED}")),
    };
    Condition { kind: ACCEPTED, is_true, reason, message }
}

/// The condition of one that cannot be read, and why not.
pub fn malformed(why: &str) -> Condition {
    let message = format!("{why}. {REFUSED}");
    Condition { kind: ACCEPTED, is_true: false, reason: "Malformed", message }
}

/// Why nobody can be asked there, if so: the reason in one word, and a sentence.
fn problem(
    authorizer: &Authorizer,
    service: Option<&ServiceFacts>,
    declared: Option<AppProtocol>,
) -> Option<(&'static str, String)> {
    let (name, port) = (&authorizer.service, authorizer.port);
    let Some(facts) = service else {
        let cause = format!("spec.service: there is no Service {name}; make it, or name another.");
        return Some((NOT_FOUND, cause));
    };
    if facts.shape == ServiceShape::ExternalName {
        let cause = format!(
            "spec.service: Service {name} is an ExternalName, which has no endpoints that could be asked; name one with \
             a selector."
        );
        return Some(("UnsupportedValue", cause));
    }
    if !facts.ports.iter().any(|(number, _)| *number == port) {
        let ports: Vec<String> = facts.ports.iter().map(|(number, _)| number.to_string()).collect();
        let has = if ports.is_empty() { "it has none".to_owned() } else { format!("it has {}", ports.join(", ")) };
        let cause = format!("spec.service.port: Service {name} has no TCP port {port}; {has}.");
        return Some((NOT_FOUND, cause));
    }
    (declared == Some(AppProtocol::Tls)).then(|| {
        let cause = format!(
            "spec.service.port: port {port} of Service {name} declares TLS of its own, and what is asked is plain HTTP, which \
             the mesh encrypts; name a port that speaks it."
        );
        ("UnsupportedProtocol", cause)
    })
}

const ACCEPTED: &str = "Accepted";
const NOT_FOUND: &str = "BackendNotFound";
const REFUSED: &str = "Requests that it would be asked about are refused.";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mesh::{NamespacedName, Waypoint};

    fn facts(shape: ServiceShape) -> ServiceFacts {
        ServiceFacts { shape, ports: vec![(80, "http".into())], waypoint: Waypoint::None, without: None }
    }

    fn of(port: u16, service: Option<&ServiceFacts>, declared: Option<AppProtocol>) -> (bool, &'static str, String) {
        let object = json!({"spec": {"service": {"name": "gate", "namespace": "auth", "port": port}, "http": {}}});
        let authorizer = Authorizer::decode(&NamespacedName::new("shop", "login"), &object).unwrap();
        let told = accepted(&authorizer, service, declared);
        assert_eq!(told.kind, "Accepted");
        (told.is_true, told.reason, told.message)
    }

    #[test]
    fn a_port_of_a_service_that_is_there_can_be_asked() {
        for shape in [ServiceShape::ClusterIp, ServiceShape::Headless] {
            for declared in [None, Some(AppProtocol::Http), Some(AppProtocol::Grpc), Some(AppProtocol::Tcp)] {
                assert_eq!(of(80, Some(&facts(shape)), declared).1, "Accepted", "{shape:?}, {declared:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_asked_is_named_with_its_field() {
        let there = facts(ServiceShape::ClusterIp);
        for (told, reason, words) in [
            (of(80, None, None), "BackendNotFound", "there is no Service auth/gate"),
            (of(81, Some(&there), None), "BackendNotFound", "has no TCP port 81; it has 80"),
            (of(80, Some(&facts(ServiceShape::ExternalName)), None), "UnsupportedValue", "is an ExternalName"),
            (of(80, Some(&there), Some(AppProtocol::Tls)), "UnsupportedProtocol", "declares TLS of its own"),
        ] {
            assert!(!told.0 && told.1 == reason && told.2.contains(words), "{told:?}");
            assert!(told.2.starts_with("spec.service") && told.2.ends_with("are refused."), "{}", told.2);
        }
    }
}
