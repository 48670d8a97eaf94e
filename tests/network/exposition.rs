//! The Prometheus text format, version 0.0.4, read as strictly as its description allows: what a scraper would refuse
//! is an error here, and so is what it would only put up with.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

/// One whole answer of `/metrics`.
#[derive(Debug, Default)]
pub struct Exposition(Vec<Family>);

/// One metric: everything under one HELP and TYPE.
#[derive(Debug)]
pub struct Family {
    pub name: String,
    pub kind: String,
    samples: Vec<Sample>,
}

#[derive(Clone, Debug)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Exposition {
    pub fn parse(text: &str) -> Result<Self> {
        ensure!(text.ends_with('\n'), "the last line has no end");
        let mut families: Vec<Family> = Vec::new();
        let mut names = BTreeSet::new();
        let mut series = BTreeSet::new();
        let mut help = None;
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, meaning) = rest.split_once(' ').with_context(|| format!("no meaning: {line}"))?;
                ensure!(!meaning.is_empty(), "no meaning: {line}");
                help = Some(name);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').with_context(|| format!("no type: {line}"))?;
                ensure!(help.take() == Some(name), "{name} has no HELP right above its TYPE");
                ensure!(["counter", "gauge", "histogram"].contains(&kind), "unknown type: {line}");
                ensure!(names.insert(name.to_owned()), "{name} comes twice");
                families.push(Family { name: name.to_owned(), kind: kind.to_owned(), samples: Vec::new() });
            } else {
                let sample = Sample::parse(line).with_context(|| format!("not a sample: {line}"))?;
                let family = families.last_mut().with_context(|| format!("a sample before any TYPE: {line}"))?;
                ensure!(family.takes(&sample), "a sample under TYPE {}: {line}", family.name);
                ensure!(series.insert((sample.name.clone(), sample.labels.clone())), "a series comes twice: {line}");
                family.samples.push(sample);
            }
        }
        families.iter().try_for_each(Family::check)?;
        Ok(Self(families))
    }

    pub fn families(&self) -> impl Iterator<Item = &Family> {
        self.0.iter()
    }

    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.0.iter().flat_map(|family| &family.samples)
    }
}

impl Family {
    fn takes(&self, sample: &Sample) -> bool {
        match sample.name.strip_prefix(&self.name) {
            Some("") => self.kind != "histogram",
            Some("_sum" | "_count") => self.kind == "histogram",
            Some("_bucket") => self.kind == "histogram" && sample.labels.contains_key("le"),
            _ => false,
        }
    }

    fn check(&self) -> Result<()> {
        if self.kind == "counter" {
            ensure!(self.name.ends_with("_total"), "the counter {} does not end with _total", self.name);
            ensure!(self.samples.iter().all(|sample| sample.value >= 0.0 && sample.value.is_finite()), "{self:?}");
        }
        if self.kind == "histogram" {
            for count in self.samples.iter().filter(|sample| sample.name.ends_with("_count")) {
                self.check_buckets(count).with_context(|| format!("{self:?}"))?;
            }
        }
        Ok(())
    }

    /// Buckets grow, and the last one holds all.
    fn check_buckets(&self, count: &Sample) -> Result<()> {
        let mut last = (f64::NEG_INFINITY, 0.0);
        for sample in self.samples.iter().filter(|sample| sample.name.ends_with("_bucket")) {
            let mut labels = sample.labels.clone();
            let bound: f64 = labels.remove("le").context("no le")?.parse()?;
            if labels != count.labels {
                continue;
            }
            ensure!(bound > last.0 && sample.value >= last.1, "buckets out of order at le={bound}");
            last = (bound, sample.value);
        }
        ensure!(last == (f64::INFINITY, count.value), "the last bucket is {last:?}, the count {}", count.value);
        Ok(())
    }
}

impl Sample {
    fn parse(line: &str) -> Result<Self> {
        let end = line.find(['{', ' ']).context("no value")?;
        let (name, mut rest) = line.split_at(end);
        ensure!(is_name(name), "bad name {name:?}");
        let mut labels = BTreeMap::new();
        if let Some(inside) = rest.strip_prefix('{') {
            rest = inside;
            loop {
                let (key, after) = rest.split_once("=\"").context("a label without a value")?;
                ensure!(is_name(key) && !key.contains(':'), "bad label name {key:?}");
                let (value, after) = quoted(after)?;
                ensure!(labels.insert(key.to_owned(), value).is_none(), "label {key} twice");
                match after.chars().next() {
                    Some(',') => rest = &after[1..],
                    Some('}') => break rest = &after[1..],
                    _ => bail!("labels without an end"),
                }
            }
        }
        let value = rest.strip_prefix(' ').context("no space before the value")?;
        ensure!(!value.contains(' '), "more than a value: {value:?}");
        Ok(Self { name: name.to_owned(), labels, value: value.parse()? })
    }
}

fn is_name(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    text.chars().all(legal) && text.starts_with(|c: char| !c.is_ascii_digit())
}

fn quoted(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                other => bail!("bad escape {other:?}"),
            },
            other => value.push(other),
        }
    }
    bail!("a value without its closing quote")
}
