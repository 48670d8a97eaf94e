//! What `docs/policy.md` and `docs/l7-policy.md` show can be used as it stands.

use serde::Deserialize;
use serde_json::Value;

use super::super::decode;
use super::kind_of;

#[test]
fn every_example_of_the_reference_decodes_and_is_enforced_as_written() {
    let mut examples = 0;
    for block in REFERENCE.split("```yaml\n").skip(1).chain(OF_REQUESTS.split("```yaml\n").skip(1)) {
        let yaml = block.split("```").next().unwrap();
        for document in serde_yaml::Deserializer::from_str(yaml) {
            let value = Value::deserialize(document).unwrap();
            if value["kind"] == "Service" {
                continue;
            }
            let policy = decode(kind_of(&value), &value).unwrap_or_else(|error| panic!("{error} in\n{yaml}"));
            assert!(policy.unenforced().is_empty(), "{:?} in\n{yaml}", policy.unenforced());
            examples += 1;
        }
    }
    assert!(examples >= 8, "only {examples} examples were found");
}

#[test]
fn the_reference_has_every_field_key_action_and_mode() {
    for word in [
        "principals",
        "namespaces",
        "serviceAccounts",
        "ipBlocks",
        "notPrincipals",
        "notNamespaces",
        "notServiceAccounts",
        "notIpBlocks",
        "ports",
        "notPorts",
        "source.ip",
        "source.namespace",
        "source.principal",
        "destination.ip",
        "destination.port",
        "values",
        "notValues",
        "ALLOW",
        "DENY",
        "AUDIT",
        "CUSTOM",
        "STRICT",
        "PERMISSIVE",
        "UNSET",
        "DISABLE",
        "portLevelMtls",
        "selector",
        "targetRefs",
        "provider",
        "selvedge.dev/dry-run",
        super::super::ROOT_NAMESPACE,
    ] {
        assert!(
            REFERENCE.contains(&format!("`{word}`"))
                || REFERENCE.contains(&format!("`{word}:"))
                || REFERENCE.contains(&format!("`{word}.")),
            "{word}"
        );
    }
}

#[test]
fn the_page_about_requests_has_every_field_and_key() {
    for word in [
        "hosts",
        "methods",
        "paths",
        "notHosts",
        "notMethods",
        "notPaths",
        "requestPrincipals",
        "notRequestPrincipals",
        "remoteIpBlocks",
        "notRemoteIpBlocks",
        "remote.ip",
        "request.headers[NAME]",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "request.auth.claims[NAME]",
        "selvedge.dev/waypoint: node",
    ] {
        assert!(OF_REQUESTS.contains(&format!("`{word}`")), "{word}");
    }
}

const REFERENCE: &str = include_str!("../../../docs/policy.md");
const OF_REQUESTS: &str = include_str!("../../../docs/l7-policy.md");
