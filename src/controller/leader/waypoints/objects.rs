//! What a waypoint consists of: the objects that are made for its Gateway.

use serde_json::{Value, json};

use super::super::super::WaypointSettings;
use crate::mesh::{GATEWAY_LABEL, NamespacedName, TUNNEL_PORT, WAYPOINT_CLASS, own_name};

/// What of a Gateway its objects follow from.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Plan {
    pub gateway: NamespacedName,
    pub uid: String,
    pub replicas: u32,
    /// More than `replicas`: as load wants it, up to so many.
    pub most_replicas: u32,
    /// `spec.infrastructure`: what all of them get besides.
    pub labels: Vec<(String, String)>,
    pub annotations: Vec<(String, String)>,
}

/// One object, and where it goes.
pub struct Wanted {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
    pub object: Value,
}

impl Plan {
    /// All of them, in the order in which they are made. An autoscaler comes last, or is none.
    pub fn objects(&self, settings: &WaypointSettings) -> Vec<Wanted> {
        let wanted = |group, version, kind, plural, spec: Value| Wanted {
            group,
            version,
            kind,
            plural,
            object: self.object(group, version, kind, spec),
        };
        let selector = json!({"matchLabels": {GATEWAY_LABEL: &*self.gateway.name}});
        let mut all = vec![
            wanted("", "v1", "ServiceAccount", "serviceaccounts", json!({})),
            wanted(
                "",
                "v1",
                "Service",
                "services",
                json!({"spec": {
                    "selector": {GATEWAY_LABEL: &*self.gateway.name},
                    "ports": [{"name": "tunnel", "port": TUNNEL_PORT, "targetPort": TUNNEL_PORT, "protocol": "TCP",
                               "appProtocol": "tcp"}],
                }}),
            ),
            wanted(
                "policy",
                "v1",
                "PodDisruptionBudget",
                "poddisruptionbudgets",
                json!({"spec": {
                    "maxUnavailable": 1, "selector": selector,
                }}),
            ),
            wanted("apps", "v1", "Deployment", "deployments", self.deployment(settings)),
        ];
        if self.is_scaled() {
            all.push(wanted(
                "autoscaling",
                "v2",
                "HorizontalPodAutoscaler",
                "horizontalpodautoscalers",
                json!({"spec": {
                    "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": &*self.name()},
                    "minReplicas": self.replicas,
                    "maxReplicas": self.most_replicas,
                    "metrics": [{"type": "Resource", "resource": {
                        "name": "cpu", "target": {"type": "Utilization", "averageUtilization": BUSY_PERCENT},
                    }}],
                }}),
            ));
        }
        all
    }

    pub fn is_scaled(&self) -> bool {
        self.most_replicas > self.replicas
    }

    pub fn name(&self) -> std::sync::Arc<str> {
        own_name(&self.gateway)
    }

    fn object(&self, group: &str, version: &str, kind: &str, body: Value) -> Value {
        let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        let mut object = body;
        object["apiVersion"] = api_version.into();
        object["kind"] = kind.into();
        object["metadata"] = json!({
            "namespace": &*self.gateway.namespace,
            "name": &*self.name(),
            "labels": self.labels(),
            "annotations": pairs(&self.annotations),
            // They go with it.
            "ownerReferences": [{
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "name": &*self.gateway.name,
                "uid": self.uid,
                "controller": true,
            }],
        });
        object
    }

    fn deployment(&self, settings: &WaypointSettings) -> Value {
        let field = |path: &str| json!({"fieldRef": {"fieldPath": path}});
        let probe = |path: &str, period: u32, failures: u32| {
            json!({"httpGet": {"path": path, "port": "readiness"}, "periodSeconds": period, "timeoutSeconds": 5,
                   "failureThreshold": failures})
        };
        let mut annotations = pairs(&self.annotations);
        annotations["prometheus.io/scrape"] = "true".into();
        annotations["prometheus.io/port"] = "15020".into();
        // Its namespace may be in the mesh; it is not captured anyway, and the CNI plugin need not wait to hear so.
        annotations["selvedge.dev/mesh"] = "disabled".into();
        let container = json!({
            "name": "waypoint",
            "image": settings.image,
            "imagePullPolicy": settings.image_pull_policy,
            "args": ["waypoint"],
            "env": [
                {"name": "SELVEDGE_GATEWAY", "value": &*self.gateway.name},
                {"name": "SELVEDGE_POD", "valueFrom": field("metadata.name")},
                {"name": "SELVEDGE_POD_NAMESPACE", "valueFrom": field("metadata.namespace")},
                {"name": "SELVEDGE_NAMESPACE", "value": settings.namespace},
                {"name": "SELVEDGE_TRUST_DOMAIN", "value": settings.trust_domain},
            ],
            "ports": [
                {"name": "tunnel", "containerPort": TUNNEL_PORT},
                {"name": "metrics", "containerPort": 15020},
                {"name": "readiness", "containerPort": 15021},
            ],
            "startupProbe": probe("/live", 2, 60),
            "livenessProbe": probe("/live", 10, 6),
            "readinessProbe": probe("/ready", 2, 2),
            "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
            "securityContext": {
                "privileged": false,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets/selvedge", "readOnly": true}],
        });
        let pod = json!({
            "serviceAccountName": &*self.name(),
            // What --linger and --drain take, and a little more.
            "terminationGracePeriodSeconds": 45,
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "topologySpreadConstraints": [{
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {GATEWAY_LABEL: &*self.gateway.name}},
            }],
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            // Good for the CA alone, and bound to this pod.
            "volumes": [{"name": "token", "projected": {"sources": [{"serviceAccountToken": {
                "path": "token", "audience": settings.audience, "expirationSeconds": 3600,
            }}]}}],
        });
        let mut spec = json!({
            "selector": {"matchLabels": {GATEWAY_LABEL: &*self.gateway.name}},
            // The next one is ready before the last one goes.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {"metadata": {"labels": self.labels(), "annotations": annotations}, "spec": pod},
        });
        if !self.is_scaled() {
            spec["replicas"] = self.replicas.into();
        }
        json!({"spec": spec})
    }

    fn labels(&self) -> Value {
        let mut labels = pairs(&self.labels);
        for (key, value) in [
            (GATEWAY_LABEL, &*self.gateway.name),
            (CLASS_LABEL, WAYPOINT_CLASS),
            ("app.kubernetes.io/name", WAYPOINT_CLASS),
            ("app.kubernetes.io/managed-by", "selvedge"),
        ] {
            labels[key] = value.into();
        }
        labels
    }
}

fn pairs(pairs: &[(String, String)]) -> Value {
    pairs
        .iter()
        .map(|(key, value)| (key.clone(), Value::from(value.as_str())))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// GEP-1762.
pub const CLASS_LABEL: &str = "gateway.networking.k8s.io/gateway-class-name";
const BUSY_PERCENT: u32 = 80;
