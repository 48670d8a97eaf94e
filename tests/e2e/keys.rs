//! Keys of token issuers that a cluster's controller fetches: from an issuer in it, by https with a CA of its own.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use libtest_mimic::Trial;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use selvedge_lab::eventually;
use serde_json::json;

use crate::cluster::{kubectl, test_image};
use crate::gateway_api::service;
use crate::mesh::{STRICT, install, join, two_nodes, wait_captured, wait_left};
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("token keys: fetched by https, anew when the issuer changes them, and kept while it is away", by_https),
        trial("token keys: fetched by http through a tunnel of the controller, or not at all", by_tunnel),
    ]
}

fn by_https(scene: &Scene) -> Result<()> {
    shop(scene)?;
    let authority = Authority::new()?;
    let host = format!("issuer.{}.svc", scene.namespace);
    scene.apply(&authority.secret(&host)?)?;
    issuer(scene, "https-files:8443")?;
    let (first, second) = (Signer::new("first")?, Signer::new("second")?);
    publish(scene, &first)?;
    let more = format!(", jwksCaBundle: {}", json!(authority.pem));
    scene.apply(&tokens(&format!("https://{host}:8443/keys.json"), &more))?;
    fetched(scene, "True/Fetched", "")?;
    answers(scene, Some(&first), 200)?;
    answers(scene, None, 403)?;
    answers(scene, Some(&second), 401)?;

    // The issuer changes its keys, as often as it likes: it says for how long they hold.
    publish(scene, &second)?;
    answers(scene, Some(&second), 200)?;
    answers(scene, Some(&first), 401)?;

    kubectl(&["delete", "pod", "issuer", "--namespace", &scene.namespace])?;
    fetched(scene, "False/Failing", "The keys that were fetched last hold for 24 hours")?;
    answers(scene, Some(&second), 200)?;
    answers(scene, Some(&first), 401)?;

    issuer(scene, "https-files:8443")?;
    publish(scene, &first)?;
    fetched(scene, "True/Fetched", "")?;
    answers(scene, Some(&first), 200)?;

    // By another CA than the one that is named, nobody is believed; what was fetched before is not from there.
    let more = format!(", jwksCaBundle: {}", json!(Authority::new()?.pem));
    scene.apply(&tokens(&format!("https://{host}:8443/keys.json?other"), &more))?;
    fetched(scene, "False/NotFetched", "TLS with")?;
    answers(scene, Some(&first), 401)
}

fn by_tunnel(scene: &Scene) -> Result<()> {
    shop(scene)?;
    issuer(scene, "files:8080")?;
    wait_captured(scene, "issuer")?;
    // What is not proven is not let in, and nobody but the controller is.
    scene.apply(STRICT)?;
    scene.apply(&readers(CONTROLLER))?;
    let signer = Signer::new("first")?;
    publish(scene, &signer)?;
    scene.apply(&tokens(&format!("http://issuer.{}.svc:8080/keys.json", scene.namespace), ""))?;
    fetched(scene, "True/Fetched", "")?;
    answers(scene, Some(&signer), 200)?;
    let other = scene.run("client", &["get", "issuer:8080", "/keys.json"]);
    ensure!(other.is_err(), "somebody else reads the keys: {other:?}");

    scene.apply(&readers("cluster.local/ns/somewhere/sa/else"))?;
    fetched(scene, "False/Failing", &format!("does not let {CONTROLLER} in"))?;
    scene.apply(&readers(CONTROLLER))?;
    fetched(scene, "True/Fetched", "")?;

    // Out of the mesh it would answer in plaintext, and is not asked.
    kubectl(&["annotate", "pod", "issuer", "selvedge.dev/mesh=disabled", "--namespace", &scene.namespace])?;
    wait_left(scene, "issuer")?;
    fetched(scene, "False/Failing", "is ready and captured by the mesh")?;
    answers(scene, Some(&signer), 200)
}

/// Lets one principal in to the issuer.
fn readers(principal: &str) -> String {
    format!(
        "apiVersion: selvedge.dev/v1alpha1\n\
         kind: AuthorizationPolicy\n\
         metadata: {{name: issuer-keys}}\n\
         spec:\n  \
           selector: {{matchLabels: {{app: issuer}}}}\n  \
           rules: [{{from: [{{source: {{principals: [{principal}]}}}}]}}]\n"
    )
}

/// A server behind a Service whose requests are read, and a client.
fn shop(scene: &Scene) -> Result<()> {
    install()?;
    let (first, second) = two_nodes()?;
    scene.pod("cart", &second, &["serve", "http:8080"])?;
    scene.pod("client", &first, &["pause"])?;
    let issuer = "apiVersion: v1\nkind: Service\nmetadata: {name: issuer}\n\
                  spec: {selector: {app: issuer}, ports: [{name: https, port: 8443}, {name: http, port: 8080}]}\n";
    scene.apply(&format!("{}---\n{issuer}", service("cart", "")))?;
    join(scene, true)?;
    kubectl(&["annotate", "namespace", &scene.namespace, "selvedge.dev/waypoint=node"])?;
    ["cart", "client"].iter().try_for_each(|pod| wait_captured(scene, pod))
}

fn issuer(scene: &Scene, serves: &str) -> Result<()> {
    scene.apply(&format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: issuer, labels: {{app: issuer}}}}\n\
         spec:\n  \
           terminationGracePeriodSeconds: 1\n  \
           containers:\n  \
           - name: main\n    \
             image: \"{}\"\n    \
             imagePullPolicy: Never\n    \
             args: [serve, \"{serves}\"]\n    \
             volumeMounts: [{{name: files, mountPath: /files}}, {{name: tls, mountPath: /tls}}]\n  \
           volumes:\n  \
           - {{name: files, emptyDir: {{}}}}\n  \
           - {{name: tls, secret: {{secretName: issuer, optional: true}}}}\n",
        test_image()?
    ))?;
    scene.wait_for("condition=Ready", "issuer")
}

fn publish(scene: &Scene, signer: &Signer) -> Result<()> {
    scene.run("issuer", &["put", "/files/keys.json", &signer.keys()]).map(drop)
}

/// Takes the tokens of an issuer whose keys are there, and nothing without one.
fn tokens(url: &str, more: &str) -> String {
    format!(
        "apiVersion: selvedge.dev/v1alpha1\n\
         kind: RequestAuthentication\n\
         metadata: {{name: users}}\n\
         spec:\n  \
           targetRefs: [{{kind: Service, name: cart}}]\n  \
           jwtRules: [{{issuer: login, fromParams: [token], jwksUri: \"{url}\"{more}}}]\n\
         ---\n\
         apiVersion: selvedge.dev/v1alpha1\n\
         kind: AuthorizationPolicy\n\
         metadata: {{name: users}}\n\
         spec:\n  \
           targetRefs: [{{kind: Service, name: cart}}]\n  \
           action: DENY\n  \
           rules: [{{from: [{{source: {{notRequestPrincipals: [\"*\"]}}}}]}}]\n"
    )
}

/// Waits until the policy says this of its present generation.
fn fetched(scene: &Scene, wanted: &str, words: &str) -> Result<()> {
    scene.says("requestauthentication", "users", "KeysFetched", wanted, words)
}

/// Waits until a request with a token of a signer is answered so.
fn answers(scene: &Scene, signer: Option<&Signer>, status: u16) -> Result<()> {
    let what = signer.map_or("no token", |signer| &signer.kid);
    let mut seen = String::new();
    let answered = eventually(&format!("{status} with {what}"), BOUND, || {
        let token = signer.map_or_else(String::new, |signer| format!("?token={}", signer.token()));
        seen = match scene.run("client", &["get", "cart:80", &format!("/{token}")]) {
            Ok(_) => "status 200".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        seen.contains(&format!("status {status}")).then_some(())
    });
    answered.with_context(|| format!("the answer was {seen}"))
}

/// Signs tokens.
struct Signer {
    kid: String,
    pair: Ed25519KeyPair,
}

impl Signer {
    fn new(kid: &str) -> Result<Self> {
        Ok(Self { kid: kid.to_owned(), pair: Ed25519KeyPair::generate().context("no key could be made")? })
    }

    /// RFC 8037, section 2.
    fn keys(&self) -> String {
        let x = URL_SAFE_NO_PAD.encode(self.pair.public_key());
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": self.kid, "x": x}]}).to_string()
    }

    fn token(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let parts =
            [json!({"alg": "EdDSA", "kid": self.kid}), json!({"iss": "login", "sub": "alice", "exp": now + 600})];
        let signed = parts.map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
        let signature = self.pair.sign(signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// A CA that nobody knows.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// The certificate of a server, and its key.
    fn secret(&self, host: &str) -> Result<String> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![host.to_owned()])?.signed_by(&key, &self.issuer)?;
        let data = json!({
            "tls.crt": STANDARD.encode(certificate.pem()),
            "tls.key": STANDARD.encode(key.serialize_pem()),
        });
        Ok(json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {"name": "issuer"}, "data": data,
        })
        .to_string())
    }
}

/// As whom the controller asks.
const CONTROLLER: &str = "cluster.local/ns/selvedge-system/sa/selvedge-controller";
