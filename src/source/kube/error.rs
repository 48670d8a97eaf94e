//! What an API server, or the way to it, made of a request: as a sentence for people.

use ::kube::core::response::Status;

/// What an API server, or the way to it, made of a request, in one sentence.
pub fn sentence(error: &::kube::Error) -> String {
    match error {
        ::kube::Error::Api(status) => status.message.clone(),
        error => causes(error),
    }
}

/// Why a watch does not go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    #[error("nobody listens any more")]
    Closed,
    #[error("the version from which to go on is too old")]
    Expired,
    #[error("the server streams no lists")]
    NoStreaming,
    #[error("{}", say(.0))]
    Api(Box<Status>),
    #[error("{0}")]
    Transport(String),
    #[error("no answer in time")]
    Timeout(#[from] tokio::time::error::Elapsed),
    #[error("what the API server sent is no object: {0}")]
    Json(#[from] serde_json::Error),
}

impl WatchError {
    pub fn request(error: ::kube::core::request::Error) -> Self {
        Self::Transport(error.to_string())
    }

    /// Whether there was no way to the server, or no answer of its own.
    pub fn is_out_of_reach(&self) -> bool {
        match self {
            Self::Transport(_) | Self::Timeout(_) => true,
            Self::Api(status) => matches!(status.code, 429 | 500..),
            Self::Closed | Self::Expired | Self::NoStreaming | Self::Json(_) => false,
        }
    }

    /// For a label: few.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Closed | Self::Transport(_) => "transport",
            Self::Expired => "expired",
            Self::NoStreaming => "no-streaming",
            Self::Api(status) if status.code == 401 => "unauthorized",
            Self::Api(status) if status.code == 403 => "forbidden",
            Self::Api(status) if status.code == 429 => "throttled",
            Self::Api(_) => "server",
            Self::Timeout(_) => "timeout",
            Self::Json(_) => "json",
        }
    }
}

impl From<::kube::Error> for WatchError {
    fn from(error: ::kube::Error) -> Self {
        match error {
            ::kube::Error::Api(status) if status.code == 410 => Self::Expired,
            ::kube::Error::Api(status) => Self::Api(status),
            error => Self::Transport(causes(&error)),
        }
    }
}

fn say(status: &Status) -> String {
    match status.code {
        403 => format!("{}: give this account the right, as daemonset/base/rbac.yaml does", status.message),
        _ => status.message.clone(),
    }
}

/// An error with what lies behind it: its own words are seldom the reason.
fn causes(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !words.contains(&text) {
            words = format!("{words}: {text}");
        }
        source = cause.source();
    }
    words
}
