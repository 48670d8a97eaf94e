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
}

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
    fn what_is_no_pattern_is_refused() {
        for text in ["(", "a)(b", "[", "(?:a{1000}){1000}", "*"] {
            assert!(Pattern::new(text).is_err(), "{text}");
        }
    }
}
