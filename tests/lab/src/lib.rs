//! Nodes and pods as network namespaces on one machine: what the demo and the real-network tests stand on.
//!
//! Nothing is simulated. A node is a network namespace with routes to the other nodes over a real link; a pod is
//! another, joined to its node by a veth pair the way the `ptp` CNI plugin does it, and pinned in the node's own
//! root-only directory the way a container runtime does. All of it lives in a private world ([`enter`]) that the kernel
//! takes away when the process ends, however it ends. With root, and without it in a user namespace.
//!
//! ```no_run
//! use selvedge_lab::{AgentOptions, Lab, LabOptions, PodSpec, enter};
//!
//! fn main() -> anyhow::Result<()> {
//!     enter(); // first of all, while the process has one thread
//!     let lab = Lab::new(LabOptions::default())?;
//!     let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
//!     let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart").port("http", 8080))?;
//!     let _server = cart.serve_http(8080, "cart")?;
//!     let _agents = [lab.node("node-a").start_agent(&AgentOptions::default())?,
//!                    lab.node("node-b").start_agent(&AgentOptions::default())?];
//!     let link = lab.link()?;
//!     let answer = web.http_get((cart.ip(), 8080), "/?say=hello")?;
//!     assert_eq!(answer.json()?["peer"], web.ip().to_string());
//!     assert!(!link.find(b"hello")?.is_found());
//!     Ok(())
//! }
//! ```

mod agent;
mod conversation;
mod health;
mod http;
mod lab;
mod manifest;
mod metrics;
mod namespace;
mod netfilter;
mod packets;
mod pod;
mod server;
mod trial;
mod wait;
pub mod waypoint;
mod world;

pub use agent::{Agent, AgentOptions};
pub use conversation::{Conversation, End};
pub use http::{Request, Response, exchange};
pub use lab::{Families, Lab, LabOptions, Node, NodeSpec};
pub use manifest::{ServiceSpec, authorization, policy, read_documents};
pub use metrics::Metrics;
pub use namespace::{Namespace, connect};
pub use netfilter::Networking;
pub use packets::{Capture, Found};
pub use pod::{Pod, PodSpec};
pub use server::Server;
pub use trial::{trial, trial_of, trial_with};
pub use wait::{BOUND, eventually};
pub use world::{World, enter};
