//! The table, and the same as JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::bench::goals::Goal;
use crate::bench::measure::{Reading, Row};
use crate::bench::stats::Summary;
use crate::bench::variants::{Place, Variant};
use crate::style::{bold, dim, mark};

/// Everything that was read, in the order of the rows.
pub struct Report {
    variants: Vec<Variant>,
    /// The rows of a place, in the order in which they came.
    rows: Vec<(Place, Row)>,
    /// By place, variant, row and round.
    values: BTreeMap<(Place, String, String, u32), f64>,
    notes: Vec<String>,
}

impl Report {
    pub fn new(variants: &[Variant]) -> Self {
        Self { variants: variants.to_vec(), rows: Vec::new(), values: BTreeMap::new(), notes: Vec::new() }
    }

    /// What is read twice in a round (memory, after each group) stays at the worse of both.
    pub fn add(&mut self, variant: &Variant, round: u32, readings: impl IntoIterator<Item = Reading>) {
        for Reading { row, value } in readings {
            let before = self.values.entry((variant.place, variant.name.clone(), row.name.clone(), round));
            before.and_modify(|before| *before = row.worse(*before, value)).or_insert(value);
            let known = (variant.place, row);
            if !self.rows.contains(&known) {
                self.rows.push(known);
            }
        }
    }

    /// A line below the tables.
    pub fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// The median of what was read of a variant so far.
    pub fn median(&self, variant: &Variant, row: &str) -> Option<f64> {
        Summary::of(self.of(variant, row).into_values()).map(|summary| summary.median)
    }

    /// Every place's table, and the notes.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for place in Place::ALL {
            if self.rows.iter().any(|(at, _)| *at == place) {
                text.push_str(&self.table(place));
                text.push('\n');
            }
        }
        for note in &self.notes {
            text.push_str(note);
            text.push('\n');
        }
        text
    }

    pub fn json(&self) -> Value {
        let samples = self.values.iter().map(|((place, variant, row, round), value)| {
            json!({"place": place.to_string(), "variant": variant, "measurement": row, "round": round, "value": value})
        });
        let mut results = Vec::new();
        for (place, row) in &self.rows {
            for variant in self.variants.iter().filter(|variant| variant.place == *place) {
                let Some(value) = Summary::of(self.of(variant, &row.name).into_values()) else { continue };
                let ratio = self.ratio(variant, row);
                let goal = Goal::of(*place, row).filter(|_| variant.is_ours());
                results.push(json!({
                    "place": place.to_string(),
                    "variant": variant.name,
                    "measurement": row.name,
                    "unit": row.unit,
                    "value": value,
                    "of_relay": ratio,
                    "want": goal.map(Goal::words),
                    "met": goal.map(|goal| goal.is_met(value, ratio)),
                }));
            }
        }
        json!({"results": results, "samples": samples.collect::<Vec<_>>(), "notes": self.notes})
    }

    fn table(&self, place: Place) -> String {
        let rows: Vec<&Row> = self.rows.iter().filter(|(at, _)| *at == place).map(|(_, row)| row).collect();
        let has_any = |variant: &&Variant| rows.iter().any(|row| !self.of(variant, &row.name).is_empty());
        let variants: Vec<&Variant> = self.variants.iter().filter(|v| v.place == place).filter(has_any).collect();
        let mut lines = vec![format!("{:<46}", capitalised(&place.to_string()))];
        for variant in &variants {
            lines[0].push_str(&format!("{:>1$}", variant.name, if variant.is_compared() { COMPARED } else { PLAIN }));
        }
        lines[0] = bold(format!("{}    {}", lines[0], if variants.iter().any(|v| v.is_ours()) { "want" } else { "" }));
        for row in rows {
            let goal = Goal::of(place, row);
            let mut line = format!("  {:<44}", format!("{} {}", row.name, row.unit));
            for variant in &variants {
                let value = Summary::of(self.of(variant, &row.name).into_values());
                let shown = value.map_or("-".into(), |value| number(value.median));
                let ratio = self.ratio(variant, row);
                let verdict = goal.zip(value).filter(|_| variant.is_ours());
                let verdict = verdict.map_or(" ".into(), |(goal, value)| mark(goal.is_met(value, ratio)));
                line.push_str(&match variant.is_compared() {
                    true => format!("{shown:>8} {:>18} {verdict}", ratio.map_or(String::new(), Summary::words)),
                    false => format!("{shown:>PLAIN$}"),
                });
            }
            line.push_str(&goal.map_or(String::new(), |goal| format!("    {}", dim(goal.words()))));
            lines.push(line);
        }
        lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
    }

    /// What was read, by round.
    fn of(&self, variant: &Variant, row: &str) -> BTreeMap<u32, f64> {
        let rounds = (variant.place, variant.name.clone(), row.to_owned(), 0)
            ..=(variant.place, variant.name.clone(), row.to_owned(), u32::MAX);
        self.values.range(rounds).map(|((.., round), value)| (*round, *value)).collect()
    }

    /// Of the bare relay, or of the best of the other proxies, round by round.
    fn ratio(&self, variant: &Variant, row: &Row) -> Option<Summary> {
        if variant.is_limit() {
            return None;
        }
        let mut limits: BTreeMap<u32, f64> = BTreeMap::new();
        for limit in self.variants.iter().filter(|limit| limit.place == variant.place && limit.is_limit()) {
            for (round, value) in self.of(limit, &row.name) {
                limits.entry(round).and_modify(|best| *best = row.better(*best, value)).or_insert(value);
            }
        }
        Summary::of(
            self.of(variant, &row.name).into_iter().filter_map(|(round, value)| Some(value / limits.get(&round)?)),
        )
    }
}

/// Three digits that matter.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        small if small < 0.1 => format!("{value:.4}"),
        small if small < 10.0 => format!("{value:.2}"),
        middle if middle < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Widths of a column of values, and of one with ratios.
const PLAIN: usize = 15;
const COMPARED: usize = 29;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::Better;
    use crate::bench::variants::Carrier;

    fn variants() -> Vec<Variant> {
        let variant = |name: &str, carrier| Variant { place: Place::TwoNodes, name: name.into(), carrier };
        vec![variant("relay", Carrier::Relay), variant("HBONE", Carrier::Agents(&[]))]
    }

    fn reading(name: &str, value: f64) -> Reading {
        Reading { row: Row { name: name.into(), unit: "Gb/s", better: Better::More }, value }
    }

    fn report() -> Report {
        let variants = variants();
        let mut report = Report::new(&variants);
        for (round, relay, ours) in [(1, 10.0, 9.0), (2, 20.0, 16.0), (3, 5.0, 5.0)] {
            report.add(&variants[0], round, [reading("bytes, 1 stream", relay)]);
            report.add(&variants[1], round, [reading("bytes, 1 stream", ours)]);
        }
        report
    }

    #[test]
    fn a_ratio_is_taken_within_its_round() {
        let json = report().json();
        let ours = json["results"].as_array().unwrap().iter().find(|result| result["variant"] == "HBONE").unwrap();
        assert_eq!(ours["of_relay"], json!({"median": 0.9, "min": 0.8, "max": 1.0}));
        assert_eq!((&ours["value"]["median"], &ours["met"]), (&json!(9.0), &json!(true)));
        assert_eq!(json["samples"].as_array().unwrap().len(), 6);
    }

    #[test]
    fn the_table_shows_values_ratios_and_what_we_want() {
        let text = report().text();
        let line = text.lines().find(|line| line.contains("bytes, 1 stream")).unwrap();
        assert!(line.contains(">= 0.85"), "{line}");
        assert!(line.contains("0.90 (0.80..1.00)") && line.contains('✓'), "{line}");
        assert!(text.contains("Two nodes") && !text.contains("One node"));
    }

    #[test]
    fn what_is_read_twice_in_a_round_stays_at_the_worse() {
        let (variants, mut report) = (variants(), report());
        report.add(&variants[1], 4, [reading("bytes, 4 streams", 8.0)]);
        report.add(&variants[1], 4, [reading("bytes, 4 streams", 6.0)]);
        report.add(&variants[1], 4, [reading("bytes, 4 streams", 7.0)]);
        assert_eq!(report.median(&variants[1], "bytes, 4 streams"), Some(6.0));
    }

    #[test]
    fn numbers_have_the_digits_that_matter() {
        assert_eq!([0.0, 0.0123, 1.234, 12.34, 1234.5].map(number), ["0", "0.0123", "1.23", "12.3", "1234"]);
    }
}
