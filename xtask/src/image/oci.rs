//! An image as one file: the OCI image layout in a tar, with the index that `docker load` reads too.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>

use std::env::consts::ARCH;

use anyhow::{Result, bail};
use aws_lc_rs::digest::{self, SHA256};
use serde_json::{Value, json};

use crate::image::layer::{Layer, Tar};

/// How a container of the image starts.
pub struct Start<'a> {
    /// Name and tag.
    pub name: &'a str,
    pub entrypoint: &'a [&'a str],
    pub arguments: &'a [&'a str],
}

/// The whole image.
pub fn pack(layer: &Layer, start: &Start) -> Result<Vec<u8>> {
    let layer = layer.tar()?;
    let architecture = architecture()?;
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "created": EPOCH,
        "config": {
            "Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Entrypoint": start.entrypoint,
            "Cmd": start.arguments,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", hex(&layer))]},
        "history": [{"created": EPOCH, "created_by": "cargo xtask image"}],
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut entry = descriptor(MANIFEST, &manifest);
    entry["platform"] = json!({"architecture": architecture, "os": "linux"});
    entry["annotations"] = json!({
        "io.containerd.image.name": start.name,
        "org.opencontainers.image.ref.name": start.name.rsplit_once(':').map_or("latest", |(_, tag)| tag),
    });
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", hex(bytes));
    let docker = json!([{"Config": blob(&config), "RepoTags": [start.name], "Layers": [blob(&layer)]}]);

    let mut tar = Tar::default();
    let mut blobs = [&config, &manifest, &layer].map(|bytes| (blob(bytes), bytes.as_slice()));
    blobs.sort();
    for folder in ["blobs/", "blobs/sha256/"] {
        tar.append(folder, 0o755, b'5', "", &[])?;
    }
    for (name, bytes) in blobs {
        tar.append(&name, 0o644, b'0', "", bytes)?;
    }
    tar.append("index.json", 0o644, b'0', "", index.to_string().as_bytes())?;
    tar.append("manifest.json", 0o644, b'0', "", docker.to_string().as_bytes())?;
    tar.append("oci-layout", 0o644, b'0', "", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(tar.finish())
}

/// SHA-256 in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    digest::digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": format!("sha256:{}", hex(bytes)), "size": bytes.len()})
}

/// What Go, and so every registry, calls this machine.
fn architecture() -> Result<&'static str> {
    Ok(match ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => bail!("no images are made for {other}; amd64 and arm64 have theirs"),
    })
}

const EPOCH: &str = "1970-01-01T00:00:00Z";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
