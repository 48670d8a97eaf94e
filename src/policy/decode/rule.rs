use serde_json::Value;

use super::field::{Fields, account, block, items, pattern, port, principal, refuse, text, texts};
use super::{DecodeError, object_at};
use crate::mesh::NamespacedName;
use crate::policy::object::{Attribute, Rule, Term, Terms, Unenforced, Values};

/// Reads one rule; what cannot be enforced is noted, marks the rule opaque, and is left out of its terms.
pub(super) fn rule(
    policy: &NamespacedName,
    value: &Value,
    path: &str,
    notes: &mut Vec<Unenforced>,
) -> Result<Rule, DecodeError> {
    let before = notes.len();
    let mut fields = Fields::new(object_at(value, path)?, path);
    let mut rule = Rule::default();
    let mut reader = Reader { policy, notes };
    if let Some((path, value)) = fields.take("from") {
        for (path, value) in items(value, &path)? {
            rule.from.push(reader.part(value, &path, "source", &SOURCE, &SOURCE_L7)?);
        }
    }
    if let Some((path, value)) = fields.take("to") {
        for (path, value) in items(value, &path)? {
            rule.to.push(reader.part(value, &path, "operation", &OPERATION, &OPERATION_L7)?);
        }
    }
    if let Some((path, value)) = fields.take("when") {
        for (path, value) in items(value, &path)? {
            rule.when.push(reader.condition(value, &path)?);
        }
    }
    notes.extend(fields.rest());
    rule.opaque = notes.len() > before;
    Ok(rule)
}

struct Reader<'a> {
    policy: &'a NamespacedName,
    notes: &'a mut Vec<Unenforced>,
}

impl Reader<'_> {
    /// One entry of `from` or `to`: `{ source: {...} }`, `{ operation: {...} }`.
    fn part(
        &mut self,
        value: &Value,
        path: &str,
        name: &str,
        known: &[(&str, Attribute)],
        layer7: &[&str],
    ) -> Result<Terms, DecodeError> {
        let mut outer = Fields::new(object_at(value, path)?, path);
        if outer.is_empty() {
            return Err(refuse(path, format!("the entry is empty; remove it, or give it a {name}")));
        }
        let mut terms = Terms::new();
        if let Some((path, value)) = outer.take(name) {
            let mut fields = Fields::new(object_at(value, &path)?, &path);
            if fields.is_empty() {
                return Err(refuse(&path, format!("the {name} is empty; remove it, or say what it matches")));
            }
            for (key, attribute) in known {
                for (key, negated) in [((*key).to_owned(), false), (negative(key), true)] {
                    if let Some((path, value)) = fields.take(&key) {
                        terms.push(self.term(*attribute, &key, negated, value, &path)?);
                    }
                }
            }
            for key in layer7 {
                for key in [(*key).to_owned(), negative(key)] {
                    if let Some((path, value)) = fields.take(&key) {
                        texts(value, &path)?;
                        self.notes.push(layer_7(path));
                    }
                }
            }
            self.notes.extend(fields.rest());
        }
        self.notes.extend(outer.rest());
        Ok(terms)
    }

    fn condition(&mut self, value: &Value, path: &str) -> Result<Terms, DecodeError> {
        let mut fields = Fields::new(object_at(value, path)?, path);
        let Some((key_path, key)) = fields.take("key") else {
            return Err(refuse(&format!("{path}.key"), "it is missing; source.ip, for example".into()));
        };
        let key = match text(key, &key_path)? {
            "" => return Err(refuse(&key_path, "it is empty; source.ip, for example".into())),
            key => key,
        };
        let lists = [fields.take("values"), fields.take("notValues")];
        self.notes.extend(fields.rest());
        if lists.iter().all(Option::is_none) && fields.is_empty() {
            return Err(refuse(path, "it has neither values nor notValues; give one of them".into()));
        }
        let attribute = KEYS.iter().find(|(known, _)| *known == key).map(|(_, attribute)| *attribute);
        let Some(attribute) = attribute else {
            for (path, value) in lists.iter().flatten() {
                texts(value, path)?;
            }
            let layer7 = KEYS_L7.iter().any(|known| key.starts_with(known));
            self.notes.push(if layer7 { layer_7(key_path) } else { unknown_key(key, key_path) });
            return Ok(Terms::new());
        };
        let mut terms = Terms::new();
        for (negated, list) in [false, true].into_iter().zip(lists) {
            let Some((path, value)) = list else { continue };
            let field = if negated { format!("not {key}") } else { key.to_owned() };
            terms.push(self.term(attribute, &field, negated, value, &path)?);
        }
        Ok(terms)
    }

    fn term(
        &self,
        attribute: Attribute,
        field: &str,
        negated: bool,
        value: &Value,
        path: &str,
    ) -> Result<Term, DecodeError> {
        let texts = texts(value, path)?.into_iter();
        let own = &self.policy.namespace;
        let values = match attribute {
            Attribute::Principal => {
                Values::Text(texts.map(|(path, text)| principal(text, &path)).collect::<Result<_, _>>()?)
            }
            Attribute::Namespace => {
                Values::Text(texts.map(|(path, text)| pattern(text, &path)).collect::<Result<_, _>>()?)
            }
            Attribute::ServiceAccount => {
                Values::Accounts(texts.map(|(path, text)| account(text, own, &path)).collect::<Result<_, _>>()?)
            }
            Attribute::SourceIp | Attribute::DestinationIp => {
                Values::Blocks(texts.map(|(path, text)| block(text, &path)).collect::<Result<_, _>>()?)
            }
            Attribute::DestinationPort => {
                Values::Ports(texts.map(|(path, text)| port(text, &path)).collect::<Result<_, _>>()?)
            }
        };
        Ok(Term { attribute, negated, values, field: field.into() })
    }
}

/// `notPrincipals` of `principals`.
fn negative(key: &str) -> String {
    let (first, rest) = key.split_at(1);
    format!("not{}{rest}", first.to_ascii_uppercase())
}

fn layer_7(field: String) -> Unenforced {
    let cause = "it speaks of requests, and connections are decided at layer 4: an ALLOW rule with it matches nothing, a DENY rule matches as if it were not there; remove it";
    Unenforced { field, cause: cause.into() }
}

fn unknown_key(key: &str, field: String) -> Unenforced {
    let known: Vec<&str> = KEYS.iter().map(|(key, _)| *key).collect();
    Unenforced {
        field,
        cause: format!("the key {key:?} is not known, it fails closed; known are {}", known.join(", ")),
    }
}

const SOURCE: [(&str, Attribute); 4] = [
    ("principals", Attribute::Principal),
    ("namespaces", Attribute::Namespace),
    ("serviceAccounts", Attribute::ServiceAccount),
    ("ipBlocks", Attribute::SourceIp),
];
const SOURCE_L7: [&str; 2] = ["requestPrincipals", "remoteIpBlocks"];
const OPERATION: [(&str, Attribute); 1] = [("ports", Attribute::DestinationPort)];
const OPERATION_L7: [&str; 3] = ["hosts", "methods", "paths"];
const KEYS: [(&str, Attribute); 5] = [
    ("source.ip", Attribute::SourceIp),
    ("source.namespace", Attribute::Namespace),
    ("source.principal", Attribute::Principal),
    ("destination.ip", Attribute::DestinationIp),
    ("destination.port", Attribute::DestinationPort),
];
const KEYS_L7: [&str; 4] = ["request.", "remote.ip", "connection.sni", "experimental."];
