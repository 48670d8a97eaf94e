//! Compile, decide, explain: who may talk to whom, and why.

use crate::mesh::TrustDomain;

#[derive(Debug)]
pub struct Policies;

#[derive(Clone, Debug)]
pub enum Delta {}

impl Policies {
    pub fn new(_trust_domain: TrustDomain) -> Self {
        Self
    }

    pub fn apply(&mut self, delta: Delta) {
        match delta {}
    }
}
