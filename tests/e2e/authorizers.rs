//! What the status of an ExternalAuthorizer says: whether it can be asked.

use anyhow::{Context, Result};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, kubectl};
use crate::gateway_api::service;
use crate::mesh::install;
use crate::policies::refused;
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("external authorizers: one says in its status whether it can be asked", status)]
}

fn status(scene: &Scene) -> Result<()> {
    install()?;
    for (spec, wanted) in [
        ("{service: {name: gate, port: 80}}", "it is asked in one way: give it http or grpc"),
        ("{service: {name: gate, port: 0}, http: {}}", "spec.service.port"),
        ("{service: {name: gate, port: 80}, http: {prefix: /x}}", "spec.http has no field prefix;"),
    ] {
        refused(scene, "ExternalAuthorizer", spec, wanted)?;
    }
    let by_tls = service("by-tls", "").replace("name: http", "name: https");
    let elsewhere = "apiVersion: v1\nkind: Service\nmetadata: {name: elsewhere}\n\
                     spec: {type: ExternalName, externalName: gate.example.com}\n";
    scene.apply(
        &[
            &service("gate", ""),
            &by_tls,
            elsewhere,
            &authorizer("good", "gate", 80, "http: {pathPrefix: /check}"),
            &authorizer("by-grpc", "gate", 80, "grpc: {}"),
            &authorizer("of-nobody", "nobody", 80, "http: {}"),
            &authorizer("of-no-port", "gate", 81, "http: {}"),
            &authorizer("of-elsewhere", "elsewhere", 80, "http: {}"),
            &authorizer("of-tls", "by-tls", 80, "http: {}"),
            // What no schema can judge.
            &authorizer("no-path", "gate", 80, "http: {pathPrefix: check}"),
        ]
        .join("---\n"),
    )?;
    for (name, wanted, words) in [
        ("good", "True/Accepted", "Port 80 of Service"),
        ("by-grpc", "True/Accepted", ""),
        ("of-nobody", "False/BackendNotFound", "there is no Service"),
        ("of-no-port", "False/BackendNotFound", "has no TCP port 81; it has 80"),
        ("of-elsewhere", "False/UnsupportedValue", "is an ExternalName"),
        ("of-tls", "False/UnsupportedProtocol", "declares TLS of its own"),
        ("no-path", "False/Malformed", "spec.http.pathPrefix"),
    ] {
        says(scene, name, wanted, words)?;
    }
    // The Service comes and goes, and the status follows without a change of the authorizer.
    scene.apply(&service("nobody", ""))?;
    says(scene, "of-nobody", "True/Accepted", "")?;
    kubectl(&["delete", "service", "gate", "--namespace", &scene.namespace])?;
    says(scene, "good", "False/BackendNotFound", "there is no Service")?;
    // Mended: it follows, with the new generation.
    scene.apply(&authorizer("no-path", "nobody", 80, "http: {pathPrefix: /check}"))?;
    says(scene, "no-path", "True/Accepted", "")
}

/// Waits until an authorizer says this of its present generation.
fn says(scene: &Scene, name: &str, wanted: &str, words: &str) -> Result<()> {
    let mut seen = Value::Null;
    let said = eventually(&format!("{name} says Accepted={wanted} {words:?}"), BOUND, || {
        let authorizer = get(&["--namespace", &scene.namespace, "externalauthorizer", name]).ok()?;
        seen = authorizer["status"].clone();
        let mut conditions = seen["conditions"].as_array()?.iter();
        let condition = conditions.find(|condition| condition["type"] == "Accepted")?;
        let (status, reason) = (condition["status"].as_str()?, condition["reason"].as_str()?);
        let is_of_now = condition["observedGeneration"] == authorizer["metadata"]["generation"];
        let is_it = format!("{status}/{reason}") == wanted && condition["message"].as_str()?.contains(words);
        (is_of_now && is_it).then_some(())
    });
    said.with_context(|| format!("its status is {seen}"))
}

fn authorizer(name: &str, service: &str, port: u16, how: &str) -> String {
    format!(
        "apiVersion: selvedge.dev/v1alpha1\n\
         kind: ExternalAuthorizer\n\
         metadata: {{name: {name}}}\n\
         spec:\n  \
           service: {{name: {service}, port: {port}}}\n  \
           {how}\n"
    )
}
