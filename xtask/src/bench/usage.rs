//! What processes have used, as /proc tells.

use std::collections::BTreeSet;
use std::fs;

use nix::unistd::{SysconfVar, sysconf};

/// The processes that carry the traffic of a variant.
#[derive(Clone, Debug, Default)]
pub struct Carriers(BTreeSet<i32>);

impl Carriers {
    /// Everything that lives now and did not then. The bench's world has its own process ids and nobody else's processes.
    pub fn since(before: &BTreeSet<i32>) -> Self {
        Self(processes().difference(before).copied().collect())
    }

    pub fn of(processes: impl IntoIterator<Item = i32>) -> Self {
        Self(processes.into_iter().collect())
    }

    /// Seconds of processor time so far, in user space and in the kernel.
    pub fn cpu(&self) -> f64 {
        let stats = self.0.iter().filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        let ticks: u64 = stats.filter_map(|stat| ticks(&stat)).sum();
        let rate = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        ticks as f64 / rate as f64
    }

    /// Resident memory in MB. Pages of files (the program itself) that several of them map are counted once.
    pub fn resident(&self) -> f64 {
        let all: Vec<Resident> = self.0.iter().filter_map(|pid| Resident::of(*pid)).collect();
        let own: u64 = all.iter().map(|resident| resident.own).sum();
        let files = all.iter().map(|resident| resident.files).max().unwrap_or_default();
        (own + files) as f64 * 1024.0 / 1e6
    }

    /// That of it which is theirs alone, and of no file.
    pub fn own(&self) -> f64 {
        let own: u64 = self.0.iter().filter_map(|pid| Resident::of(*pid)).map(|resident| resident.own).sum();
        own as f64 * 1024.0 / 1e6
    }
}

/// The ids of all processes that there are.
pub fn processes() -> BTreeSet<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// `utime` and `stime`, the fields 14 and 15 of proc_pid_stat(5).
fn ticks(stat: &str) -> Option<u64> {
    let (_, behind_command) = stat.rsplit_once(") ")?;
    let mut fields = behind_command.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Resident memory of one process in KiB.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Resident {
    own: u64,
    files: u64,
}

impl Resident {
    fn of(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }

    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?;
            value.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().ok()
        };
        Some(Self { own: field("RssAnon")? + field("RssShmem")?, files: field("RssFile")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_a_command_with_brackets() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 70 30 5 6 20 0 3 0 100 1000 200";
        assert_eq!(ticks(stat), Some(100));
        assert_eq!(ticks("42 (a"), None);
    }

    #[test]
    fn resident_memory_is_split_in_own_and_files() {
        let status = "Name:\tx\nVmRSS:\t    900 kB\nRssAnon:\t     500 kB\nRssFile:\t     300 kB\nRssShmem:\t 100 kB\n";
        assert_eq!(Resident::parse(status), Some(Resident { own: 600, files: 300 }));
    }

    #[test]
    fn we_use_something_ourselves() {
        let own = Carriers::of([std::process::id() as i32]);
        assert!(own.resident() > 0.1 && own.cpu() >= 0.0);
        assert!(own.0.is_subset(&processes()));
    }
}
