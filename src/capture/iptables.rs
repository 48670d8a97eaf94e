//! Runs iptables in a pod's namespace, by whichever back end works here.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::address;
use super::netns::{self, NetNs};
use super::reset::Resets;
use super::rules::{InPlace, IpVersion, Marks, Mode, OtherMesh, Phase, Ports, Probes, RuleSet, removal};
use crate::mesh::Exclusions;

/// The kernel's two packet filters, each with its own tables: rules in the one do not show in the other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackEnd {
    Nft,
    Legacy,
}

/// What works on this node, tried for real.
#[derive(Clone, Debug)]
pub struct Chosen {
    pub mode: Mode,
    pub back_end: BackEnd,
    /// Whether probes can wait in a queue (`NFQUEUE`).
    pub queue: bool,
    /// Whether SYNs can wait for the agent's answer (`NFQUEUE`, raw sockets).
    pub hold: bool,
    /// Why anything better was not chosen, for the log.
    pub refused: Vec<String>,
    tools: Tools,
}

/// Everything of ours in one namespace, in both back ends and families.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    pub places: Vec<Place>,
    pub other_mesh: Option<OtherMesh>,
}

/// What is ours in one back end's tables of one family.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Place {
    pub back_end: BackEnd,
    pub version: IpVersion,
    pub in_place: InPlace,
}

impl BackEnd {
    /// As a person writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }
}

impl Chosen {
    /// Tries a whole set of rules in a scratch namespace: TPROXY before REDIRECT, nft before legacy, with SYNs
    /// and probes that wait in a queue before without. `mode` and `back_end` narrow the choice.
    pub fn detect(mode: Option<Mode>, back_end: Option<BackEnd>) -> Result<Self, CaptureUnavailable> {
        let tools = Tools::find();
        let mut refused = Vec::new();
        let modes = mode.map_or(vec![Mode::Tproxy, Mode::Redirect], |mode| vec![mode]);
        let back_ends = back_end.map_or(vec![BackEnd::Nft, BackEnd::Legacy], |back_end| vec![back_end]);
        for mode in modes {
            for (queue, hold) in [(true, true), (true, false), (false, false)] {
                for &back_end in &back_ends {
                    let chosen = Self { mode, back_end, queue, hold, refused: Vec::new(), tools: tools.clone() };
                    match netns::in_scratch(|| chosen.try_out()) {
                        Ok(()) => return Ok(Self { refused, ..chosen }),
                        Err(cause) => {
                            let with = match (queue, hold) {
                                (_, true) => " with SYNs that wait",
                                (true, false) => " with NFQUEUE",
                                (false, false) => "",
                            };
                            refused.push(format!("{} by {}{with}: {cause}", mode.name(), back_end.name()));
                        }
                    }
                }
            }
        }
        Err(CaptureUnavailable(refused))
    }

    fn try_out(&self) -> io::Result<()> {
        if self.hold {
            Resets::open()?;
        }
        let probes = self.queue.then(|| Probes {
            queue: 0,
            ports: [80].into(),
            node_addresses: ["192.0.2.1".parse().ok(), "2001:db8::1".parse().ok()].into_iter().flatten().collect(),
        });
        let rules = RuleSet {
            mode: self.mode,
            phase: Phase::Capturing,
            marks: Marks { own: 1, outbound: 2, back: 3 },
            ports: Ports::default(),
            exclusions: Exclusions {
                inbound_ports: [1].into(),
                outbound_ports: [1].into(),
                outbound_cidrs: Default::default(),
            },
            probes,
            hold: self.hold,
        };
        for version in self.versions() {
            self.restore(version, &rules.program(version, &InPlace::default()))?;
        }
        Ok(())
    }

    /// The families that live in the thread's present namespace.
    pub fn versions(&self) -> Vec<IpVersion> {
        match address::ipv6_usable() {
            true => vec![IpVersion::V4, IpVersion::V6],
            false => vec![IpVersion::V4],
        }
    }

    /// Puts rules in, in the thread's present namespace.
    pub fn restore(&self, version: IpVersion, text: &str) -> io::Result<()> {
        self.tools.restore(self.back_end, version, text)
    }

    /// What is in place in the thread's present namespace.
    pub fn found(&self) -> io::Result<Found> {
        self.tools.found()
    }

    /// Makes the rules so in the thread's present namespace, one transaction a table, and takes what was left in
    /// the other back end away. Returns what is in place then.
    pub fn program(&self, rules: &RuleSet) -> io::Result<Found> {
        let found = self.found()?;
        for version in self.versions() {
            let in_place = found.of(self.back_end, version);
            self.restore(version, &rules.program(version, &in_place))?;
        }
        for place in found.places.iter().filter(|place| place.back_end != self.back_end) {
            if let Some(text) = removal(&place.in_place) {
                self.tools.restore(place.back_end, place.version, &text)?;
            }
        }
        self.found()
    }

    /// Takes away whatever is ours in the thread's present namespace. Goes on past an error and returns the first.
    pub fn remove(&self) -> io::Result<()> {
        let mut result = Ok(());
        for place in self.found()?.places {
            if let Some(text) = removal(&place.in_place) {
                result = result.and(self.tools.restore(place.back_end, place.version, &text));
            }
        }
        result
    }
}

impl Found {
    /// Reads without having chosen anything: for a look from outside the agent.
    pub fn look(netns: &NetNs) -> io::Result<Self> {
        let tools = Tools::find();
        netns.run(|| tools.found())
    }

    pub fn of(&self, back_end: BackEnd, version: IpVersion) -> InPlace {
        let place = self.places.iter().find(|place| (place.back_end, place.version) == (back_end, version));
        place.map(|place| place.in_place.clone()).unwrap_or_default()
    }

    /// The marks that rules in place were made with.
    pub fn marks(&self) -> Option<Marks> {
        self.places.iter().find_map(|place| Marks::read(&place.in_place))
    }

    pub fn is_empty(&self) -> bool {
        self.places.iter().all(|place| place.in_place.is_empty())
    }
}

/// No way to capture works here.
#[derive(Debug, thiserror::Error)]
#[error(
    "capture works in no way on this node; install iptables, load xt_TPROXY, xt_socket, xt_connmark and xt_conntrack \
     (or nf_nat for REDIRECT), and run as root: {}", .0.join("; ")
)]
pub struct CaptureUnavailable(pub Vec<String>);

/// The programs found, by back end.
#[derive(Clone, Debug)]
struct Tools {
    nft: Option<Programs>,
    legacy: Option<Programs>,
}

#[derive(Clone, Debug)]
struct Programs {
    /// `…-restore` and `…-save`, for IPv4 and IPv6.
    restore: [PathBuf; 2],
    save: [PathBuf; 2],
}

impl Tools {
    fn find() -> Self {
        let plain = Programs::named("");
        let plain_is = |text: &str| {
            let plain = plain.clone()?;
            let said = run(Command::new(&plain.restore[0]).arg("--version"), "").ok()?;
            said.contains(text).then_some(plain)
        };
        Self {
            nft: Programs::named("-nft").or_else(|| plain_is("nf_tables")),
            // Before 1.8 there was one back end, and no word for it.
            legacy: Programs::named("-legacy").or_else(|| plain_is("legacy")),
        }
    }

    fn of(&self, back_end: BackEnd) -> Option<&Programs> {
        match back_end {
            BackEnd::Nft => self.nft.as_ref(),
            BackEnd::Legacy => self.legacy.as_ref(),
        }
    }

    fn restore(&self, back_end: BackEnd, version: IpVersion, text: &str) -> io::Result<()> {
        let Some(programs) = self.of(back_end) else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no such iptables is installed; install iptables"));
        };
        let mut command = Command::new(&programs.restore[index(version)]);
        command.args(["--noflush", "-w", LOCK_SECONDS]);
        run(&mut command, text).map(drop)
    }

    fn found(&self) -> io::Result<Found> {
        let mut found = Found::default();
        for back_end in [BackEnd::Nft, BackEnd::Legacy] {
            let Some(programs) = self.of(back_end) else { continue };
            for version in [IpVersion::V4, IpVersion::V6] {
                // Saving loads a legacy table that nobody uses, so ask the kernel for their names first.
                if back_end == BackEnd::Legacy && legacy_tables(version).is_empty() {
                    continue;
                }
                if version == IpVersion::V6 && !Path::new("/proc/sys/net/ipv6").exists() {
                    continue;
                }
                let saved = match run(&mut Command::new(&programs.save[index(version)]), "") {
                    Ok(saved) => saved,
                    // A kernel without nf_tables has no rules there.
                    Err(error) if back_end == BackEnd::Nft && self.legacy.is_some() => {
                        tracing::debug!(%error, "The nft back end cannot be read.");
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let (in_place, other) = InPlace::parse(&saved);
                found.other_mesh = found.other_mesh.or(other);
                if !in_place.is_empty() {
                    found.places.push(Place { back_end, version, in_place });
                }
            }
        }
        Ok(found)
    }
}

impl Programs {
    fn named(variant: &str) -> Option<Self> {
        let directories = directories();
        let find = |name: String| directories.iter().map(|dir| dir.join(&name)).find(|path| path.is_file());
        Some(Self {
            restore: [find(format!("iptables{variant}-restore"))?, find(format!("ip6tables{variant}-restore"))?],
            save: [find(format!("iptables{variant}-save"))?, find(format!("ip6tables{variant}-save"))?],
        })
    }
}

/// Where programs are looked for: as the agent was told, and where they usually are, for a person's PATH often lacks
/// `sbin`. A relative entry is left out: it means whatever directory somebody stands in.
fn directories() -> Vec<PathBuf> {
    let told = std::env::var_os("PATH").unwrap_or_default();
    let told = std::env::split_paths(&told).filter(|dir| dir.is_absolute());
    told.chain(DIRECTORIES.iter().map(PathBuf::from)).collect()
}

fn search_path() -> OsString {
    // A directory whose name holds the separator cannot have come out of PATH.
    std::env::join_paths(directories()).unwrap_or_default()
}

/// The legacy tables that exist in the thread's present namespace.
pub fn legacy_tables(version: IpVersion) -> String {
    let file = match version {
        IpVersion::V4 => "/proc/thread-self/net/ip_tables_names",
        IpVersion::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    std::fs::read_to_string(file).unwrap_or_default()
}

/// Runs a program with this standard input and returns its standard output, within a bounded time and with nothing
/// of our environment but where programs are. Input and output are memory files, so neither side can block the other.
fn run(command: &mut Command, input: &str) -> io::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut stdin = memory_file()?;
    stdin.write_all(input.as_bytes())?;
    stdin.rewind()?;
    let (mut stdout, mut stderr) = (memory_file()?, memory_file()?);
    command.env_clear().env("PATH", search_path()).env("LC_ALL", "C").current_dir("/");
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout.try_clone()?)).stderr(Stdio::from(stderr.try_clone()?));
    let mut child = command.spawn().map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;

    // SAFETY: pidfd_open takes a process id and flags; the child is not waited for yet, so the id is its own.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) } as i32;
    if pidfd >= 0 {
        // SAFETY: the call above succeeded, so this is a new descriptor of ours alone.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let timeout = PollTimeout::try_from(CHILD_TIMEOUT).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{name} did not end within {CHILD_TIMEOUT:?}; does another program hold the xtables lock?"),
            ));
        }
    }
    let status = child.wait()?;
    if status.success() {
        return contents(&mut stdout);
    }
    let said = contents(&mut stderr)?;
    let culprit = said
        .split_once("line: ")
        .or_else(|| said.split_once("line "))
        .and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<usize>().ok())
        .and_then(|line| input.lines().nth(line.checked_sub(1)?))
        .map(|line| format!(" (at {line:?})"));
    Err(io::Error::other(format!("{name} failed, {status}: {}{}", said.trim(), culprit.unwrap_or_default())))
}

fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create(c"iptables", MFdFlags::MFD_CLOEXEC)?))
}

fn contents(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn index(version: IpVersion) -> usize {
    match version {
        IpVersion::V4 => 0,
        IpVersion::V6 => 1,
    }
}

const DIRECTORIES: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
const LOCK_SECONDS: &str = "5";
const CHILD_TIMEOUT: Duration = Duration::from_secs(15);
