//! One line a connection, written by a thread of its own.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::catalogue;
use super::connection::{ConnectionInfo, Party, Verdict};
use super::request::RequestInfo;
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
        let (mut records, mut text) = (Vec::new(), String::new());
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
            records.iter().for_each(|record| record.write(format, &mut text));
            if output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_err() {
                metrics::counter!(catalogue::DROPPED).increment(records.len() as u64);
            }
            records.clear();
            text.clear();
            // What a burst needed is given back.
            records.shrink_to(MANY);
            text.shrink_to(MOST_TEXT_KEPT);
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
    /// Of a request, what it was.
    pub request: Option<Box<RequestInfo>>,
}

impl Record {
    pub fn of_request(time: SystemTime, duration: Duration, mut request: RequestInfo) -> Self {
        Self {
            time,
            info: request.connection.clone(),
            verdict: request.verdict,
            policy: request.policy.take(),
            reason: request.reason.take(),
            sent: request.sent,
            received: request.received,
            duration,
            detail: std::mem::take(&mut request.detail),
            request: Some(Box::new(request)),
        }
    }

    /// Appends its line.
    fn write(&self, format: AccessLogFormat, text: &mut String) {
        let info = &self.info;
        let mut line = Line { text, format, is_first: true, value: String::new() };
        if format != AccessLogFormat::Text {
            line.text.push('{');
        }
        line.word("time", Some(Rfc3339(self.time)));
        line.word("direction", Some(info.direction.as_str()));
        line.word("transport", Some(info.transport.as_str()));
        line.word("verdict", self.verdict);
        line.word("reason", self.reason.as_ref());
        line.word("policy", self.policy.as_ref());
        line.party(["source_addr", "source_pod", "source_workload", "source_identity"], &info.source);
        let names = ["destination_addr", "destination_pod", "destination_workload", "destination_identity"];
        line.party(names, &info.destination);
        line.word("service", info.service.as_ref());
        line.word("requested_addr", info.requested);
        line.word("key_exchange", info.key_exchange);
        if let Some(request) = &self.request {
            request.write(&mut line);
        }
        line.number("bytes_sent", self.sent);
        line.number("bytes_received", self.received);
        line.number("duration_ms", u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX));
        line.word("detail", (!self.detail.is_empty()).then_some(&self.detail));
        text.push_str(if format == AccessLogFormat::Text { "\n" } else { "}\n" });
    }
}

/// One line on its way: fields with a value, one after the other.
pub(super) struct Line<'a> {
    text: &'a mut String,
    format: AccessLogFormat,
    is_first: bool,
    /// The value of now, as it is shown.
    value: String,
}

impl Line<'_> {
    fn party(&mut self, [addr, pod, workload, identity]: [&str; 4], party: &Party) {
        self.word(addr, party.addr);
        self.word(pod, party.pod.as_ref());
        self.word(workload, party.workload.as_ref());
        self.word(identity, party.identity.as_ref());
    }

    /// A word as it is, anything else quoted as JSON, so that no value can break out of its line.
    pub fn word(&mut self, name: &str, value: Option<impl fmt::Display>) {
        let Some(value) = value else { return };
        self.name(name);
        self.value.clear();
        // Writing to a String does not fail.
        let _ = write!(self.value, "{value}");
        let is_graphic = self.value.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\'));
        match self.format {
            AccessLogFormat::Text if is_graphic && !self.value.is_empty() && !self.value.contains('=') => {
                self.text.push_str(&self.value);
            }
            _ if is_graphic => {
                let _ = write!(self.text, "\"{}\"", self.value);
            }
            _ => {
                let _ = write!(self.text, "{}", serde_json::Value::from(self.value.as_str()));
            }
        }
    }

    pub fn number(&mut self, name: &str, value: u64) {
        self.name(name);
        let _ = write!(self.text, "{value}");
    }

    fn name(&mut self, name: &str) {
        let is_first = std::mem::replace(&mut self.is_first, false);
        let _ = match (self.format, is_first) {
            (AccessLogFormat::Text, true) => write!(self.text, "{name}="),
            (AccessLogFormat::Text, false) => write!(self.text, " {name}="),
            (_, true) => write!(self.text, "\"{name}\":"),
            (_, false) => write!(self.text, ",\"{name}\":"),
        };
    }
}

/// `2026-01-31T23:59:59.123Z`, the calendar by Howard Hinnant's `civil_from_days`.
struct Rfc3339(SystemTime);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
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
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
    }
}

/// Some megabytes at most.
const QUEUE_LENGTH: usize = 8192;
/// So many are written without waiting for more.
const MANY: usize = 256;
const GATHERING: Duration = Duration::from_millis(10);
const MOST_TEXT_KEPT: usize = 64 * 1024;

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
            request: None,
        }
    }

    fn line(record: &Record, format: AccessLogFormat) -> String {
        let mut text = String::new();
        record.write(format, &mut text);
        text
    }

    #[test]
    fn a_line_of_json_holds_what_a_text_line_does() {
        let record = record("an \"\u{e9}\", a \\ and\ta = sign");
        let json: serde_json::Value = serde_json::from_str(&line(&record, AccessLogFormat::Json)).unwrap();
        assert_eq!(json["source_addr"], "[fd00::1]:4000");
        assert_eq!((&json["bytes_sent"], &json["duration_ms"]), (&1.into(), &7.into()));
        assert_eq!(json["detail"], record.detail);
        assert_eq!(line(&record, AccessLogFormat::Text).lines().count(), 1);
    }

    #[test]
    fn a_text_line_is_words_and_quoted_values_on_one_line() {
        assert_eq!(
            line(&record("two\nlines \"quoted\""), AccessLogFormat::Text),
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
            assert_eq!(Rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)).to_string(), text);
        }
    }
}
