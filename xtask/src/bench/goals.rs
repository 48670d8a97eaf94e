//! What we want.

use crate::bench::measure::Row;
use crate::bench::stats::Summary;
use crate::bench::variants::Place;

/// What one of ours should reach.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Goal {
    /// This part of what its place is compared with, in the same run.
    AtLeast(f64),
    /// This much in all, in the row's unit.
    AtMost(f64),
}

impl Goal {
    pub fn of(place: Place, row: &Row) -> Option<Self> {
        let memory = MEMORY.iter().find(|(name, _)| *name == row.name).map(|(_, most)| Self::AtMost(*most));
        let here: &[(&str, f64)] = match place {
            Place::TwoNodes => &TWO_NODES,
            Place::OneNode => &ONE_NODE,
            Place::Outside => &[],
            Place::Requests => &REQUESTS,
        };
        memory.or_else(|| here.iter().find(|(name, _)| *name == row.name).map(|(_, least)| Self::AtLeast(*least)))
    }

    /// Whether the medians hold it.
    pub fn is_met(self, value: Summary, ratio: Option<Summary>) -> bool {
        match self {
            Self::AtLeast(least) => ratio.is_some_and(|ratio| ratio.median >= least),
            Self::AtMost(most) => value.median <= most,
        }
    }

    pub fn words(self) -> String {
        match self {
            Self::AtLeast(least) => format!(">= {least:.2}"),
            Self::AtMost(most) => format!("<= {most}"),
        }
    }
}

const TWO_NODES: [(&str, f64); 5] = [
    ("bytes, 1 stream", 0.85),
    ("bytes, 4 streams", 0.85),
    ("requests, 1 connection", 0.95),
    ("requests, 64 connections", 1.0),
    ("new connection a request", 1.2),
];

const ONE_NODE: [(&str, f64); 5] = [
    ("bytes, 1 stream", 1.2),
    ("bytes, 4 streams", 1.0),
    ("requests, 1 connection", 0.95),
    ("requests, 64 connections", 1.0),
    ("new connection a request", 0.9),
];

/// Of the best of the other proxies.
const REQUESTS: [(&str, f64); 2] = [
    ("requests, 1 connection: a CPU second of the hop", 1.0),
    ("requests, 64 connections: a CPU second of the hop", 1.0),
];

const MEMORY: [(&str, f64); 3] = [
    ("memory of one agent, idle", 12.0),
    ("memory of one agent, after load", 15.0),
    ("memory of an idle connection, both agents", 10.0),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::{Better, GROUPS, Measurement};

    fn summary(median: f64) -> Summary {
        Summary { median, min: median, max: median }
    }

    fn row(name: &str) -> Row {
        Row { name: name.into(), unit: "", better: Better::More }
    }

    #[test]
    fn every_goal_is_of_something_that_is_measured() {
        let measured: Vec<_> = GROUPS.iter().flat_map(|group| group.iter().copied().map(Measurement::name)).collect();
        for (name, _) in TWO_NODES.iter().chain(&ONE_NODE).chain(&REQUESTS) {
            assert!(measured.iter().any(|have| name.starts_with(have)), "{name}");
        }
    }

    #[test]
    fn a_ratio_is_held_against_the_relay_and_memory_against_itself() {
        let goal = Goal::of(Place::TwoNodes, &row("bytes, 1 stream")).unwrap();
        assert!(goal.is_met(summary(3.0), Some(summary(0.85))));
        assert!(!goal.is_met(summary(300.0), Some(summary(0.84))) && !goal.is_met(summary(300.0), None));
        let goal = Goal::of(Place::OneNode, &row("memory of one agent, idle")).unwrap();
        assert!(goal.is_met(summary(12.0), Some(summary(9.0))) && !goal.is_met(summary(12.1), None));
        assert_eq!(Goal::of(Place::Outside, &row("bytes, 1 stream")), None);
    }
}
