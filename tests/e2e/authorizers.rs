//! What the status of an ExternalAuthorizer says: whether it can be asked.

use anyhow::Result;
use libtest_mimic::Trial;

use crate::cluster::kubectl;
use crate::gateway_api::service;
use crate::mesh::install;
use crate::policies::refused;
use crate::scene::{Scene, trial};

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
        scene.says("externalauthorizer", name, "Accepted", wanted, words)?;
    }
    // The Service comes and goes, and the status follows without a change of the authorizer.
    scene.apply(&service("nobody", ""))?;
    scene.says("externalauthorizer", "of-nobody", "Accepted", "True/Accepted", "")?;
    kubectl(&["delete", "service", "gate", "--namespace", &scene.namespace])?;
    scene.says("externalauthorizer", "good", "Accepted", "False/BackendNotFound", "there is no Service")?;
    // Mended: it follows, with the new generation.
    scene.apply(&authorizer("no-path", "nobody", 80, "http: {pathPrefix: /check}"))?;
    scene.says("externalauthorizer", "no-path", "Accepted", "True/Accepted", "")
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
