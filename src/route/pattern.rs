use std::fmt;
use std::sync::Arc;

use regex::bytes::{Regex, RegexBuilder};

/// A `RegularExpression` of a match. It must match the whole text; classes such as `\w` are ASCII, as in RE2.
#[derive(Clone)]
pub struct Pattern(Arc<Regex>, Arc<str>);

impl Pattern {
    /// # Errors
    /// Where it is no regular expression, or one that would take too much memory.
    pub fn new(written: &str) -> Result<Self, PatternError> {
        let whole = format!("^(?:{written})$");
        let regex = RegexBuilder::new(&whole).unicode(false).size_limit(MOST_BYTES).dfa_size_limit(MOST_BYTES).build();
        match regex {
            // What is balanced only with the parenthesis around it means something else than it says.
            Ok(regex) if RegexBuilder::new(written).unicode(false).build().is_ok() => {
                Ok(Self(Arc::new(regex), written.into()))
            }
            Ok(_) => Err(PatternError("its parentheses are not balanced".to_owned())),
            Err(regex::Error::CompiledTooBig(limit)) => {
                Err(PatternError(format!("it takes more than {limit} bytes of memory")))
            }
            Err(error) => Err(PatternError(
                error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned(),
            )),
        }
    }

    pub fn takes(&self, text: &[u8]) -> bool {
        self.0.is_match(text)
    }

    pub fn as_str(&self) -> &str {
        &self.1
    }

    /// The whole elements that every path begins with which it takes: `/v1/users` of `/v1/users/[0-9]+`; none where
    /// it need not even begin with a slash.
    pub(super) fn first_elements(&self) -> Option<&str> {
        let written = self.1.strip_prefix('^').unwrap_or(&self.1);
        let end = written.find(SPECIAL).unwrap_or(written.len());
        let (literal, rest) = written.split_at(end);
        // What may be repeated may be absent.
        let literal = if rest.starts_with(['*', '?', '{']) {
            literal.char_indices().next_back().map_or("", |(last, _)| &literal[..last])
        } else {
            literal
        };
        if has_alternatives(rest) || !literal.starts_with('/') {
            return None;
        }
        literal.rfind('/').map(|last| &literal[..last])
    }
}

/// Whether a `|` may stand outside of all groups: then what stands before it need not be there. Where classes or flags
/// make that hard to tell, it may.
fn has_alternatives(pattern: &str) -> bool {
    if !pattern.contains('|') {
        return false;
    }
    let flags = pattern.matches("(?").count() > pattern.matches("(?:").count();
    let (mut depth, mut is_escaped) = (0usize, false);
    let is_outside = pattern.chars().any(|c| {
        let escaped = is_escaped;
        is_escaped = c == '\\' && !escaped;
        match c {
            '(' if !escaped => depth += 1,
            ')' if !escaped => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == '|' && depth == 0
    });
    flags || pattern.contains('[') || is_outside
}

/// Characters that do not mean themselves.
const SPECIAL: [char; 14] = ['\\', '.', '+', '*', '?', '(', ')', '|', '[', ']', '{', '}', '^', '$'];

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.1 == other.1
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.as_str())
    }
}

/// Why something is no pattern.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct PatternError(String);

/// Of one compiled expression: whoever may write a route must not fill the agent's memory.
const MOST_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Prefix;
    use super::*;

    #[test]
    fn a_pattern_must_match_the_whole_text() {
        let pattern = Pattern::new("v[0-9]+|w").unwrap();
        for (text, takes) in [("v12", true), ("w", true), ("v12x", false), ("xw", false), ("", false)] {
            assert_eq!(pattern.takes(text.as_bytes()), takes, "{text}");
        }
    }

    #[test]
    fn classes_are_ascii_and_bytes_need_be_no_text() {
        assert!(!Pattern::new(r"\w+").unwrap().takes("é".as_bytes()));
        assert!(Pattern::new("a(?s:.)").unwrap().takes(b"a\xff"));
    }

    #[test]
    fn what_paths_must_begin_with_is_known_of_most_patterns() {
        for (pattern, wanted) in [
            ("/v1/users/[0-9]+", Some("/v1/users")),
            ("^/v1/users/.*$", Some("/v1/users")),
            ("/v1/users", Some("/v1")),
            ("/v1/use(r|d)s", Some("/v1")),
            ("/v1/u*", Some("/v1")),
            ("/v1/?", Some("")),
            ("/*", None),
            ("/a/b+/c", Some("/a")),
            ("/a/(x|y)/[|]", None),
            ("/a|/b", None),
            ("/a/(b)|c", None),
            (r"/a/(\)|b)", Some("/a")),
            (r"/a/\(|b", None),
            ("/a/[]|(]", None),
            ("/a/(?:x|y)", Some("/a")),
            ("/a/(?i:x|y)", None),
            ("(/a)", None),
            ("(?i)/a/b", None),
            (".*", None),
            ("", None),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().first_elements(), wanted, "{pattern}");
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for text in ["(", "a)(b", "[", "(?:a{1000}){1000}", "*"] {
            assert!(Pattern::new(text).is_err(), "{text}");
        }
    }

    proptest! {
        /// Patterns are kept by what paths must begin with: none of those that they take may be missed.
        #[test]
        fn whatever_a_pattern_takes_begins_as_it_says(
            pattern in r"(/[ab|()\[\]?*+.\\^${}0i:-]{0,9}|[/ab|()\[\]?*+.\\^${}0i:-]{1,9})",
            paths in prop::collection::vec("/[ab/(|]{0,6}", 1..40),
        ) {
            let Ok(read) = Pattern::new(&pattern) else { return Ok(()) };
            let Some(first) = read.first_elements() else { return Ok(()) };
            for path in paths.iter().filter(|path| read.takes(path.as_bytes())) {
                prop_assert!(Prefix::new(first).takes(path), "{pattern} takes {path}, and not all of {first}");
            }
        }
    }
}
