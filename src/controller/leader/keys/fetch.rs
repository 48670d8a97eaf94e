//! One fetch of keys: by https, from an address that a policy of any namespace may name, or through a tunnel of the mesh.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CACHE_CONTROL, HOST, USER_AGENT};
use http::{HeaderMap, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper::rt::{Read, Write};
use hyper_util::rt::TokioIo;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Tunnels;
use crate::authentication::ServiceUrl;

/// Addresses that are the cluster's own: who writes a policy must not reach them through the controller.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Forbidden(pub HashSet<IpAddr>);

/// What a URL says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Fetched {
    pub text: String,
    /// For how long that is so, where the answer tells.
    pub fresh: Option<Duration>,
}

/// What a URL says, by https, without following it elsewhere. The address is judged that is connected to: a name that says
/// something else the next time gains nothing.
pub(super) async fn by_https(url: &str, bundle: &str, forbidden: &Forbidden) -> Result<Fetched, String> {
    within_the_limit(async {
        let uri: Uri = url.parse().map_err(|_| "it is no URL".to_owned())?;
        let host = uri.host().unwrap_or_default();
        let name = host.trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(443);
        let config = trust(bundle)?;
        let found = tokio::net::lookup_host((name, port)).await;
        let found = found.map_err(|error| format!("{name} is not found: {error}"))?;
        let stream = connect(name, found.collect(), forbidden).await?;
        let server = ServerName::try_from(name.to_owned()).map_err(|_| format!("{name:?} is no name of a server"))?;
        let stream = TlsConnector::from(config).connect(server, stream).await;
        let stream = stream.map_err(|error| format!("TLS with {name}: {error}"))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        ask(TokioIo::new(stream), uri.authority().map_or(host, |authority| authority.as_str()), path).await
    })
    .await
}

/// What a URL of a Service of the cluster says, over the mesh.
pub(super) async fn by_tunnel(
    url: &ServiceUrl,
    tunnels: &Tunnels,
    captured: &HashSet<String>,
    forbidden: &Forbidden,
) -> Result<Fetched, String> {
    within_the_limit(async {
        let stream = tunnels.open(url, captured, forbidden).await?;
        ask(stream, &url.authority, &url.path).await
    })
    .await
}

async fn within_the_limit(fetching: impl Future<Output = Result<Fetched, String>>) -> Result<Fetched, String> {
    match tokio::time::timeout(LIMIT, fetching).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("no answer within {} s", LIMIT.as_secs())),
    }
}

async fn ask(stream: impl Read + Write + Unpin + Send + 'static, host: &str, path: &str) -> Result<Fetched, String> {
    let broken = |error: hyper::Error| format!("HTTP with {host}: {error}");
    let (mut sender, connection) = http1::handshake(stream).await.map_err(broken)?;
    // It ends with the request, which tells how.
    let driven = tokio::spawn(connection);
    let request = Request::get(path)
        .header(HOST, host)
        .header(ACCEPT, "application/jwk-set+json, application/json")
        .header(USER_AGENT, "selvedge")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(broken)?;
    if answer.status() != StatusCode::OK {
        driven.abort();
        let more = if answer.status().is_redirection() {
            ", and redirects are not followed: write where it leads"
        } else {
            ""
        };
        return Err(format!("{host} answered {}{more}", answer.status()));
    }
    let fresh = fresh(answer.headers());
    let body = Limited::new(answer.into_body(), MOST).collect().await;
    driven.abort();
    let body = body.map_err(|error| format!("its body, of which {} KiB are read: {error}", MOST >> 10))?;
    let text = String::from_utf8(body.to_bytes().into()).map_err(|_| "what it answered is no text".to_owned())?;
    Ok(Fetched { text, fresh })
}

/// RFC 9111, section 5.2.2.1.
fn fresh(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all(CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let mut directives = values.flat_map(|value| value.split(',')).filter_map(|one| one.trim().split_once('='));
    let (_, seconds) = directives.find(|(name, _)| name.eq_ignore_ascii_case("max-age"))?;
    seconds.trim_matches('"').parse().ok().map(Duration::from_secs)
}

/// To the first address that may be connected to and answers.
async fn connect(name: &str, found: Vec<SocketAddr>, forbidden: &Forbidden) -> Result<TcpStream, String> {
    let mut last = None;
    for address in found {
        if let Some(why) = forbidden.why(address.ip()) {
            last = Some(format!("{name} is {}, which is {why}: nothing is fetched from there", address.ip()));
            continue;
        }
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(format!("{address}: {}", word(&error))),
        }
    }
    Err(last.unwrap_or_else(|| format!("{name} has no address")))
}

impl Forbidden {
    /// Why nothing is fetched from an address, if so.
    pub fn why(&self, ip: IpAddr) -> Option<&'static str> {
        let ip = plain(ip);
        if self.0.contains(&ip) {
            return Some("a node's or the API server's");
        }
        match ip {
            IpAddr::V4(ip) if ip.is_loopback() => Some("a loopback address"),
            IpAddr::V6(ip) if ip.is_loopback() => Some("a loopback address"),
            IpAddr::V4(ip) if ip.is_link_local() => Some("a link-local address"),
            IpAddr::V6(ip) if ip.is_unicast_link_local() => Some("a link-local address"),
            // RFC 1122, section 3.2.1.3: this host.
            IpAddr::V4(ip) if ip.octets()[0] == 0 => Some("no address of a server"),
            IpAddr::V4(ip) if ip.is_multicast() || ip.is_broadcast() => Some("no address of a server"),
            IpAddr::V6(ip) if ip.is_unspecified() || ip.is_multicast() => Some("no address of a server"),
            // Where clouds tell machines who they are, outside the link-local ranges.
            IpAddr::V4(METADATA_V4) | IpAddr::V6(METADATA_V6) => Some("a cloud's metadata service"),
            _ => None,
        }
    }
}

/// The IPv4 address within one of IPv6: mapped (RFC 4291, section 2.5.5.2), of NAT64 (RFC 6052) or of 6to4 (RFC 3056).
fn plain(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip.to_canonical() else { return ip.to_canonical() };
    match v6.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        _ => IpAddr::V6(v6),
    }
}

/// By the certificates of the policy, or else the public ones.
fn trust(bundle: &str) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    if bundle.is_empty() {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err("there are no public CA certificates where the controller runs: write jwksCaBundle".to_owned());
        }
    } else {
        for certificate in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
            let certificate = certificate.map_err(|error| format!("jwksCaBundle: {error}"))?;
            roots.add(certificate).map_err(|error| format!("jwksCaBundle: {error}"))?;
        }
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

/// Few words, and none about what else there is: whoever writes a policy reads them.
fn word(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "refused",
        io::ErrorKind::TimedOut => "no answer",
        _ => "not reachable",
    }
}

const METADATA_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
const LIMIT: Duration = Duration::from_secs(10);
const MOST: usize = 128 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_fetched_from_the_machine_its_links_or_the_cluster_itself() {
        let forbidden = Forbidden(["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()].into());
        for address in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "fe80::1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "255.255.255.255",
            "fd00:ec2::254",
            "100.100.100.200",
            "10.0.0.7",
            "::ffff:10.0.0.7",
            "64:ff9b::a00:7",
            "fd00::7",
        ] {
            assert!(forbidden.why(address.parse().unwrap()).is_some(), "{address}");
        }
        for address in ["10.0.0.8", "1.1.1.1", "fd00::8", "2606:4700::1111", "64:ff9b::101:101"] {
            assert_eq!(forbidden.why(address.parse().unwrap()), None, "{address}");
        }
    }

    #[tokio::test]
    async fn a_name_of_a_forbidden_address_is_not_connected_to() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "[::1]"] {
            let error = by_https(&format!("https://{host}:{port}/keys"), "", &Forbidden::default()).await.unwrap_err();
            assert!(error.contains("nothing is fetched from there"), "{error}");
        }
        let accepted = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(accepted.is_err(), "somebody connected");
    }

    #[test]
    fn an_answer_tells_for_how_long_it_holds() {
        for (value, wanted) in [
            ("max-age=60", Some(60)),
            ("public, Max-Age=\"60\", must-revalidate", Some(60)),
            ("no-store", None),
            ("max-age=soon", None),
            ("s-maxage=60", None),
        ] {
            let headers = HeaderMap::from_iter([(CACHE_CONTROL, value.parse().unwrap())]);
            assert_eq!(fresh(&headers), wanted.map(Duration::from_secs), "{value}");
        }
        assert_eq!(fresh(&HeaderMap::new()), None);
    }

    #[test]
    fn a_bundle_that_is_none_is_told() {
        assert!(
            trust("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
                .unwrap_err()
                .contains("jwksCaBundle")
        );
    }
}
