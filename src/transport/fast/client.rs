use std::future::poll_fn;
use std::io;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::AlertDescription;

use super::ProtocolError;
use super::early::Early;
use super::flow::{After, Progress, Side, carry, settle};
use super::frame::Kind;
use super::header::Header;
use super::link::Link;
use super::pool::Lease;
use super::stream::{Held, Stream};
use crate::transport::hbone::OpenError;
use crate::transport::relay::{Ended, RelayControl, TcpEnd};
use crate::transport::tls::TlsError;

/// One flow that the far application has accepted.
pub struct Flow {
    /// On the heap, for it goes through many hands, and each future on the way has room for what it was given.
    lease: Box<Lease>,
    progress: Progress,
    /// How much of the application's was sent before it was accepted, and how the application broke behind that.
    said: usize,
    broken: Option<io::Error>,
}

impl Flow {
    /// Carries the flow to its end. Its connection goes back to the pool, once it is fit for that.
    pub async fn carry(self, application: TcpEnd, control: &RelayControl) -> Ended {
        let Self { mut lease, progress, said, broken } = self;
        control.sent.fetch_add(said as u64, Ordering::Relaxed);
        let (ended, after) = carry(application, &mut lease.link, progress, broken, Side::Client, control).await;
        match after {
            After::Reusable => lease.give_back(),
            After::Unsettled(awaited) => drop(tokio::task::spawn_local(async move {
                if settle(&mut lease.link, awaited).await {
                    lease.give_back();
                }
            })),
            After::Spent => {}
        }
        ended
    }
}

impl Flow {
    /// Ready when the far application has said something, or has closed or reset: nothing of it is taken.
    pub fn poll_spoken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Also where it broke: who carries the flow finds that out.
        self.lease.link.poll_fill(cx).map(drop)
    }

    /// Sends what the application has said already, before the flow is carried.
    pub async fn say(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let link = &mut self.lease.link;
        while !bytes.is_empty() {
            if !link.has_room() {
                poll_fn(|cx| link.poll_flush(cx)).await?;
            }
            let (chunk, rest) = bytes.split_at(bytes.len().min(CHUNK));
            link.push(Kind::Data, chunk)?;
            self.said += chunk.len();
            bytes = rest;
        }
        Ok(())
    }

    /// The flow as a stream of bytes, for who speaks a protocol over it. Nothing was said early on it.
    pub fn into_stream(self) -> Stream {
        Stream::new(Held::Lease(self.lease), self.progress)
    }
}

/// Why a flow did not come about on one connection.
pub(super) enum Unopened {
    /// The peer has not looked at it: whatever was sent may be sent again.
    Unprocessed(String),
    /// The connection broke, and nothing of the application's had been sent.
    Unanswered(String),
    Open(OpenError),
}

/// Asks the peer for a flow, and sends what the application says meanwhile.
pub(super) async fn open(
    mut lease: Lease,
    header: &Header,
    early: &mut Early,
    limit: Duration,
) -> Result<Flow, Unopened> {
    let mut opening = Opening { link: &mut lease.link, early, sent: 0, end_sent: false };
    let answer = match opening.begin(header) {
        Ok(()) => tokio::time::timeout(limit, poll_fn(|cx| opening.poll(cx))).await,
        Err(error) => Ok(Err(error)),
    };
    let (end_sent, said) = (opening.end_sent, opening.sent);
    match answer {
        Ok(Ok(Answer::Accepted)) => {
            let progress = Progress { end_sent, ..Progress::default() };
            Ok(Flow { lease: Box::new(lease), progress, said, broken: early.take_broken() })
        }
        Ok(Ok(Answer::Refused(status))) => {
            if lease.link.has_unsent() {
                // Too much was sent for what the peer reads behind a refusal at once.
                drop(lease);
            } else {
                lease.give_back();
            }
            Err(Unopened::Open(OpenError::Refused { status }))
        }
        Ok(Ok(Answer::Closed)) => Err(Unopened::Unprocessed("the peer closed the tunnel".to_owned())),
        Ok(Err(error)) => Err(unopened(&error, said > 0 || end_sent, lease.is_new())),
        Err(_) => Err(Unopened::Open(OpenError::Timeout(limit))),
    }
}

fn unopened(error: &io::Error, said: bool, new: bool) -> Unopened {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        // TLS 1.3 lets the client go ahead before the server has judged its certificate: here comes the verdict.
        Some(ProtocolError::Alert(code)) if new => {
            Unopened::Open(OpenError::Tls(TlsError::PeerRefused(AlertDescription::from(*code))))
        }
        _ if said => Unopened::Open(OpenError::Lost(error.to_string().into())),
        _ => Unopened::Unanswered(error.to_string()),
    }
}

struct Opening<'a> {
    link: &'a mut Link,
    early: &'a mut Early,
    /// How much of what is kept was sent on this connection.
    sent: usize,
    end_sent: bool,
}

enum Answer {
    Accepted,
    Refused(u16),
    /// In order, and without a word: nobody has looked at the header.
    Closed,
}

impl Opening<'_> {
    fn begin(&mut self, header: &Header) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(96);
        header.write(&mut bytes);
        self.link.push(Kind::Open, &bytes)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Answer>> {
        if self.early.is_silent() {
            // A request that is there already goes with the header.
            self.early.look();
        }
        loop {
            let sent = self.send(cx);
            // Also where sending failed: why may have come before.
            match self.poll_answer(cx) {
                Poll::Pending => sent?,
                answer => return answer,
            }
            ready!(self.early.poll_more(cx));
        }
    }

    /// Sends what is kept and was not sent yet, as far as the socket takes it.
    fn send(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        loop {
            while self.link.has_room() && self.sent < self.early.kept().len() {
                let chunk = &self.early.kept()[self.sent..];
                let chunk = &chunk[..chunk.len().min(CHUNK)];
                self.link.push(Kind::Data, chunk)?;
                self.sent += chunk.len();
            }
            let all = self.sent == self.early.kept().len();
            if all && self.early.has_ended() && !self.end_sent {
                self.link.push(Kind::End, &[])?;
                self.end_sent = true;
            }
            match self.link.poll_flush(cx) {
                Poll::Ready(outcome) => outcome?,
                Poll::Pending => return Ok(()),
            }
            if all {
                return Ok(());
            }
        }
    }

    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Answer>> {
        match self.link.poll_fill(cx) {
            Poll::Ready(outcome) => outcome?,
            Poll::Pending => return Poll::Pending,
        }
        let Some(frame) = self.link.front() else { return Poll::Ready(Ok(Answer::Closed)) };
        let answer = match (frame.kind, self.link.payload(frame)) {
            (Kind::Ok, _) => Answer::Accepted,
            (Kind::Refused, &[high, low]) => Answer::Refused(u16::from_be_bytes([high, low])),
            _ => return Poll::Ready(Err(ProtocolError::Order.into())),
        };
        self.link.pop();
        Poll::Ready(Ok(answer))
    }
}

/// Of early data in one frame: it fits a record together with its head.
const CHUNK: usize = 16_000;
