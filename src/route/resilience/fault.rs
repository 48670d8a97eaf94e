//! Failures on purpose: to see what they do before they come by themselves.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::super::{GrpcStatus, Share};

/// `faultInjection`: at the client's side, once a request, and never repeated.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FaultRules {
    /// Only requests that carry all of these.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub delay: Option<(Duration, Share)>,
    pub abort: Option<(Abort, Share)>,
}

/// What is answered in place of the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Abort {
    Http(StatusCode),
    /// To clients of gRPC alone.
    Grpc(GrpcStatus),
}

/// What befalls one request: the delay first, then the abort.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fault {
    pub delay: Option<Duration>,
    pub abort: Option<Abort>,
}

impl FaultRules {
    /// Draws what befalls a request. Both are drawn by themselves.
    pub fn draw(&self, head: &HeaderMap, [delay, abort]: [u64; 2]) -> Fault {
        if !self.headers.iter().all(|(name, value)| head.get_all(name).iter().any(|sent| sent == value)) {
            return Fault::default();
        }
        let delay = self.delay.filter(|(_, share)| share.takes(delay)).map(|(length, _)| length);
        let abort = self.abort.filter(|(_, share)| share.takes(abort)).map(|(abort, _)| abort);
        Fault { delay, abort }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_befalls_its_share() {
        let percent = |numerator| Share { numerator, denominator: 100 };
        let rules = FaultRules {
            headers: Vec::new(),
            delay: Some((Duration::from_secs(1), percent(10))),
            abort: Some((Abort::Http(StatusCode::SERVICE_UNAVAILABLE), percent(50))),
        };
        let drawn: Vec<_> = (0..100)
            .flat_map(|a| (0..100).map(move |b| [a, b]))
            .map(|draw| rules.draw(&HeaderMap::new(), draw))
            .collect();
        let count = |is: fn(&Fault) -> bool| drawn.iter().filter(|fault| is(fault)).count();
        assert_eq!(count(|fault| fault.delay.is_some()), 1000);
        assert_eq!(count(|fault| fault.abort.is_some()), 5000);
        assert_eq!(count(|fault| fault.delay.is_some() && fault.abort.is_some()), 500);
        assert_eq!(FaultRules::default().draw(&HeaderMap::new(), [0, 0]), Fault::default());
    }

    #[test]
    fn only_requests_with_the_headers_are_befallen() {
        let header = (HeaderName::from_static("x-chaos"), HeaderValue::from_static("yes"));
        let abort = Some((Abort::Grpc(GrpcStatus::Unavailable), Share::ALL));
        let rules = FaultRules { headers: vec![header.clone()], delay: None, abort };
        let mut head = HeaderMap::new();
        assert_eq!(rules.draw(&head, [0, 0]), Fault::default());
        head.append("x-chaos", HeaderValue::from_static("no"));
        head.append(header.0, header.1);
        assert_eq!(rules.draw(&head, [0, 0]).abort, Some(Abort::Grpc(GrpcStatus::Unavailable)));
    }
}
