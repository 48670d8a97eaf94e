use std::net::SocketAddr;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Uri};

use crate::transport::Behalf;

/// What a CONNECT says besides its stream: where to, and on whose behalf.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConnectHead {
    /// The workload's address; towards a waypoint, the service's.
    pub authority: SocketAddr,
    /// The client's own address, as it wants to be believed.
    pub forwarded: Option<SocketAddr>,
    /// W3C baggage: who the client is, for the other side's telemetry.
    pub baggage: String,
    pub traceparent: Option<String>,
    /// Of a waypoint's stream: whose it is.
    pub behalf: Option<Behalf>,
}

impl ConnectHead {
    /// RFC 9113, section 8.5: only `:method` and `:authority`. A value that no header can carry is left out.
    pub(super) fn request(&self) -> Result<Request<()>, http::Error> {
        let authority: http::uri::Authority = self.authority.to_string().parse()?;
        let mut request = Request::builder().method(Method::CONNECT).uri(Uri::from(authority)).body(())?;
        let forwarded = self
            .behalf
            .as_ref()
            .map(|behalf| behalf.address)
            .or(self.forwarded)
            .map(|address| format!("for=\"{address}\""));
        let identity = self.behalf.as_ref().map(|behalf| behalf.identity.to_string());
        let headers = [
            (FORWARDED, forwarded.as_deref()),
            (BAGGAGE, Some(self.baggage.as_str()).filter(|baggage| !baggage.is_empty())),
            (TRACEPARENT, self.traceparent.as_deref()),
            (CLIENT_IDENTITY, identity.as_deref()),
        ];
        for (name, value) in headers {
            if let Some(value) = value.and_then(|value| HeaderValue::from_str(value).ok()) {
                request.headers_mut().insert(name, value);
            }
        }
        Ok(request)
    }

    /// The head of a request; `None` where it is none of HBONE's.
    pub(super) fn of<B>(request: &Request<B>) -> Option<Self> {
        let uri = request.uri();
        let bare = uri.scheme().is_none() && uri.path_and_query().is_none_or(|path| path.as_str().is_empty());
        if request.method() != Method::CONNECT || !bare {
            return None;
        }
        let authority: SocketAddr = uri.authority()?.as_str().parse().ok()?;
        if authority.port() == 0 {
            return None;
        }
        let forwarded = text(request.headers(), &FORWARDED).as_deref().and_then(forwarded_for);
        let behalf = match text(request.headers(), &CLIENT_IDENTITY) {
            // Passed over where it cannot be read, the stream would be taken for the waypoint's own.
            Some(identity) => Some(Behalf { identity: identity.parse().ok()?, address: forwarded? }),
            None => None,
        };
        Some(Self {
            authority,
            behalf,
            forwarded,
            baggage: text(request.headers(), &BAGGAGE).unwrap_or_default(),
            traceparent: text(request.headers(), &TRACEPARENT),
        })
    }
}

/// The values of one header as one list; a value that is no text counts as absent.
pub(super) fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let values: Vec<&str> = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
    if values.is_empty() { None } else { Some(values.join(",")) }
}

/// RFC 7239, section 4: the first `for` that is an address with a port.
fn forwarded_for(value: &str) -> Option<SocketAddr> {
    value.split([',', ';']).find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        if !name.eq_ignore_ascii_case("for") {
            return None;
        }
        value.trim_matches('"').parse().ok()
    })
}

pub(super) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const CLIENT_IDENTITY: HeaderName = HeaderName::from_static("selvedge-client-identity");
const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::{mutated, mutated_text};

    #[test]
    fn a_head_reads_back_what_it_writes() {
        for authority in ["10.1.2.3:8080", "[fd00::1]:80"] {
            let head = ConnectHead {
                authority: authority.parse().unwrap(),
                forwarded: Some("10.9.9.9:4321".parse().unwrap()),
                baggage: "k8s.namespace.name=shop".to_owned(),
                traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
                behalf: Some(Behalf {
                    identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
                    address: "10.9.9.9:4321".parse().unwrap(),
                }),
            };
            let request = head.request().unwrap();
            assert_eq!(request.headers()["forwarded"], "for=\"10.9.9.9:4321\"");
            assert_eq!(request.uri().authority().unwrap().as_str(), authority);
            assert_eq!(ConnectHead::of(&request), Some(head));
        }
    }

    #[test]
    fn what_is_no_connect_to_an_address_is_none_of_ours() {
        for (method, uri) in [
            ("GET", "http://10.0.0.1:80/"),
            ("CONNECT", "cart.shop:80"),
            ("CONNECT", "10.0.0.1"),
            ("CONNECT", "10.0.0.1:0"),
            ("CONNECT", "user@10.0.0.1:80"),
            ("CONNECT", "http://10.0.0.1:80/path"),
        ] {
            let request = Request::builder().method(method).uri(uri).body(()).unwrap();
            assert_eq!(ConnectHead::of(&request), None, "{method} {uri}");
        }
    }

    #[test]
    fn whose_a_stream_is_is_said_whole_or_the_request_is_none_of_ours() {
        let of = |headers: &[(&str, &str)]| {
            let request = Request::builder().method("CONNECT").uri("10.0.0.1:80");
            let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
            ConnectHead::of(&request.body(()).unwrap()).map(|head| head.behalf.is_some())
        };
        let (who, from) =
            (("selvedge-client-identity", "spiffe://d/ns/a/sa/b"), ("forwarded", "for=\"10.9.9.9:4321\""));
        assert_eq!(of(&[who, from]), Some(true));
        assert_eq!(of(&[from]), Some(false));
        assert_eq!(of(&[who]), None);
        assert_eq!(of(&[("selvedge-client-identity", "web"), from]), None);
        assert_eq!(of(&[who, who, from]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn a_request_of_any_kind_is_read_without_a_panic_and_keeps_no_more_than_it_brought(
            method in prop_oneof![Just("CONNECT".to_owned()), "[A-Z]{1,8}"],
            authority in mutated_text(&["10.1.2.3:8080", "[fd00::1]:80", "[fe80::1%1]:80", "a@10.0.0.1:80"]),
            headers in prop::collection::vec(
                (
                    prop::sample::select(vec![FORWARDED, BAGGAGE, TRACEPARENT]),
                    mutated(vec![
                        b"for=\"10.9.9.9:4321\";by=_x;proto=https, for=\"[fd00::1]:1\"".to_vec(),
                        b"k8s.cluster.name=a,k8s.namespace.name=shop,service.name=b;c=d".to_vec(),
                        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_vec(),
                    ]),
                ),
                0..6,
            ),
        ) {
            let mut request = Request::new(());
            let (Ok(method), Ok(uri)) = (method.parse(), authority.parse()) else { return Ok(()) };
            (*request.method_mut(), *request.uri_mut()) = (method, uri);
            let mut brought = 0;
            for (name, value) in headers {
                let Ok(value) = HeaderValue::from_bytes(&value) else { continue };
                brought += value.len() + 1;
                request.headers_mut().append(name, value);
            }
            if let Some(head) = ConnectHead::of(&request) {
                prop_assert_eq!(request.method(), Method::CONNECT);
                prop_assert_eq!(head.authority.to_string().parse(), Ok(head.authority));
                prop_assert!(head.baggage.len() + head.traceparent.as_ref().map_or(0, String::len) <= brought);
                // What was believed can be said again.
                prop_assert_eq!(ConnectHead::of(&head.request().unwrap()).map(|again| again.authority), Some(head.authority));
            }
        }
    }
}
