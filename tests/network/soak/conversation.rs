use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use selvedge_lab::BOUND;
use socket2::SockRef;

/// Whether policy may cut a conversation on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    Steady,
    NowAndThen,
}

/// What two applications have agreed to say: each knows every byte that the other sends.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    seed: u64,
    /// From the client, and to it.
    up: u32,
    down: u32,
    ending: Ending,
    route: Route,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    /// Both talk at once, and each half-closes when it is done.
    BothAtOnce,
    /// The client half-closes, and is answered.
    QuestionFirst,
    /// It resets behind its last byte; the other has said nothing.
    ClientResets,
    ServerResets,
}

/// Random numbers that a number repeats (SplitMix64).
#[derive(Clone, Copy, Debug)]
pub struct Seed(u64);

impl Seed {
    pub fn of(number: usize) -> Self {
        Self(number as u64 * 7919)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

impl Plan {
    pub fn draw(seed: &mut Seed, route: Route) -> Self {
        // Most are small, some are not, a few are large: as on any network.
        let mut length = || match seed.below(20) {
            0 => 0,
            1..10 => seed.below(1 << 10),
            10..16 => seed.below(1 << 16),
            16..19 => seed.below(1 << 19),
            _ => seed.below(1 << 22),
        };
        let (up, down) = (length() as u32, length() as u32);
        let ending = match seed.below(10) {
            0 => Ending::ClientResets,
            1 => Ending::ServerResets,
            2..6 => Ending::QuestionFirst,
            _ => Ending::BothAtOnce,
        };
        Self { seed: seed.next(), up, down, ending, route }
    }

    fn to_bytes(self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&self.seed.to_be_bytes());
        head[8..12].copy_from_slice(&self.up.to_be_bytes());
        head[12..16].copy_from_slice(&self.down.to_be_bytes());
        head[16] = ENDINGS.iter().position(|ending| *ending == self.ending).map_or(0, |at| at as u8);
        head[17] = u8::from(self.route == Route::NowAndThen);
        head
    }

    fn from_bytes(head: &[u8; HEAD]) -> Result<Self> {
        let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let ending = ENDINGS.get(usize::from(head[16])).context("a plan with no such ending came")?;
        Ok(Self {
            seed: u64::from(number(0)) << 32 | u64::from(number(4)),
            up: number(8),
            down: number(12),
            ending: *ending,
            route: if head[17] == 1 { Route::NowAndThen } else { Route::Steady },
        })
    }

    /// An error of a socket that policy may have caused: what it forbids is unreachable, what it ends is reset.
    pub fn forgives(&self, error: &anyhow::Error) -> bool {
        let caused = [
            ErrorKind::HostUnreachable,
            ErrorKind::ConnectionReset,
            ErrorKind::BrokenPipe,
            ErrorKind::ConnectionAborted,
            ErrorKind::NotConnected,
        ];
        self.route == Route::NowAndThen
            && error.downcast_ref::<std::io::Error>().is_some_and(|error| caused.contains(&error.kind()))
    }
}

/// The client's part.
pub fn ask(stream: &TcpStream, plan: &Plan) -> Result<()> {
    prepare(stream)?;
    let mut writer = stream;
    writer.write_all(&plan.to_bytes())?;
    match plan.ending {
        Ending::BothAtOnce => both(|| send(stream, plan.seed, plan.up), || hear(stream, !plan.seed, plan.down)),
        Ending::QuestionFirst => {
            send(stream, plan.seed, plan.up)?;
            hear(stream, !plan.seed, plan.down)
        }
        Ending::ClientResets => send_and_reset(stream, plan.seed, plan.up),
        Ending::ServerResets => hear_reset(stream, !plan.seed, plan.down),
    }
}

/// The server's part.
pub fn answer(stream: &TcpStream) -> Result<()> {
    prepare(stream)?;
    let mut head = [0; HEAD];
    let mut reader = stream;
    match reader.read_exact(&mut head) {
        // Closing with a reset discards what was not sent yet, so it may come before any word.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
        other => other.context("the plan")?,
    }
    let plan = Plan::from_bytes(&head)?;
    let talk = || match plan.ending {
        Ending::BothAtOnce => both(|| send(stream, !plan.seed, plan.down), || hear(stream, plan.seed, plan.up)),
        Ending::QuestionFirst => {
            hear(stream, plan.seed, plan.up)?;
            send(stream, !plan.seed, plan.down)
        }
        Ending::ClientResets => hear_reset(stream, plan.seed, plan.up),
        Ending::ServerResets => send_and_reset(stream, !plan.seed, plan.down),
    };
    talk().or_else(|error| if plan.forgives(&error) { Ok(()) } else { Err(error.context(format!("{plan:?}"))) })
}

fn prepare(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream.set_nodelay(true)?)
}

fn both(send: impl FnOnce() -> Result<()> + Send, hear: impl FnOnce() -> Result<()>) -> Result<()> {
    thread::scope(|scope| {
        let sending = scope.spawn(send);
        let heard = hear();
        let sent = sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // A socket tells its reset once, to whichever of the two asks first: the other then sees an end.
        sent.and(heard)
    })
}

/// Says it all, in chunks of any size, and half-closes.
fn send(stream: &TcpStream, seed: u64, length: u32) -> Result<()> {
    write(stream, seed, length)?;
    Ok(stream.shutdown(Shutdown::Write)?)
}

fn send_and_reset(stream: &TcpStream, seed: u64, length: u32) -> Result<()> {
    write(stream, seed, length)?;
    // Closing it, which the caller does, then resets.
    Ok(SockRef::from(stream).set_linger(Some(Duration::ZERO))?)
}

fn write(mut stream: &TcpStream, seed: u64, length: u32) -> Result<()> {
    let (mut at, mut sizes) = (0, Seed(seed));
    let mut chunk = Vec::new();
    while at < length {
        let size = (1 + sizes.below(100_000) as u32).min(length - at);
        chunk.clear();
        chunk.extend((at..at + size).map(|at| byte(seed, at)));
        stream.write_all(&chunk)?;
        at += size;
    }
    Ok(())
}

/// Hears all of it, and then the end.
fn hear(stream: &TcpStream, seed: u64, length: u32) -> Result<()> {
    let (count, end) = read(stream, seed, length)?;
    end?;
    ensure!(count == length, "it ended in order after {count} bytes of {length}");
    Ok(())
}

/// Hears the beginning of it, and then a reset: never an end.
fn hear_reset(stream: &TcpStream, seed: u64, length: u32) -> Result<()> {
    let (count, end) = read(stream, seed, length)?;
    match end {
        Ok(()) => bail!("a reset looked like an end in order, after {count} bytes of {length}"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// How many bytes came, each the one that was sent, and how they ended.
fn read(mut stream: &TcpStream, seed: u64, length: u32) -> Result<(u32, std::io::Result<()>)> {
    let (mut at, mut room) = (0_u32, vec![0; 65_536]);
    loop {
        let count = match stream.read(&mut room) {
            Ok(0) => return Ok((at, Ok(()))),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Ok((at, Err(error))),
        };
        for got in &room[..count] {
            ensure!(at < length, "more came than the {length} bytes that were sent");
            ensure!(*got == byte(seed, at), "byte {at} of {length} is another");
            at += 1;
        }
    }
}

/// The byte at a place of a conversation.
fn byte(seed: u64, at: u32) -> u8 {
    ((seed ^ u64::from(at)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

const HEAD: usize = 18;
const ENDINGS: [Ending; 4] = [Ending::BothAtOnce, Ending::QuestionFirst, Ending::ClientResets, Ending::ServerResets];
/// A conversation that nobody carries any further has failed. It waits for all the others too.
const PATIENCE: Duration = BOUND.saturating_mul(2);
