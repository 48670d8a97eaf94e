//! Where the trust bundle comes from, if not from the embedded CA: a file or a ConfigMap, followed.

mod config_map;
mod file;

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

pub use config_map::ConfigMapAnchors;
pub use file::FileAnchors;

/// `configmap`, or the path of a file with certificates in PEM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CaRoot {
    ConfigMap,
    File(PathBuf),
}

impl FromStr for CaRoot {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "configmap" => Self::ConfigMap,
            path => Self::File(path.into()),
        })
    }
}
