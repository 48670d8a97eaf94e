//! The controller's own way into the mesh: a tunnel to a pod of a Service, as which nobody else can pose.
//!
//! The controller's pod is not captured, and need not be: it speaks HBONE itself, under a certificate of its own identity that
//! it signs as it does every other. That what is sent is encrypted, and to whom, is not assumed of anybody: TLS proves it here.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, ListParams};
use tokio::net::TcpStream;

use super::Forbidden;
use crate::authentication::ServiceUrl;
use crate::controller::pods::Pods;
use crate::controller::root::Root;
use crate::identity::{
    CaError, CertificateAuthority, Csr, Identities, IdentitySettings, SignedCertificate, TrustSource,
};
use crate::mesh::{Identity, TUNNEL_PORT, TrustDomain};
use crate::transport::tls::Tls;

/// Opens tunnels as the controller.
#[derive(Clone)]
pub struct Tunnels {
    client: Client,
    pods: Arc<Pods>,
    tls: Tls,
    trust_domain: TrustDomain,
    /// This replica's pod.
    namespace: Arc<str>,
    name: Arc<str>,
}

/// A pod of a Service, and who it must prove to be.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Target {
    pod: String,
    address: SocketAddr,
    identity: Identity,
}

impl Tunnels {
    pub fn new(
        client: Client,
        pods: Arc<Pods>,
        (root, trust): (Arc<Root>, TrustSource),
        trust_domain: &TrustDomain,
        (namespace, name): (&str, &str),
    ) -> Self {
        // So short-lived that a new root signs soon: nobody renews it but who asks for it.
        let settings = IdentitySettings { validity: VALIDITY, ..IdentitySettings::default() };
        let identities = Identities::new(trust_domain.clone(), Arc::new(Own(root)), trust, settings);
        let tls = Tls::new(identities);
        Self { client, pods, tls, trust_domain: trust_domain.clone(), namespace: namespace.into(), name: name.into() }
    }

    /// A connection to some pod of the Service that is captured, by the UIDs of those that are.
    pub(super) async fn open(
        &self,
        url: &ServiceUrl,
        captured: &HashSet<String>,
        forbidden: &Forbidden,
    ) -> Result<Upgraded, String> {
        let own = self.own()?;
        let mut last = None;
        for target in self.targets(url, captured, forbidden).await?.into_iter().take(TRIES) {
            match self.through(&own, &target).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = Some(format!("pod {} of Service {}: {error}", target.pod, url.service)),
            }
        }
        Err(last.unwrap_or_else(|| {
            format!(
                "no pod of Service {} at port {} is ready and captured by the mesh, and by plain HTTP keys are fetched \
                 through a tunnel alone: let it join, or write https://",
                url.service, url.port
            )
        }))
    }

    /// Whom the controller's pod runs as.
    fn own(&self) -> Result<Identity, String> {
        let own = self.pods.get(&self.namespace, &self.name);
        let own = own.and_then(|own| Identity::new(&self.trust_domain, &own.namespace, &own.service_account));
        own.ok_or_else(|| {
            format!("the controller does not find its own pod {}/{}, and so has no identity", self.namespace, self.name)
        })
    }

    async fn targets(
        &self,
        url: &ServiceUrl,
        captured: &HashSet<String>,
        forbidden: &Forbidden,
    ) -> Result<Vec<Target>, String> {
        let (namespace, name) = (&url.service.namespace, &url.service.name);
        let unread = |error: kube::Error| format!("Service {} cannot be read: {error}", url.service);
        let services: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        let service = services.get_opt(name).await.map_err(unread)?;
        let spec = service.ok_or_else(|| format!("there is no Service {}", url.service))?.spec.unwrap_or_default();
        let port = spec.ports.unwrap_or_default().into_iter().find(|port| port.port == i32::from(url.port));
        let port = port.ok_or_else(|| format!("Service {} has no port {}", url.service, url.port))?;
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), namespace);
        let of_service = ListParams::default().labels(&format!("kubernetes.io/service-name={name}"));
        let slices = slices.list(&of_service).await.map_err(unread)?;
        let found = slices.items.iter().flat_map(|slice| endpoints(slice, port.name.as_deref().unwrap_or_default()));
        let target = |(address, uid, pod): (SocketAddr, &str, &str)| {
            let facts = self.pods.get(namespace, pod).filter(|facts| *facts.uid == *uid && captured.contains(uid))?;
            let identity = Identity::new(&self.trust_domain, &facts.namespace, &facts.service_account)?;
            forbidden.why(address.ip()).is_none().then(|| Target { pod: pod.to_owned(), address, identity })
        };
        Ok(found.filter_map(target).collect())
    }

    async fn through(&self, own: &Identity, target: &Target) -> Result<Upgraded, String> {
        let tunnel = SocketAddr::new(target.address.ip(), TUNNEL_PORT);
        let tcp = tokio::time::timeout(CONNECT, TcpStream::connect(tunnel)).await;
        let tcp = tcp.map_err(|_| format!("{tunnel} does not answer"))?;
        let tcp = tcp.map_err(|error| format!("{tunnel}: {error}"))?;
        let session = self.tls.connect_hbone(tcp, own, &target.identity).await.map_err(|error| error.to_string())?;
        let broken = |error: hyper::Error| format!("the tunnel broke: {error}");
        let stream = TokioIo::new(session.stream);
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.map_err(broken)?;
        // It ends with the stream in it.
        drop(tokio::spawn(connection));
        let authority =
            Uri::builder().authority(target.address.to_string()).build().map_err(|error| error.to_string())?;
        let request = Request::builder().method(Method::CONNECT).uri(authority).body(Empty::<Bytes>::new());
        let request = request.map_err(|error| error.to_string())?;
        let answer = sender.send_request(request).await.map_err(broken)?;
        match answer.status() {
            StatusCode::OK => hyper::upgrade::on(answer).await.map_err(broken),
            StatusCode::UNAUTHORIZED => {
                Err(format!("a policy over it does not let {} in: allow that principal", own.principal()))
            }
            status => Err(format!("its agent answered {}", status.as_u16())),
        }
    }
}

/// The ready endpoints of a slice that are pods, at a port of the Service by its name: address, UID and name.
fn endpoints<'a>(
    slice: &'a EndpointSlice,
    port: &str,
) -> impl Iterator<Item = (SocketAddr, &'a str, &'a str)> + use<'a> {
    let ports = slice.ports.as_deref().unwrap_or_default();
    let found = ports.iter().find(|one| one.name.as_deref().unwrap_or_default() == port);
    let number = found.and_then(|port| u16::try_from(port.port?).ok()).filter(|port| *port != 0);
    slice.endpoints.iter().flatten().filter_map(move |endpoint| {
        let is_ready = endpoint.conditions.as_ref().is_none_or(|conditions| conditions.ready != Some(false));
        let pod = endpoint.target_ref.as_ref().filter(|target| is_ready && target.kind.as_deref() == Some("Pod"))?;
        let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        Some((SocketAddr::new(ip, number?), pod.uid.as_deref()?, pod.name.as_deref()?))
    })
}

/// The root, for the one identity that the controller has itself.
struct Own(Arc<Root>);

impl CertificateAuthority for Own {
    fn sign<'a>(
        &'a self,
        csr: &'a Csr,
        identity: &'a Identity,
        validity: Duration,
    ) -> BoxFuture<'a, Result<SignedCertificate, CaError>> {
        let signed = self.0.signer().map_err(|why| CaError::Unavailable(why.into()));
        async move { signed?.0.sign(&csr.der, identity, validity, SystemTime::now()) }.boxed()
    }
}

/// HBONE's.
/// Pods of a Service that are tried, one after the other.
const TRIES: usize = 3;
const CONNECT: Duration = Duration::from_secs(3);
const VALIDITY: Duration = Duration::from_secs(10 * 60);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn endpoints_are_ready_pods_at_the_port_of_that_name() {
        let slice = json!({
            "metadata": {"name": "a"},
            "addressType": "IPv4",
            "ports": [{"name": "admin", "port": 9}, {"name": "http", "port": 8080}],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "one", "uid": "u1"}},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": false}, "targetRef": {"kind": "Pod", "name": "two", "uid": "u2"}},
                {"addresses": ["10.0.0.3"], "conditions": {"ready": true}, "targetRef": {"kind": "Node", "name": "three", "uid": "u3"}},
                {"addresses": ["10.0.0.4"]},
            ],
        });
        let slice: EndpointSlice = serde_json::from_value(slice).unwrap();
        let found: Vec<_> = endpoints(&slice, "http").collect();
        assert_eq!(found, [("10.0.0.1:8080".parse().unwrap(), "u1", "one")]);
        assert_eq!(endpoints(&slice, "").count(), 0);
    }
}
