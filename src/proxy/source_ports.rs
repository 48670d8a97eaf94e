use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use rand::Rng;

/// Source ports of the sockets that carry a client's address to an application.
///
/// Two sockets of one 4-tuple kill each other, so a port is taken only where no live connection of that client to
/// that address holds it: neither one of ours, nor one accepted from the client, nor one that the kernel knows.
#[derive(Debug)]
pub struct SourcePorts {
    ranges: PortRanges,
    /// How many connections hold each; a client may reuse its port before its last connection has left us.
    held: Mutex<HashMap<Tuple, u32>>,
}

/// (client, the application's address) as the application sees it.
type Tuple = (SocketAddr, SocketAddr);

/// A 4-tuple in use, given back on drop.
#[derive(Debug)]
pub struct Held {
    ports: Arc<SourcePorts>,
    tuple: Tuple,
}

impl SourcePorts {
    pub fn new(ranges: PortRanges) -> Arc<Self> {
        Arc::new(Self { ranges, held: Mutex::default() })
    }

    /// Notes the 4-tuple of a connection accepted from a client, so that none of ours takes it while it lives.
    pub fn note(self: &Arc<Self>, client: SocketAddr, destination: SocketAddr) -> Held {
        *self.lock().entry((client, destination)).or_default() += 1;
        Held { ports: self.clone(), tuple: (client, destination) }
    }

    /// Takes a free port for `client` towards `destination`. `in_use` asks the kernel about one 4-tuple.
    /// `None` where every port of the ranges is held.
    pub fn take(
        self: &Arc<Self>,
        client: IpAddr,
        destination: SocketAddr,
        random: &mut impl Rng,
        mut in_use: impl FnMut(SocketAddr) -> bool,
    ) -> Option<Held> {
        let total = self.ranges.len();
        let start = random.next_u32() as usize % total;
        for offset in 0..total {
            let source = SocketAddr::new(client, self.ranges.nth((start + offset) % total));
            match self.lock().entry((source, destination)) {
                Entry::Occupied(_) => continue,
                Entry::Vacant(free) => drop(free.insert(1)),
            }
            let held = Held { ports: self.clone(), tuple: (source, destination) };
            if !in_use(source) {
                return Some(held);
            }
        }
        None
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Tuple, u32>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    pub fn source(&self) -> SocketAddr {
        self.tuple.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.ports.lock().entry(self.tuple) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

/// Ports to choose from, written `1024-32767,61000-65535`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortRanges(Vec<RangeInclusive<u16>>);

impl PortRanges {
    fn len(&self) -> usize {
        self.0.iter().map(ExactSizeIterator::len).sum()
    }

    fn nth(&self, mut index: usize) -> u16 {
        for range in &self.0 {
            if index < range.len() {
                return range.start() + index as u16;
            }
            index -= range.len();
        }
        unreachable!("the index is below the sum of the lengths")
    }
}

impl Default for PortRanges {
    /// What Linux's `ip_local_port_range` leaves free: clients rarely choose these.
    fn default() -> Self {
        Self(vec![1024..=32767, 61000..=65535])
    }
}

impl FromStr for PortRanges {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = |part: &str| format!("{part:?} is not a port or a range such as 1024-32767");
        let parse = |part: &str| part.trim().parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(|| refused(part));
        let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (parse(first)?, parse(last)?),
                None => (parse(part)?, parse(part)?),
            };
            if first > last {
                return Err(format!("{part:?} ends before it begins"));
            }
            if ranges.iter().any(|other| first <= *other.end() && *other.start() <= last) {
                return Err(format!("{part:?} overlaps another range"));
            }
            ranges.push(first..=last);
        }
        Ok(Self(ranges))
    }
}

impl std::fmt::Display for PortRanges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{}-{}", range.start(), range.end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 2));

    fn app() -> SocketAddr {
        "10.2.0.2:80".parse().unwrap()
    }

    #[test]
    fn no_port_is_taken_twice_and_every_one_can_be() {
        let ports = SourcePorts::new("100-103,200".parse().unwrap());
        let mut random = StdRng::seed_from_u64(1);
        let held: Vec<Held> = std::iter::from_fn(|| ports.take(CLIENT, app(), &mut random, |_| false)).collect();
        let taken: HashSet<u16> = held.iter().map(|h| h.source().port()).collect();
        assert_eq!(taken, HashSet::from([100, 101, 102, 103, 200]));
        drop(held);
        assert!(ports.take(CLIENT, app(), &mut random, |_| false).is_some());
    }

    #[test]
    fn a_port_that_the_client_or_the_kernel_holds_is_passed_over() {
        let ports = SourcePorts::new("100-102".parse().unwrap());
        let mut random = StdRng::seed_from_u64(2);
        let _accepted = ports.note(SocketAddr::new(CLIENT, 100), app());
        for _ in 0..20 {
            let held = ports.take(CLIENT, app(), &mut random, |source| source.port() == 101).unwrap();
            assert_eq!(held.source().port(), 102);
        }
    }

    #[test]
    fn one_port_serves_several_destinations() {
        let ports = SourcePorts::new("100".parse().unwrap());
        let mut random = StdRng::seed_from_u64(3);
        let _one = ports.take(CLIENT, app(), &mut random, |_| false).unwrap();
        assert!(ports.take(CLIENT, "10.2.0.2:81".parse().unwrap(), &mut random, |_| false).is_some());
    }

    #[test]
    fn ranges_that_cannot_be_are_refused() {
        for text in ["", "0", "5-1", "1-5,5-9", "x", "1-70000"] {
            assert!(text.parse::<PortRanges>().is_err(), "{text}");
        }
        assert_eq!("1-2,7".parse::<PortRanges>().unwrap().to_string(), "1-2,7-7");
    }
}
