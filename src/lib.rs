//! Selvedge, a node-level ambient service mesh.
//!
//! The map of the rooms. Arrows go down only: wiring, then shells, then core.
//!
//! | room | what lives there | may touch |
//! | --- | --- | --- |
//! | [`mesh`] | the model: identities, workloads, services, and the tables that answer look-ups | nothing: no socket, clock or runtime |
//! | [`authentication`] | the tokens of requests: read, verified, made a principal | nothing |
//! | [`authorizer`] | who else is asked about a request: the question, and what the answer says | `mesh` |
//! | [`policy`] | compile, decide, explain | `mesh`, `authentication` |
//! | [`route`] | L7: match a request, pick a backend, edit heads | `mesh` |
//! | [`model`] | `mesh`, `policy` and `route` together, fed by deltas, read by every shell | the core |
//! | [`api`] | the custom resources users write; `crd/*.yaml` is generated from them | nothing |
//! | [`source`] | watch a cluster or a folder of manifests, decode objects, hand deltas to `model` | the API server, files, `api`, the core |
//! | [`identity`] | keys, certificate requests, the CA, rotation, the verifiers of certificates | files, the core |
//! | [`capture`] | find a pod's namespace, program its rules, keep both true | the kernel, the core |
//! | [`cni`] | the start of a pod: the CNI plugin, its installer, and the agent's end of it | `capture`, files |
//! | [`transport`] | TLS, HBONE, the relay loops | sockets, `identity` |
//! | [`proxy`] | the life of one connection: outbound, inbound, passthrough | the shells above |
//! | [`waypoint`] | HTTP, where a Service asks for it: requests in, requests out | `proxy`'s way onward, the core |
//! | [`telemetry`] | metrics and the access log | the core |
//! | [`admin`] | health, metrics, state dump, drain | everything, read-only |
//! | [`handover`] | the small parent that keeps the listeners while a worker is replaced | file descriptors |
//! | [`memory`] | what the process holds of the machine's memory | the allocator |
//! | [`upkeep`] | what agent and waypoint do alike as processes | `proxy`, `memory`, `telemetry` |
//! | [`cli`] | one file a verb | everything |
//! | [`controller`] | the CA in the cluster, and status on users' objects | the API server, `identity`, the core |
//! | [`waypoint_process`] | wires a waypoint that is a process of its own | everything |
//! | [`agent`] | wires the rooms together, nothing else | everything |

pub mod admin;
pub mod agent;
pub mod api;
pub mod authentication;
pub mod authorizer;
pub mod capture;
pub mod cli;
pub mod cni;
pub mod controller;
pub mod handover;
pub mod identity;
pub mod memory;
pub mod mesh;
pub mod model;
#[cfg(test)]
mod mutation;
pub mod policy;
pub mod proxy;
pub mod route;
pub mod source;
pub mod telemetry;
pub mod transport;
pub mod upkeep;
pub mod waypoint;
pub mod waypoint_process;
