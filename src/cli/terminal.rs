//! What a verb says, to whoever reads it.

use std::fmt::Display;
use std::io::{self, Write};

use super::Failure;

/// Prints to standard output. A reader that has seen enough, such as `head`, is no failure to speak of: the verb then
/// ends as a program does that SIGPIPE ends.
pub fn say(what: impl Display) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    write!(out, "{what}").and_then(|()| out.flush()).map_err(|cause| match cause.kind() {
        io::ErrorKind::BrokenPipe => Failure::silent(SIGPIPE_ENDED),
        _ => Failure::new(format!("standard output cannot be written: {cause}")),
    })
}

/// Prints a line to standard error, which nobody may be reading.
pub fn remark(what: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{what}");
}

/// As a shell reports a program that SIGPIPE (13) ended.
const SIGPIPE_ENDED: u8 = 128 + 13;
