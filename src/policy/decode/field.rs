//! The small readers: each names the field that it refuses, and the cure.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::{DecodeError, unknown};
use crate::mesh::NamespacedName;
use crate::policy::object::{Pattern, Unenforced};
use crate::policy::path::normal_path;

/// The fields of one object, crossed off as they are read: what is left is not known.
pub(super) struct Fields<'a> {
    path: String,
    left: Vec<(&'a str, &'a Value)>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(object: &'a Map<String, Value>, path: &str) -> Self {
        Self { path: path.to_owned(), left: object.iter().map(|(key, value)| (key.as_str(), value)).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Crosses off a field; with its path.
    pub(super) fn take(&mut self, key: &str) -> Option<(String, &'a Value)> {
        let at = self.left.iter().position(|(name, _)| *name == key)?;
        Some((self.path_of(key), self.left.swap_remove(at).1))
    }

    /// What nobody asked for.
    pub(super) fn rest(&self) -> Vec<Unenforced> {
        self.left.iter().map(|(key, _)| unknown(self.path_of(key))).collect()
    }

    fn path_of(&self, key: &str) -> String {
        format!("{}.{key}", self.path)
    }
}

pub(super) fn refuse(path: &str, cause: String) -> DecodeError {
    DecodeError { field: path.to_owned(), cause }
}

pub(super) fn text<'a>(value: &'a Value, path: &str) -> Result<&'a str, DecodeError> {
    value.as_str().ok_or_else(|| refuse(path, format!("{} is not text; put it in quotes", kind(value))))
}

/// A list that says something.
pub(super) fn items<'a>(value: &'a Value, path: &str) -> Result<Vec<(String, &'a Value)>, DecodeError> {
    let Value::Array(list) = value else {
        return Err(refuse(path, format!("{} is not a list", kind(value))));
    };
    if list.is_empty() {
        return Err(refuse(path, "the list is empty; leave the field out, or fill it".into()));
    }
    Ok(list.iter().enumerate().map(|(index, value)| (format!("{path}[{index}]"), value)).collect())
}

/// A list of texts, none empty.
pub(super) fn texts<'a>(value: &'a Value, path: &str) -> Result<Vec<(String, &'a str)>, DecodeError> {
    let read = |(path, value): (String, &'a Value)| match text(value, &path)? {
        "" => Err(refuse(&path, "the value is empty; remove it, or fill it".into())),
        text => Ok((path, text)),
    };
    items(value, path)?.into_iter().map(read).collect()
}

/// Exact, prefix, suffix or presence; a `*` elsewhere would never match, and so is refused.
pub(super) fn pattern(text: &str, path: &str) -> Result<Pattern, DecodeError> {
    let (pattern, rest) = match text {
        "*" => (Pattern::Presence, ""),
        _ if text.starts_with('*') => (Pattern::Suffix(text[1..].into()), &text[1..]),
        _ if text.ends_with('*') => (Pattern::Prefix(text[..text.len() - 1].into()), &text[..text.len() - 1]),
        _ => (Pattern::Exact(text.into()), text),
    };
    if rest.contains('*') {
        return Err(refuse(path, format!("{text:?}: one '*' may stand, first or last")));
    }
    Ok(pattern)
}

pub(super) fn principal(text: &str, path: &str) -> Result<Pattern, DecodeError> {
    if text.contains("://") {
        let cure = text.strip_prefix("spiffe://").unwrap_or("cluster.local/ns/shop/sa/cart");
        return Err(refuse(path, format!("{text:?}: a principal is written without its scheme, as {cure:?}")));
    }
    pattern(text, path)
}

/// A host name, with a port or without.
pub(super) fn host(text: &str, path: &str) -> Result<Pattern, DecodeError> {
    if text.contains('/') {
        return Err(refuse(path, format!("{text:?} is no host; write one such as \"cart.example.com\"")));
    }
    pattern(text, path)
}

pub(super) fn method(text: &str, path: &str) -> Result<Pattern, DecodeError> {
    let name = text.trim_matches('*');
    if !name.is_empty() && http::Method::from_bytes(name.as_bytes()).is_err() {
        return Err(refuse(path, format!("{text:?} is no method; write one such as \"GET\"")));
    }
    pattern(text, path)
}

/// A path in the one form that requests are brought to: another one would never match.
pub(super) fn path_pattern(text: &str, path: &str) -> Result<Pattern, DecodeError> {
    let pattern = pattern(text, path)?;
    let (written, starts, ends) = match &pattern {
        Pattern::Exact(text) => (text, true, true),
        Pattern::Prefix(text) => (text, true, false),
        Pattern::Suffix(text) => (text, false, true),
        Pattern::Presence => return Ok(pattern),
    };
    if starts && !written.starts_with('/') {
        return Err(refuse(path, format!("{text:?} never matches: a path begins with '/'")));
    }
    if written.contains(['?', '#']) {
        return Err(refuse(path, format!("{text:?} never matches: a path is looked at without its query")));
    }
    // What stands in for the rest must change nothing of how this part is read.
    let whole = format!("{}{written}{}", if starts { "" } else { "/x" }, if ends { "" } else { "x" });
    match normal_path(&whole) {
        Ok(normal) if normal == whole => Ok(pattern),
        Ok(_) => {
            let cure =
                normal_path(written).map_or_else(|_| "it in its plain form".to_owned(), |cure| format!("{cure:?}"));
            Err(refuse(path, format!("{text:?} never matches: paths are looked at in their one form; write {cure}")))
        }
        Err(fault) => Err(refuse(path, format!("{text:?} never matches: {fault}"))),
    }
}

pub(super) fn account(text: &str, own: &Arc<str>, path: &str) -> Result<NamespacedName, DecodeError> {
    let name = match text.split_once('/') {
        Some((namespace, name)) => NamespacedName::new(namespace, name),
        None => NamespacedName::new(own.clone(), text),
    };
    if text.contains('*') || name.namespace.is_empty() || name.name.is_empty() || name.name.contains('/') {
        return Err(refuse(
            path,
            format!("{text:?} is neither \"name\" nor \"namespace/name\"; patterns are for principals"),
        ));
    }
    Ok(name)
}

pub(super) fn block(text: &str, path: &str) -> Result<IpNet, DecodeError> {
    let block = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    block.ok_or_else(|| {
        refuse(path, format!("{text:?} is neither an address such as 10.1.2.3 nor a range such as 10.0.0.0/8"))
    })
}

pub(super) fn port(text: &str, path: &str) -> Result<u16, DecodeError> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    let number = if digits { text.parse::<u16>().ok() } else { None };
    number.ok_or_else(|| refuse(path, format!("{text:?} is not a port from 1 to 65535")))
}

/// A value's type, in words.
pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "nothing (null)".into(),
        Value::Bool(value) => format!("{value}"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(value) => format!("the text {value:?}"),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}
