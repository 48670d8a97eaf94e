//! Watch a folder of manifests, decode objects, hand deltas to the model.
//!
//! [`document`] cuts text into documents, [`decode`] makes an object of each, [`folder`] decides what a change of
//! the files means (it is sans-io), and [`directory`] reads the files and asks it.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;

pub mod decode;
mod derive;
pub mod directory;
mod document;
mod folder;
mod report;
mod view;

pub use report::{Report, describe_metrics};

/// One thing in the folder that is not in force as written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
pub struct Problem {
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
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        for part in [&self.object, &self.field, &self.cause].into_iter().filter(|part| !part.is_empty()) {
            write!(f, ": {part}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
