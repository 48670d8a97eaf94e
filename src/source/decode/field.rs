//! The small readers: each names the field that it refuses, and the cure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Key;
use crate::mesh::Settings;

/// The field of an object that forbids it, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::source) struct Fault {
    pub field: String,
    pub cause: String,
}

impl Fault {
    pub fn new(field: impl Into<String>, cause: impl Into<String>) -> Self {
        Self { field: field.into(), cause: cause.into() }
    }
}

pub(super) fn parse<T: DeserializeOwned>(value: Value) -> Result<T, Fault> {
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
        Fault::new(field, in_words(&error.inner().to_string()))
    })
}

/// What a field of the wrong type is told, for whoever writes manifests: what stands there, and what to write.
fn in_words(message: &str) -> String {
    let mistaken = ["invalid type: ", "invalid value: "].iter().find_map(|start| message.strip_prefix(start));
    let Some((found, wanted)) = mistaken.and_then(|rest| rest.rsplit_once(", expected ")) else {
        return message.to_owned();
    };
    let found = match found.split_once(' ') {
        Some(("string", text)) => format!("the text {text}"),
        Some(("integer" | "boolean", plain)) => plain.trim_matches('`').to_owned(),
        Some(("floating", rest)) => rest.trim_start_matches("point ").trim_matches('`').to_owned(),
        _ => match found {
            "sequence" => "a list".to_owned(),
            "map" => "an object with fields".to_owned(),
            "null" | "unit value" => "empty".to_owned(),
            other => other.to_owned(),
        },
    };
    let wanted = match wanted {
        "a sequence" => "a list is wanted: lines that start with `- `, or [..., ...]",
        "a map" => "names with values are wanted: lines of `name: value`, or {name: value}",
        "a string" => "text is wanted: put it into quotes",
        "a boolean" => "true or false is wanted, without quotes",
        "i32" | "i64" | "u8" | "u16" | "u32" | "u64" => "a whole number is wanted, without quotes",
        other => return format!("it is {found}; {}", object_of(other)),
    };
    format!("it is {found}; {wanted}")
}

/// Types of Kubernetes go by their names there: `struct ServiceSpec`.
fn object_of(wanted: &str) -> String {
    match wanted.strip_prefix("struct ").unwrap_or(wanted) {
        name if name.starts_with(|first: char| first.is_ascii_uppercase()) => {
            format!("the fields of {name} are wanted: lines of `name: value`, or {{name: value}}")
        }
        words => format!("{words} is wanted"),
    }
}

pub(super) fn settings(metadata: &ObjectMeta) -> (Settings, Vec<Fault>) {
    let empty = BTreeMap::new();
    let annotations = metadata.annotations.as_ref().unwrap_or(&empty);
    let (settings, problems) = Settings::read(annotations, metadata.labels.as_ref().unwrap_or(&empty));
    (settings, problems.into_iter().map(|problem| Fault::new(problem.field, problem.cause)).collect())
}

pub(super) fn check_namespaced(key: &Key, is_name: fn(&str) -> bool, wanted: &str) -> Result<(), Fault> {
    check(is_name, &key.name.name, "metadata.name", wanted)?;
    check(is_label, &key.name.namespace, "metadata.namespace", LABEL)
}

pub(super) fn check(is_name: fn(&str) -> bool, name: &str, field: &str, wanted: &str) -> Result<(), Fault> {
    match is_name(name) {
        true => Ok(()),
        false => Err(Fault::new(field, format!("{name:?} is no name; {wanted}"))),
    }
}

// RFC 1123, as Kubernetes reads it: "Object Names and IDs", DNS label names.
pub(super) fn is_label(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('-') && !name.ends_with('-')
}

// DNS subdomain names: labels joined by dots; Kubernetes bounds the whole and not each label.
pub(super) fn is_subdomain(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let part = |p: &str| !p.is_empty() && p.bytes().all(allowed) && !p.starts_with('-') && !p.ends_with('-');
    (1..=253).contains(&name.len()) && name.split('.').all(part)
}

pub(super) fn address(field: impl FnOnce() -> String, text: &str) -> Result<IpAddr, Fault> {
    text.parse::<IpAddr>()
        .map(|ip| ip.to_canonical())
        .map_err(|_| Fault::new(field(), format!("{text:?} is no IP address; write one such as 10.0.1.2 or fd00::2")))
}

pub(super) fn cidr(field: impl FnOnce() -> String, text: &str) -> Result<IpNet, Fault> {
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .map_err(|_| Fault::new(field(), format!("{text:?} is no range; write one such as 10.0.1.0/24")))
}

pub(super) fn port(field: impl FnOnce() -> String, number: i32) -> Result<u16, Fault> {
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Fault::new(field(), format!("{number} is no port; write a number from 1 to 65535"))),
    }
}

pub(super) fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP" || protocol.is_empty())
}

pub(super) const LABEL: &str = "write at most 63 of lower-case letters, digits and '-', the first and last no '-'";
pub(super) const SUBDOMAIN: &str = "write at most 253 of lower-case letters, digits, '-' and '.', each part starting and ending \
                         with a letter or digit";
