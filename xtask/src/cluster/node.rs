//! A node: containerd, the kubelet and kube-proxy, and their settings.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::cluster::control::API_PORT;
use crate::cluster::machine::{Machine, Service};
use crate::cluster::network::{CONTROL, DNS_SERVICE, PODS, pod_range};
use crate::cluster::pki::{Authority, Reached, Subject};
use crate::cluster::programs::Programs;
use crate::image::{PAUSE, digest};

pub const CONTAINERD: &str = "containerd";
pub const KUBELET: &str = "kubelet";
pub const KUBE_PROXY: &str = "kube-proxy";
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// Writes a node's settings, certificates and CNI plugins into its machine.
pub fn furnish(node: &Machine, number: u8, authority: &Authority) -> Result<()> {
    let root = node.root();
    let user = format!("system:node:{}", node.name);
    let names = [Reached::By(node.name.clone()), Reached::At(node.ip)];
    let issued = authority.issue(&node.name, &Subject::of("system:nodes", &user), &names)?;
    let proxy = authority.issue(KUBE_PROXY, &Subject::user("system:kube-proxy"), &[])?;
    let kubernetes = root.join("etc/kubernetes");
    fs::create_dir_all(kubernetes.join("pki"))?;
    for (from, to) in [
        ("ca.crt", "ca.crt"),
        (&format!("{}.crt", node.name), "kubelet.crt"),
        (&format!("{}.key", node.name), "kubelet.key"),
    ] {
        fs::copy(authority.folder().join(from), kubernetes.join("pki").join(to))?;
    }
    let server = format!("https://{CONTROL}:{API_PORT}");
    authority.kubeconfig(&kubernetes.join("kubelet.kubeconfig"), &server, &issued)?;
    authority.kubeconfig(&kubernetes.join("kube-proxy.kubeconfig"), &server, &proxy)?;
    put(&root, "etc/kubernetes/kubelet.yaml", &serde_json::to_string_pretty(&kubelet_settings())?)?;
    put(&root, "etc/containerd/config.toml", &containerd_settings())?;
    put(&root, "etc/cni/net.d/10-ptp.conflist", &serde_json::to_string_pretty(&cni(number))?)?;
    put(&root, "etc/hosts", &format!("127.0.0.1 localhost\n{} {}\n", node.ip, node.name))?;
    let machine_id = &digest(format!("{}/{}", node.cluster, node.name).as_bytes())[..32];
    put(&root, "etc/machine-id", &format!("{machine_id}\n"))?;
    // Names outside the cluster are not resolved; nothing answers there.
    put(&root, "etc/resolv.conf", &format!("nameserver {CONTROL}\n"))?;
    // A copy, for what installs itself as a CNI plugin writes there.
    fs::create_dir_all(root.join("opt/cni/bin"))?;
    for plugin in PLUGINS {
        let from = Path::new(PLUGIN_FOLDER).join(plugin);
        fs::copy(&from, root.join("opt/cni/bin").join(plugin)).with_context(|| {
            format!("cannot copy {}; type: apt-get install containernetworking-plugins", from.display())
        })?;
    }
    Ok(())
}

pub fn services(programs: &Programs, node: &Machine) -> Vec<Service> {
    let own = |options: &[&str]| options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
    let mut kubelet = own(&[
        "--config=/etc/kubernetes/kubelet.yaml",
        "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
        "--root-dir=/var/lib/kubelet",
        "--v=2",
    ]);
    kubelet.extend([format!("--hostname-override={}", node.name), format!("--node-ip={}", node.ip)]);
    let mut proxy = own(&[
        "--kubeconfig=/etc/kubernetes/kube-proxy.kubeconfig",
        "--proxy-mode=iptables",
        // The host's own limits stay as they are.
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
    ]);
    proxy.extend([format!("--hostname-override={}", node.name), format!("--cluster-cidr={PODS}")]);
    vec![
        Service::new(CONTAINERD, &programs.containerd("containerd"), own(&["--config=/etc/containerd/config.toml"])),
        Service::new(KUBELET, &programs.kubernetes("kubelet"), kubelet),
        Service::new(KUBE_PROXY, &programs.kubernetes("kube-proxy"), proxy),
    ]
}

/// Reads an image from a tar file into the node's containerd.
pub fn load(programs: &Programs, node: &Machine, image: &Path) -> Result<()> {
    let file = fs::File::open(image).with_context(|| format!("cannot read {}", image.display()))?;
    let mut command = node.command(programs.containerd("ctr"))?;
    command.args(["--namespace", "k8s.io", "images", "import", "--snapshotter", "native", "--local", "-"]).stdin(file);
    let output = command.output().context("cannot run nsenter; type: apt-get install util-linux")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} cannot load {}: {}", node.name, image.display(), said.trim());
    Ok(())
}

fn kubelet_settings() -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": "/etc/kubernetes/pki/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": "/etc/kubernetes/pki/kubelet.crt",
        "tlsPrivateKeyFile": "/etc/kubernetes/pki/kubelet.key",
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD_SOCKET}"),
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "staticPodPath": "/etc/kubernetes/manifests",
        "resolvConf": "/etc/resolv.conf",
        "cgroupDriver": "cgroupfs",
        // /usr is the host's.
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "failCgroupV1": false,
        "failSwapOn": false,
        "enforceNodeAllocatable": ["pods"],
        "localStorageCapacityIsolation": false,
        // The host's disk may be as full as it likes.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
    })
}

fn containerd_settings() -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "{CONTAINERD_SOCKET}"

[plugins."io.containerd.cri.v1.images"]
# Works on any file system, also where a container's own is an overlay.
snapshotter = "native"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"

[plugins."io.containerd.cri.v1.runtime"]
# A container's score is never below ours: root may lack the right to lower it.
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
"#
    )
}

fn cni(number: u8) -> serde_json::Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "cluster",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": pod_range(number)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn put(root: &Path, file: &str, text: &str) -> Result<()> {
    let path = root.join(file);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Where Debian's package has them.
pub const PLUGIN_FOLDER: &str = "/usr/lib/cni";
const PLUGINS: [&str; 4] = ["host-local", "loopback", "portmap", "ptp"];
