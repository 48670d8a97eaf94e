//! How output looks: colour on a terminal, plain elsewhere.

use std::env;
use std::fmt::Display;
use std::io::{IsTerminal, stdout};
use std::sync::OnceLock;

pub fn bold(text: impl Display) -> String {
    paint("1", text)
}

pub fn dim(text: impl Display) -> String {
    paint("2", text)
}

pub fn good(text: impl Display) -> String {
    paint("32", text)
}

pub fn bad(text: impl Display) -> String {
    paint("1;31", text)
}

/// `✓` or `✗`.
pub fn mark(held: bool) -> String {
    if held { good("✓") } else { bad("✗") }
}

fn paint(code: &str, text: impl Display) -> String {
    static COLOUR: OnceLock<bool> = OnceLock::new();
    let colour = *COLOUR.get_or_init(|| stdout().is_terminal() && env::var_os("NO_COLOR").is_none());
    if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
}
