use std::net::SocketAddr;

use bytes::Bytes;
use http::header::HOST;
use http::request::Parts;

/// One request that is asked about.
#[derive(Clone, Copy, Debug)]
pub struct Check<'a> {
    pub head: &'a Parts,
    pub body: Option<&'a CheckBody>,
    pub source: &'a Peer,
    pub destination: &'a Peer,
    /// In seconds and nanoseconds since 1970.
    pub time: (i64, i32),
}

/// As much of a request's body as is sent along.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckBody {
    pub data: Bytes,
    /// There is more of it.
    pub is_partial: bool,
}

/// One end of the connection that a request comes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    /// Its identity as a SPIFFE ID; empty where none is proven.
    pub principal: String,
}

impl<'a> Check<'a> {
    /// Whom the request is for, as it says itself.
    pub(super) fn host(&self) -> &'a str {
        let said = self.head.headers.get(HOST).and_then(|host| host.to_str().ok());
        said.or(self.head.uri.authority().map(|authority| authority.as_str())).unwrap_or_default()
    }

    /// With the query.
    pub(super) fn path(&self) -> &'a str {
        self.head.uri.path_and_query().map_or("/", |path| path.as_str())
    }
}
