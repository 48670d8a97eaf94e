//! Which of the kinds that are read the cluster has, and under which path.

use std::collections::BTreeMap;

use ::kube::Client;
use ::kube::client::Body;
use ::kube::core::discovery::v2::{ACCEPT_AGGREGATED_DISCOVERY_V2, APIGroupDiscoveryList};
use http::header::{ACCEPT, ETAG, IF_NONE_MATCH};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::BodyExt;

use super::WatchError;
use crate::source::decode::Kind;

/// Asks what there is; an answer that is still true costs the server nothing.
#[derive(Debug, Default)]
pub(super) struct Discovery {
    tags: [Option<HeaderValue>; 2],
    found: [BTreeMap<Kind, String>; 2],
}

impl Discovery {
    /// The collections of the kinds that are read, as paths.
    pub async fn ask(&mut self, client: &Client) -> Result<BTreeMap<Kind, String>, WatchError> {
        for (index, root) in ROOTS.into_iter().enumerate() {
            let mut request = Request::get(root).header(ACCEPT, ACCEPT_AGGREGATED_DISCOVERY_V2);
            if let Some(tag) = &self.tags[index] {
                request = request.header(IF_NONE_MATCH, tag);
            }
            let request = request.body(Body::empty()).map_err(|cause| WatchError::Transport(cause.to_string()))?;
            let answer = client.send(request).await?;
            match answer.status() {
                StatusCode::NOT_MODIFIED => continue,
                StatusCode::OK => {}
                other => return Err(WatchError::Transport(format!("{root}: the API server answered {other}"))),
            }
            let tag = answer.headers().get(ETAG).cloned();
            let body = answer.into_body().collect().await?.to_bytes();
            let groups: APIGroupDiscoveryList =
                serde_json::from_slice(&body).map_err(|cause| WatchError::Transport(format!("{root}: {cause}")))?;
            // What an aggregated server last said may be yesterday's; it is asked for again.
            let is_stale = |version: &::kube::core::discovery::v2::APIVersionDiscovery| {
                version.freshness.as_deref() == Some("Stale")
            };
            let stale = groups.items.iter().flat_map(|group| &group.versions).any(is_stale);
            self.tags[index] = tag.filter(|_| !stale);
            self.found[index] = collections(root, &groups);
        }
        Ok(self.found.iter().flatten().map(|(kind, path)| (*kind, path.clone())).collect())
    }
}

fn collections(root: &str, groups: &APIGroupDiscoveryList) -> BTreeMap<Kind, String> {
    let mut found = BTreeMap::new();
    for group in &groups.items {
        let name = group.metadata.as_ref().and_then(|metadata| metadata.name.as_deref()).unwrap_or_default();
        // The preferred version stands first.
        for version in &group.versions {
            let Some(number) = &version.version else { continue };
            for resource in
                version.resources.iter().filter(|resource| resource.verbs.iter().any(|verb| verb == "watch"))
            {
                let kind = resource.response_kind.as_ref().and_then(|kind| kind.kind.as_deref());
                let known = kind.and_then(|kind| Kind::of(name, kind)).filter(|kind| *kind != Kind::ConfigMap);
                let Some((kind, plural)) = known.zip(resource.resource.as_ref()) else {
                    continue;
                };
                let api_version = if name.is_empty() { number.clone() } else { format!("{name}/{number}") };
                if kind.api_version().is_none_or(|wanted| wanted == api_version) {
                    found.entry(kind).or_insert_with(|| format!("{root}/{api_version}/{plural}"));
                }
            }
        }
    }
    found
}

const ROOTS: [&str; 2] = ["/api", "/apis"];
