use std::fmt::Write;
use std::net::SocketAddr;

use super::AccessLogFormat;
use crate::mesh::{Identity, NamespacedName};
use crate::telemetry::connection::Party;

/// One line on its way: fields with a value, one after the other. There is one for each request, so that the machinery of
/// `fmt` is kept for what is rare.
pub struct Line<'a> {
    text: &'a mut String,
    format: AccessLogFormat,
    is_first: bool,
}

impl<'a> Line<'a> {
    pub fn begin(text: &'a mut String, format: AccessLogFormat) -> Self {
        if format != AccessLogFormat::Text {
            text.push('{');
        }
        Self { text, format, is_first: true }
    }

    /// Fields that others precede.
    pub fn within(text: &'a mut String, format: AccessLogFormat) -> Self {
        Self { text, format, is_first: false }
    }

    /// Such fields, written before.
    pub fn fields(&mut self, written: &str) {
        self.text.push_str(written);
    }

    pub fn end(self) {
        self.text.push_str(if self.format == AccessLogFormat::Text { "\n" } else { "}\n" });
    }

    /// Who speaks with whom.
    pub fn parties(&mut self, source: &Party, destination: &Party) {
        self.party(["source_addr", "source_pod", "source_workload", "source_identity"], source);
        let names = ["destination_addr", "destination_pod", "destination_workload", "destination_identity"];
        self.party(names, destination);
    }

    fn party(&mut self, [addr, pod, workload, identity]: [&str; 4], party: &Party) {
        self.addr(addr, party.addr);
        self.object(pod, party.pod.as_ref());
        self.word(workload, party.workload.as_deref());
        if let Some(Identity { trust_domain, namespace, service_account }) = &party.identity {
            let parts = ["spiffe://", trust_domain.as_str(), "/ns/", namespace, "/sa/", service_account];
            self.value(identity, |text| text.extend(parts));
        }
    }

    pub fn word(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.value(name, |text| text.push_str(value));
        }
    }

    pub fn object(&mut self, name: &str, value: Option<&NamespacedName>) {
        if let Some(NamespacedName { namespace, name: own }) = value {
            self.value(name, |text| text.extend([namespace, "/", own]));
        }
    }

    pub fn addr(&mut self, name: &str, value: Option<SocketAddr>) {
        let mut number = itoa::Buffer::new();
        match value {
            Some(SocketAddr::V4(addr)) => self.value(name, |text| {
                for (octet, behind) in addr.ip().octets().into_iter().zip([".", ".", ".", ":"]) {
                    text.extend([number.format(octet), behind]);
                }
                text.push_str(number.format(addr.port()));
            }),
            Some(other) => self.shown(name, Some(other)),
            None => {}
        }
    }

    pub fn number(&mut self, name: &str, value: impl itoa::Integer) {
        self.name(name);
        self.text.push_str(itoa::Buffer::new().format(value));
    }

    pub fn shown(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.value(name, |text| {
                // Writing to a String does not fail.
                let _ = write!(text, "{value}");
            });
        }
    }

    /// A word as it is, anything else quoted as JSON, so that no value can break out of its line.
    pub fn value(&mut self, name: &str, write: impl FnOnce(&mut String)) {
        self.name(name);
        let before = self.text.len();
        let is_json = self.format != AccessLogFormat::Text;
        if is_json {
            self.text.push('"');
        }
        let start = self.text.len();
        write(self.text);
        let value = &self.text[start..];
        let is_plain = value.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\'));
        if is_json && is_plain {
            self.text.push('"');
        } else if is_json || !is_plain || value.is_empty() || value.contains('=') {
            let quoted = serde_json::Value::from(value).to_string();
            self.text.truncate(before);
            self.text.push_str(&quoted);
        }
    }

    fn name(&mut self, name: &str) {
        let is_first = std::mem::replace(&mut self.is_first, false);
        match (self.format, is_first) {
            (AccessLogFormat::Text, true) => self.text.extend([name, "="]),
            (AccessLogFormat::Text, false) => self.text.extend([" ", name, "="]),
            (_, true) => self.text.extend(["\"", name, "\":"]),
            (_, false) => self.text.extend([",\"", name, "\":"]),
        }
    }
}
