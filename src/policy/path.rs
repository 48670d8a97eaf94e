//! The one form of a path: what policy is held against, and what the application gets.

use std::borrow::Cow;
use std::fmt::Write;

/// Why a path has no such form: two programs would read it in two ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PathFault {
    #[error("an escape that is none in the path")]
    Escape,
    #[error("an encoded slash or backslash in the path")]
    Slash,
    #[error("an encoded NUL in the path")]
    Nul,
    #[error("a dot segment with a parameter in the path")]
    DotParameter,
}

/// Brings a path, without its query, into its one form: unreserved characters are decoded and other escapes written in
/// capitals (RFC 3986, sections 6.2.2.1 and 6.2.2.2), backslashes are slashes, many slashes are one, and dot segments are
/// gone (section 5.2.4). What is in this form stays as it is.
///
/// # Errors
/// For what servers are known to read in different ways: they are refused rather than guessed at.
pub fn normal_path(path: &str) -> Result<Cow<'_, str>, PathFault> {
    // `OPTIONS *` asks about no path.
    if path == "*" || is_normal(path) {
        return Ok(Cow::Borrowed(path));
    }
    let decoded = decode(path)?;
    let mut segments: Vec<&str> = Vec::new();
    let mut ends_in_folder = false;
    for segment in decoded.split('/') {
        ends_in_folder = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            // Servers that take the parameter off first see a dot segment.
            _ if segment.starts_with(".;") || segment.starts_with("..;") => return Err(PathFault::DotParameter),
            _ => segments.push(segment),
        }
    }
    let mut normal = String::with_capacity(decoded.len() + 1);
    for segment in &segments {
        normal.push('/');
        normal.push_str(segment);
    }
    if ends_in_folder || segments.is_empty() {
        normal.push('/');
    }
    Ok(Cow::Owned(normal))
}

/// Most paths need no second look.
fn is_normal(path: &str) -> bool {
    path.starts_with('/')
        && path.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'%' | b'\\'))
        && !path.contains("//")
        && !path.contains("/.")
}

/// Escapes as they are to be, and slashes alone between segments.
fn decode(path: &str) -> Result<String, PathFault> {
    let mut decoded = String::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let value = match byte {
            b'\\' => {
                decoded.push('/');
                continue;
            }
            b'%' => escape(bytes.next(), bytes.next())?,
            _ if byte.is_ascii_graphic() => {
                decoded.push(char::from(byte));
                continue;
            }
            other => other,
        };
        match value {
            0 => return Err(PathFault::Nul),
            b'/' | b'\\' => return Err(PathFault::Slash),
            // RFC 3986, section 2.3.
            b'-' | b'.' | b'_' | b'~' => decoded.push(char::from(value)),
            _ if value.is_ascii_alphanumeric() => decoded.push(char::from(value)),
            // A String takes whatever is written.
            _ => drop(write!(decoded, "%{value:02X}")),
        }
    }
    Ok(decoded)
}

fn escape(high: Option<u8>, low: Option<u8>) -> Result<u8, PathFault> {
    let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
    let value = digit(high).zip(digit(low)).map(|(high, low)| high * 16 + low);
    value.and_then(|value| u8::try_from(value).ok()).ok_or(PathFault::Escape)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_path_has_one_form() {
        for (written, wanted) in [
            ("/", "/"),
            ("", "/"),
            ("*", "*"),
            ("/a/b", "/a/b"),
            ("/a/b/", "/a/b/"),
            ("/a//b", "/a/b"),
            ("//a///", "/a/"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/b/..", "/a/"),
            ("/a/b/.", "/a/b/"),
            ("/../../a", "/a"),
            ("/..", "/"),
            ("/public/../admin", "/admin"),
            ("/public/%2e%2E/admin", "/admin"),
            ("/public/.%2e/admin", "/admin"),
            ("/%61dmin", "/admin"),
            ("/a\\b", "/a/b"),
            ("/a\\..\\b", "/b"),
            ("/\\/a", "/a"),
            ("/a%7eb%2Dc%5f", "/a~b-c_"),
            ("/a%20b%3fc%3B", "/a%20b%3Fc%3B"),
            ("/a%252e", "/a%252e"),
            ("/caf\u{e9}", "/caf%C3%A9"),
            ("/caf%c3%a9", "/caf%C3%A9"),
            ("/...", "/..."),
            ("/.well-known/x", "/.well-known/x"),
            ("/..a/.b", "/..a/.b"),
            ("/a;b=c/d", "/a;b=c/d"),
        ] {
            assert_eq!(normal_path(written).as_deref(), Ok(wanted), "{written}");
        }
    }

    #[test]
    fn what_servers_read_in_different_ways_is_refused() {
        for (written, fault) in [
            ("/a%2fb", PathFault::Slash),
            ("/a%2Fb", PathFault::Slash),
            ("/a%5cb", PathFault::Slash),
            ("/a%00", PathFault::Nul),
            ("/a%", PathFault::Escape),
            ("/a%2", PathFault::Escape),
            ("/a%zz", PathFault::Escape),
            ("/a%+1", PathFault::Escape),
            ("/public/..;/admin", PathFault::DotParameter),
            ("/public/%2e.;x=y/admin", PathFault::DotParameter),
            ("/a/.;/b", PathFault::DotParameter),
        ] {
            assert_eq!(normal_path(written), Err(fault), "{written}");
        }
    }

    /// As a server might: decodes all, then walks.
    fn walked(path: &str) -> Vec<String> {
        let mut bytes = path.bytes();
        let mut decoded = Vec::new();
        while let Some(byte) = bytes.next() {
            match byte {
                b'%' => decoded.push(escape(bytes.next(), bytes.next()).unwrap()),
                b'\\' => decoded.push(b'/'),
                other => decoded.push(other),
            }
        }
        let decoded = String::from_utf8(decoded).unwrap();
        let mut segments = Vec::new();
        for segment in decoded.split('/') {
            match segment {
                "" | "." => {}
                ".." => drop(segments.pop()),
                _ => segments.push(segment.to_owned()),
            }
        }
        segments
    }

    proptest! {
        #[test]
        fn the_form_of_a_form_is_itself(path in "(/|\\\\|%2e|%2E|%41|%c3%a9|%25|\\.|a|b|;|%20|é){0,12}") {
            if let Ok(once) = normal_path(&path) {
                prop_assert_eq!(normal_path(&once), Ok(Cow::Borrowed(&*once)));
            }
        }

        #[test]
        fn a_server_that_decodes_and_walks_comes_to_the_same_place(
            path in "/(/|\\\\|%2e|%2E|%41|%c3%a9|%25|\\.|a|b|%20|é|\\.\\.){0,12}",
        ) {
            let normal = normal_path(&path).unwrap();
            prop_assert_eq!(walked(&normal), walked(&path), "{}", normal);
            let has_dots = normal.split('/').any(|segment| segment == "." || segment == "..");
            prop_assert!(!has_dots && !normal.contains("//"), "{}", normal);
        }

        #[test]
        fn any_text_has_a_form_or_is_refused(path in "\\PC{0,40}") {
            if let Ok(normal) = normal_path(&path) {
                prop_assert!(normal.is_ascii() && (normal == "*" || normal.starts_with('/')));
            }
        }
    }
}
