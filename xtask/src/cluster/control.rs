//! The control plane: etcd, the API server, the controller manager and the scheduler.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;

use crate::cluster::machine::{Machine, Service};
use crate::cluster::network::{CONTROL, KUBERNETES_SERVICE, PODS, SERVICES};
use crate::cluster::pki::{Authority, Reached, Subject};
use crate::cluster::programs::Programs;

pub const API_PORT: u16 = 6443;
pub const ETCD: &str = "etcd";
pub const API_SERVER: &str = "kube-apiserver";
/// What needs an API server that answers.
pub const CONTROLLERS: [&str; 2] = ["kube-controller-manager", "kube-scheduler"];

/// Writes the certificates and kubeconfigs of the control plane into its machine.
pub fn furnish(control: &Machine, authority: &Authority) -> Result<()> {
    let kubernetes = control.root().join("etc/kubernetes");
    fs::create_dir_all(control.root().join("var/lib/etcd"))?;
    let at = |ip: std::net::Ipv4Addr| Reached::At(IpAddr::from(ip));
    let mut names = vec![at(CONTROL), at(KUBERNETES_SERVICE), at(std::net::Ipv4Addr::LOCALHOST)];
    let beginnings = ["", ".default", ".default.svc", ".default.svc.cluster.local"];
    names.extend(beginnings.map(|end| Reached::By(format!("kubernetes{end}"))));
    authority.issue("apiserver", &Subject::user("kube-apiserver"), &names)?;
    authority.issue("kubelet-client", &Subject::of("system:masters", "kube-apiserver-kubelet-client"), &[])?;
    authority.signing_key("service-account")?;
    for name in CONTROLLERS {
        let issued = authority.issue(name, &Subject::user(&format!("system:{name}")), &[])?;
        let server = format!("https://{CONTROL}:{API_PORT}");
        authority.kubeconfig(&kubernetes.join(format!("{name}.kubeconfig")), &server, &issued)?;
    }
    Ok(())
}

/// The folder of certificates in the control plane's machine.
pub const PKI: &str = "/etc/kubernetes/pki";

pub fn services(programs: &Programs) -> Vec<Service> {
    let kubernetes = |name: &str, options: Vec<String>| Service::new(name, &programs.kubernetes(name), options);
    vec![
        Service::new(ETCD, &programs.etcd(), etcd()),
        kubernetes(API_SERVER, api_server()),
        kubernetes(CONTROLLERS[0], [as_client(CONTROLLERS[0]), controller_manager()].concat()),
        kubernetes(CONTROLLERS[1], [as_client(CONTROLLERS[1]), vec!["--leader-elect=false".to_owned()]].concat()),
    ]
}

fn etcd() -> Vec<String> {
    let url = "http://127.0.0.1:2379";
    vec![
        "--data-dir=/var/lib/etcd".to_owned(),
        format!("--listen-client-urls={url}"),
        format!("--advertise-client-urls={url}"),
        "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
        "--log-level=warn".to_owned(),
        // The cluster does not outlive its machine.
        "--unsafe-no-fsync".to_owned(),
    ]
}

fn api_server() -> Vec<String> {
    vec![
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        "--bind-address=0.0.0.0".to_owned(),
        format!("--advertise-address={CONTROL}"),
        format!("--secure-port={API_PORT}"),
        format!("--service-cluster-ip-range={SERVICES}"),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged=true".to_owned(),
        format!("--client-ca-file={PKI}/ca.crt"),
        format!("--tls-cert-file={PKI}/apiserver.crt"),
        format!("--tls-private-key-file={PKI}/apiserver.key"),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--kubelet-certificate-authority={PKI}/ca.crt"),
        format!("--kubelet-client-certificate={PKI}/kubelet-client.crt"),
        format!("--kubelet-client-key={PKI}/kubelet-client.key"),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        format!("--service-account-key-file={PKI}/service-account.pub"),
        format!("--service-account-signing-key-file={PKI}/service-account.key"),
    ]
}

fn controller_manager() -> Vec<String> {
    vec![
        format!("--root-ca-file={PKI}/ca.crt"),
        format!("--service-account-private-key-file={PKI}/service-account.key"),
        "--use-service-account-credentials=true".to_owned(),
        format!("--cluster-cidr={PODS}"),
        "--allocate-node-cidrs=false".to_owned(),
        "--leader-elect=false".to_owned(),
    ]
}

fn as_client(name: &str) -> Vec<String> {
    let config = Path::new("/etc/kubernetes").join(format!("{name}.kubeconfig"));
    let options = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"];
    options.map(|option| format!("--{option}={}", config.display())).to_vec()
}
