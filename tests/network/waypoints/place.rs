//! Where requests are told apart, for tests that ask the same of either place.

use anyhow::Result;
use selvedge_lab::waypoint::{Waypoint, gateway, lead_to};
use selvedge_lab::{Agent, AgentOptions, Lab, Metrics};
use serde_json::Value;

/// One of the two places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Node,
    /// A waypoint of its own, `infra/gw`.
    Apart,
}

impl Place {
    pub const BOTH: [Self; 2] = [Self::Node, Self::Apart];

    /// What Services say that have it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Apart => "infra/gw",
        }
    }

    /// How a trial of something in this place is called.
    pub fn title(self, subject: &str, trial: &str) -> String {
        match self {
            Self::Node => format!("http::{subject}::{trial}"),
            Self::Apart => format!("waypoints::{subject}::{trial}"),
        }
    }

    /// Runs the agents, and the waypoint where there is one: on the other node than the client's.
    pub fn run(self, lab: &Lab) -> Result<Run> {
        let mut waypoint = None;
        if self == Self::Apart {
            gateway(lab, "All")?;
            let started = waypoint.insert(Waypoint::start(lab, "node-b", 1, &[])?);
            lead_to(lab, &[(&*started, true)])?;
        }
        let agents = lab.start_agents(&AgentOptions::default())?;
        if let Some(waypoint) = &mut waypoint {
            waypoint.wait_ready()?;
        }
        Ok(Run { agents, waypoint })
    }
}

/// What runs.
pub struct Run {
    pub agents: Vec<Agent>,
    pub waypoint: Option<Waypoint>,
}

impl Run {
    /// The metrics of whoever routes the requests of a client on the first node.
    pub fn metrics(&self) -> Result<Metrics> {
        match &self.waypoint {
            Some(waypoint) => waypoint.metrics(),
            None => self.agents[0].metrics(),
        }
    }

    /// A line of its access log.
    pub fn access_line(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        match &self.waypoint {
            Some(waypoint) => waypoint.access_line(what, wanted),
            None => self.agents[0].access_line(what, wanted),
        }
    }
}
