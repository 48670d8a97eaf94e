use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

/// A set of address ranges. A look-up costs one hash for each prefix length in use, however many ranges there are.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Blocks {
    v4: BTreeMap<u8, HashSet<u32>>,
    v6: BTreeMap<u8, HashSet<u128>>,
}

impl Blocks {
    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        match ip.to_canonical() {
            IpAddr::V4(ip) => self.v4.iter().any(|(length, set)| set.contains(&(u32::from(ip) & mask_v4(*length)))),
            IpAddr::V6(ip) => self.v6.iter().any(|(length, set)| set.contains(&(u128::from(ip) & mask_v6(*length)))),
        }
    }

    fn insert(&mut self, block: IpNet) {
        match block {
            IpNet::V4(net) => {
                self.v4.entry(net.prefix_len()).or_default().insert(u32::from(net.network()));
            }
            IpNet::V6(net) => {
                // A range of IPv4-mapped addresses (RFC 4291, section 2.5.5.2) is one of IPv4: look-ups are canonical.
                if let Some(v4) = net.network().to_ipv4_mapped()
                    && net.prefix_len() >= 96
                {
                    self.v4.entry(net.prefix_len() - 96).or_default().insert(u32::from(v4));
                    return;
                }
                self.v6.entry(net.prefix_len()).or_default().insert(u128::from(net.network()));
            }
        }
    }
}

impl<'a> FromIterator<&'a IpNet> for Blocks {
    fn from_iter<I: IntoIterator<Item = &'a IpNet>>(blocks: I) -> Self {
        let mut set = Self::default();
        blocks.into_iter().for_each(|block| set.insert(block.trunc()));
        set
    }
}

fn mask_v4(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)
}

fn mask_v6(length: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(blocks: &[&str]) -> Blocks {
        let blocks: Vec<IpNet> = blocks.iter().map(|block| block.parse().unwrap()).collect();
        blocks.iter().collect()
    }

    #[test]
    fn mapped_addresses_are_their_ipv4_addresses_on_both_sides() {
        let blocks = set(&["10.0.0.0/8"]);
        assert!(blocks.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!blocks.contains("::ffff:11.1.2.3".parse().unwrap()));
        let blocks = set(&["::ffff:10.0.0.0/104"]);
        assert!(blocks.contains("10.1.2.3".parse().unwrap()));
        assert!(!blocks.contains("11.1.2.3".parse().unwrap()));
    }

    #[test]
    fn the_whole_of_one_family_holds_nothing_of_the_other() {
        assert!(!set(&["0.0.0.0/0"]).contains("fd00::1".parse().unwrap()));
        assert!(set(&["0.0.0.0/0"]).contains("1.2.3.4".parse().unwrap()));
        assert!(set(&["::/0"]).contains("fd00::1".parse().unwrap()));
        assert!(!set(&["::/0"]).contains("1.2.3.4".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn a_set_holds_what_one_of_its_ranges_holds(
            nets in prop::collection::vec((any::<u32>(), 0u8..=32), 0..20), ip in any::<u32>(), near in any::<bool>(),
        ) {
            let nets: Vec<IpNet> =
                nets.into_iter().map(|(ip, length)| IpNet::new(IpAddr::V4(ip.into()), length).unwrap()).collect();
            let ip = match nets.first() {
                Some(IpNet::V4(net)) if near => IpAddr::V4((u32::from(net.addr()) ^ (ip & 0xff)).into()),
                _ => IpAddr::V4(ip.into()),
            };
            let blocks: Blocks = nets.iter().collect();
            prop_assert_eq!(blocks.contains(ip), nets.iter().any(|net| net.contains(&ip)));
        }
    }
}
