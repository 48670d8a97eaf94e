//! What crosses the links between the nodes.

use anyhow::{Result, ensure};
use selvedge_lab::Capture;

use crate::cluster::{netns, nodes};

/// A capture on the link of every node, from when it is made.
pub struct Wire(Vec<Capture>);

impl Wire {
    pub fn tap() -> Result<Self> {
        Ok(Self(nodes()?.iter().map(|node| netns(node)?.capture(LINK)).collect::<Result<_>>()?))
    }

    /// Whether a text was readable between nodes.
    pub fn carried(&self, text: &str) -> Result<bool> {
        let found = self.0.iter().map(|link| link.find(text.as_bytes())).collect::<Result<Vec<_>>>()?;
        ensure!(found.iter().all(|found| found.searched_packets > 0), "no packet was seen at all");
        Ok(found.iter().any(|found| found.is_found()))
    }

    /// How many packets of tunnels there were.
    pub fn tunnelled(&self) -> Result<usize> {
        self.0.iter().map(|link| link.tcp_packets(TUNNEL)).sum()
    }

    /// Forgets what was seen.
    pub fn clear(&self) -> Result<()> {
        self.0.iter().try_for_each(Capture::clear)
    }
}

const LINK: &str = "eth0";
const TUNNEL: u16 = 15008;
