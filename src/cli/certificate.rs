use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::json;

use super::agent::parse_lifetime;
use super::{Failure, Output, terminal};
use crate::identity::anchors::FileAnchors;
use crate::identity::{CaAddress, Identities, IdentitySettings, RemoteCa};
use crate::mesh::Identity;

/// Ask a CA for a certificate as an agent does, and say what it signed or why it did not.
///
/// For finding out why an agent has no certificate: the CA answers whoever brings an agent's token as it answers that
/// agent. The certificate and its key are thrown away.
#[derive(Args, Debug)]
pub struct CertificateArgs {
    /// Whose certificate: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[arg(value_name = "IDENTITY")]
    identity: String,

    /// The CA.
    #[arg(
        long,
        env = "SELVEDGE_CA_ADDRESS",
        value_name = "URL",
        default_value = "https://selvedge-controller.selvedge-system.svc:15012"
    )]
    ca_address: CaAddress,

    /// The roots that the CA itself and what it signs must lead to: certificates in PEM.
    #[arg(long, env = "SELVEDGE_CA_ROOT", value_name = "FILE")]
    ca_root: PathBuf,

    /// The service account token that the CA is shown.
    #[arg(long, env = "SELVEDGE_CA_TOKEN", value_name = "FILE", default_value = "/var/run/secrets/selvedge/token")]
    ca_token: PathBuf,

    /// How long the certificate shall live.
    #[arg(long, env = "SELVEDGE_CERTIFICATE_LIFETIME", value_name = "DURATION", default_value = "1h",
          value_parser = parse_lifetime)]
    certificate_lifetime: Duration,

    /// How to print it.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub fn run(args: &CertificateArgs) -> Result<ExitCode, Failure> {
    let identity: Identity = args.identity.parse().map_err(Failure::usage)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    runtime.block_on(ask(args, &identity))
}

async fn ask(args: &CertificateArgs, identity: &Identity) -> Result<ExitCode, Failure> {
    let anchors = FileAnchors::open(&args.ca_root).map_err(Failure::new)?;
    let trust = anchors.trust();
    let ca = RemoteCa::new(args.ca_address.clone(), args.ca_token.clone(), trust.clone());
    let settings = IdentitySettings { validity: args.certificate_lifetime, ..IdentitySettings::default() };
    let identities = Identities::new(identity.trust_domain.clone(), ca, trust, settings);
    let certificate = identities.certificate(identity).await.map_err(Failure::new)?;
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (issuer, not_after) = (certificate.issuer(), seconds(certificate.not_after));
    let left = not_after.saturating_sub(seconds(SystemTime::now()));
    match args.output {
        Output::Text => terminal::say(format_args!(
            "{identity}\n  serial     {}\n  signed by  {issuer}\n  valid for  {left} s\n",
            certificate.serial
        ))?,
        Output::Json => {
            let told = json!({
                "identity": identity.to_string(),
                "serial": certificate.serial,
                "issuer": issuer,
                "notAfter": not_after,
            });
            terminal::say(format_args!("{told}\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
