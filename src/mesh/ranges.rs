use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::shared_map::SharedMap;

/// A multiset of address ranges. Looking up costs one hash a distinct prefix length, not one step a range; so does a
/// clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges(BTreeMap<(bool, u8), SharedMap<IpNet, usize>>);

impl Ranges {
    pub(super) fn insert(&mut self, range: IpNet) {
        let range = range.trunc();
        let of_length = self.0.entry(length(&range)).or_default();
        let count = of_length.get(&range).copied().unwrap_or_default();
        of_length.insert(range, count + 1);
    }

    pub(super) fn remove(&mut self, range: IpNet) {
        let range = range.trunc();
        let Some(of_length) = self.0.get_mut(&length(&range)) else { return };
        match of_length.remove(&range) {
            Some(count) if count > 1 => drop(of_length.insert(range, count - 1)),
            _ => {}
        }
        if of_length.is_empty() {
            self.0.remove(&length(&range));
        }
    }

    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        self.0
            .iter()
            .filter(|((v6, _), _)| *v6 == ip.is_ipv6())
            .any(|((_, bits), ranges)| IpNet::new(ip, *bits).is_ok_and(|range| ranges.contains_key(&range.trunc())))
    }
}

fn length(range: &IpNet) -> (bool, u8) {
    (range.addr().is_ipv6(), range.prefix_len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_counts_as_often_as_it_was_put_in() {
        let mut ranges = Ranges::default();
        let net: IpNet = "10.1.0.0/16".parse().unwrap();
        let inside: IpAddr = "10.1.2.3".parse().unwrap();
        ranges.insert(net);
        ranges.insert(net);
        ranges.remove(net);
        assert!(ranges.contains(inside));
        assert!(!ranges.contains("10.2.0.1".parse().unwrap()));
        assert!(!ranges.contains("fd00::1".parse().unwrap()));
        ranges.remove(net);
        assert!(!ranges.contains(inside));
    }

    #[test]
    fn host_bits_of_a_range_do_not_matter() {
        let mut ranges = Ranges::default();
        ranges.insert("fd00:1::5/64".parse().unwrap());
        assert!(ranges.contains("fd00:1::9".parse().unwrap()));
    }
}
