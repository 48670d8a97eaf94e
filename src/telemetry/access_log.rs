//! One line a connection, or a request, written by a thread of its own.

mod calendar;
mod line;
mod record;

use std::cell::RefCell;
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

thread_local! {
    /// The line that is being written. It is made where it is told: what it says is at hand there, and neither copied for
    /// another thread nor freed by it.
    static LINE: RefCell<(Calendar, String)> = RefCell::default();
}

impl AccessLog {
    pub fn off() -> Self {
        Self(None)
    }

    /// Writes to `output`, standard output in an agent. The [`AccessLogWriter`] is to be finished at the end.
    pub fn start(format: AccessLogFormat, output: impl Write + Send + 'static) -> io::Result<(Self, AccessLogWriter)> {
        if format == AccessLogFormat::Off {
            return Ok((Self::off(), AccessLogWriter(None)));
        }
        let queue = Arc::new(Queue { format, state: Mutex::default(), changed: Condvar::new() });
        let theirs = queue.clone();
        thread::Builder::new().name("access-log".to_owned()).spawn(move || theirs.write_all(output))?;
        Ok((Self(Some(queue.clone())), AccessLogWriter(Some(queue))))
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn write(&self, record: &Record<'_>) {
        let Some(queue) = &self.0 else { return };
        LINE.with_borrow_mut(|(calendar, text)| {
            text.clear();
            record.write(queue.format, calendar, text);
            queue.take(text);
            text.shrink_to(MOST_LINE_KEPT);
        });
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

#[derive(Debug)]
struct Queue {
    format: AccessLogFormat,
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    text: String,
    /// Of it.
    lines: usize,
    closed: bool,
    finished: bool,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, line: &str) {
        let mut state = self.state();
        if state.text.len() + line.len() > MOST_WAITING || state.closed {
            drop(state);
            metrics::counter!(catalogue::DROPPED).increment(1);
            return;
        }
        state.text.push_str(line);
        state.lines += 1;
        let waiting = state.lines;
        drop(state);
        // The writer waits for the first, and then a moment for more: one that is woken for each costs more than it writes.
        if waiting == 1 || waiting == MANY {
            self.changed.notify_all();
        }
    }

    fn write_all(&self, mut output: impl Write) {
        let mut text = String::new();
        loop {
            let waited = self.changed.wait_while(self.state(), |state| state.lines == 0 && !state.closed);
            let waited = waited.unwrap_or_else(PoisonError::into_inner);
            let gathering = |state: &mut QueueState| state.lines < MANY && !state.closed;
            let waited = self.changed.wait_timeout_while(waited, GATHERING, gathering);
            let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut state.text, &mut text);
            let lines = std::mem::take(&mut state.lines);
            drop(state);
            if lines == 0 {
                self.state().finished = true;
                self.changed.notify_all();
                return;
            }
            if output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_err() {
                metrics::counter!(catalogue::DROPPED).increment(lines as u64);
            }
            text.clear();
            // What a burst needed is given back.
            text.shrink_to(MOST_TEXT_KEPT);
        }
    }
}

/// Bytes of lines that wait.
const MOST_WAITING: usize = 4 << 20;
/// So many are written without waiting for more.
const MANY: usize = 256;
const GATHERING: Duration = Duration::from_millis(10);
const MOST_TEXT_KEPT: usize = 128 * 1024;
const MOST_LINE_KEPT: usize = 4 * 1024;

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

    fn with_record<T>(detail: &str, then: impl FnOnce(&Record<'_>) -> T) -> T {
        let info = ConnectionInfo {
            direction: Direction::Inbound,
            transport: Transport::Plaintext,
            source: Party::stranger("[fd00::1]:4000".parse().unwrap()),
            destination: Party::stranger("10.0.0.255:80".parse().unwrap()),
            service: None,
            requested: None,
            key_exchange: None,
        };
        then(&Record {
            time: UNIX_EPOCH + Duration::from_millis(1_709_210_096_789),
            duration: Duration::from_millis(7),
            told: Told::Connection(OfConnection {
                info: &info,
                verdict: Some(Verdict::Deny),
                policy: None,
                reason: Some(&Reason::Plaintext(None)),
                sent: 1,
                received: 2,
                detail,
            }),
        })
    }

    fn line(detail: &str, format: AccessLogFormat) -> String {
        let mut text = String::new();
        with_record(detail, |record| record.write(format, &mut Calendar::default(), &mut text));
        text
    }

    #[test]
    fn a_line_of_json_holds_what_a_text_line_does() {
        let detail = "an \"\u{e9}\", a \\ and\ta = sign";
        let json: serde_json::Value = serde_json::from_str(&line(detail, AccessLogFormat::Json)).unwrap();
        assert_eq!(json["source_addr"], "[fd00::1]:4000");
        assert_eq!((&json["bytes_sent"], &json["duration_ms"]), (&1.into(), &7.into()));
        assert_eq!((&json["destination_addr"], &json["detail"]), (&"10.0.0.255:80".into(), &detail.into()));
        assert_eq!(line(detail, AccessLogFormat::Text).lines().count(), 1);
    }

    #[test]
    fn a_text_line_is_words_and_quoted_values_on_one_line() {
        assert_eq!(
            line("two\nlines \"quoted\"", AccessLogFormat::Text),
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
            with_record("", |record| log.write(record));
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
            let detail = "x".repeat(1024);
            for _ in 0..3 * MOST_WAITING / detail.len() {
                with_record(&detail, |record| log.write(record));
            }
        });
        assert!(recorder.handle().render().contains(catalogue::DROPPED));
        assert!(!writer.finish(Duration::from_millis(10)));
        drop(let_go);
    }
}
