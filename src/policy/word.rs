//! Rules in words, as `explain` and the access log show them.

use super::object::{Term, Terms, Values};

/// `principals a, b and 3 more; not ports 8080`
pub(super) fn terms(terms: &Terms) -> String {
    terms.iter().map(term).collect::<Vec<_>>().join(", and ")
}

fn term(term: &Term) -> String {
    match &term.values {
        Values::Text(values) => line(&term.field, values),
        Values::Accounts(values) => line(&term.field, values),
        Values::Blocks(values) => line(&term.field, values),
        Values::Ports(values) => line(&term.field, values),
    }
}

fn line<T: ToString>(field: &str, values: &[T]) -> String {
    let shown: Vec<String> = values.iter().take(SHOWN).map(ToString::to_string).collect();
    let shown = shown.join(", ");
    match values.len().saturating_sub(SHOWN) {
        0 => format!("{field} {shown}"),
        more => format!("{field} {shown} and {more} more"),
    }
}

/// How many values of one field are shown.
const SHOWN: usize = 4;
