//! What the demo found, told to a person or as JSON.

use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use crate::style::{bad, bold, dim, good, mark};

/// Collects expectations; prints as it goes, unless JSON was asked for.
pub struct Report {
    json: bool,
    expectations: Vec<Expectation>,
}

/// One thing that must hold.
#[derive(Serialize)]
struct Expectation {
    name: String,
    held: bool,
    detail: String,
}

impl Report {
    pub fn new(json: bool) -> Self {
        Self { json, expectations: Vec::new() }
    }

    pub fn section(&self, title: &str) {
        self.line(&format!("\n{}", bold(title)));
    }

    pub fn line(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    /// Records one expectation: a sentence, whether it held, and what was seen.
    pub fn expect(&mut self, name: &str, held: bool, detail: impl Into<String>) {
        let detail = detail.into();
        self.line(&format!("  {} {name}\n      {}", mark(held), dim(&detail)));
        self.expectations.push(Expectation { name: name.into(), held, detail });
    }

    /// A step that should give something: its failure is an expectation that did not hold.
    pub fn attempt<T>(&mut self, name: &str, result: anyhow::Result<T>, detail: impl FnOnce(&T) -> (bool, String)) {
        match result {
            Ok(value) => {
                let (held, detail) = detail(&value);
                self.expect(name, held, detail);
            }
            Err(error) => self.expect(name, false, format!("{error:#}")),
        }
    }

    /// The last word, and the exit code.
    pub fn close(self, error: Option<&anyhow::Error>) -> ExitCode {
        let held = self.expectations.iter().filter(|expectation| expectation.held).count();
        let all = error.is_none() && held == self.expectations.len();
        let error = error.map(|error| format!("{error:#}"));
        if self.json {
            println!("{}", json!({"held": all, "expectations": self.expectations, "error": error}));
        } else {
            if let Some(error) = &error {
                println!("\n{} {error}", bad("The demo stopped:"));
            }
            let count = format!("{held} of {} expectations held.", self.expectations.len());
            println!("\n{}", if all { good(count) } else { bad(count) });
        }
        if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
