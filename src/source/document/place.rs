//! Where in a document a field stands.

use std::cell::Cell;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Segment {
    Key(String),
    Index(usize),
}

// `spec.ports[0].port`, and `metadata.labels[app.kubernetes.io/name]` for keys that hold dots.
pub(super) fn segments(field: &str) -> Vec<Segment> {
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
pub(super) fn locate(text: &str, path: &[Segment]) -> Option<usize> {
    let reached = Cell::new(false);
    let walk = Walk { path, reached: &reached };
    let error = walk.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
    error.location().filter(|_| reached.get()).map(|location| location.line())
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
