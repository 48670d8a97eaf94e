use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, gauge};

/// Tells what this room's metrics mean.
pub fn describe_metrics() {
    describe_counter!(HANDSHAKES, "TLS handshakes by role (client, server), result (ok, or why not) and key exchange.");
    describe_histogram!(HANDSHAKE_SECONDS, Unit::Seconds, "How long successful TLS handshakes took, by role.");
    describe_gauge!(CONNECTIONS, "HTTP/2 tunnel connections open now, by role.");
    describe_gauge!(STREAMS, "HBONE streams open now, by role.");
    describe_counter!(REFUSED, "CONNECT requests refused by this side, by status.");
    describe_gauge!(WINDOWS, Unit::Bytes, "Receive windows granted to peers, in all.");
    describe_gauge!(UNSENT, Unit::Bytes, "Bytes that tunnels have taken from connections and not sent yet, in all.");
    describe_gauge!(FAST_CONNECTIONS, "Connections of the fast tunnel open now, with and without a flow, by role.");
    describe_counter!(
        FAST_POOLED,
        "Flows opened, by whether a waiting connection carried them (hit) or a new one (miss)."
    );
    describe_counter!(FAST_REFUSED, "Flows refused by this side, by status.");
    describe_counter!(POOLED, "Streams opened, by whether a pooled connection carried them (hit) or a new one (miss).");
}

pub(super) const HANDSHAKES: &str = "selvedge_tls_handshakes_total";
pub(super) const HANDSHAKE_SECONDS: &str = "selvedge_tls_handshake_duration_seconds";
pub(super) const CONNECTIONS: &str = "selvedge_hbone_connections";
pub(super) const STREAMS: &str = "selvedge_hbone_streams";
pub(super) const REFUSED: &str = "selvedge_hbone_refused_total";
pub(super) const WINDOWS: &str = "selvedge_hbone_window_bytes";
pub(super) const UNSENT: &str = "selvedge_hbone_unsent_bytes";
pub(super) const POOLED: &str = "selvedge_hbone_pool_opens_total";
pub(super) const FAST_POOLED: &str = "selvedge_fast_pool_opens_total";
pub(super) const FAST_REFUSED: &str = "selvedge_fast_refused_total";
const FAST_CONNECTIONS: &str = "selvedge_fast_connections";

/// Counts one connection of the fast tunnel for as long as it lives.
pub(super) struct FastConnection {
    role: &'static str,
}

impl FastConnection {
    pub fn begin(role: &'static str) -> Self {
        gauge!(FAST_CONNECTIONS, "role" => role).increment(1.0);
        Self { role }
    }
}

impl Drop for FastConnection {
    fn drop(&mut self) {
        gauge!(FAST_CONNECTIONS, "role" => self.role).decrement(1.0);
    }
}
