//! Watch a cluster or a folder of manifests, decode objects, hand deltas to the model.
//!
//! [`decode`] makes the same of an object wherever it comes from. Of a folder, [`document`] cuts text into documents,
//! [`folder`] decides what a change of the files means (it is sans-io), and [`directory`] reads the files and asks it.
//! [`kube`] watches a cluster.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};

pub mod decode;
mod derive;
pub mod directory;
mod document;
#[cfg(test)]
pub(crate) mod fixture;
mod folder;
pub mod kube;
mod origin;
mod report;
mod routes;
mod view;

pub use origin::Origin;
pub use report::{Report, describe_metrics};

/// One thing that is not in force as written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
pub struct Problem {
    /// Empty for an object of a cluster.
    #[serde(skip_serializing_if = "is_nowhere")]
    pub file: PathBuf,
    /// Counted from 1; 0 where the problem is the file's as a whole.
    pub line: usize,
    /// `Pod shop/cart`; empty where it could not be told which object it is.
    pub object: String,
    /// `spec.ports[0].port`; empty where it is the object as a whole.
    pub field: String,
    /// What is wrong, and what to write instead.
    pub cause: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.line {
            0 => self.file.display().to_string(),
            line => format!("{}:{line}", self.file.display()),
        };
        let parts = [&place, &self.object, &self.field, &self.cause].into_iter().filter(|part| !part.is_empty());
        f.write_str(&parts.map(String::as_str).collect::<Vec<_>>().join(": "))
    }
}

fn is_nowhere(file: &Path) -> bool {
    file.as_os_str().is_empty()
}

#[cfg(test)]
mod tests;
