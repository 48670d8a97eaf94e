//! Text into documents: where each starts, what it says, and where in it a field stands.

use std::cell::Cell;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, IgnoredAny, MapAccess, SeqAccess, VariantAccess, Visitor};
use serde_json::Value;

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

#[derive(Clone, PartialEq, Eq, Debug)]
enum Segment {
    Key(String),
    Index(usize),
}

// `spec.ports[0].port`, and `metadata.labels[app.kubernetes.io/name]` for keys that hold dots.
fn segments(field: &str) -> Vec<Segment> {
    let mut found = Vec::new();
    let mut rest = field;
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('[') {
            let (inside, after) = inner.split_once(']').unwrap_or((inner, ""));
            found.push(inside.parse().map_or_else(|_| Segment::Key(inside.to_owned()), Segment::Index));
            rest = after;
        } else {
            let rest_without_dot = rest.strip_prefix('.').unwrap_or(rest);
            let end = rest_without_dot.find(['.', '[']).unwrap_or(rest_without_dot.len());
            if end > 0 {
                found.push(Segment::Key(rest_without_dot[..end].to_owned()));
            }
            rest = &rest_without_dot[end..];
        }
    }
    found
}

// The parser tells places only in errors: so walk to the field, fail there, and read the place off the failure.
fn locate(text: &str, path: &[Segment]) -> Option<usize> {
    let reached = Cell::new(false);
    let walk = Walk { path, reached: &reached };
    let error = walk.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
    error.location().filter(|_| reached.get()).map(|location| location.line())
}

/// Refuses what would grow out of bounds once its aliases are followed. Without an anchor there is no alias.
fn weigh(text: &str) -> serde_yaml::Result<()> {
    if !text.contains('&') {
        return Ok(());
    }
    let left = Cell::new(MOST_SAID + 8 * text.len());
    Weight(&left).deserialize(serde_yaml::Deserializer::from_str(text))
}

#[derive(Clone, Copy)]
struct Weight<'a>(&'a Cell<usize>);

impl Weight<'_> {
    fn add<E: serde::de::Error>(self, bytes: usize) -> Result<(), E> {
        let left = self.0.get().checked_sub(bytes + NODE);
        self.0.set(left.ok_or_else(|| E::custom("its aliases say too much: write out what they stand for"))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Weight<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Weight<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_entry_seed(self, self)?.is_some() {}
        self.add(0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(self)?.is_some() {}
        self.add(0)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<(), A::Error> {
        let (_, inner) = tagged.variant::<IgnoredAny>()?;
        inner.newtype_variant_seed(self)
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.add(0)
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.add(0)
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.add(0)
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.add(0)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        self.add(text.len())
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.add(0)
    }
}

#[derive(Clone, Copy)]
struct Walk<'a> {
    path: &'a [Segment],
    reached: &'a Cell<bool>,
}

impl Walk<'_> {
    fn here<E: serde::de::Error>(&self) -> E {
        self.reached.set(true);
        E::custom("here")
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((Segment::Key(wanted), rest)) = self.path.split_first() else {
            if self.path.is_empty() {
                return Err(self.here());
            }
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(());
        };
        let key = Key { wanted, reached: rest.is_empty().then_some(self.reached) };
        while let Some(matches) = map.next_key_seed(key)? {
            if matches {
                map.next_value_seed(Walk { path: rest, reached: self.reached })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Some((Segment::Index(wanted), rest)) = self.path.split_first() else {
            if self.path.is_empty() {
                return Err(self.here());
            }
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        };
        for _ in 0..*wanted {
            if seq.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        seq.next_element_seed(Walk { path: rest, reached: self.reached })?;
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.scalar()
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.scalar()
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.scalar()
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.scalar()
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        self.scalar()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.scalar()
    }
}

impl Walk<'_> {
    fn scalar<E: serde::de::Error>(&self) -> Result<(), E> {
        if self.path.is_empty() { Err(self.here()) } else { Ok(()) }
    }
}

#[derive(Clone, Copy)]
struct Key<'a> {
    wanted: &'a str,
    /// Set where the key itself is what is looked for.
    reached: Option<&'a Cell<bool>>,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<bool, E> {
        match self.reached {
            Some(reached) if key == self.wanted => {
                reached.set(true);
                Err(E::custom("here"))
            }
            _ => Ok(key == self.wanted),
        }
    }
}

/// A list of ten thousand objects, each with a problem, must not take minutes to say so.
const LOOKED_BYTES: usize = 16 << 20;
const MIN_LOOKS: usize = 20;
/// What a document may say by aliases, beside a multiple of its length.
const MOST_SAID: usize = 16 << 20;
/// What a value weighs whatever it says.
const NODE: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<(&str, usize)> {
        split(text).into_iter().map(|d| (d.text.trim(), d.offset)).collect()
    }

    #[test]
    fn a_file_is_cut_at_its_markers() {
        assert_eq!(cut("a: 1\n---\nb: 2\n"), [("a: 1", 0), ("---\nb: 2", 1)]);
        assert_eq!(cut("--- # first\na: 1\n--- {b: 2}\n"), [("--- # first\na: 1", 0), ("--- {b: 2}", 2)]);
        assert_eq!(cut("\u{feff}---\r\na: 1\r\n---\r\nb: 2"), [("---\r\na: 1", 0), ("---\r\nb: 2", 2)]);
        assert_eq!(cut("a: 1\n...\n# why\n---\nb: 2\n"), [("a: 1", 0), ("# why\n---\nb: 2", 2)]);
        assert_eq!(cut("# head\n\n%YAML 1.2\n---\na: 1\n"), [("# head\n\n%YAML 1.2\n---\na: 1", 0)]);
        assert_eq!(cut("a: |\n  ---\n  text\n----\n"), [("a: |\n  ---\n  text\n----", 0)]);
        assert!(cut("\n\n").is_empty());
    }

    #[test]
    fn a_document_with_markers_and_comments_alone_says_nothing() {
        for text in ["---\n", "# note\n---\n# more\n", "---\n---\n"] {
            assert!(split(text).iter().all(|d| d.parse() == Ok(Value::Null)), "{text:?}");
        }
    }

    #[test]
    fn fields_are_found_on_their_lines() {
        let text = "a: 1\n---\n# note\nmetadata:\n  name: x\n  labels:\n    app.kubernetes.io/name: 3\nspec:\n  ports:\n  - \
                    port: 1\n    name: a\n  - {port: 70000,\n     name: b}\n  empty:\n";
        let document = &split(text)[1];
        for (field, line) in [
            ("metadata", 4),
            ("metadata.name", 5),
            ("metadata.labels[app.kubernetes.io/name]", 7),
            ("spec.ports", 9),
            ("spec.ports[0]", 10),
            ("spec.ports[0].name", 11),
            ("spec.ports[1].port", 12),
            ("spec.ports[1].name", 13),
            ("spec.ports[1].protocol", 12),
            ("spec.ports[7].port", 9),
            ("spec.empty", 14),
            ("status.podIPs[0]", 4),
        ] {
            assert_eq!(document.line_of(field), line, "{field}");
        }
    }

    #[test]
    fn what_is_not_yaml_is_told_by_its_line_in_the_file() {
        let unparsed = split("a: 1\n---\nb: [1\nc: 2\n")[1].parse().unwrap_err();
        assert!((3..=4).contains(&unparsed.line), "{unparsed:?}");
        let twice = split("---\na: 1\na: 2\n")[0].parse().unwrap_err();
        assert!(twice.cause.contains("duplicate"), "{twice:?}");
    }

    #[test]
    fn aliases_that_say_too_much_are_refused_and_others_are_followed() {
        let value = split("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}\n")[0].parse().unwrap();
        assert_eq!(value["d"], serde_json::json!({"b": 1, "e": 2}));
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 16), "*a,".repeat(1 << 13));
        let wide = (b'b'..=b'i').fold("a: &a [x,x,x,x,x,x,x,x,x,x]\n".to_owned(), |text, name| {
            let above = (name - 1) as char;
            format!("{text}{0}: &{0} [{1}]\n", name as char, format!("*{above},").repeat(10))
        });
        for bomb in [long, wide] {
            let unparsed = split(&bomb)[0].parse().unwrap_err();
            assert!(
                unparsed.cause.contains("aliases say too much") || unparsed.cause.contains("repetition"),
                "{unparsed:?}"
            );
        }
    }

    #[test]
    fn json_with_its_own_escapes_is_read() {
        let value = split("{\n\t\"a\": \"\\ud83d\\ude00\\/\"\n}\n")[0].parse().unwrap();
        assert_eq!(value["a"], "😀/");
    }

    #[test]
    fn a_broken_document_still_tells_what_it_seems_to_be() {
        let text = "kind: AuthorizationPolicy # deny\nmetadata:\n  labels:\n    name: no\n  name: \"strict\"\n  \
                    namespace: shop\nspec:\n  rules: [\n";
        assert_eq!(split(text)[0].guess(), (Some("AuthorizationPolicy"), Some("shop"), Some("strict")));
        assert_eq!(split("kind: Po")[0].guess(), (Some("Po"), None, None));
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_strange(text in "[-.%#a: \\[\\]{}\"'|&*!<\\t\\r\\n\u{feff}]{0,80}") {
            for document in split(&text) {
                let _ = document.parse();
                let _ = document.line_of("a.b[0]");
                let _ = document.guess();
            }
        }
    }
}
