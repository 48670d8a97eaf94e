use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::cluster::unread;
use super::{Failure, Output, terminal};
use crate::mesh::MeshSettings;
use crate::model::Model;
use crate::source::directory;

/// Read a folder of manifests as the agent would, and say what it would refuse, by file, line, object and field.
///
/// Exits 0 where nothing is refused, 1 otherwise. Runs nothing and needs no rights.
#[derive(Args, Debug)]
pub struct ValidateArgs {
    /// The folder of manifests.
    #[arg(value_name = "DIR", env = "SELVEDGE_MANIFESTS")]
    dir: PathBuf,

    /// How to print it.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub fn run(args: &ValidateArgs) -> Result<ExitCode, Failure> {
    let mut loaded = directory::load(&args.dir).map_err(Failure::new)?;
    // Whose requests are read is the same in every trust domain.
    let trust_domain = "cluster.local".parse().map_err(Failure::new)?;
    let model = Model::new(MeshSettings { trust_domain, cluster_cidrs: Vec::new() });
    model.apply(std::mem::take(&mut loaded.deltas));
    loaded.problems.extend(unread(&model));
    match args.output {
        Output::Text => {
            for problem in &loaded.problems {
                terminal::say(format_args!("{problem}\n"))?;
            }
            let refused = match loaded.problems.len() {
                0 => "nothing to object to".to_owned(),
                1 => "1 problem".to_owned(),
                many => format!("{many} problems"),
            };
            terminal::say(format_args!(
                "{}: {} objects, {} of other kinds passed over, {refused}\n",
                args.dir.display(),
                loaded.objects,
                loaded.ignored
            ))?;
        }
        Output::Json => {
            let report = serde_json::json!({
                "valid": loaded.problems.is_empty(),
                "objects": loaded.objects,
                "ignored": loaded.ignored,
                "problems": loaded.problems,
            });
            terminal::say(format_args!("{report}\n"))?;
        }
    }
    Ok(if loaded.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
