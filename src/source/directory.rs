//! Reads and watches the folder. What its changes mean, `Folder` decides.

use std::collections::HashSet;
use std::convert::Infallible;
use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use super::folder::{Folder, Scan, Seen, Stamp, Step};
use super::{Problem, Report};
use crate::model::{Delta, Model};

/// Feeds the model from a folder, and follows the folder. Comes back only if the folder cannot be listed at start.
///
/// The model is synced once every file has been read. What is wrong in the files goes to `report`.
pub async fn run(dir: PathBuf, model: Arc<Model>, report: Arc<Report>) -> Result<Infallible, DirectoryError> {
    check_readable(&dir)?;
    let changed = Arc::new(Notify::new());
    let mut watch = Watch::default();
    let mut folder = Folder::default();
    let mut told_unwatched = false;
    loop {
        // Before the walk: what changes during it is told by an event.
        if let Err(error) = watch.keep(&dir, &changed)
            && !std::mem::replace(&mut told_unwatched, true)
        {
            warn!(dir = %dir.display(), %error, "The folder cannot be watched for events; it is polled instead.");
        }
        let walked = dir.clone();
        let checked = tokio::task::spawn_blocking(move || {
            let check = check(&walked, &mut folder, Instant::now());
            (folder, check)
        });
        let check = match checked.await {
            Ok((back, check)) => {
                folder = back;
                check
            }
            // What it knew is lost with it: better a new start than a view that forgets to delete.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        if let Some(step) = check.step {
            if !step.deltas.is_empty() {
                debug!(deltas = step.deltas.len(), "The folder changed.");
                model.apply(step.deltas);
            }
            report.replace_problems(&step.problems);
            if step.synced && !model.is_synced() {
                let (objects, ignored) = folder.counts();
                info!(dir = %dir.display(), objects, ignored, problems = step.problems.len(), "The folder has been read.");
                model.set_synced();
            }
        }
        if check.listed {
            report.checked(Instant::now());
        }
        report.record_metrics();
        let rescan = if watch.is_live() && !check.linked { RESCAN } else { POLL };
        let wake = folder.next().map_or(rescan, |at| at.saturating_duration_since(Instant::now()).min(rescan));
        tokio::select! {
            () = tokio::time::sleep(wake.max(BREATH)) => {}
            () = async { changed.notified().await; tokio::time::sleep(BREATH).await } => {}
        }
    }
}

/// Whether a folder can be listed at all.
pub fn check_readable(dir: &Path) -> Result<(), DirectoryError> {
    fs::read_dir(dir).map(drop).map_err(|error| DirectoryError { dir: dir.to_owned(), error })
}

/// Reads a folder once, as it is.
pub fn load(dir: &Path) -> Result<Loaded, DirectoryError> {
    check_readable(dir)?;
    let mut folder = Folder::default();
    let (scan, ..) = walk(dir);
    let now = Instant::now();
    folder.scan(scan, now);
    // Nothing is waited for: whoever asks once wants to know what stands there now.
    let later = now + Duration::from_secs(3600);
    for (path, stamp) in folder.due(later) {
        let bytes = read(&path);
        folder.read(&path, stamp, bytes.as_deref().map_err(unreadable), now);
    }
    let Step { deltas, problems, .. } = folder.settle(later);
    let (objects, ignored) = folder.counts();
    Ok(Loaded { deltas, problems, objects, ignored })
}

/// What a folder holds.
#[derive(Debug)]
pub struct Loaded {
    /// What a model is to apply, in order.
    pub deltas: Vec<Delta>,
    pub problems: Vec<Problem>,
    /// How many objects were read.
    pub objects: usize,
    /// How many documents were of kinds that are not read.
    pub ignored: usize,
}

/// A folder that cannot be listed.
#[derive(Debug, thiserror::Error)]
#[error("{}: the folder of manifests cannot be read: {error}; {}", dir.display(), cure(error))]
pub struct DirectoryError {
    pub dir: PathBuf,
    #[source]
    pub error: io::Error,
}

struct Check {
    step: Option<Step>,
    /// Symbolic links were met: events do not tell of changes behind them.
    linked: bool,
    listed: bool,
}

fn check(dir: &Path, folder: &mut Folder, now: Instant) -> Check {
    let (scan, linked) = walk(dir);
    let listed = scan.unlisted.is_empty();
    folder.scan(scan, now);
    for (path, stamp) in folder.due(now) {
        let bytes = match read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            bytes => bytes,
        };
        // Changed while it was read: the next walk sees that, and the wait begins again.
        if fs::metadata(&path).is_ok_and(|metadata| stamp_of(&metadata) == stamp) {
            folder.read(&path, stamp, bytes.as_deref().map_err(unreadable), now);
        }
    }
    let step = folder.is_dirty(now).then(|| folder.settle(now));
    Check { step, linked, listed }
}

/// All manifests below a folder, and whether symbolic links were met.
fn walk(dir: &Path) -> (Scan, bool) {
    let mut scan = Scan::default();
    let mut linked = fs::symlink_metadata(dir).is_ok_and(|metadata| metadata.is_symlink());
    let now = SystemTime::now();
    // Each folder once, however many links lead to it.
    let mut met = HashSet::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let listed = fs::metadata(&folder).and_then(|metadata| {
            if met.insert((metadata.dev(), metadata.ino())) { fs::read_dir(&folder).map(Some) } else { Ok(None) }
        });
        let entries = match listed {
            Ok(Some(entries)) => entries,
            Ok(None) => continue,
            // A subfolder that went since its name was read is gone; the root of all is never taken for gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder != dir => continue,
            Err(error) => {
                scan.problems.push(unlisted(&folder, &error));
                scan.unlisted.push(folder);
                continue;
            }
        };
        let mut names = Vec::new();
        for entry in entries {
            match entry {
                Ok(entry) => names.push(entry.path()),
                Err(error) => {
                    scan.problems.push(unlisted(&folder, &error));
                    scan.unlisted.push(folder.clone());
                    break;
                }
            }
        }
        names.sort();
        for path in names {
            // Editors and ConfigMap volumes keep their own under names that start with a dot.
            if path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            linked |= fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink());
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_dir() {
                folders.push(path);
            } else if metadata.is_file() && is_manifest(&path) {
                scan.files.push(Seen { stamp: stamp_of(&metadata), age: age(&metadata, now), path });
            }
        }
    }
    (scan, linked)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {} MiB", MOST_BYTES >> 20)));
    }
    Ok(bytes)
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known))
}

fn stamp_of(metadata: &Metadata) -> Stamp {
    Stamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    }
}

// A rename into place keeps the modification time and sets the change time: the later of both counts.
fn age(metadata: &Metadata, now: SystemTime) -> Duration {
    let changed =
        Duration::new(metadata.ctime().try_into().unwrap_or(0), metadata.ctime_nsec().try_into().unwrap_or(0));
    let since = |time: SystemTime| now.duration_since(time).unwrap_or_default();
    metadata.modified().map_or(Duration::ZERO, since).min(since(SystemTime::UNIX_EPOCH + changed))
}

fn unlisted(folder: &Path, error: &io::Error) -> Problem {
    Problem {
        file: folder.to_owned(),
        line: 0,
        object: String::new(),
        field: String::new(),
        cause: format!("the folder cannot be read: {error}; what it held stays in force; {}", cure(error)),
    }
}

fn unreadable(error: &io::Error) -> String {
    format!("the file cannot be read: {error}; {}", cure(error))
}

fn cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "make it, or name another",
        io::ErrorKind::PermissionDenied => "let the user that runs selvedge read it (folders also need the x bit)",
        io::ErrorKind::FileTooLarge => "cut it into several",
        io::ErrorKind::NotADirectory => "name the folder that holds the manifests",
        _ => "see that the file system it lies on works",
    }
}

/// The kernel's events for the folder that stands at the path now.
#[derive(Default)]
struct Watch {
    watcher: Option<RecommendedWatcher>,
    root: Option<(u64, u64)>,
}

impl Watch {
    fn is_live(&self) -> bool {
        self.watcher.is_some()
    }

    /// Watches anew if another folder has taken the place of the one that is watched.
    fn keep(&mut self, dir: &Path, changed: &Arc<Notify>) -> notify::Result<()> {
        let root = fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        if root == self.root {
            return Ok(());
        }
        *self = Self { watcher: None, root };
        if root.is_none() {
            return Ok(());
        }
        let changed = changed.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading opens and closes files too.
            if event.map_or(true, |event| is_change(event.kind)) {
                changed.notify_one();
            }
        })?;
        watcher.watch(dir, RecursiveMode::Recursive)?;
        self.watcher = Some(watcher);
        Ok(())
    }
}

fn is_change(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// How often the folder is walked where events cannot tell of every change.
pub const POLL: Duration = Duration::from_millis(250);
/// How often it is walked although events tell: they can be lost.
const RESCAN: Duration = Duration::from_secs(5);
/// What one file may hold: some fifty thousand pods.
const MOST_BYTES: u64 = 64 << 20;
/// The shortest time between two walks: a burst of events is one.
const BREATH: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests;
