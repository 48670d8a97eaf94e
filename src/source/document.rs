//! Text into documents: where each starts, what it says, and where in it a field stands.

use std::cell::Cell;

use serde_json::Value;

use self::place::{locate, segments};
use self::weight::weigh;

mod place;
mod weight;

/// One YAML document of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Document<'a> {
    pub text: &'a str,
    /// How many lines of the file stand before it.
    pub offset: usize,
    /// How often a field may still be looked for: each time reads the document anew.
    looks: Cell<usize>,
}

/// A document that is not YAML.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Unparsed {
    /// Of the file, counted from 1.
    pub line: usize,
    pub cause: String,
}

/// Cuts a file at its document markers, so that a document that is not YAML takes no other with it.
///
/// [YAML 1.2.2, section 9.1](https://yaml.org/spec/1.2.2/#91-documents): `---` and `...` at the start of a line, before
/// white space or the line's end, are markers wherever they stand: no scalar may contain such a line.
pub(super) fn split(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    let mut start = (0, 0);
    // Comments and directives before a `---` belong to the document that it starts.
    let mut only_prologue = true;
    let mut at = 0;
    let mut push = |start: (usize, usize), end: usize| {
        let text = &text[start.0..end];
        let looks = Cell::new(MIN_LOOKS.max(LOOKED_BYTES / text.len().max(1)));
        let document = Document { text, offset: start.1, looks };
        if !document.text.trim().is_empty() {
            documents.push(document);
        }
    };
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if is_marker(line, "---") {
            if !only_prologue {
                push(start, at);
                start = (at, number);
            }
            only_prologue = false;
        } else if is_marker(line, "...") {
            push(start, at);
            start = (at + line.len(), number + 1);
            only_prologue = true;
        } else if only_prologue {
            let content = line.trim();
            only_prologue = content.is_empty() || content.starts_with('#') || line.starts_with('%');
        }
        at += line.len();
    }
    push(start, text.len());
    documents
}

impl Document<'_> {
    /// What the document says; null where it says nothing.
    pub fn parse(&self) -> Result<Value, Unparsed> {
        // JSON is tried first: its string escapes are not all YAML's.
        if self.text.trim_start().starts_with('{')
            && let Ok(value) = serde_json::from_str(self.text)
        {
            return Ok(value);
        }
        let parsed = weigh(self.text).and_then(|()| {
            let mut value: serde_yaml::Value = serde_yaml::from_str(self.text)?;
            value.apply_merge()?;
            Ok(value)
        });
        match parsed {
            Ok(value) => serde_json::to_value(value).map_err(|error| Unparsed {
                line: self.first_line(),
                cause: format!("this is YAML, but no Kubernetes object: {error}"),
            }),
            Err(error) => Err(Unparsed {
                line: error.location().map_or(self.first_line(), |location| self.offset + location.line()),
                cause: format!("not YAML: {}", without_place(&error.to_string())),
            }),
        }
    }

    /// The line of the file on which a field stands, or the nearest one above it that is written.
    ///
    /// Of a document with very many problems, the later ones stand on its first line.
    pub fn line_of(&self, field: &str) -> usize {
        let Some(left) = self.looks.get().checked_sub(1) else { return self.first_line() };
        self.looks.set(left);
        let path = segments(field);
        (0..=path.len())
            .rev()
            .find_map(|length| locate(self.text, &path[..length]))
            .map_or(self.first_line(), |line| self.offset + line)
    }

    /// What a document that is not YAML seems to be, read line by line: (kind, namespace, name).
    pub fn guess(&self) -> (Option<&str>, Option<&str>, Option<&str>) {
        let (mut kind, mut namespace, mut name) = (None, None, None);
        let mut metadata_indent: Option<usize> = None;
        let mut in_metadata = false;
        for line in self.text.lines() {
            let indent = line.len() - line.trim_start().len();
            let Some((key, value)) = line.trim().split_once(':') else { continue };
            let value = value.split(" #").next().unwrap_or(value).trim().trim_matches(['"', '\'']);
            if indent == 0 {
                in_metadata = key == "metadata";
                if key == "kind" {
                    kind = Some(value);
                }
            } else if in_metadata && *metadata_indent.get_or_insert(indent) == indent {
                match key {
                    "name" => name = Some(value),
                    "namespace" => namespace = Some(value),
                    _ => {}
                }
            }
        }
        (kind, namespace, name.filter(|name| !name.is_empty()))
    }

    // The first line that says something.
    fn first_line(&self) -> usize {
        let says = |line: &str| {
            let line = line.trim();
            !line.is_empty() && !line.starts_with('#') && !is_marker(line, "---")
        };
        self.offset + self.text.lines().position(says).unwrap_or(0) + 1
    }
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

// The place is told in our own words, counted from the file's start.
fn without_place(message: &str) -> &str {
    match message.rfind(" at line ") {
        Some(at) if !message[at..].contains(", ") => &message[..at],
        _ => message,
    }
}

/// A list of ten thousand objects, each with a problem, must not take minutes to say so.
const LOOKED_BYTES: usize = 16 << 20;
const MIN_LOOKS: usize = 20;

#[cfg(test)]
mod tests;
