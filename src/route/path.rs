//! Paths, element by element.

use std::sync::Arc;

/// A `PathPrefix`: matches element by element, and a slash at its end means nothing (Gateway API, HTTPPathMatch).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Prefix {
    /// Without slashes at its end; empty for `/`.
    elements: Arc<str>,
    /// Characters as written: of two prefixes the longer one goes first.
    len: usize,
}

impl Prefix {
    /// From a path that begins with a slash.
    pub fn new(written: &str) -> Self {
        Self { elements: written.trim_end_matches('/').into(), len: written.len() }
    }

    pub fn elements(&self) -> &Arc<str> {
        &self.elements
    }

    pub fn written_len(&self) -> usize {
        self.len
    }

    pub fn takes(&self, path: &str) -> bool {
        path.strip_prefix(&*self.elements).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The path with this prefix replaced, as the table of HTTPPathModifier has it.
    pub fn replace(&self, path: &str, replacement: &str) -> String {
        let rest = path.strip_prefix(&*self.elements).unwrap_or(path);
        let new = format!("{}{rest}", replacement.trim_end_matches('/'));
        if new.starts_with('/') { new } else { format!("/{new}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_takes_whole_elements() {
        for (prefix, path, takes) in [
            ("/", "/", true),
            ("/", "/a/b", true),
            ("/abc", "/abc", true),
            ("/abc", "/abc/", true),
            ("/abc", "/abc/def", true),
            ("/abc", "/abcd", false),
            ("/abc", "/ABC", false),
            ("/abc", "/ab", false),
            ("/abc/", "/abc", true),
            ("/abc/", "/abc/", true),
            ("/abc/", "/abcd", false),
            ("/abc/def", "/abc", false),
            ("/", "*", false),
        ] {
            assert_eq!(Prefix::new(prefix).takes(path), takes, "{prefix} {path}");
        }
    }

    /// The table in the documentation of HTTPPathModifier.
    #[test]
    fn a_prefix_is_replaced_as_the_specification_has_it() {
        for (path, prefix, replacement, wanted) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/bar", "/", "/xyz", "/xyz/bar"),
        ] {
            assert_eq!(Prefix::new(prefix).replace(path, replacement), wanted, "{path} {prefix} {replacement:?}");
        }
    }
}
