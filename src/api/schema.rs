//! What a schema is made of beyond what the types' attributes can say.

use serde_yaml::{Mapping, Value};

/// Takes `nullable` from every field: what is left out is left out, and a `null` in a policy is a list that somebody
/// has yet to fill.
pub(super) fn refuse_null(value: &mut Value) {
    match value {
        Value::Mapping(fields) => {
            // A property of that name would be an object; the keyword is a boolean.
            if fields.get("nullable").is_some_and(Value::is_bool) {
                fields.remove("nullable");
            }
            fields.values_mut().for_each(refuse_null);
        }
        Value::Sequence(items) => items.iter_mut().for_each(refuse_null),
        _ => {}
    }
}

/// Formats that OpenAPI does not know, and the API server warns of: `minimum` says the same of numbers without a sign.
pub(super) fn drop_strange_formats(schema: &mut Value) {
    match schema {
        Value::Mapping(fields) => {
            if fields.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
                fields.remove("format");
            }
            fields.values_mut().for_each(drop_strange_formats);
        }
        Value::Sequence(items) => items.iter_mut().for_each(drop_strange_formats),
        _ => {}
    }
}

/// Says with its cure what the API server would tell in its own words alone: that a list may not be empty, in place of
/// `minItems`. Patterns of a list's items are judged by an admission policy instead.
pub(super) fn explain_refusals(schema: &mut Value) {
    if let Value::Sequence(items) = schema {
        return items.iter_mut().for_each(explain_refusals);
    }
    let Value::Mapping(schema) = schema else { return };
    if let Some(items) = schema.get_mut("items").and_then(Value::as_mapping_mut) {
        items.remove("pattern");
    }
    let mut rules = Vec::new();
    let properties = schema.get_mut("properties").and_then(Value::as_mapping_mut);
    for (name, property) in properties.into_iter().flatten() {
        let Some((name, property)) = name.as_str().zip(property.as_mapping_mut()) else { continue };
        let (items, values) = (property.remove("minItems"), property.remove("minProperties"));
        if items.or(values).is_some() {
            rules.push(not_empty(name));
        }
    }
    if !rules.is_empty() {
        let all = schema.entry("x-kubernetes-validations".into()).or_insert(Value::Sequence(Vec::new()));
        all.as_sequence_mut().into_iter().for_each(|all| all.append(&mut rules));
    }
    schema.values_mut().for_each(explain_refusals);
}

fn not_empty(field: &str) -> Value {
    let rule = [
        ("rule", format!("!has(self.{field}) || self.{field}.size() > 0")),
        ("fieldPath", format!(".{field}")),
        ("message", "what is empty matches nothing: give it at least one entry, or leave the field out".to_owned()),
    ];
    rule.into_iter().map(|(name, value)| (name.into(), value.into())).collect::<Mapping>().into()
}
