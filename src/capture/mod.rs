//! Finds the pods' network namespaces, programs their rules, keeps both true.
pub mod address;
pub mod iptables;
mod netlink;
pub mod netns;
mod nfqueue;
mod probe;
pub mod routes;
pub mod rules;
pub mod sock_diag;
pub mod socket;

#[cfg(test)]
mod tests;
