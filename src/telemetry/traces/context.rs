use std::fmt;

use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

/// Which trace a request belongs to, and who its parent is, as header `traceparent` says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TraceContext {
    pub trace: TraceId,
    pub span: SpanId,
    flags: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TraceId(pub u128);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SpanId(pub u64);

impl TraceContext {
    /// A trace that begins here.
    pub fn begin(sampled: bool) -> Self {
        let flags = if sampled { SAMPLED | RANDOM } else { RANDOM };
        Self { trace: TraceId(rand::random_range(1..=u128::MAX)), span: SpanId::random(), flags }
    }

    /// Another span of the same trace.
    pub fn child(&self) -> Self {
        Self { span: SpanId::random(), ..*self }
    }

    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// What a request says of itself; none where it says nothing, or nothing that can be read.
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return None };
        Self::parse(value.as_bytes())
    }

    /// W3C Trace Context, sections 3.2.2 and 4.3: later versions may add fields, and have these first.
    fn parse(value: &[u8]) -> Option<Self> {
        let (fields, rest) = value.split_at_checked(LENGTH)?;
        let [version, trace, span, flags] = [(0, 2), (3, 35), (36, 52), (53, 55)].map(|(from, to)| &fields[from..to]);
        let version = hex(version)?;
        let well_formed = [2, 35, 52].iter().all(|at| fields[*at] == b'-')
            && (rest.is_empty() || (version > 0 && rest[0] == b'-'))
            && version != 0xff;
        let (trace, span) = (hex(trace)?, hex(span)?);
        let flags = u8::try_from(hex(flags)?).ok()? & (SAMPLED | RANDOM);
        let span = u64::try_from(span).ok()?;
        (well_formed && trace != 0 && span != 0).then_some(Self { trace: TraceId(trace), span: SpanId(span), flags })
    }

    /// Names it as the parent of what follows.
    pub fn write(&self, headers: &mut HeaderMap) {
        let text = format!("00-{}-{}-{:02x}", self.trace, self.span, self.flags);
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(TRACEPARENT, value);
        }
    }

    /// Takes away what could not be read: what others keep in `tracestate` belongs to another trace.
    pub fn forget(headers: &mut HeaderMap) {
        headers.remove(TRACEPARENT);
        headers.remove(TRACESTATE);
    }
}

impl SpanId {
    fn random() -> Self {
        Self(rand::random_range(1..=u64::MAX))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Lower-case digits alone: capitals are refused, as the specification has it.
fn hex(digits: &[u8]) -> Option<u128> {
    let is_lower = digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    let text = std::str::from_utf8(digits).ok().filter(|_| is_lower)?;
    u128::from_str_radix(text, 16).ok()
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// Of version 00.
const LENGTH: usize = 55;
const SAMPLED: u8 = 1;
/// Trace Context Level 2, section 3.2.2.3: the trace's id was drawn at random.
const RANDOM: u8 = 2;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(value: &str) -> Option<TraceContext> {
        TraceContext::parse(value.as_bytes())
    }

    #[test]
    fn a_context_is_read_as_the_specification_has_it() {
        const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = read(GOOD).unwrap();
        assert_eq!(
            (context.trace.to_string().as_str(), context.span.to_string().as_str(), context.is_sampled()),
            ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", true)
        );
        assert!(!read(&GOOD.replace("-01", "-00")).unwrap().is_sampled());
        assert!(read(&GOOD.replace("00-", "cc-")).is_some(), "a later version");
        assert!(read(&format!("{}-what-the-future-will-be-like", GOOD.replace("00-", "cc-"))).is_some());
        for wrong in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-+1",
            "00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.x",
            "0g-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn bytes_from_outside_are_read_or_refused(value in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = TraceContext::parse(&value);
        }

        #[test]
        fn what_is_written_is_read_again(sampled: bool) {
            let context = TraceContext::begin(sampled);
            let mut headers = HeaderMap::new();
            context.child().write(&mut headers);
            let read = TraceContext::read(&headers).unwrap();
            prop_assert_eq!((read.trace, read.is_sampled()), (context.trace, sampled));
            prop_assert_ne!(read.span, context.span);
        }
    }
}
