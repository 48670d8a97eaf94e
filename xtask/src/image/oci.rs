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
    let layer = Blob::new("application/vnd.oci.image.layer.v1.tar", layer.tar()?);
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
        "rootfs": {"type": "layers", "diff_ids": [layer.digest()]},
        "history": [{"created": EPOCH, "created_by": "cargo xtask image"}],
    });
    let config = Blob::new("application/vnd.oci.image.config.v1+json", config.to_string().into());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.descriptor()],
    });
    let manifest = Blob::new(MANIFEST, manifest.to_string().into());
    let mut entry = manifest.descriptor();
    entry["platform"] = json!({"architecture": architecture, "os": "linux"});
    entry["annotations"] = json!({
        "io.containerd.image.name": start.name,
        "org.opencontainers.image.ref.name": start.name.rsplit_once(':').map_or("latest", |(_, tag)| tag),
    });
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
    let docker = json!([{"Config": config.path(), "RepoTags": [start.name], "Layers": [layer.path()]}]);

    let mut tar = Tar::default();
    for folder in ["blobs/", "blobs/sha256/"] {
        tar.append(folder, 0o755, b'5', "", &[])?;
    }
    let mut blobs = [config, manifest, layer];
    blobs.sort_by_key(Blob::path);
    for blob in &blobs {
        tar.append(&blob.path(), 0o644, b'0', "", &blob.bytes)?;
    }
    tar.append("index.json", 0o644, b'0', "", index.to_string().as_bytes())?;
    tar.append("manifest.json", 0o644, b'0', "", docker.to_string().as_bytes())?;
    tar.append("oci-layout", 0o644, b'0', "", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(tar.finish())
}

/// Something that is named by its own digest.
struct Blob {
    kind: &'static str,
    hex: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(kind: &'static str, bytes: Vec<u8>) -> Self {
        Self { kind, hex: hex(&bytes), bytes }
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.hex)
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.hex)
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.kind, "digest": self.digest(), "size": self.bytes.len()})
    }
}

/// SHA-256 in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    digest::digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
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
