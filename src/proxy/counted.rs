use std::net::SocketAddr;
use std::sync::Arc;

use super::Proxy;

/// Counts a connection for its endpoint, from its first attempt to its end; or a request.
pub struct Counted {
    proxy: Arc<Proxy>,
    endpoint: SocketAddr,
}

impl Counted {
    pub fn begin(proxy: &Arc<Proxy>, endpoint: SocketAddr) -> Self {
        proxy.balancer().opened(endpoint);
        Self { proxy: proxy.clone(), endpoint }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.proxy.balancer().closed(self.endpoint);
    }
}
