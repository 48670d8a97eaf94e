use std::net::{IpAddr, SocketAddr};

use crate::mesh::Identity;

/// For whom a waypoint speaks: the client that proved its identity to it, and where that client came from.
///
/// It is a claim. Who is believed is for the destination's side to say: its own waypoint alone.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Behalf {
    pub identity: Identity,
    pub address: SocketAddr,
}

impl Behalf {
    /// As bytes: family (4 or 6), port, address, and the identity as text.
    pub(super) fn write(&self) -> Vec<u8> {
        let port = self.address.port().to_be_bytes();
        let mut bytes = Vec::with_capacity(96);
        match self.address.ip() {
            IpAddr::V4(ip) => {
                bytes.extend_from_slice(&[4, port[0], port[1]]);
                bytes.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                bytes.extend_from_slice(&[6, port[0], port[1]]);
                bytes.extend_from_slice(&ip.octets());
            }
        }
        bytes.extend_from_slice(self.identity.to_string().as_bytes());
        bytes
    }

    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let (&[family, high, low], rest) = bytes.split_first_chunk()?;
        let (ip, text): (IpAddr, &[u8]) = match family {
            4 => rest.split_first_chunk::<4>().map(|(ip, rest)| ((*ip).into(), rest))?,
            6 => rest.split_first_chunk::<16>().map(|(ip, rest)| ((*ip).into(), rest))?,
            _ => return None,
        };
        let identity = std::str::from_utf8(text).ok()?.parse().ok()?;
        Some(Self { identity, address: SocketAddr::new(ip, u16::from_be_bytes([high, low])) })
    }
}

/// Of its bytes: a trust domain, a namespace and a service account have 255, 63 and 253 at most.
pub(super) const MOST_BEHALF: usize = 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated;

    fn behalf(address: &str) -> Behalf {
        let identity = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        Behalf { identity, address: address.parse().unwrap() }
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(
            bytes in mutated(vec![behalf("10.1.2.3:4321").write(), behalf("[fd00::1]:80").write()]),
        ) {
            if let Some(behalf) = Behalf::read(&bytes) {
                prop_assert_eq!(behalf.write(), bytes);
            }
        }
    }
}
