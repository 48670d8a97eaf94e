use std::io::{self, IsTerminal};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// How the agent's own log looks. It goes to standard error; standard output is the access log's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Changes what is logged while the agent runs.
#[derive(Clone, Debug)]
pub struct LogControl(reload::Handle<EnvFilter, Registry>);

impl LogControl {
    /// Starts the log of this process. `filter` as `tracing-subscriber` reads it: `info`, or
    /// `warn,selvedge::capture=debug`.
    pub fn install(format: LogFormat, filter: &str) -> Result<Self, LogError> {
        let (filter, handle) = reload::Layer::new(parse(filter)?);
        let registry = tracing_subscriber::registry().with(filter);
        match format {
            LogFormat::Text => {
                // Colours are for people who watch, not for files and collectors.
                registry.with(fmt::layer().with_ansi(io::stderr().is_terminal()).with_writer(io::stderr)).try_init()
            }
            LogFormat::Json => {
                registry.with(fmt::layer().json().flatten_event(true).with_writer(io::stderr)).try_init()
            }
        }?;
        Ok(Self(handle))
    }

    /// One that changes the log of nobody.
    #[cfg(test)]
    pub(crate) fn detached() -> Self {
        let (layer, handle) = reload::Layer::new(EnvFilter::new("info"));
        // The handle works for as long as its layer lives.
        Box::leak(Box::new(layer));
        Self(handle)
    }

    /// The filter in force.
    pub fn level(&self) -> Result<String, LogError> {
        Ok(self.0.with_current(ToString::to_string)?)
    }

    /// Puts another filter in force; on an error the old one stays.
    pub fn set_level(&self, filter: &str) -> Result<(), LogError> {
        Ok(self.0.reload(parse(filter)?)?)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "{filter:?} is no log level ({cause}); give error, warn, info, debug, trace or off, or such as warn,selvedge::capture=debug"
    )]
    Filter { filter: String, cause: String },
    #[error("the log of this process was started already")]
    Started(#[from] TryInitError),
    #[error("the log level cannot be read or changed any more")]
    Gone(#[from] reload::Error),
}

// Stricter than the library, which takes "inof" for the name of a module and would then log nothing.
fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    let refused = |cause: String| LogError::Filter { filter: filter.chars().take(200).collect(), cause };
    for part in filter.split(',') {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level).trim();
        if !LEVELS.contains(&level.to_ascii_lowercase().as_str()) {
            return Err(refused(format!("{level:?} is not a level")));
        }
    }
    EnvFilter::try_new(filter).map_err(|error| refused(error.to_string()))
}

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated_text;

    #[test]
    fn a_misspelt_level_is_refused_with_what_may_be_said() {
        for wrong in ["", "inof", "warn,selvedge=loud", "selvedge::capture", "info,,debug"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("selvedge::capture=debug"), "{error}");
        }
        for right in ["info", "DEBUG", "warn,selvedge::capture=debug", "off"] {
            parse(right).unwrap();
        }
    }

    #[test]
    fn a_refused_level_leaves_the_old_one_in_force() {
        let (_layer, handle) = reload::Layer::<EnvFilter, Registry>::new(parse("warn").unwrap());
        let control = LogControl(handle);
        assert!(control.set_level("loud").is_err());
        assert_eq!(control.level().unwrap(), "warn");
        control.set_level("debug").unwrap();
        assert_eq!(control.level().unwrap(), "debug");
    }

    proptest! {
        #[test]
        fn a_filter_of_any_kind_is_refused_in_short_words_or_taken(
            text in mutated_text(&["info", "warn,selvedge::capture=debug", "a[b{c=d}]=trace,off", "[x]=info"]),
        ) {
            if let Err(error) = parse(&text) {
                prop_assert!(error.to_string().len() < 4_096);
            }
        }
    }
}
