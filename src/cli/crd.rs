use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{Failure, terminal};

/// Print the CustomResourceDefinitions and the admission policies that guard them, or write them to a folder.
#[derive(Args, Debug)]
pub struct CrdArgs {
    /// The folder to write one file a kind into. Default: all on standard output.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(args: &CrdArgs) -> Result<ExitCode, Failure> {
    for file in crate::api::files().map_err(Failure::new)? {
        let Some(dir) = &args.out else {
            terminal::say(format_args!("---\n{}\n", file.yaml))?;
            continue;
        };
        let path = dir.join(&file.name);
        std::fs::create_dir_all(dir)
            .and_then(|()| std::fs::write(&path, file.yaml))
            .map_err(|cause| Failure::new(format!("{}: {cause}", path.display())))?;
    }
    Ok(ExitCode::SUCCESS)
}
