use std::sync::Arc;

use http::Uri;
use http::uri::Scheme;

use crate::mesh::NamespacedName;

/// A URL of keys that a Service of the cluster publishes by plain HTTP: `http://NAME.NAMESPACE.svc/keys`. It is fetched
/// through a tunnel of the mesh, and in no other way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceUrl {
    pub service: NamespacedName,
    pub port: u16,
    /// As it is written: what the server sees as `Host`.
    pub authority: Arc<str>,
    /// With its query.
    pub path: Arc<str>,
}

impl ServiceUrl {
    /// None where the URL is another: by https, with a user, or of a host that need not be a Service
    /// ([DNS for Services](https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/)).
    pub fn parse(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let authority = uri.authority()?;
        if uri.scheme() != Some(&Scheme::HTTP) || authority.as_str().contains('@') {
            return None;
        }
        let mut labels = authority.host().trim_end_matches('.').split('.');
        let (name, namespace) = (labels.next()?, labels.next()?);
        let is_label = |label: &str| {
            let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            (1..=63).contains(&label.len()) && label.bytes().all(known)
        };
        if labels.next() != Some("svc") || !labels.chain([name, namespace]).all(is_label) {
            return None;
        }
        Some(Self {
            service: NamespacedName::new(namespace, name),
            port: authority.port_u16().unwrap_or(80),
            authority: authority.as_str().into(),
            path: uri.path_and_query().map_or("/", |path| path.as_str()).into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_known_by_its_name_in_the_cluster() {
        for (url, service, port, path) in [
            ("http://issuer.auth.svc/keys", "auth/issuer", 80, "/keys"),
            ("http://issuer.auth.svc.cluster.local:8080/keys?a=b", "auth/issuer", 8080, "/keys?a=b"),
            ("http://issuer.auth.svc.cluster.local.", "auth/issuer", 80, "/"),
        ] {
            let parsed = ServiceUrl::parse(url).unwrap();
            let wanted = (service.to_owned(), port, path);
            assert_eq!((parsed.service.to_string(), parsed.port, &*parsed.path), wanted, "{url}");
        }
    }

    #[test]
    fn nothing_else_is_one() {
        for url in [
            "https://issuer.auth.svc/keys",
            "http://issuer/keys",
            "http://issuer.auth/keys",
            "http://issuer.auth.svcs/keys",
            "http://issuer.auth.pod.cluster.local/keys",
            "http://10.0.0.1/keys",
            "http://[::1]/keys",
            "http://user@issuer.auth.svc/keys",
            "http://.auth.svc/keys",
            "http://Issuer.auth.svc/keys",
            "http://issuer.auth.svc..local/keys",
            "/keys",
        ] {
            assert_eq!(ServiceUrl::parse(url), None, "{url}");
        }
    }
}
