//! One document into one object of the model, or the field that forbids it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Problem;
use super::document::{self, Document};
use crate::mesh::{self, NamespacedName, ObjectKind, ObjectRef, Settings};

mod cluster;
mod network_policy;
mod pod;
mod policies;
mod service;

pub use network_policy::CniKind;
pub(super) use policies::PolicyItem;

/// The kinds that are read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    Namespace,
    Node,
    ServiceCidr,
    Service,
    EndpointSlice,
    Pod,
    PeerAuthentication,
    AuthorizationPolicy,
    /// Of `networking.k8s.io`.
    NetworkPolicy,
    /// A CNI's own.
    Cni(&'static CniKind),
}

impl Kind {
    /// All but those of CNIs.
    const ALL: [Self; 9] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceCidr,
        Self::Service,
        Self::EndpointSlice,
        Self::Pod,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
        Self::NetworkPolicy,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::Cni(kind) => kind.kind,
        }
    }

    pub fn is_policy(self) -> bool {
        matches!(self, Self::PeerAuthentication | Self::AuthorizationPolicy)
    }

    /// `None`: any version, for of this kind nothing is read that versions may differ in.
    fn api_version(self) -> Option<&'static str> {
        match self {
            Self::Namespace | Self::Node | Self::Service | Self::Pod => Some("v1"),
            Self::ServiceCidr | Self::NetworkPolicy => Some("networking.k8s.io/v1"),
            Self::EndpointSlice => Some("discovery.k8s.io/v1"),
            Self::PeerAuthentication | Self::AuthorizationPolicy => Some("selvedge.dev/v1alpha1"),
            Self::Cni(_) => None,
        }
    }

    fn is_cluster_wide(self) -> bool {
        match self {
            Self::Namespace | Self::Node | Self::ServiceCidr => true,
            Self::Cni(kind) => kind.is_cluster_wide,
            _ => false,
        }
    }

    fn named(name: &str) -> Option<Self> {
        let known = Self::ALL.into_iter().find(|kind| kind.as_str() == name);
        known.or_else(|| CniKind::find(None, name).map(Self::Cni))
    }

    fn of(group: &str, name: &str) -> Option<Self> {
        let in_group = |kind: &Self| kind.api_version().is_some_and(|version| group_of(version) == group);
        let known = Self::ALL.into_iter().find(|kind| kind.as_str() == name && in_group(kind));
        known.or_else(|| CniKind::find(Some(group), name).map(Self::Cni))
    }
}

/// Names one object of the folder; the namespace is empty for cluster-wide kinds.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Key {
    pub kind: Kind,
    pub name: NamespacedName,
}

impl Key {
    fn new(kind: Kind, namespace: Option<&str>, name: &str) -> Self {
        let namespace = if kind.is_cluster_wide() { "" } else { namespace.unwrap_or(DEFAULT_NAMESPACE) };
        Self { kind, name: NamespacedName::new(namespace, name) }
    }

    /// The model's name of it; `None` for policies, which the mesh does not hold.
    pub(super) fn object_ref(&self) -> Option<ObjectRef> {
        let kind = match self.kind {
            Kind::Namespace => ObjectKind::Namespace,
            Kind::Node => ObjectKind::Node,
            Kind::ServiceCidr => ObjectKind::ServiceCidr,
            Kind::Service => ObjectKind::Service,
            Kind::EndpointSlice => ObjectKind::EndpointSlice,
            Kind::Pod => ObjectKind::Pod,
            Kind::NetworkPolicy | Kind::Cni(_) => ObjectKind::NetworkPolicy,
            Kind::PeerAuthentication | Kind::AuthorizationPolicy => return None,
        };
        Some(ObjectRef { kind, name: self.model_name() })
    }

    /// Of a CNI's kind no object of another kind has the same: a slash is not allowed in a name.
    fn model_name(&self) -> NamespacedName {
        match self.kind {
            Kind::Cni(CniKind { group, kind, .. }) => {
                let name = format!("{kind}.{group}/{}", self.name.name);
                NamespacedName { namespace: self.name.namespace.clone(), name: name.into() }
            }
            _ => self.name.clone(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.name.namespace {
            "" => write!(f, "{} {}", self.kind.as_str(), self.name.name),
            _ => write!(f, "{} {}", self.kind.as_str(), self.name),
        }
    }
}

/// What one object became.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Item {
    /// With whether its condition Ready holds.
    Pod(mesh::Pod, bool),
    /// With its selector.
    Service(mesh::Service, BTreeMap<String, String>),
    Other(mesh::Object),
    Policy(PolicyItem),
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
    fn new(key: Key, value: &Value, fault: &Fault) -> Self {
        let stand_in = match key.kind {
            Kind::PeerAuthentication | Kind::AuthorizationPolicy => {
                Some(Arc::new(Item::Policy(policies::malformed(&key, value, fault))))
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

/// The field of an object that forbids it, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Fault {
    pub field: String,
    pub cause: String,
}

impl Fault {
    pub fn new(field: impl Into<String>, cause: impl Into<String>) -> Self {
        Self { field: field.into(), cause: cause.into() }
    }
}

/// An object, and the fields of it that were passed over.
type Read = (Item, Vec<Fault>);

fn read_document(path: &Path, document: &Document<'_>, content: &mut Content) {
    match document.parse() {
        Ok(Value::Null) => {}
        Ok(value) => read_value(path, document, &At::default(), value, content),
        Err(unparsed) => {
            let (kind, namespace, name) = document.guess();
            let key = kind.and_then(Kind::named).zip(name).map(|(kind, name)| Key::new(kind, namespace, name));
            content.problems.push(Problem {
                file: path.to_owned(),
                line: unparsed.line,
                object: key.as_ref().map(Key::to_string).unwrap_or_default(),
                field: String::new(),
                cause: unparsed.cause.clone(),
            });
            content.unparsed = true;
            let fault = Fault::new("", unparsed.cause);
            content.broken.extend(key.map(|key| Broken::new(key, &Value::Null, &fault)));
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
    let problem = |object: String, fault: Fault| Problem {
        file: path.to_owned(),
        line: document.line_of(&format!("{prefix}{}", fault.field)),
        object,
        field: fault.field,
        cause: fault.cause,
    };
    let text = |value: &Value, field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
    let (Some(kind), Some(api_version)) = (text(&value, "kind"), text(&value, "apiVersion")) else {
        let field = if text(&value, "kind").is_some() { "apiVersion" } else { "kind" };
        let cause = "every object says its apiVersion and kind, such as `apiVersion: v1` and `kind: Pod`";
        // An object whose version was forgotten is still known by its name.
        let known = text(&value, "kind").as_deref().and_then(Kind::named);
        let key = known.and_then(|kind| identify(kind, &value));
        let fault = Fault::new(field, cause);
        content.problems.push(problem(key.as_ref().map(Key::to_string).unwrap_or_default(), fault.clone()));
        match key {
            Some(key) => content.broken.push(Broken::new(key, &value, &fault)),
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
            let kinds = "AuthorizationPolicy and PeerAuthentication";
            let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            let fault = Fault::new("kind", format!("selvedge.dev has no kind {kind:?}; it has {kinds}"));
            content.problems.push(problem(format!("{kind} {name}"), fault));
        } else {
            content.ignored += 1;
        }
        return;
    };
    let Some(key) = identify(known, &value) else {
        content.problems.push(problem(kind, Fault::new("metadata.name", "every object needs a name")));
        content.unparsed = true;
        return;
    };
    // Of a policy that cannot be read, as much as can be read says where it denies.
    let written = if known.is_policy() { value.clone() } else { Value::Null };
    let read = match known.api_version() {
        None => read_object(&key, value),
        Some(wanted) if wanted == api_version => read_object(&key, value),
        Some(wanted) => Err(Fault::new("apiVersion", format!("{kind} is read as {wanted}, not {api_version}"))),
    };
    match read {
        Ok((item, passed_over)) => {
            content.problems.extend(passed_over.into_iter().map(|fault| problem(key.to_string(), fault)));
            let line = at.line.unwrap_or_else(|| document.line_of("metadata.name"));
            content.objects.push(Found { key, line, item: Arc::new(item) });
        }
        Err(fault) => {
            content.broken.push(Broken::new(key.clone(), &written, &fault));
            content.problems.push(problem(key.to_string(), fault));
        }
    }
}

fn read_object(key: &Key, value: Value) -> Result<Read, Fault> {
    let plain = |object| (Item::Other(object), Vec::new());
    match key.kind {
        Kind::Namespace => cluster::namespace(key, parse(value)?),
        Kind::Node => cluster::node(key, parse(value)?).map(plain),
        Kind::ServiceCidr => cluster::service_cidr(key, parse(value)?).map(plain),
        Kind::Service => service::service(key, parse(value)?),
        Kind::EndpointSlice => service::endpoint_slice(key, parse(value)?).map(plain),
        Kind::Pod => pod::pod(key, parse(value)?),
        Kind::PeerAuthentication | Kind::AuthorizationPolicy => {
            check_namespaced(key, is_subdomain, SUBDOMAIN)?;
            policies::decode(key, &value)
        }
        Kind::NetworkPolicy => network_policy::network_policy(key, parse(value)?).map(plain),
        Kind::Cni(_) => Ok(plain(network_policy::selects_all(key))),
    }
}

fn identify(kind: Kind, value: &Value) -> Option<Key> {
    let metadata = value.get("metadata")?;
    let name = metadata.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let namespace = metadata.get("namespace").and_then(Value::as_str);
    Some(Key::new(kind, namespace, name))
}

fn is_list_of_known(kind: &str) -> bool {
    kind.strip_suffix("List").is_some_and(|item| Kind::named(item).is_some())
}

fn group_of(api_version: &str) -> &str {
    api_version.rsplit_once('/').map_or("", |(group, _)| group)
}

fn parse<T: DeserializeOwned>(value: Value) -> Result<T, Fault> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        use serde_path_to_error::Segment;
        let mut field = String::new();
        for segment in error.path() {
            match segment {
                Segment::Seq { index } => field.push_str(&format!("[{index}]")),
                Segment::Map { key } | Segment::Enum { variant: key } if key.contains(['.', '[']) => {
                    field.push_str(&format!("[{key}]"));
                }
                Segment::Map { key } | Segment::Enum { variant: key } => {
                    field.push_str(if field.is_empty() { "" } else { "." });
                    field.push_str(key);
                }
                Segment::Unknown => {}
            }
        }
        Fault::new(field, error.inner().to_string())
    })
}

fn settings(metadata: &ObjectMeta) -> (Settings, Vec<Fault>) {
    let empty = BTreeMap::new();
    let annotations = metadata.annotations.as_ref().unwrap_or(&empty);
    let (settings, problems) = Settings::read(annotations, metadata.labels.as_ref().unwrap_or(&empty));
    (settings, problems.into_iter().map(|problem| Fault::new(problem.field, problem.cause)).collect())
}

fn check_namespaced(key: &Key, is_name: fn(&str) -> bool, wanted: &str) -> Result<(), Fault> {
    check(is_name, &key.name.name, "metadata.name", wanted)?;
    check(is_label, &key.name.namespace, "metadata.namespace", LABEL)
}

fn check(is_name: fn(&str) -> bool, name: &str, field: &str, wanted: &str) -> Result<(), Fault> {
    match is_name(name) {
        true => Ok(()),
        false => Err(Fault::new(field, format!("{name:?} is no name; {wanted}"))),
    }
}

// RFC 1123, as Kubernetes reads it: "Object Names and IDs", DNS label names.
fn is_label(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('-') && !name.ends_with('-')
}

// DNS subdomain names: labels joined by dots; Kubernetes bounds the whole and not each label.
fn is_subdomain(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let part = |p: &str| !p.is_empty() && p.bytes().all(allowed) && !p.starts_with('-') && !p.ends_with('-');
    (1..=253).contains(&name.len()) && name.split('.').all(part)
}

fn address(field: impl FnOnce() -> String, text: &str) -> Result<IpAddr, Fault> {
    text.parse::<IpAddr>()
        .map(|ip| ip.to_canonical())
        .map_err(|_| Fault::new(field(), format!("{text:?} is no IP address; write one such as 10.0.1.2 or fd00::2")))
}

fn cidr(field: impl FnOnce() -> String, text: &str) -> Result<IpNet, Fault> {
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .map_err(|_| Fault::new(field(), format!("{text:?} is no range; write one such as 10.0.1.0/24")))
}

fn port(field: impl FnOnce() -> String, number: i32) -> Result<u16, Fault> {
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Fault::new(field(), format!("{number} is no port; write a number from 1 to 65535"))),
    }
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP" || protocol.is_empty())
}

const LABEL: &str = "write at most 63 of lower-case letters, digits and '-', the first and last no '-'";
const SUBDOMAIN: &str = "write at most 253 of lower-case letters, digits, '-' and '.', each part starting and ending \
                         with a letter or digit";
const DEFAULT_NAMESPACE: &str = "default";

#[cfg(test)]
mod tests;
