//! What of an object is kept when it is read: the rest is passed over as it is parsed, and never takes memory.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::source::decode::Kind;

/// Which fields of an object are kept. Lists are passed through: what holds of a list holds of each of its items.
#[derive(Clone, Copy, Debug)]
pub(super) enum Keep {
    All,
    /// These fields, and nothing else.
    Only(&'static [(&'static str, Keep)]),
    /// All but these fields; of one with something to keep, that.
    But(&'static [(&'static str, Option<Keep>)]),
    /// The fields whose names begin so.
    Prefixed(&'static str),
}

impl Keep {
    /// What the decoder reads of a kind. Of policies everything is kept that a person may have written: what nobody
    /// knows must be seen, for it fails closed.
    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::Pod => Self::Only(&[("metadata", METADATA), ("spec", POD_SPEC), ("status", POD_STATUS)]),
            Kind::Node => Self::Only(&[
                ("metadata", METADATA),
                ("spec", Self::Only(&[("podCIDR", Self::All), ("podCIDRs", Self::All)])),
                ("status", Self::Only(&[("addresses", Self::All)])),
            ]),
            Kind::Namespace => Self::Only(&[("metadata", METADATA)]),
            Kind::Service => Self::Only(&[
                ("metadata", METADATA),
                ("spec", Self::All),
                ("status", Self::Only(&[("loadBalancer", Self::All)])),
            ]),
            Kind::ServiceCidr => Self::Only(&[("metadata", METADATA), ("spec", Self::All)]),
            Kind::EndpointSlice => Self::Only(&[
                ("metadata", METADATA),
                ("addressType", Self::All),
                ("endpoints", Self::All),
                ("ports", Self::All),
            ]),
            Kind::NetworkPolicy => {
                Self::Only(&[("metadata", METADATA), ("spec", Self::Only(&[("podSelector", Self::All)]))])
            }
            Kind::MeshNode => Self::Only(&[("metadata", METADATA), ("status", Self::Only(&[("captured", Self::All)]))]),
            Kind::Cni(_) => Self::Only(&[("metadata", METADATA)]),
            // All of their spec: what nobody knows of a match or a filter is not passed over.
            Kind::HttpRoute | Kind::GrpcRoute | Kind::TrafficPolicy | Kind::BackendTrafficPolicy => {
                Self::Only(&[("metadata", ROUTE_METADATA), ("spec", Self::All)])
            }
            Kind::Gateway => Self::Only(&[
                ("metadata", METADATA),
                ("spec", Self::Only(&[("gatewayClassName", Self::All), ("listeners", Self::All)])),
            ]),
            Kind::PeerAuthentication | Kind::AuthorizationPolicy | Kind::ExternalAuthorizer => POLICY,
            // With the keys that the controller fetched.
            Kind::RequestAuthentication => {
                Self::But(&[("status", Some(Self::Only(&[("keys", Self::All)]))), ("metadata", Some(POLICY_METADATA))])
            }
            Kind::ConfigMap => Self::Only(&[("metadata", METADATA), ("data", Self::All)]),
        }
    }

    /// Reads an object's JSON as far as it is kept.
    pub fn read(self, json: &str) -> serde_json::Result<Value> {
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let value = self.deserialize(&mut deserializer)?;
        deserializer.end()?;
        Ok(value)
    }

    fn of_field(&self, name: &str) -> Option<Self> {
        match self {
            Self::All => Some(Self::All),
            Self::Only(kept) => kept.iter().find(|(known, _)| *known == name).map(|(_, keep)| *keep),
            Self::But(special) => {
                special.iter().find(|(known, _)| *known == name).map_or(Some(Self::All), |(_, keep)| *keep)
            }
            Self::Prefixed(prefix) => name.starts_with(prefix).then_some(Self::All),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Keep {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Keep {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut kept = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            match self.of_field(&name) {
                Some(keep) => drop(kept.insert(name, fields.next_value_seed(keep)?)),
                None => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Value::Object(kept))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut kept = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            kept.push(item);
        }
        Ok(Value::Array(kept))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
}

const METADATA: Keep = Keep::Only(&[
    ("name", Keep::All),
    ("namespace", Keep::All),
    ("uid", Keep::All),
    ("labels", Keep::All),
    ("annotations", Keep::Prefixed("selvedge.dev/")),
    ("ownerReferences", Keep::All),
    ("deletionTimestamp", Keep::All),
]);

const ROUTE_METADATA: Keep =
    Keep::Only(&[("name", Keep::All), ("namespace", Keep::All), ("creationTimestamp", Keep::All)]);

const POD_SPEC: Keep = Keep::Only(&[
    ("nodeName", Keep::All),
    ("serviceAccountName", Keep::All),
    ("serviceAccount", Keep::All),
    ("hostNetwork", Keep::All),
    ("hostUsers", Keep::All),
    ("containers", CONTAINER),
    ("initContainers", CONTAINER),
]);

const CONTAINER: Keep = Keep::Only(&[
    ("name", Keep::All),
    ("ports", Keep::All),
    ("restartPolicy", Keep::All),
    ("livenessProbe", Keep::All),
    ("readinessProbe", Keep::All),
    ("startupProbe", Keep::All),
    ("lifecycle", Keep::All),
]);

const POD_STATUS: Keep = Keep::Only(&[("phase", Keep::All), ("podIP", Keep::All), ("podIPs", Keep::All)]);

/// Less what others write into it.
const POLICY: Keep = Keep::But(&[("status", None), ("metadata", Some(POLICY_METADATA))]);

const POLICY_METADATA: Keep = Keep::But(&[
    ("managedFields", None),
    ("resourceVersion", None),
    ("annotations", Some(Keep::But(&[("kubectl.kubernetes.io/last-applied-configuration", None)]))),
]);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(kind: Kind, object: &Value) -> Value {
        Keep::of(kind).read(&object.to_string()).unwrap()
    }

    #[test]
    fn of_a_pod_what_the_model_needs_is_kept_and_nothing_else() {
        let pod = json!({
            "metadata": {
                "name": "a", "namespace": "b", "resourceVersion": "7", "managedFields": [{"manager": "x"}],
                "labels": {"app": "a"}, "annotations": {"selvedge.dev/mesh": "enabled", "other": "long"},
            },
            "spec": {
                "nodeName": "n", "volumes": [{}],
                "containers": [{"name": "c", "env": [{"name": "A"}], "ports": [{"containerPort": 1}]}],
            },
            "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready"}]},
        });
        let wanted = json!({
            "metadata": {
                "name": "a", "namespace": "b", "labels": {"app": "a"}, "annotations": {"selvedge.dev/mesh": "enabled"},
            },
            "spec": {"nodeName": "n", "containers": [{"name": "c", "ports": [{"containerPort": 1}]}]},
            "status": {"podIP": "10.0.0.1"},
        });
        assert_eq!(read(Kind::Pod, &pod), wanted);
    }

    #[test]
    fn of_a_policy_whatever_somebody_wrote_is_kept() {
        let policy = json!({
            "metadata": {"name": "a", "managedFields": [], "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": "{}", "selvedge.dev/dry-run": "true",
            }},
            "spec": {"selektor": {"matchLabels": {}}, "rules": [{"form": 1.5, "x": [null, -1, true]}]},
            "spek": {},
            "status": {"conditions": []},
        });
        let wanted = json!({
            "metadata": {"name": "a", "annotations": {"selvedge.dev/dry-run": "true"}},
            "spec": {"selektor": {"matchLabels": {}}, "rules": [{"form": 1.5, "x": [null, -1, true]}]},
            "spek": {},
        });
        assert_eq!(read(Kind::AuthorizationPolicy, &policy), wanted);
    }

    #[test]
    fn of_a_route_its_age_is_kept_and_what_others_say_of_it_is_not() {
        let route = json!({
            "metadata": {"name": "a", "creationTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "7", "labels": {}},
            "spec": {"rules": [{"unheard": 1}]},
            "status": {"parents": [{}]},
        });
        let wanted = json!({
            "metadata": {"name": "a", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"rules": [{"unheard": 1}]},
        });
        assert_eq!(read(Kind::HttpRoute, &route), wanted);
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in ["", "{", "{} {}", "nul"] {
            assert!(Keep::All.read(text).is_err(), "{text:?}");
        }
    }
}
