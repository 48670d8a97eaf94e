use std::net::{IpAddr, SocketAddr};

use super::ProtocolError;
use crate::transport::behalf::{Behalf, MOST_BEHALF};

/// What a flow begins with: where to. Of where from it says nothing, for nobody would believe it; but a waypoint says
/// whose the flow is.
///
/// | octets | |
/// | --- | --- |
/// | 0 | version: 1 |
/// | 1 | family: 4 or 6 |
/// | 2, 3 | port, network byte order |
/// | 4 or 16 | address |
/// | the rest | fields: kind (1 octet), length (2), value; those of unknown kind are passed over |
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    pub destination: SocketAddr,
    /// [W3C Trace Context](https://www.w3.org/TR/trace-context/), as in the HTTP header of that name.
    pub traceparent: Option<String>,
    /// Of a waypoint's flow: the client that it is for.
    pub behalf: Option<Behalf>,
}

impl Header {
    pub fn write(&self, into: &mut Vec<u8>) {
        let port = self.destination.port().to_be_bytes();
        match self.destination.ip() {
            IpAddr::V4(ip) => {
                into.extend_from_slice(&[VERSION, 4, port[0], port[1]]);
                into.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                into.extend_from_slice(&[VERSION, 6, port[0], port[1]]);
                into.extend_from_slice(&ip.octets());
            }
        }
        // A value that no peer would take is left out.
        if let Some(traceparent) = self.traceparent.as_ref().filter(|value| value.len() <= MOST_VALUE) {
            let [.., high, low] = traceparent.len().to_be_bytes();
            into.extend_from_slice(&[TRACEPARENT, high, low]);
            into.extend_from_slice(traceparent.as_bytes());
        }
        if let Some(behalf) = &self.behalf {
            let value = behalf.write();
            let [.., high, low] = value.len().to_be_bytes();
            into.extend_from_slice(&[BEHALF, high, low]);
            into.extend_from_slice(&value);
        }
    }

    pub fn read(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let (&[version, family, high, low], rest) = bytes.split_first_chunk().ok_or(ProtocolError::Header)?;
        if version != VERSION {
            return Err(ProtocolError::Version(version));
        }
        let (ip, mut fields): (IpAddr, &[u8]) = match family {
            4 => rest.split_first_chunk::<4>().map(|(ip, rest)| ((*ip).into(), rest)),
            6 => rest.split_first_chunk::<16>().map(|(ip, rest)| ((*ip).into(), rest)),
            _ => None,
        }
        .ok_or(ProtocolError::Header)?;
        let port = u16::from_be_bytes([high, low]);
        if port == 0 {
            return Err(ProtocolError::Header);
        }
        let (mut traceparent, mut behalf) = (None, None);
        while !fields.is_empty() {
            let (&[kind, high, low], rest) = fields.split_first_chunk().ok_or(ProtocolError::Header)?;
            let length = usize::from(u16::from_be_bytes([high, low]));
            let (value, rest) = rest.split_at_checked(length).ok_or(ProtocolError::Header)?;
            if kind == TRACEPARENT && value.len() <= MOST_VALUE {
                // A value that is no text counts as absent.
                traceparent = std::str::from_utf8(value).ok().map(str::to_owned);
            }
            if kind == BEHALF {
                // Passed over, the flow would be taken for the waypoint's own.
                let read = Some(value).filter(|value| value.len() <= MOST_BEHALF).and_then(Behalf::read);
                behalf = Some(read.ok_or(ProtocolError::Header)?);
            }
            fields = rest;
        }
        Ok(Self { destination: SocketAddr::new(ip, port), traceparent, behalf })
    }
}

const VERSION: u8 = 1;
const TRACEPARENT: u8 = 1;
const BEHALF: u8 = 2;
/// A traceparent has 55 octets today, and may grow.
const MOST_VALUE: usize = 256;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated;

    fn header(destination: &str) -> Header {
        Header {
            destination: destination.parse().unwrap(),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
            behalf: Some(Behalf {
                identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
                address: "10.9.9.9:4321".parse().unwrap(),
            }),
        }
    }

    fn written(header: &Header) -> Vec<u8> {
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        bytes
    }

    #[test]
    fn a_header_reads_back_what_it_writes() {
        for destination in ["10.1.2.3:8080", "[fd00::1]:80"] {
            let header = header(destination);
            assert_eq!(Header::read(&written(&header)), Ok(header));
        }
        let bare = Header { traceparent: None, behalf: None, ..header("10.1.2.3:8080") };
        assert_eq!(written(&bare), [1, 4, 0x1f, 0x90, 10, 1, 2, 3]);
    }

    #[test]
    fn fields_of_tomorrow_are_passed_over_and_versions_of_tomorrow_refused() {
        let mut bytes = written(&header("10.1.2.3:8080"));
        bytes.extend_from_slice(&[200, 0, 2, 1, 2]);
        assert_eq!(Header::read(&bytes), Ok(header("10.1.2.3:8080")));
        bytes[0] = 2;
        assert_eq!(Header::read(&bytes), Err(ProtocolError::Version(2)));
    }

    #[test]
    fn a_claim_that_cannot_be_read_is_not_passed_over() {
        let mut bytes = written(&Header { behalf: None, ..header("10.1.2.3:8080") });
        bytes.extend_from_slice(&[BEHALF, 0, 2, 4, 0]);
        assert_eq!(Header::read(&bytes), Err(ProtocolError::Header));
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_a_panic_and_means_what_it_says(
            bytes in mutated(vec![written(&header("10.1.2.3:8080")), written(&header("[fd00::1]:80"))]),
        ) {
            if let Ok(header) = Header::read(&bytes) {
                prop_assert_ne!(header.destination.port(), 0);
                prop_assert_eq!(Header::read(&written(&header)), Ok(header));
            }
        }
    }
}
