//! One line a connection, or a request, written by a thread of its own.

mod calendar;
mod line;
mod record;

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::catalogue;
use calendar::Calendar;
pub(super) use line::Line;
pub(super) use record::{OfConnection, Record, Told};

/// How the access log looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum AccessLogFormat {
    Off,
    Json,
    Text,
}

/// Where connections write their line. Never makes one wait: when the output does not keep up, lines are dropped and
/// counted. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AccessLog(Option<Arc<Queue>>);

impl AccessLog {
    pub fn off() -> Self {
        Self(None)
    }

    /// Writes to `output`, standard output in an agent. The [`AccessLogWriter`] is to be finished at the end.
    pub fn start(format: AccessLogFormat, output: impl Write + Send + 'static) -> io::Result<(Self, AccessLogWriter)> {
        if format == AccessLogFormat::Off {
            return Ok((Self::off(), AccessLogWriter(None)));
        }
        let queue = Arc::new(Queue::default());
        let theirs = queue.clone();
        thread::Builder::new().name("access-log".to_owned()).spawn(move || theirs.write_all(format, output))?;
        Ok((Self(Some(queue.clone())), AccessLogWriter(Some(queue))))
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn write(&self, record: Record) {
        let Some(queue) = &self.0 else { return };
        let mut state = queue.state();
        if state.records.len() >= QUEUE_LENGTH || state.closed {
            drop(state);
            metrics::counter!(catalogue::DROPPED).increment(1);
            return;
        }
        state.records.push(record);
        let waiting = state.records.len();
        drop(state);
        // The writer waits for the first, and then a moment for more: one that is woken for each costs more than it writes.
        if waiting == 1 || waiting == MANY {
            queue.changed.notify_all();
        }
    }
}

/// The other end of an [`AccessLog`].
#[must_use = "lines still waiting are lost unless it is finished"]
#[derive(Debug)]
pub struct AccessLogWriter(Option<Arc<Queue>>);

impl AccessLogWriter {
    /// Takes no more lines and waits until those that wait are written, at most for `limit`. False if some were not.
    pub fn finish(self, limit: Duration) -> bool {
        let Some(queue) = self.0 else { return true };
        let mut state = queue.state();
        state.closed = true;
        queue.changed.notify_all();
        let waited = queue.changed.wait_timeout_while(state, limit, |state| !state.finished);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.finished
    }
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    records: Vec<Record>,
    closed: bool,
    finished: bool,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_all(&self, format: AccessLogFormat, mut output: impl Write) {
        let (mut records, mut text, mut calendar) = (Vec::new(), String::new(), Calendar::default());
        loop {
            let waited = self.changed.wait_while(self.state(), |state| state.records.is_empty() && !state.closed);
            let waited = waited.unwrap_or_else(PoisonError::into_inner);
            let gathering = |state: &mut QueueState| state.records.len() < MANY && !state.closed;
            let waited = self.changed.wait_timeout_while(waited, GATHERING, gathering);
            let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut state.records, &mut records);
            drop(state);
            if records.is_empty() {
                self.state().finished = true;
                self.changed.notify_all();
                return;
            }
            for some in records.chunks(MANY) {
                some.iter().for_each(|record| record.write(format, &mut calendar, &mut text));
                if output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_err() {
                    metrics::counter!(catalogue::DROPPED).increment(some.len() as u64);
                }
                text.clear();
            }
            records.clear();
            // What a burst needed is given back.
            records.shrink_to(MANY);
            text.shrink_to(MOST_TEXT_KEPT);
        }
    }
}

/// Some megabytes at most.
const QUEUE_LENGTH: usize = 8192;
/// So many are written without waiting for more.
const MANY: usize = 256;
const GATHERING: Duration = Duration::from_millis(10);
const MOST_TEXT_KEPT: usize = 128 * 1024;

#[cfg(test)]
pub(super) mod tests {
    use std::sync::mpsc;

    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::mesh::Reason;
    use crate::telemetry::connection::{ConnectionInfo, Direction, Party, Transport, Verdict};
    use crate::telemetry::metrics::{MetricsSettings, recorder};

    #[derive(Clone, Default)]
    pub(in crate::telemetry) struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Shared {
        pub(in crate::telemetry) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// An output that takes nothing until it is let go.
    struct StalledOutput(mpsc::Receiver<()>);

    impl Write for StalledOutput {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn record(detail: &str) -> Record {
        let info = ConnectionInfo {
            direction: Direction::Inbound,
            transport: Transport::Plaintext,
            source: Party::stranger("[fd00::1]:4000".parse().unwrap()),
            destination: Party::stranger("10.0.0.255:80".parse().unwrap()),
            service: None,
            requested: None,
            key_exchange: None,
        };
        Record {
            time: UNIX_EPOCH + Duration::from_millis(1_709_210_096_789),
            duration: Duration::from_millis(7),
            told: Told::Connection(Box::new(OfConnection {
                info,
                verdict: Some(Verdict::Deny),
                policy: None,
                reason: Some(Reason::Plaintext(None)),
                sent: 1,
                received: 2,
                detail: detail.to_owned(),
            })),
        }
    }

    fn line(record: &Record, format: AccessLogFormat) -> String {
        let mut text = String::new();
        record.write(format, &mut Calendar::default(), &mut text);
        text
    }

    #[test]
    fn a_line_of_json_holds_what_a_text_line_does() {
        let detail = "an \"\u{e9}\", a \\ and\ta = sign";
        let record = record(detail);
        let json: serde_json::Value = serde_json::from_str(&line(&record, AccessLogFormat::Json)).unwrap();
        assert_eq!(json["source_addr"], "[fd00::1]:4000");
        assert_eq!((&json["bytes_sent"], &json["duration_ms"]), (&1.into(), &7.into()));
        assert_eq!((&json["destination_addr"], &json["detail"]), (&"10.0.0.255:80".into(), &detail.into()));
        assert_eq!(line(&record, AccessLogFormat::Text).lines().count(), 1);
    }

    #[test]
    fn a_text_line_is_words_and_quoted_values_on_one_line() {
        assert_eq!(
            line(&record("two\nlines \"quoted\""), AccessLogFormat::Text),
            "time=2024-02-29T12:34:56.789Z direction=inbound transport=plaintext verdict=deny reason=plaintext \
             source_addr=[fd00::1]:4000 destination_addr=10.0.0.255:80 bytes_sent=1 bytes_received=2 duration_ms=7 \
             detail=\"two\\nlines \\\"quoted\\\"\"\n"
        );
    }

    #[test]
    fn lines_that_wait_are_written_at_the_end() {
        let output = Shared::default();
        let (log, writer) = AccessLog::start(AccessLogFormat::Json, output.clone()).unwrap();
        for _ in 0..100 {
            log.write(record(""));
        }
        assert!(writer.finish(Duration::from_secs(10)));
        let lines: Vec<serde_json::Value> =
            output.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 100);
        assert!(lines[0].get("detail").is_none(), "an empty field is left out");
    }

    #[test]
    fn an_output_that_stalls_costs_lines_and_stops_nobody() {
        let recorder = recorder(&MetricsSettings::default()).unwrap();
        let (let_go, gate) = mpsc::channel();
        let (log, writer) = AccessLog::start(AccessLogFormat::Text, StalledOutput(gate)).unwrap();
        metrics::with_local_recorder(&recorder, || {
            for _ in 0..3 * QUEUE_LENGTH {
                log.write(record(""));
            }
        });
        assert!(recorder.handle().render().contains(catalogue::DROPPED));
        assert!(!writer.finish(Duration::from_millis(10)));
        drop(let_go);
    }
}
