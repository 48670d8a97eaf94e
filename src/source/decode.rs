//! One document into one object of the model, or the field that forbids it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

pub(super) use self::field::Fault;
use self::field::{SUBDOMAIN, check_namespaced, is_subdomain, parse};
use super::Problem;
use super::document::{self, Document};
use crate::authorizer::{self, Authorizer};
use crate::mesh;
use crate::model::Delta;
use crate::route::traffic::{self, TrafficPolicy};
use crate::route::{self, Route};

mod cluster;
mod field;
mod gateway;
mod key;
mod network_policy;
mod pod;
mod policies;
mod routes;
mod service;

pub use gateway::read_gateway;
pub(super) use key::{Key, Kind};
pub use network_policy::CniKind;
pub(super) use policies::PolicyItem;

/// What one object became.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Item {
    /// With whether its condition Ready holds.
    Pod(mesh::Pod, bool),
    /// With its selector.
    Service(mesh::Service, BTreeMap<String, String>),
    Other(mesh::Object),
    Policy(PolicyItem),
    Route(Arc<Route>),
    Authorizer(Arc<Authorizer>),
    /// The texts of a ConfigMap.
    ConfigMap(BTreeMap<String, String>),
    Traffic(Arc<TrafficPolicy>),
}

impl Item {
    /// The step of the model that puts it in force; none where it is so only in what names it.
    pub fn apply(&self) -> Option<Delta> {
        let apply = |object: mesh::Object| Delta::Mesh(mesh::Delta::Apply(object));
        Some(match self {
            Self::Policy(policy) => Delta::Policy(policy.apply()),
            Self::Route(route) => Delta::Route(route::Delta::Apply(route.clone())),
            Self::Traffic(policy) => Delta::Traffic(traffic::Delta::Apply(policy.clone())),
            Self::Pod(pod, _) => apply(mesh::Object::Pod(pod.clone())),
            Self::Service(service, _) => apply(mesh::Object::Service(service.clone())),
            Self::Other(object) => apply(object.clone()),
            Self::Authorizer(authorizer) => Delta::Authorizer(authorizer::Delta::Apply(authorizer.clone())),
            Self::ConfigMap(_) => return None,
        })
    }
}

/// What one file holds.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Content {
    pub objects: Vec<Found>,
    /// Objects that are there but could not be read: their last good version stays.
    pub broken: Vec<Broken>,
    /// A document was not even YAML: whatever the file last held may be in it.
    pub unparsed: bool,
    pub problems: Vec<Problem>,
    /// Documents of kinds that are not read.
    pub ignored: usize,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Found {
    pub key: Key,
    pub line: usize,
    pub item: Arc<Item>,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Broken {
    pub key: Key,
    /// What stands in for it where there is no good version: of a policy, one that denies; of a NetworkPolicy, one
    /// that selects all.
    pub stand_in: Option<Arc<Item>>,
}

impl Broken {
    /// What is put in force now, if anything, and what people are told of it.
    pub fn outcome(&self, has_good: bool) -> (Option<&Arc<Item>>, &'static str) {
        match &self.stand_in {
            _ if has_good => (None, "; its last good version stays in force"),
            Some(item) if self.key.kind.is_policy() => {
                (Some(item), "; until it can be read it denies what it might stand over")
            }
            Some(item) => (Some(item), "; until it can be read it counts as selecting every pod"),
            None => (None, "; it has no effect"),
        }
    }

    fn new(key: Key, value: &Value, fault: &Fault, line_of: impl Fn(&str) -> usize) -> Self {
        let stand_in = match key.kind {
            Kind::PeerAuthentication | Kind::AuthorizationPolicy | Kind::RequestAuthentication => {
                Some(Arc::new(Item::Policy(policies::malformed(&key, value, fault, line_of))))
            }
            Kind::NetworkPolicy | Kind::Cni(_) => Some(Arc::new(Item::Other(network_policy::selects_all(&key)))),
            _ => None,
        };
        Self { key, stand_in }
    }
}

impl Content {
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.broken.is_empty() && !self.unparsed && self.ignored == 0
    }

    pub fn has(&self, key: &Key) -> bool {
        self.objects.iter().any(|found| found.key == *key) || self.broken.iter().any(|broken| broken.key == *key)
    }
}

/// Reads one file. Whatever is in it, the rest of it is read too.
pub(super) fn file(path: &Path, bytes: &[u8]) -> Content {
    let mut content = Content::default();
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(error) => {
            let line = bytes[..error.valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
            content.problems.push(Problem {
                file: path.to_owned(),
                line,
                object: String::new(),
                field: String::new(),
                cause: "not UTF-8 text: save the file as UTF-8".to_owned(),
            });
            content.unparsed = true;
            String::from_utf8_lossy(bytes)
        }
    };
    for document in document::split(&text) {
        read_document(path, &document, &mut content);
    }
    content
}

/// An object, and the fields of it that were passed over.
type Read = (Item, Vec<Fault>);

fn read_document(path: &Path, document: &Document<'_>, content: &mut Content) {
    match document.parse() {
        Ok(Value::Null) => {}
        Ok(value) => read_value(path, document, &At::default(), value, content),
        Err(unparsed) => {
            let (kind, namespace, name) = document.guess();
            let key = kind.and_then(Kind::named).and_then(|kind| match name {
                Some(name) => Some(Key::new(kind, namespace, name)),
                None => Key::unnamed(kind, namespace, path, unparsed.line),
            });
            content.problems.push(Problem {
                file: path.to_owned(),
                line: unparsed.line,
                object: key.as_ref().map(Key::to_string).unwrap_or_default(),
                field: String::new(),
                cause: unparsed.cause.clone(),
            });
            content.unparsed = true;
            let fault = Fault::new("", unparsed.cause);
            content.broken.extend(key.map(|key| Broken::new(key, &Value::Null, &fault, |_| unparsed.line)));
        }
    }
}

/// Where in its document an object stands.
#[derive(Default)]
struct At {
    /// Empty, or `items[2].`.
    prefix: String,
    /// Of the list that it is in, looked up once for all its items.
    line: Option<usize>,
}

fn read_value(path: &Path, document: &Document<'_>, at: &At, value: Value, content: &mut Content) {
    let prefix = &at.prefix;
    let line_of = |field: &str| document.line_of(&format!("{prefix}{field}"));
    // Of a list's items it would take too long to look for places that are mostly not told.
    let line_at = |field: &str| at.line.unwrap_or_else(|| line_of(field));
    let problem = |object: String, fault: Fault| Problem {
        file: path.to_owned(),
        line: line_of(&fault.field),
        object,
        field: fault.field,
        cause: fault.cause,
    };
    let unnamed = |kind: Kind, value: &Value| Key::unnamed(kind, namespace(value).as_deref(), path, line_at(""));
    let text = |value: &Value, field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
    let (Some(kind), Some(api_version)) = (text(&value, "kind"), text(&value, "apiVersion")) else {
        let field = if text(&value, "kind").is_some() { "apiVersion" } else { "kind" };
        let cause = "every object says its apiVersion and kind, such as `apiVersion: v1` and `kind: Pod`";
        // An object whose version was forgotten is still known by its name.
        let known = text(&value, "kind").as_deref().and_then(Kind::named);
        let key = known.and_then(|kind| identify(kind, &value).ok().or_else(|| unnamed(kind, &value)));
        let fault = Fault::new(field, cause);
        content.problems.push(problem(key.as_ref().map(Key::to_string).unwrap_or_default(), fault.clone()));
        match key {
            Some(key) => content.broken.push(Broken::new(key, &value, &fault, line_at)),
            None => content.unparsed = true,
        }
        return;
    };
    if api_version == "v1" && kind == "List" || is_list_of_known(&kind) {
        let Value::Object(mut list) = value else { return };
        let item_kind = kind.strip_suffix("List").unwrap_or_default();
        match list.remove("items") {
            Some(Value::Array(items)) => {
                let line = document.line_of(&format!("{prefix}items"));
                for (index, mut item) in items.into_iter().enumerate() {
                    // Items of a typed list need not repeat what the list says.
                    if let Value::Object(fields) = &mut item
                        && !item_kind.is_empty()
                    {
                        fields.entry("kind").or_insert_with(|| item_kind.into());
                        fields.entry("apiVersion").or_insert_with(|| api_version.clone().into());
                    }
                    let at = At { prefix: format!("{prefix}items[{index}]."), line: Some(line) };
                    read_value(path, document, &at, item, content);
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => {
                content.problems.push(problem(kind, Fault::new("items", "a list of objects is wanted")));
                content.unparsed = true;
            }
        }
        return;
    }
    let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
    let Some(known) = Kind::of(group, &kind) else {
        if group == "selvedge.dev" {
            let kinds = "AuthorizationPolicy, ExternalAuthorizer, MeshNode, PeerAuthentication, RequestAuthentication and \
                         TrafficPolicy";
            let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            let fault = Fault::new("kind", format!("selvedge.dev has no kind {kind:?}; it has {kinds}"));
            content.problems.push(problem(format!("{kind} {name}"), fault));
        } else {
            content.ignored += 1;
        }
        return;
    };
    let key = match identify(known, &value) {
        Ok(key) => key,
        Err(fault) => {
            let key = unnamed(known, &value);
            content.problems.push(problem(key.as_ref().map_or(kind, Key::to_string), fault.clone()));
            content.broken.extend(key.map(|key| Broken::new(key, &value, &fault, line_at)));
            // Whichever of those that the file held it may have been.
            content.unparsed = true;
            return;
        }
    };
    let (read, faults) = match known.api_version() {
        Some(wanted) if wanted != api_version => {
            let fault = Fault::new("apiVersion", format!("{kind} is read as {wanted}, not {api_version}"));
            (Err(Broken::new(key.clone(), &value, &fault, line_at)), vec![fault])
        }
        _ => named(&key, value, line_at),
    };
    content.problems.extend(faults.into_iter().map(|fault| problem(key.to_string(), fault)));
    match read {
        Ok(item) => {
            let line = line_at("metadata.name");
            content.objects.push(Found { key, line, item: Arc::new(item) });
        }
        Err(broken) => content.broken.push(broken),
    }
}

/// Reads an object whose kind and name are known: what it became or what stands in for it, and the fields at fault.
pub(super) fn named(
    key: &Key,
    value: Value,
    line_of: impl Fn(&str) -> usize + Copy,
) -> (Result<Item, Broken>, Vec<Fault>) {
    // Of a policy that cannot be read, as much as can be read says where it denies.
    let written = if key.kind.is_policy() { value.clone() } else { Value::Null };
    match read_object(key, value, line_of) {
        Ok((item, passed_over)) => (Ok(item), passed_over),
        Err(fault) => (Err(Broken::new(key.clone(), &written, &fault, line_of)), vec![fault]),
    }
}

fn read_object(key: &Key, value: Value, line_of: impl Fn(&str) -> usize) -> Result<Read, Fault> {
    let plain = |object| (Item::Other(object), Vec::new());
    match key.kind {
        Kind::Namespace => cluster::namespace(key, parse(value)?),
        Kind::Node => cluster::node(key, parse(value)?).map(plain),
        Kind::ServiceCidr => cluster::service_cidr(key, parse(value)?).map(plain),
        Kind::Service => service::service(key, parse(value)?),
        Kind::EndpointSlice => service::endpoint_slice(key, parse(value)?).map(plain),
        Kind::Pod => pod::pod(key, parse(value)?),
        Kind::PeerAuthentication | Kind::AuthorizationPolicy | Kind::RequestAuthentication => {
            check_namespaced(key, is_subdomain, SUBDOMAIN)?;
            policies::decode(key, &value, line_of)
        }
        Kind::NetworkPolicy => network_policy::network_policy(key, parse(value)?).map(plain),
        Kind::Cni(_) => Ok(plain(network_policy::selects_all(key))),
        Kind::MeshNode => cluster::mesh_node(key, parse(value)?).map(plain),
        Kind::ExternalAuthorizer => policies::authorizer(key, &value),
        Kind::ConfigMap => {
            let map: k8s_openapi::api::core::v1::ConfigMap = parse(value)?;
            Ok((Item::ConfigMap(map.data.unwrap_or_default()), Vec::new()))
        }
        Kind::HttpRoute | Kind::GrpcRoute => routes::route(key, &value),
        Kind::TrafficPolicy | Kind::BackendTrafficPolicy => routes::traffic(key, &value),
        Kind::Gateway => gateway::gateway(key, parse(value)?),
    }
}

pub(super) fn identify(kind: Kind, value: &Value) -> Result<Key, Fault> {
    let metadata = value.get("metadata");
    let written = metadata.and_then(|metadata| metadata.get("name"));
    let name = written.and_then(word).filter(|name| !name.is_empty()).ok_or_else(|| match metadata {
        None | Some(Value::Null | Value::Object(_)) => {
            Fault::new("metadata.name", "every object needs a name; write text such as `name: cart`")
        }
        Some(_) => Fault::new("metadata", "it is no object with fields; write `metadata: {name: cart}`"),
    })?;
    Ok(Key::new(kind, namespace(value).as_deref(), &name))
}

fn namespace(value: &Value) -> Option<String> {
    value.pointer("/metadata/namespace").and_then(word)
}

/// Text, or what was meant to be text: a name of digits is a number to YAML, and refused as such under that name.
fn word(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn is_list_of_known(kind: &str) -> bool {
    kind.strip_suffix("List").is_some_and(|item| Kind::named(item).is_some())
}

fn group_of(api_version: &str) -> &str {
    api_version.rsplit_once('/').map_or("", |(group, _)| group)
}

#[cfg(test)]
mod tests;
