//! What a container runtime asks of a plugin, and what it is answered. Pure: text in, text out.
//!
//! <https://github.com/containernetworking/cni/blob/main/SPEC.md>, versions 0.3.0 to 1.1.0: those that have `prevResult`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::wire::PodNames;

/// The network configuration on standard input, as far as we read it.
#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase")]
pub(super) struct Config {
    #[serde(default)]
    pub cni_version: String,
    /// What the plugins before us have made.
    pub prev_result: Option<Map<String, Value>>,
    /// The folder that plugin and agent share.
    pub shared_dir: Option<std::path::PathBuf>,
    #[serde(default)]
    runtime_config: BTreeMap<String, Value>,
}

/// A failed call, as the runtime reads it and the kubelet shows it in an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub code: u32,
    pub message: String,
}

impl Failure {
    /// "Try again later": the kubelet does.
    pub fn again(message: impl Into<String>) -> Self {
        Self { code: 11, message: message.into() }
    }

    pub fn config(message: impl Into<String>) -> Self {
        Self { code: 7, message: message.into() }
    }

    pub fn environment(message: impl Into<String>) -> Self {
        Self { code: 4, message: message.into() }
    }

    pub fn text(&self, version: &str) -> String {
        let version = if SUPPORTED.contains(&version) { version } else { NEWEST };
        json!({"cniVersion": version, "code": self.code, "msg": self.message}).to_string()
    }
}

impl Config {
    pub fn read(text: &str) -> Result<Self, Failure> {
        let config: Self = serde_json::from_str(text).map_err(|error| Failure {
            code: 6,
            message: format!("the network configuration on standard input cannot be read: {error}"),
        })?;
        if !SUPPORTED.contains(&config.cni_version.as_str()) {
            let message = format!(
                "cniVersion {:?} is not spoken by this plugin; it speaks {}",
                config.cni_version,
                SUPPORTED.join(", ")
            );
            return Err(Failure { code: 1, message });
        }
        Ok(config)
    }

    /// What the plugin before us made, handed on as it is.
    pub fn result(&self) -> Result<String, Failure> {
        let result = self.prev_result.as_ref().ok_or_else(|| {
            Failure::config("there is no prevResult: selvedge stands behind another plugin in a list, never alone")
        })?;
        Ok(Value::Object(result.clone()).to_string())
    }

    /// The addresses that the pod was given. An interface without a sandbox is the node's end.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let Some(result) = &self.prev_result else { return Vec::new() };
        let interfaces = result.get("interfaces").and_then(Value::as_array);
        let of_the_pod = |ip: &Value| {
            let interface = ip["interface"].as_u64().and_then(|index| interfaces?.get(usize::try_from(index).ok()?));
            interface.is_none_or(|interface| interface["sandbox"].as_str().is_some_and(|path| !path.is_empty()))
        };
        let ips = result.get("ips").and_then(Value::as_array).into_iter().flatten().filter(|ip| of_the_pod(ip));
        ips.filter_map(|ip| Some(ip["address"].as_str()?.parse::<IpNet>().ok()?.addr())).collect()
    }

    /// The pod's own annotations that are ours, where the runtime passes them (containerd does, when the list asks for
    /// the capability).
    pub fn annotations(&self) -> BTreeMap<String, String> {
        let passed = self.runtime_config.get(ANNOTATIONS).and_then(Value::as_object);
        let ours = passed.into_iter().flatten().filter(|(key, _)| key.starts_with("selvedge.dev/"));
        ours.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
    }
}

/// Reads `CNI_ARGS`: `K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=...`; none where it names no pod.
pub(super) fn pod_of(arguments: &str) -> Option<PodNames> {
    let of = |key: &str| {
        let mut pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
        pairs.find(|(name, _)| *name == key).map(|(_, value)| value.to_owned()).filter(|value| !value.is_empty())
    };
    Some(PodNames { namespace: of("K8S_POD_NAMESPACE")?, name: of("K8S_POD_NAME")?, uid: of("K8S_POD_UID") })
}

/// The answer to `VERSION`.
pub(super) fn versions() -> String {
    json!({"cniVersion": NEWEST, "supportedVersions": SUPPORTED}).to_string()
}

/// The capability by which containerd passes a pod's annotations.
pub(super) const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
const SUPPORTED: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const NEWEST: &str = "1.1.0";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated_text;

    const CALL: &str = r#"{
        "cniVersion": "1.0.0", "name": "cluster", "type": "selvedge", "sharedDir": "/var/lib/selvedge",
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations":
            {"selvedge.dev/mesh": "enabled", "kubernetes.io/config.source": "api"}},
        "prevResult": {
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/cni-1"}],
            "ips": [{"address": "10.1.0.7/24", "gateway": "10.1.0.1", "interface": 1},
                    {"address": "10.1.0.1/24", "interface": 0}, {"address": "fd00::7/64"}],
            "dns": {}
        }
    }"#;

    #[test]
    fn a_call_says_what_the_pod_was_given() {
        let config = Config::read(CALL).unwrap();
        assert_eq!(config.addresses(), ["10.1.0.7".parse::<IpAddr>().unwrap(), "fd00::7".parse().unwrap()]);
        assert_eq!(config.annotations(), BTreeMap::from([("selvedge.dev/mesh".into(), "enabled".into())]));
        assert_eq!(config.shared_dir.as_deref(), Some(std::path::Path::new("/var/lib/selvedge")));
        let (result, written): (Value, Value) =
            (serde_json::from_str(&config.result().unwrap()).unwrap(), serde_json::from_str(CALL).unwrap());
        assert_eq!(result, written["prevResult"], "handed on as it is");
    }

    #[test]
    fn the_pod_is_named_by_the_arguments() {
        let names = pod_of("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=12ab").unwrap();
        assert_eq!((&*names.namespace, &*names.name, names.uid.as_deref()), ("shop", "web-0", Some("12ab")));
        assert!(pod_of("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0").unwrap().uid.is_none());
        assert!(pod_of("").is_none() && pod_of("K8S_POD_NAME=web-0").is_none());
    }

    #[test]
    fn a_call_that_cannot_be_served_says_why() {
        assert_eq!(Config::read("{").unwrap_err().code, 6);
        let failure = Config::read(r#"{"cniVersion": "0.2.0"}"#).unwrap_err();
        assert!(failure.code == 1 && failure.message.contains("1.1.0"), "{failure:?}");
        let alone = Config::read(r#"{"cniVersion": "1.1.0"}"#).unwrap().result().unwrap_err();
        assert!(alone.message.contains("never alone"), "{alone:?}");
        let text: Value = serde_json::from_str(&Failure::again("later").text("0.4.0")).unwrap();
        assert_eq!(text, json!({"cniVersion": "0.4.0", "code": 11, "msg": "later"}));
    }

    proptest! {
        #[test]
        fn whatever_a_runtime_says_is_read_or_refused(text in mutated_text(&[CALL])) {
            if let Ok(config) = Config::read(&text) {
                let _ = (config.addresses(), config.annotations(), config.result());
            }
        }
    }
}
