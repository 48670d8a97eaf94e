/// What a Service says that one of its ports speaks. Declared ports are believed; of others the first bytes tell.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum AppProtocol {
    /// HTTP, of any version that the client speaks in the clear.
    Http,
    /// HTTP/2 from the first byte on (`h2c`).
    Http2,
    Grpc,
    /// HTTP/1.1 that becomes a WebSocket.
    WebSocket,
    /// TLS that the application itself ends, whatever is in it.
    Tls,
    /// Bytes that are not HTTP.
    Tcp,
}

impl AppProtocol {
    /// From a port's `appProtocol`, else from its name: `<protocol>` or `<protocol>-<anything>`. `None` where neither
    /// says it. An `appProtocol` that nobody here knows says nothing, and neither does the name beside it.
    pub fn declared(app_protocol: Option<&str>, name: &str) -> Option<Self> {
        let Some(written) = app_protocol.filter(|written| !written.is_empty()) else {
            return Self::named(name.split_once('-').map_or(name, |(protocol, _)| protocol));
        };
        // KEP-3726, "Standard Application Protocols": names of its own under `kubernetes.io/`.
        Self::named(&written.strip_prefix("kubernetes.io/").unwrap_or(written).to_ascii_lowercase())
    }

    fn named(word: &str) -> Option<Self> {
        Some(match word {
            "http" => Self::Http,
            "http2" | "h2c" => Self::Http2,
            "grpc" => Self::Grpc,
            "ws" => Self::WebSocket,
            "https" | "tls" | "wss" | "h2" => Self::Tls,
            "tcp" | "mongo" | "mongodb" | "mysql" | "postgres" | "postgresql" | "redis" | "amqp" | "kafka" | "smtp" => {
                Self::Tcp
            }
            _ => return None,
        })
    }

    /// Whether requests can be told apart on it.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::WebSocket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_is_told_by_app_protocol_or_else_by_the_name() {
        for (app_protocol, name, wanted) in [
            (None, "", None),
            (None, "web", None),
            (None, "http", Some(AppProtocol::Http)),
            (None, "http-admin", Some(AppProtocol::Http)),
            (None, "httpadmin", None),
            (None, "http2", Some(AppProtocol::Http2)),
            (None, "h2c-a", Some(AppProtocol::Http2)),
            (None, "grpc-web", Some(AppProtocol::Grpc)),
            (None, "https", Some(AppProtocol::Tls)),
            (None, "tcp-x", Some(AppProtocol::Tcp)),
            (Some("HTTP"), "tcp", Some(AppProtocol::Http)),
            (Some("kubernetes.io/h2c"), "", Some(AppProtocol::Http2)),
            (Some("kubernetes.io/ws"), "", Some(AppProtocol::WebSocket)),
            (Some("kubernetes.io/wss"), "", Some(AppProtocol::Tls)),
            (Some("mysql"), "http", Some(AppProtocol::Tcp)),
            (Some("example.com/own"), "http", None),
            (Some(""), "http", Some(AppProtocol::Http)),
        ] {
            assert_eq!(AppProtocol::declared(app_protocol, name), wanted, "{app_protocol:?} {name:?}");
        }
    }
}
