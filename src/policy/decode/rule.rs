use serde_json::Value;

use super::field::{
    Fields, account, block, host, items, method, path_pattern, pattern, port, principal, refuse, text, texts,
};
use super::{DecodeError, object_at};
use crate::mesh::NamespacedName;
use crate::policy::object::{Attribute, Pattern, RequestAttribute, Rule, Term, Terms, Unenforced, Values};

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
            rule.from.push(reader.part(value, &path, "source", &SOURCE)?);
        }
    }
    if let Some((path, value)) = fields.take("to") {
        for (path, value) in items(value, &path)? {
            rule.to.push(reader.part(value, &path, "operation", &OPERATION)?);
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
                        terms.push(self.term(attribute, &key, negated, value, &path)?);
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
        let Some(attribute) = attribute_of(key) else {
            for (path, value) in lists.iter().flatten() {
                texts(value, path)?;
            }
            self.notes.push(unknown_key(key, key_path));
            return Ok(Terms::new());
        };
        let mut terms = Terms::new();
        for (negated, list) in [false, true].into_iter().zip(lists) {
            let Some((path, value)) = list else { continue };
            let field = if negated { format!("not {key}") } else { key.to_owned() };
            terms.push(self.term(&attribute, &field, negated, value, &path)?);
        }
        Ok(terms)
    }

    fn term(
        &self,
        attribute: &Attribute,
        field: &str,
        negated: bool,
        value: &Value,
        path: &str,
    ) -> Result<Term, DecodeError> {
        let texts = texts(value, path)?.into_iter();
        let own = &self.policy.namespace;
        let read = |reader: fn(&str, &str) -> Result<Pattern, DecodeError>| -> Result<Values, DecodeError> {
            let read = texts.clone().map(|(path, text)| reader(text, &path));
            read.collect::<Result<_, _>>().map(Values::Text)
        };
        let values = match attribute {
            Attribute::Principal => read(principal)?,
            Attribute::Namespace => read(pattern)?,
            Attribute::ServiceAccount => {
                Values::Accounts(texts.map(|(path, text)| account(text, own, &path)).collect::<Result<_, _>>()?)
            }
            Attribute::SourceIp | Attribute::DestinationIp | Attribute::Request(RequestAttribute::RemoteIp) => {
                Values::Blocks(texts.map(|(path, text)| block(text, &path)).collect::<Result<_, _>>()?)
            }
            Attribute::DestinationPort => {
                Values::Ports(texts.map(|(path, text)| port(text, &path)).collect::<Result<_, _>>()?)
            }
            Attribute::Request(RequestAttribute::Host) => read(host)?,
            Attribute::Request(RequestAttribute::Method) => read(method)?,
            Attribute::Request(RequestAttribute::Path) => read(path_pattern)?,
            Attribute::Request(
                RequestAttribute::Header(_) | RequestAttribute::Principal | RequestAttribute::Claim(_),
            ) => read(pattern)?,
        };
        Ok(Term { attribute: attribute.clone(), negated, values, field: field.into() })
    }
}

/// `notPrincipals` of `principals`.
fn negative(key: &str) -> String {
    let (first, rest) = key.split_at(1);
    format!("not{}{rest}", first.to_ascii_uppercase())
}

fn unknown_key(key: &str, field: String) -> Unenforced {
    let known: Vec<&str> =
        KEYS.iter().map(|(key, _)| *key).chain(["request.headers[NAME]", "request.auth.claims[NAME]"]).collect();
    Unenforced {
        field,
        cause: format!("the key {key:?} is not known, it fails closed; known are {}", known.join(", ")),
    }
}

/// What the key of a condition speaks of.
fn attribute_of(key: &str) -> Option<Attribute> {
    let of_request = |attribute| Some(Attribute::Request(attribute));
    if let Some((_, attribute)) = KEYS.iter().find(|(known, _)| *known == key) {
        return Some(attribute.clone());
    }
    let one_claim = |name: &str| of_request(RequestAttribute::Claim([name.to_owned()].into()));
    match key {
        // RFC 7519, section 4.1.3, and OpenID Connect Core, section 2.
        "request.auth.audiences" => return one_claim("aud"),
        "request.auth.presenter" => return one_claim("azp"),
        _ => {}
    }
    if let Some(name) = key.strip_prefix("request.headers[").and_then(|rest| rest.strip_suffix(']')) {
        return of_request(RequestAttribute::Header(name.parse().ok()?));
    }
    let names = key.strip_prefix("request.auth.claims[")?.strip_suffix(']')?;
    let names: Vec<String> = names.split("][").map(str::to_owned).collect();
    if names.iter().any(|name| name.is_empty() || name.contains(['[', ']'])) {
        return None;
    }
    of_request(RequestAttribute::Claim(names.into()))
}

const SOURCE: [(&str, Attribute); 6] = [
    ("principals", Attribute::Principal),
    ("namespaces", Attribute::Namespace),
    ("serviceAccounts", Attribute::ServiceAccount),
    ("ipBlocks", Attribute::SourceIp),
    ("requestPrincipals", Attribute::Request(RequestAttribute::Principal)),
    ("remoteIpBlocks", Attribute::Request(RequestAttribute::RemoteIp)),
];
const OPERATION: [(&str, Attribute); 4] = [
    ("ports", Attribute::DestinationPort),
    ("hosts", Attribute::Request(RequestAttribute::Host)),
    ("methods", Attribute::Request(RequestAttribute::Method)),
    ("paths", Attribute::Request(RequestAttribute::Path)),
];
const KEYS: [(&str, Attribute); 7] = [
    ("source.ip", Attribute::SourceIp),
    ("source.namespace", Attribute::Namespace),
    ("source.principal", Attribute::Principal),
    ("destination.ip", Attribute::DestinationIp),
    ("destination.port", Attribute::DestinationPort),
    ("remote.ip", Attribute::Request(RequestAttribute::RemoteIp)),
    ("request.auth.principal", Attribute::Request(RequestAttribute::Principal)),
];
