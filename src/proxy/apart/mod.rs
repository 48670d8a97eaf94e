//! Waypoints in processes of their own: how a client's agent reaches one, and how one serves.
//!
//! A Service that names a Gateway of class `selvedge-waypoint` is dialled through a pod of that waypoint: a tunnel under
//! the client's own identity, whose header names the Service's address instead of a pod's ([`reach`]). The waypoint's
//! process is a proxy that serves one pod, its own, and of that the tunnel port alone. What comes there it takes apart
//! into requests ([`serve`]), and passes on through tunnels of its own, each flow with a word about the client that it is for
//! ([`Relayed`]).

mod connect;
mod place;
mod reach;
mod serve;

pub use place::Relayed;
pub use reach::decide;

#[cfg(test)]
mod tests;
