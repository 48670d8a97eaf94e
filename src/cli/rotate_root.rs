use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use super::{Failure, terminal};
use crate::controller::client;
use crate::controller::root::progress::{Progress, Rotation};

/// Replace the mesh's root, without a failed request.
///
/// The controller makes a new root and adds it to the trust bundle; once every agent says that it holds this bundle, the
/// new root signs, and agents get new certificates; once no certificate of the old root can be in use, the old root is
/// taken out of the bundle. The command asks for it and then watches until the new root signs. It may be stopped at any
/// time, and started again to watch: what it began goes on.
///
/// Needs to read and patch Secret selvedge-ca and to read ConfigMap selvedge-trust-bundle and MeshNodes. A root that was
/// brought (by cert-manager, by hand) is replaced where it comes from; the controller then does the same.
#[derive(Args, Debug)]
pub struct RotateRootArgs {
    /// The namespace of the controller.
    #[arg(long, env = "SELVEDGE_NAMESPACE", value_name = "NAME", default_value = "selvedge-system")]
    namespace: String,

    /// How to reach the API server. Default: as kubectl does.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// Wait until the old root is trusted no more: as long as a certificate may live, and a minute.
    #[arg(long)]
    to_the_end: bool,

    /// Only look how far a rotation is.
    #[arg(long, conflicts_with = "to_the_end")]
    look: bool,
}

pub fn run(args: &RotateRootArgs) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    runtime.block_on(rotate(args))
}

async fn rotate(args: &RotateRootArgs) -> Result<ExitCode, Failure> {
    let client = client::as_kubectl(args.kubeconfig.as_deref()).await.map_err(Failure::new)?;
    let rotation = Rotation::new(client, &args.namespace);
    if args.look {
        terminal::say(format_args!("{}\n", rotation.look().await.map_err(Failure::new)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let before = rotation.look().await.map_err(Failure::new)?;
    if before == Progress::Stable {
        rotation.ask().await.map_err(Failure::new)?;
        terminal::say("asked for a new root\n")?;
    } else {
        terminal::say("a rotation is under way\n")?;
    }
    let (mut last, mut since) = (None, Instant::now());
    loop {
        let now = rotation.look().await.map_err(Failure::new)?;
        if last.as_ref() != Some(&now) {
            terminal::say(format_args!("{now}\n"))?;
            since = Instant::now();
        }
        match &now {
            Progress::Stable => return Ok(ExitCode::SUCCESS),
            Progress::Retiring { .. } if !args.to_the_end => return Ok(ExitCode::SUCCESS),
            Progress::Asked if since.elapsed() > NOBODY => {
                return Err(Failure::new("no controller takes it up: does one run, and does it lead? See its log"));
            }
            _ => {}
        }
        if since.elapsed() > REMARK && matches!(now, Progress::Introducing { .. }) {
            terminal::remark(format_args!("still waiting; a node that is gone for good: kubectl delete meshnode NAME"));
            since = Instant::now();
        }
        last = Some(now);
        tokio::time::sleep(LOOK).await;
    }
}

const LOOK: Duration = Duration::from_secs(1);
const NOBODY: Duration = Duration::from_secs(60);
const REMARK: Duration = Duration::from_secs(60);
