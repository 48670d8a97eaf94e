//! What a change of the files means, as a state machine: times and contents come in, steps of the model come out.
//!
//! A file is read once it has been left alone for [`QUIET`]. What it then says is in force at once, unless something
//! would vanish by it, or it looks half written: then it, like a file that is gone, must stay so for [`HOLD`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Problem;
use super::decode::{self, Content, Key};
use super::view::{self, FileView, Next, View};
use crate::model::Delta;

#[derive(Debug, Default)]
pub(super) struct Folder {
    files: BTreeMap<PathBuf, File>,
    view: View,
    /// Problems of the folder itself: a subfolder that cannot be read.
    problems: Vec<Problem>,
    scanned: bool,
    synced: bool,
    dirty: bool,
}

#[derive(Debug)]
struct File {
    /// As last seen; `None`: gone.
    stamp: Option<Stamp>,
    /// Since when it looks so.
    since: Instant,
    taken: Option<Taken>,
    held: Option<Held>,
}

#[derive(Debug)]
struct Taken {
    stamp: Stamp,
    content: Content,
    former: BTreeSet<Key>,
    /// It could not be read: tried again from this time.
    retry: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    content: Content,
    ends_whole: bool,
    retry: Option<Instant>,
}

/// What tells two versions of a file apart without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Stamp {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    pub modified: (i64, i64),
    pub changed: (i64, i64),
}

/// One file, as a walk of the folder met it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub path: PathBuf,
    pub stamp: Stamp,
    /// How long ago it was last changed, as its file system says; believed at start only.
    pub age: Duration,
}

/// What a walk of the folder met.
#[derive(Clone, Debug, Default)]
pub(super) struct Scan {
    pub files: Vec<Seen>,
    /// Folders that could not be listed: nothing below them counts as gone.
    pub unlisted: Vec<PathBuf>,
    pub problems: Vec<Problem>,
}

/// What follows from all that was seen.
#[derive(Debug)]
pub(super) struct Step {
    pub deltas: Vec<Delta>,
    pub problems: Vec<Problem>,
    /// Whether every file has been read once.
    pub synced: bool,
}

impl Folder {
    pub fn scan(&mut self, scan: Scan, now: Instant) {
        let mut present = BTreeSet::new();
        for seen in scan.files {
            // What lay there before we started is not being written now.
            let since = if self.scanned { now } else { now.checked_sub(seen.age).unwrap_or(now) };
            let fresh = || File { stamp: None, since, taken: None, held: None };
            let file = self.files.entry(seen.path.clone()).or_insert_with(fresh);
            if file.stamp != Some(seen.stamp) {
                *file = File { stamp: Some(seen.stamp), since, taken: file.taken.take(), held: None };
                self.dirty = true;
            }
            present.insert(seen.path);
        }
        for (path, file) in &mut self.files {
            let unlisted = scan.unlisted.iter().any(|folder| path.starts_with(folder));
            if file.stamp.is_some() && !present.contains(path) && !unlisted {
                *file = File { stamp: None, since: now, taken: file.taken.take(), held: None };
                self.dirty = true;
            }
        }
        self.scanned = true;
        if self.problems != scan.problems {
            self.problems = scan.problems;
            self.dirty = true;
        }
    }

    /// The files to be read now, with the stamp that each must still have after the reading.
    pub fn due(&self, now: Instant) -> Vec<(PathBuf, Stamp)> {
        let due = self.files.iter().filter(|(_, file)| file.read_at().is_some_and(|at| at <= now));
        due.filter_map(|(path, file)| Some((path.clone(), file.stamp?))).collect()
    }

    /// Takes what a file holds, or why it cannot be read.
    pub fn read(&mut self, path: &Path, stamp: Stamp, bytes: Result<&[u8], String>, now: Instant) {
        let Some(file) = self.files.get_mut(path).filter(|file| file.stamp == Some(stamp)) else { return };
        let retry = bytes.is_err().then(|| now + RETRY);
        let held = match bytes {
            Ok(bytes) => Held { content: decode::file(path, bytes), ends_whole: bytes.ends_with(b"\n"), retry },
            Err(cause) => {
                let problem = Problem {
                    file: path.to_owned(),
                    line: 0,
                    object: String::new(),
                    field: String::new(),
                    cause: format!("{cause}; what it held stays in force"),
                };
                let content = Content { unparsed: true, problems: vec![problem], ..Content::default() };
                Held { content, ends_whole: false, retry }
            }
        };
        file.held = Some(held);
        self.dirty = true;
    }

    /// Takes what has waited long enough, and tells what the model should do.
    pub fn settle(&mut self, now: Instant) -> Step {
        let gone = |file: &File| file.stamp.is_none() && (file.taken.is_none() || file.since + HOLD <= now);
        let before = self.files.len();
        self.files.retain(|_, file| !gone(file));
        self.dirty |= self.files.len() < before;
        for file in self.files.values_mut() {
            self.dirty |= file.take(now);
        }
        self.synced |= self.scanned && self.problems.is_empty() && self.files.values().all(File::is_read);
        let files = self.files.iter().filter_map(|(path, file)| file.view(path));
        let (next, mut problems) = view::combine(files, &self.view);
        problems.extend(self.problems.iter().cloned());
        let deltas = if self.dirty { view::difference(&self.view, &next) } else { Vec::new() };
        self.view = next;
        self.dirty = false;
        Step { deltas, problems, synced: self.synced }
    }

    /// Whether something changed since the last step.
    pub fn is_dirty(&self, now: Instant) -> bool {
        self.dirty || self.next().is_some_and(|at| at <= now)
    }

    /// When there is something to do even if no file changes.
    pub fn next(&self) -> Option<Instant> {
        self.files.values().filter_map(File::next).min()
    }

    /// How many objects are known, and how many documents were of kinds that are not read.
    pub fn counts(&self) -> (usize, usize) {
        let contents = || self.files.values().filter_map(|file| file.taken.as_ref()).map(|taken| &taken.content);
        (contents().map(|content| content.objects.len()).sum(), contents().map(|content| content.ignored).sum())
    }
}

impl File {
    fn is_current(&self) -> bool {
        self.taken.as_ref().map(|taken| taken.stamp) == self.stamp
    }

    fn is_read(&self) -> bool {
        self.is_current() && self.taken.as_ref().is_some_and(|taken| taken.retry.is_none())
    }

    fn read_at(&self) -> Option<Instant> {
        self.stamp.filter(|_| self.held.is_none())?;
        match self.taken.as_ref().filter(|_| self.is_current()) {
            Some(taken) => taken.retry,
            None => Some(self.since + QUIET),
        }
    }

    fn next(&self) -> Option<Instant> {
        let waits = self.stamp.is_none() || self.held.is_some();
        if waits { Some(self.since + HOLD) } else { self.read_at() }
    }

    fn take(&mut self, now: Instant) -> bool {
        let Some((stamp, held)) = self.stamp.zip(self.held.as_ref()) else { return false };
        if !held.is_whole(self.taken.as_ref()) && now < self.since + HOLD {
            return false;
        }
        let Some(Held { content, retry, .. }) = self.held.take() else { return false };
        let former = match self.taken.take() {
            Some(old) if content.unparsed => {
                let keys = old.content.objects.into_iter().map(|found| found.key);
                old.former
                    .into_iter()
                    .chain(keys)
                    .chain(old.content.broken.into_iter().map(|broken| broken.key))
                    .collect()
            }
            _ => BTreeSet::new(),
        };
        self.taken = Some(Taken { stamp, content, former, retry });
        true
    }

    fn view<'a>(&'a self, path: &'a Path) -> Option<FileView<'a>> {
        let taken = self.taken.as_ref()?;
        let next = match (&self.held, self.stamp) {
            (_, None) => Next::Gone,
            (Some(held), _) => Next::Held(&held.content),
            _ => Next::Same,
        };
        Some(FileView { path, content: &taken.content, former: &taken.former, next })
    }
}

impl Held {
    /// Whether it looks finished, and nothing vanishes by it.
    fn is_whole(&self, taken: Option<&Taken>) -> bool {
        let content = &self.content;
        let keeps = |old: &Content| {
            old.objects.iter().all(|found| content.has(&found.key))
                && old.broken.iter().all(|broken| content.has(&broken.key))
        };
        let keeps = taken.is_none_or(|taken| !taken.content.unparsed && keeps(&taken.content));
        self.ends_whole && !content.unparsed && !content.is_empty() && keeps
    }
}

/// How long a file must be left alone before it is read: longer than an editor pauses between two writes of one save,
/// short beside the second in which a save takes effect.
pub(super) const QUIET: Duration = Duration::from_millis(100);
/// How long a file must be gone, emptied or cut short before that counts: longer than an editor takes from moving the
/// old file away to putting the new one there; with a poll of [`super::directory::POLL`] still under a second.
pub(super) const HOLD: Duration = Duration::from_millis(400);
/// How soon a file that could not be read is tried again: the cause may have been a lack of descriptors.
const RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
