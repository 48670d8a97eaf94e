use crate::{capture, cni, handover, identity, policy, proxy, source, telemetry, transport, waypoint};

/// Tells the unit and meaning of every metric that an agent has. `docs/metrics.md` is checked against it.
pub fn describe() {
    capture::describe_metrics();
    cni::describe_metrics();
    handover::describe_metrics();
    identity::describe_metrics();
    super::mesh_node::describe_metrics();
    policy::describe_metrics();
    proxy::describe_metrics();
    source::describe_metrics();
    telemetry::describe_metrics();
    transport::describe_metrics();
    waypoint::describe_metrics();
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

    /// Takes descriptions, and nothing else.
    #[derive(Default)]
    struct Descriptions(Mutex<BTreeMap<String, (&'static str, SharedString)>>);

    impl Descriptions {
        fn note(&self, name: &KeyName, kind: &'static str, meaning: SharedString) {
            let before = self.0.lock().unwrap().insert(name.as_str().to_owned(), (kind, meaning));
            assert!(before.is_none(), "{} is described twice", name.as_str());
        }
    }

    impl Recorder for Descriptions {
        fn describe_counter(&self, name: KeyName, _: Option<Unit>, meaning: SharedString) {
            self.note(&name, "counter", meaning);
        }

        fn describe_gauge(&self, name: KeyName, _: Option<Unit>, meaning: SharedString) {
            self.note(&name, "gauge", meaning);
        }

        fn describe_histogram(&self, name: KeyName, _: Option<Unit>, meaning: SharedString) {
            self.note(&name, "histogram", meaning);
        }

        fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
            Counter::noop()
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::noop()
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::noop()
        }
    }

    fn described() -> BTreeMap<String, (&'static str, SharedString)> {
        let descriptions = Descriptions::default();
        metrics::with_local_recorder(&descriptions, || {
            super::describe();
            crate::controller::describe_metrics();
        });
        descriptions.0.into_inner().unwrap()
    }

    #[test]
    fn the_documentation_names_each_metric_with_its_kind_and_no_other() {
        let text = include_str!("../../docs/metrics.md");
        let documented: Vec<(String, String)> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `selvedge_"))
            .map(|row| {
                let mut cells = row.split('|').map(|cell| cell.trim().trim_end_matches('`'));
                (format!("selvedge_{}", cells.next().unwrap()), cells.next().unwrap().to_owned())
            })
            .collect();
        let mut sorted = documented.clone();
        sorted.sort();
        let known: Vec<_> = described().into_iter().map(|(name, (kind, _))| (name, kind.to_owned())).collect();
        assert_eq!(sorted, known);
    }

    #[test]
    fn names_follow_openmetrics_and_meanings_are_sentences() {
        for (name, (kind, meaning)) in described() {
            assert!(name.starts_with("selvedge_"), "{name}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            assert!(meaning.starts_with(|c: char| c.is_uppercase()) && meaning.ends_with('.'), "{name}: {meaning}");
        }
    }
}
