use std::time::{Duration, SystemTime};

use super::calendar::Calendar;
use super::{AccessLogFormat, Line};
use crate::mesh::{NamespacedName, Reason};
use crate::telemetry::connection::{ConnectionInfo, Verdict};
use crate::telemetry::request::RequestInfo;

/// What one line says.
#[derive(Debug)]
pub struct Record<'a> {
    pub time: SystemTime,
    pub duration: Duration,
    pub told: Told<'a>,
}

#[derive(Debug)]
pub enum Told<'a> {
    Connection(OfConnection<'a>),
    Request(&'a RequestInfo),
}

#[derive(Debug)]
pub struct OfConnection<'a> {
    pub info: &'a ConnectionInfo,
    pub verdict: Option<Verdict>,
    pub policy: Option<&'a NamespacedName>,
    pub reason: Option<&'a Reason>,
    pub sent: u64,
    pub received: u64,
    pub detail: &'a str,
}

impl Record<'_> {
    /// Appends its line.
    pub fn write(&self, format: AccessLogFormat, calendar: &mut Calendar, text: &mut String) {
        let (info, verdict, reason, policy): (&ConnectionInfo, _, _, _) = match &self.told {
            Told::Connection(told) => (told.info, told.verdict, told.reason, told.policy),
            Told::Request(told) => (&told.connection, told.verdict, told.reason.as_ref(), told.policy.as_ref()),
        };
        let (service, requested) = match &self.told {
            Told::Connection(_) => (info.service.as_ref(), info.requested),
            Told::Request(told) => (told.service.as_ref(), told.requested),
        };
        let mut line = Line::begin(text, format);
        line.value("time", |text| calendar.push(self.time, text));
        line.word("direction", Some(info.direction.as_str()));
        line.word("transport", Some(info.transport.as_str()));
        line.word("verdict", verdict.map(Verdict::as_str));
        line.shown("reason", reason);
        line.object("policy", policy);
        match &self.told {
            Told::Connection(_) => line.parties(&info.source, &info.destination),
            Told::Request(told) => told.connection.write_parties(format, &mut line),
        }
        line.object("service", service);
        line.addr("requested_addr", requested);
        line.word("key_exchange", info.key_exchange);
        let (sent, received, detail) = match &self.told {
            Told::Connection(told) => (told.sent, told.received, told.detail),
            Told::Request(told) => {
                told.write(&mut line);
                (told.sent, told.received, told.detail.as_str())
            }
        };
        line.number("bytes_sent", sent);
        line.number("bytes_received", received);
        line.number("duration_ms", u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX));
        line.word("detail", (!detail.is_empty()).then_some(detail));
        line.end();
    }
}
