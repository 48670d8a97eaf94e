//! One line a connection, written by a thread of its own.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::catalogue;
use super::connection::{ConnectionInfo, Party, Verdict};
use crate::mesh::{NamespacedName, Reason};

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
        state.records.push_back(record);
        drop(state);
        queue.changed.notify_all();
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
    records: VecDeque<Record>,
    closed: bool,
    finished: bool,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_all(&self, format: AccessLogFormat, mut output: impl Write) {
        loop {
            let waited = self.changed.wait_while(self.state(), |state| state.records.is_empty() && !state.closed);
            let records = std::mem::take(&mut waited.unwrap_or_else(PoisonError::into_inner).records);
            if records.is_empty() {
                self.state().finished = true;
                self.changed.notify_all();
                return;
            }
            let text: String = records.iter().map(|record| record.line(format)).collect();
            if output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_err() {
                metrics::counter!(catalogue::DROPPED).increment(records.len() as u64);
            }
        }
    }
}

/// What one line says.
#[derive(Debug)]
pub(super) struct Record {
    pub time: SystemTime,
    pub info: ConnectionInfo,
    pub verdict: Option<Verdict>,
    pub policy: Option<NamespacedName>,
    pub reason: Option<Reason>,
    pub sent: u64,
    pub received: u64,
    pub duration: Duration,
    pub detail: String,
}

impl Record {
    fn line(&self, format: AccessLogFormat) -> String {
        let fields = self.fields().into_iter().filter(|(_, value)| !value.is_null());
        match format {
            AccessLogFormat::Text => {
                let words: Vec<String> = fields.map(|(name, value)| format!("{name}={}", word(&value))).collect();
                format!("{}\n", words.join(" "))
            }
            AccessLogFormat::Json | AccessLogFormat::Off => {
                let pairs: Vec<String> = fields.map(|(name, value)| format!("\"{name}\":{value}")).collect();
                format!("{{{}}}\n", pairs.join(","))
            }
        }
    }

    fn fields(&self) -> [(&'static str, Value); 21] {
        let info = &self.info;
        let text = |value: Option<String>| value.map_or(Value::Null, Value::String);
        let addr = |party: &Party| text(party.addr.map(|addr| addr.to_string()));
        let pod = |party: &Party| text(party.pod.as_ref().map(ToString::to_string));
        let identity = |party: &Party| text(party.identity.as_ref().map(ToString::to_string));
        let duration = u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX);
        [
            ("time", rfc3339(self.time).into()),
            ("direction", info.direction.as_str().into()),
            ("transport", info.transport.as_str().into()),
            ("verdict", text(self.verdict.map(|verdict| verdict.to_string()))),
            ("reason", text(self.reason.as_ref().map(ToString::to_string))),
            ("policy", text(self.policy.as_ref().map(ToString::to_string))),
            ("source_addr", addr(&info.source)),
            ("source_pod", pod(&info.source)),
            ("source_workload", text(info.source.workload.as_deref().map(str::to_owned))),
            ("source_identity", identity(&info.source)),
            ("destination_addr", addr(&info.destination)),
            ("destination_pod", pod(&info.destination)),
            ("destination_workload", text(info.destination.workload.as_deref().map(str::to_owned))),
            ("destination_identity", identity(&info.destination)),
            ("service", text(info.service.as_ref().map(ToString::to_string))),
            ("requested_addr", text(info.requested.map(|addr| addr.to_string()))),
            ("key_exchange", text(info.key_exchange.map(str::to_owned))),
            ("bytes_sent", self.sent.into()),
            ("bytes_received", self.received.into()),
            ("duration_ms", duration.into()),
            ("detail", text((!self.detail.is_empty()).then(|| self.detail.clone()))),
        ]
    }
}

// A word as it is, anything else quoted as JSON, so that no value can break out of its line.
fn word(value: &Value) -> String {
    match value.as_str() {
        Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'=')) => {
            text.to_owned()
        }
        _ => value.to_string(),
    }
}

/// `2026-01-31T23:59:59.123Z`, the calendar by Howard Hinnant's `civil_from_days`.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

/// Some megabytes at most.
const QUEUE_LENGTH: usize = 8192;

#[cfg(test)]
pub(super) mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::telemetry::connection::{Direction, Transport};
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
        Record {
            time: UNIX_EPOCH + Duration::from_millis(1_709_210_096_789),
            info: ConnectionInfo {
                direction: Direction::Inbound,
                transport: Transport::Plaintext,
                source: Party::stranger("[fd00::1]:4000".parse().unwrap()),
                destination: Party::default(),
                service: None,
                requested: None,
                key_exchange: None,
            },
            verdict: Some(Verdict::Deny),
            policy: None,
            reason: Some(Reason::Plaintext(None)),
            sent: 1,
            received: 2,
            duration: Duration::from_millis(7),
            detail: detail.to_owned(),
        }
    }

    #[test]
    fn a_text_line_is_words_and_quoted_values_on_one_line() {
        assert_eq!(
            record("two\nlines \"quoted\"").line(AccessLogFormat::Text),
            "time=2024-02-29T12:34:56.789Z direction=inbound transport=plaintext verdict=deny reason=plaintext \
             source_addr=[fd00::1]:4000 bytes_sent=1 bytes_received=2 duration_ms=7 \
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

    #[test]
    fn days_are_told_by_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
