use http::HeaderName;

/// A list of headers, as people write it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Names(Vec<Name>);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Name {
    Exact(HeaderName),
    Prefix(String),
    Suffix(String),
}

impl Names {
    /// Each written exactly, as a prefix (`x-auth-*`) or as a suffix (`*-id`).
    ///
    /// # Errors
    /// The place of one that is no name of a header.
    pub fn parse<T: AsRef<str>>(written: &[T]) -> Result<Self, usize> {
        let read = |(at, text): (usize, &T)| {
            let text = text.as_ref();
            let part = |part: &str| {
                let part = part.to_ascii_lowercase();
                (part.is_empty() || HeaderName::from_bytes(part.as_bytes()).is_ok()).then_some(part).ok_or(at)
            };
            match (text.strip_suffix('*'), text.strip_prefix('*')) {
                (Some(prefix), _) => part(prefix).map(Name::Prefix),
                (_, Some(suffix)) => part(suffix).map(Name::Suffix),
                _ => HeaderName::from_bytes(text.as_bytes()).map(Name::Exact).map_err(|_| at),
            }
        };
        written.iter().enumerate().map(read).collect::<Result<_, _>>().map(Self)
    }

    pub fn has(&self, name: &HeaderName) -> bool {
        self.0.iter().any(|known| match known {
            Name::Exact(exact) => exact == name,
            Name::Prefix(prefix) => name.as_str().starts_with(prefix),
            Name::Suffix(suffix) => name.as_str().ends_with(suffix),
        })
    }

    /// As [`Names::has`], with `_` and `-` taken for one another: so applications of the CGI tradition read headers
    /// (RFC 3875, section 4.1.18).
    pub fn has_alike(&self, name: &HeaderName) -> bool {
        let plain = |text: &str| text.replace('_', "-");
        let name = plain(name.as_str());
        self.0.iter().any(|known| match known {
            Name::Exact(exact) => plain(exact.as_str()) == name,
            Name::Prefix(prefix) => name.starts_with(&plain(prefix)),
            Name::Suffix(suffix) => name.ends_with(&plain(suffix)),
        })
    }
}
