//! The ValidatingAdmissionPolicies: what a schema cannot say, refused by `kubectl apply` with the cure.
//!
//! The schemas keep fields that nobody knows, so that pruning never widens a policy; these refuse them by name. And what
//! the types say by a pattern is judged here, for of a pattern in a schema the API server tells the pattern alone. Both
//! are made from the schemas, level by level, so that the two cannot differ.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use super::{GROUP, VERSION};

/// Refuses fields of a policy that its schema does not know, and values that are not written as their fields want them.
pub(super) fn policies(crd: &CustomResourceDefinition) -> Result<Vec<Value>, serde_json::Error> {
    let (plural, kind) = (&crd.spec.names.plural, &crd.spec.names.kind);
    let crd = serde_json::to_value(crd)?;
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut found = Found::default();
    collect(spec, &mut vec![Step::Field("spec".to_owned())], &mut found);
    let (mut variables, mut validations) = (Vec::new(), Vec::new());
    for (number, level) in found.levels.iter().enumerate() {
        let (words, known) = (words(&level.path), level.known.join(", "));
        let name = format!("unknown{number}");
        validations.push(json!({
            "expression": format!("variables.{name} == ''"),
            "messageExpression": format!(
                "'{kind}: {words} has no field ' + variables.{name} + '; correct the spelling or the indentation, or \
                 remove it. Known are {known}'"
            ),
            "message": format!("{kind}: {words} has a field that is not known"),
            "reason": "Invalid",
        }));
        variables.push(json!({"name": name, "expression": level.unknown()}));
    }
    for (number, list) in found.lists.iter().enumerate() {
        let (words, cure) = (words(&list.path), list.cure);
        let name = format!("malformed{number}");
        validations.push(json!({
            "expression": format!("variables.{name} == ''"),
            "messageExpression": format!("'{kind}: {words}: ' + variables.{name} + ' is not {cure}'"),
            "message": format!("{kind}: an entry of {words} is not {cure}"),
            "reason": "Invalid",
        }));
        variables.push(json!({"name": name, "expression": list.malformed()}));
    }
    let spec = json!({
        "matchConstraints": matches(plural, &["CREATE", "UPDATE"]),
        // One that was stored before may still be labelled, given a status, and deleted.
        "matchConditions": [{
            "name": "the-spec-is-new",
            "expression": "request.operation == 'CREATE' || object.spec != oldObject.spec",
        }],
        "variables": variables,
        "validations": validations,
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

/// What a schema has to be asked about.
#[derive(Default)]
struct Found {
    levels: Vec<Level>,
    lists: Vec<List>,
}

/// One object of a schema, with the fields that it knows.
struct Level {
    path: Vec<Step>,
    known: Vec<String>,
}

/// One list of texts that are written in a certain way.
struct List {
    path: Vec<Step>,
    pattern: String,
    cure: &'static str,
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
    /// A CEL expression for the names of unknown fields, joined.
    fn unknown(&self) -> String {
        let known: Vec<String> = self.known.iter().map(|name| format!("'{name}'")).collect();
        let known = known.join(", ");
        along("object", &self.path, 0, &|at, each| format!("{at}.filter({each}, !({each} in [{known}])).join(', ')"))
    }
}

impl List {
    /// A CEL expression for the texts that are written in another way, joined.
    fn malformed(&self) -> String {
        let pattern = &self.pattern;
        along("object", &self.path, 0, &|at, each| {
            format!("{at}.filter({each}, !{each}.matches(r'{pattern}')).join(', ')")
        })
    }
}

/// A CEL expression that joins what another says of everything that a path leads to.
fn along(at: &str, path: &[Step], depth: usize, said: &dyn Fn(&str, &str) -> String) -> String {
    let each = format!("x{depth}");
    let joined = |inner: String| format!("{at}.map({each}, {inner}).filter(s, s != '').join(', ')");
    match path {
        [] => said(at, &each),
        // By index, for a field may be called as a word of the language is.
        [Step::Field(name), rest @ ..] => {
            let inner = along(&format!("{at}['{name}']"), rest, depth, said);
            format!("('{name}' in {at} ? {inner} : '')")
        }
        [Step::Items, rest @ ..] => joined(along(&each, rest, depth + 1, said)),
        [Step::Values, rest @ ..] => joined(along(&format!("{at}[{each}]"), rest, depth + 1, said)),
    }
}

fn words(path: &[Step]) -> String {
    let mut words = String::new();
    for step in path {
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

fn collect(schema: &Value, path: &mut Vec<Step>, found: &mut Found) {
    if let Some(properties) = schema["properties"].as_object() {
        found.levels.push(Level { path: path.clone(), known: properties.keys().cloned().collect() });
    }
    if let (Some(pattern), Some(Step::Field(name))) = (schema["items"]["pattern"].as_str(), path.last()) {
        let cure = cure(name);
        found.lists.push(List { path: path.clone(), pattern: pattern.to_owned(), cure });
    }
    let fields = schema["properties"].as_object().into_iter().flatten();
    let fields = fields.map(|(name, property)| (Step::Field(name.clone()), property));
    let others = [(Step::Items, &schema["items"]), (Step::Values, &schema["additionalProperties"])];
    for (step, inner) in fields.chain(others.into_iter().filter(|(_, inner)| inner.is_object())) {
        path.push(step);
        collect(inner, path, found);
        path.pop();
    }
}

/// How the texts of a list are written.
fn cure(field: &str) -> &'static str {
    match field {
        "principals" | "notPrincipals" => {
            "an identity such as cluster.local/ns/shop/sa/web: write it without spiffe://, with a * at its beginning or \
             its end alone"
        }
        "namespaces" | "notNamespaces" => "a namespace such as shop: a * may stand at its beginning or its end alone",
        "serviceAccounts" | "notServiceAccounts" => {
            "a service account such as web or shop/web: write namespace/name without a *, or use principals for patterns"
        }
        "ipBlocks" | "notIpBlocks" => "an address or a range of addresses: write 10.1.2.3, 10.0.0.0/8 or fd00::/8",
        "ports" | "notPorts" => "a port: write a number from 1 to 65535 in quotes, such as 8080",
        _ => "written as this field wants it: see its description",
    }
}

const AGENT: &str = "system:serviceaccount:selvedge-system:selvedge-agent";
/// <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#additional-metadata-in-pod-bound-tokens>
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";
