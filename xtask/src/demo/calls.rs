//! The calls that the demo makes, and what the manifests' policies say of each.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::demo::Stage;

pub const CALLS: [Call; 7] = [
    Call::new("shop/web", "shop/catalog", Protocol::Http, Expected::Allowed).over_link(),
    Call::new("shop/catalog", "shop/ledger", Protocol::Tcp, Expected::Allowed).over_link(),
    Call::new("shop/reports", "shop/ledger", Protocol::Tcp, Expected::Allowed),
    Call::new("shop/reports", "shop/catalog", Protocol::Http, Expected::Denied("policy:shop/catalog-readers"))
        .over_link(),
    Call::new("shop/web", "shop/ledger", Protocol::Tcp, Expected::Denied("policy:shop/ledger-clients")),
    Call::new("legacy/cron", "shop/catalog", Protocol::Http, Expected::Denied("plaintext:shop/default")).in_plaintext(),
    Call::new("legacy/cron", "shop/ledger", Protocol::Tcp, Expected::Allowed).in_plaintext().over_link(),
];

/// One call from a pod to a server.
pub struct Call {
    pub from: &'static str,
    pub to: &'static str,
    pub protocol: Protocol,
    pub expected: Expected,
    /// The two pods live on different nodes.
    pub crosses_link: bool,
    /// The client is outside the mesh.
    pub plaintext: bool,
}

impl Call {
    const fn new(from: &'static str, to: &'static str, protocol: Protocol, expected: Expected) -> Self {
        Self { from, to, protocol, expected, crosses_link: false, plaintext: false }
    }

    const fn over_link(self) -> Self {
        Self { crosses_link: true, ..self }
    }

    const fn in_plaintext(self) -> Self {
        Self { plaintext: true, ..self }
    }

    pub fn title(&self) -> String {
        format!("{} -> {} ({})", self.from, self.to, self.protocol.name())
    }

    pub fn is_allowed(&self) -> bool {
        matches!(self.expected, Expected::Allowed)
    }

    /// Words to send that nothing else on the link can hold.
    pub fn needle(&self, phase: &str) -> Result<String> {
        let mut random = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let (_, from) = self.from.split_once('/').unwrap_or_default();
        Ok(format!("secret-of-{from}-{phase}-{:016x}", u64::from_ne_bytes(random)))
    }

    /// Makes the call, and tells what came of it.
    pub(super) fn make(&self, stage: &Stage, needle: &str, address: String) -> Outcome {
        let result = match self.protocol {
            Protocol::Http => self.ask(stage, needle, &address),
            Protocol::Tcp => self.exchange(stage, needle, &address),
        };
        match result {
            Ok(saw) => Outcome { answered: true, saw, detail: format!("{address} answered") },
            Err(error) => Outcome { answered: false, saw: None, detail: format!("{address}: {}", error.root_cause()) },
        }
    }

    fn ask(&self, stage: &Stage, needle: &str, address: &str) -> Result<Option<IpAddr>> {
        let answer = stage.pod(self.from)?.http_get(address.parse::<SocketAddr>()?, &format!("/{needle}"))?;
        ensure!(answer.status == 200, "status {}", answer.status);
        let seen = answer.json()?;
        ensure!(seen["path"] == format!("/{needle}"), "an answer to something else: {seen}");
        Ok(seen["peer"].as_str().and_then(|peer| peer.parse().ok()))
    }

    fn exchange(&self, stage: &Stage, needle: &str, address: &str) -> Result<Option<IpAddr>> {
        let mut stream = stage.pod(self.from)?.connect(address.parse::<SocketAddr>()?)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(needle.as_bytes())?;
        let mut back = vec![0; needle.len()];
        stream.read_exact(&mut back).context("no answer")?;
        ensure!(back == needle.as_bytes(), "it sent back something else");
        Ok(stage.servers.get(self.to).and_then(|server| server.peers().last().map(SocketAddr::ip)))
    }
}

#[derive(Clone, Copy)]
pub enum Protocol {
    Http,
    Tcp,
}

impl Protocol {
    /// Where the pods listen.
    pub fn port(self) -> u16 {
        match self {
            Self::Http => 8080,
            Self::Tcp => 9000,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Http => "HTTP",
            Self::Tcp => "TCP",
        }
    }
}

#[derive(Clone, Copy)]
pub enum Expected {
    Allowed,
    /// With this reason in the access log.
    Denied(&'static str),
}

/// What came of one call.
pub struct Outcome {
    pub answered: bool,
    /// The client's address as the application saw it.
    pub saw: Option<IpAddr>,
    pub detail: String,
}
