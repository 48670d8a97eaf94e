//! The ValidatingAdmissionPolicies: what a schema cannot say, refused by `kubectl apply` with the cure.
//!
//! The schemas keep fields that nobody knows, so that pruning never widens a policy; these refuse them by name. They
//! are made from the schemas, level by level, so that the two cannot differ.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use super::{GROUP, VERSION};

/// Refuses fields of a policy that its schema does not know.
pub(super) fn unknown_fields(crd: &CustomResourceDefinition) -> Result<Vec<Value>, serde_json::Error> {
    let (plural, kind) = (&crd.spec.names.plural, &crd.spec.names.kind);
    let crd = serde_json::to_value(crd)?;
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut levels = Vec::new();
    collect(spec, &mut vec![Step::Field("spec".to_owned())], &mut levels);
    let variables = levels.iter().enumerate().map(|(number, level)| {
        json!({"name": format!("unknown{number}"), "expression": level.unknown("object", &level.path, 0)})
    });
    let validations = levels.iter().enumerate().map(|(number, level)| {
        let words = format!(
            "'{kind}: {} has no field ' + variables.unknown{number} + '; correct the spelling or the indentation, or \
             remove it. Known are {}'",
            level.words(),
            level.known.join(", ")
        );
        json!({
            "expression": format!("variables.unknown{number} == ''"),
            "messageExpression": words,
            "message": format!("{kind}: {} has a field that is not known", level.words()),
            "reason": "Invalid",
        })
    });
    let spec = json!({
        "matchConstraints": matches(plural, &["CREATE", "UPDATE"]),
        // One that was stored before may still be labelled, given a status, and deleted.
        "matchConditions": [{
            "name": "the-spec-is-new",
            "expression": "request.operation == 'CREATE' || object.spec != oldObject.spec",
        }],
        "variables": variables.collect::<Vec<_>>(),
        "validations": validations.collect::<Vec<_>>(),
    });
    Ok(policy_and_binding(&format!("{plural}.{GROUP}"), spec))
}

/// Ties each MeshNode to the node of the agent that writes it: a stolen token of one node says nothing of another.
pub(super) fn mesh_nodes() -> Vec<Value> {
    // Set by the API server from the token, which is bound to a pod and so to the pod's node.
    let node = format!("'{NODE_CLAIM}' in request.userInfo.extra ? request.userInfo.extra['{NODE_CLAIM}'][0] : ''");
    let spec = json!({
        "matchConstraints": matches("meshnodes", &["CREATE", "UPDATE", "DELETE"]),
        "variables": [
            {"name": "isAgent", "expression": format!("request.userInfo.username == '{AGENT}'")},
            {"name": "node", "expression": node},
        ],
        "validations": [
            {
                "expression": "variables.isAgent || request.operation == 'DELETE'",
                "message": "a MeshNode is what the agent of its node says, and written by nobody else; it may be deleted",
                "reason": "Forbidden",
            },
            {
                "expression": "!variables.isAgent || variables.node == request.name",
                "messageExpression": "'the MeshNode ' + request.name + ' belongs to the agent of that node, and this token \
                    is ' + (variables.node == '' ? 'bound to no node' : 'of node ' + variables.node)",
                "message": "a MeshNode belongs to the agent of its node, and this token is of another",
                "reason": "Forbidden",
            },
        ],
    });
    policy_and_binding("meshnodes.selvedge.dev", spec)
}

fn matches(plural: &str, operations: &[&str]) -> Value {
    json!({"resourceRules": [{
        "apiGroups": [GROUP], "apiVersions": [VERSION], "resources": [plural], "operations": operations,
    }]})
}

fn policy_and_binding(name: &str, mut spec: Value) -> Vec<Value> {
    spec["failurePolicy"] = "Fail".into();
    let api_version = "admissionregistration.k8s.io/v1";
    vec![
        json!({
            "apiVersion": api_version, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": name}, "spec": spec,
        }),
        json!({
            "apiVersion": api_version, "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": name},
            "spec": {"policyName": name, "validationActions": ["Deny"]},
        }),
    ]
}

/// One object of a schema, with the fields that it knows.
struct Level {
    path: Vec<Step>,
    known: Vec<String>,
}

#[derive(Clone)]
enum Step {
    Field(String),
    /// Every item of a list.
    Items,
    /// Every value of a map.
    Values,
}

impl Level {
    /// A CEL expression for the names of unknown fields along a path, joined.
    fn unknown(&self, at: &str, path: &[Step], depth: usize) -> String {
        let each = format!("x{depth}");
        let joined = |inner: String| format!("{at}.map({each}, {inner}).filter(s, s != '').join(', ')");
        match path {
            [] => {
                let known: Vec<String> = self.known.iter().map(|name| format!("'{name}'")).collect();
                format!("{at}.filter({each}, !({each} in [{}])).join(', ')", known.join(", "))
            }
            // By index, for a field may be called as a word of the language is.
            [Step::Field(name), rest @ ..] => {
                let inner = self.unknown(&format!("{at}['{name}']"), rest, depth);
                format!("('{name}' in {at} ? {inner} : '')")
            }
            [Step::Items, rest @ ..] => joined(self.unknown(&each, rest, depth + 1)),
            [Step::Values, rest @ ..] => joined(self.unknown(&format!("{at}[{each}]"), rest, depth + 1)),
        }
    }

    fn words(&self) -> String {
        let mut words = String::new();
        for step in &self.path {
            match step {
                Step::Field(name) if words.is_empty() => words.push_str(name),
                Step::Field(name) => {
                    words.push('.');
                    words.push_str(name);
                }
                Step::Items => words.push_str("[]"),
                Step::Values => words.push_str(".*"),
            }
        }
        words
    }
}

fn collect(schema: &Value, path: &mut Vec<Step>, levels: &mut Vec<Level>) {
    if let Some(properties) = schema["properties"].as_object() {
        levels.push(Level { path: path.clone(), known: properties.keys().cloned().collect() });
    }
    let fields = schema["properties"].as_object().into_iter().flatten();
    let fields = fields.map(|(name, property)| (Step::Field(name.clone()), property));
    let others = [(Step::Items, &schema["items"]), (Step::Values, &schema["additionalProperties"])];
    for (step, inner) in fields.chain(others.into_iter().filter(|(_, inner)| inner.is_object())) {
        path.push(step);
        collect(inner, path, levels);
        path.pop();
    }
}

const AGENT: &str = "system:serviceaccount:selvedge-system:selvedge-agent";
/// <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#additional-metadata-in-pod-bound-tokens>
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";
