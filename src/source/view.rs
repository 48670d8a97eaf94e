//! All files of the folder as one view: who wins where two say the same name, and what stays of what broke.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Problem;
use super::decode::{Broken, Content, Item, Key, Kind};
use super::{derive, routes};
use crate::mesh::{NamespacedName, PodUid};
use crate::model::Delta;

/// What one file says, as far as it is taken.
pub(super) struct FileView<'a> {
    pub path: &'a Path,
    pub content: &'a Content,
    /// What it held before it broke.
    pub former: &'a BTreeSet<Key>,
    pub next: Next<'a>,
}

impl FileView<'_> {
    /// What the file held before it broke, and nobody has now.
    fn lost<'v>(&self, view: &View, now: &'v View) -> Vec<(&'v Key, &'v Arc<Item>)> {
        let lost = self.former.iter().filter(|key| !key.is_unnamed() && !view.contains_key(key));
        lost.filter_map(|key| now.get_key_value(key)).collect()
    }

    /// Whether a policy without a name is one that the file held under its name: then that one stays.
    fn may_hold(&self, unnamed: &Key, view: &View, now: &View) -> bool {
        let alike = |key: &Key| (key.kind, &key.name.namespace) == (unnamed.kind, &unnamed.name.namespace);
        let unnamed_here = self.content.broken.iter().filter(|broken| broken.key.is_unnamed() && alike(&broken.key));
        let lost = self.lost(view, now).into_iter().filter(|(key, item)| alike(key) && is_good(item));
        unnamed.is_unnamed() && lost.count() >= unnamed_here.count()
    }

    fn holds(&self, key: &Key) -> bool {
        self.content.has(key) || self.former.contains(key)
    }
}

/// What the file is about to be.
pub(super) enum Next<'a> {
    Same,
    Gone,
    /// Read, but still waited for.
    Held(&'a Content),
}

impl Next<'_> {
    /// Whether an object is about to go from the file: then it yields to another file that has it.
    fn drops(&self, key: &Key) -> bool {
        match self {
            Self::Same => false,
            Self::Gone => true,
            Self::Held(content) => !content.unparsed && !content.has(key),
        }
    }
}

pub(super) type View = BTreeMap<Key, Arc<Item>>;

/// One view of all files, given in the order of their names, and what the model has now.
pub(super) fn combine<'a>(files: impl Iterator<Item = FileView<'a>> + Clone, now: &View) -> (View, Vec<Problem>) {
    let mut problems = Vec::new();
    let mut winners: BTreeMap<&Key, (&Arc<Item>, &Path, usize, bool)> = BTreeMap::new();
    for file in files.clone() {
        for found in &file.content.objects {
            let drops = file.next.drops(&found.key);
            match winners.get(&found.key) {
                Some((_, path, line, false)) if !drops => problems.push(Problem {
                    file: file.path.to_owned(),
                    line: found.line,
                    object: found.key.to_string(),
                    field: "metadata.name".to_owned(),
                    cause: format!("it stands already in {}:{line}, which is in force; remove one", path.display()),
                }),
                Some((_, _, _, false)) => {}
                Some((_, _, _, true)) if drops => {}
                _ => drop(winners.insert(&found.key, (&found.item, file.path, found.line, drops))),
            }
        }
    }
    let mut view: View = winners.into_iter().map(|(key, (item, ..))| (key.clone(), item.clone())).collect();
    for file in files.clone() {
        let mut outcomes = BTreeMap::new();
        for broken in &file.content.broken {
            let outcome = match file.may_hold(&broken.key, &view, now) {
                true => "; what its file held before stays in force",
                false => keep_broken(broken, &mut view, now),
            };
            outcomes.insert(broken.key.to_string(), outcome);
        }
        if file.content.unparsed {
            for (key, item) in file.lost(&view, now) {
                view.insert(key.clone(), item.clone());
            }
        }
        problems.extend(file.content.problems.iter().cloned().map(|mut problem| {
            if let Some(outcome) = outcomes.get(&problem.object) {
                problem.cause.push_str(outcome);
            }
            problem
        }));
    }
    problems.extend(part_twins(files.clone(), &mut view, now));
    bring_keys(&mut view);
    problems.extend(close_over_missing_targets(files.clone(), &mut view));
    problems.extend(tell_of_routes(files, &view));
    derive::add_endpoint_slices(&mut view);
    problems.sort();
    problems.dedup();
    (view, problems)
}

/// Two pods of one UID, as a copied manifest has it, would put each other out of the mesh: the one that is in force
/// stays, else the first by name.
fn part_twins<'a>(files: impl Iterator<Item = FileView<'a>> + Clone, view: &mut View, now: &View) -> Vec<Problem> {
    let uid_of = |item: &Arc<Item>| if let Item::Pod(pod, _) = &**item { Some(pod.uid.clone()) } else { None };
    let in_force = |key: &Key, uid: &PodUid| now.get(key).and_then(uid_of).as_ref() == Some(uid);
    let mut holders: HashMap<PodUid, Key> = HashMap::new();
    let mut twins: Vec<(Key, PodUid)> = Vec::new();
    for (key, item) in view.iter() {
        let Some(uid) = uid_of(item) else { continue };
        match holders.entry(uid.clone()) {
            Entry::Vacant(free) => drop(free.insert(key.clone())),
            Entry::Occupied(mut holder) if in_force(key, &uid) => twins.push((holder.insert(key.clone()), uid)),
            Entry::Occupied(_) => twins.push((key.clone(), uid)),
        }
    }
    let part = |(twin, uid): (Key, PodUid)| {
        view.remove(&twin);
        let (file, line) = place(files.clone(), &twin);
        let cause = format!("{} has this UID and is in force; give each pod its own, or none", holders[&uid]);
        Problem { file, line, object: twin.to_string(), field: "metadata.uid".to_owned(), cause }
    };
    twins.into_iter().map(part).collect()
}

/// The file and the line of an object.
fn place<'a>(mut files: impl Iterator<Item = FileView<'a>>, key: &Key) -> (PathBuf, usize) {
    let found = files.find_map(|file| {
        let found = file.content.objects.iter().find(|found| found.key == *key)?;
        Some((file.path.to_owned(), found.line))
    });
    found.unwrap_or_default()
}

/// Puts the keys of issuers from the folder's ConfigMaps where they are asked for.
fn bring_keys(view: &mut View) {
    let text = |name: &NamespacedName, key: &str| {
        let item = view.get(&Key { kind: Kind::ConfigMap, name: name.clone() })?;
        if let Item::ConfigMap(data) = &**item { data.get(key).cloned() } else { None }
    };
    let mut changed = Vec::new();
    for (key, item) in view.iter() {
        let Item::Policy(policy) = &**item else { continue };
        let beside = policy.beside_config_maps(text);
        if beside != *policy {
            changed.push((key.clone(), Arc::new(Item::Policy(beside))));
        }
    }
    view.extend(changed);
}

/// A policy over a Service that is not there may mean any of them: until there is one it fails closed.
fn close_over_missing_targets<'a>(files: impl Iterator<Item = FileView<'a>> + Clone, view: &mut View) -> Vec<Problem> {
    let is_there = |service: &NamespacedName| view.contains_key(&Key { kind: Kind::Service, name: service.clone() });
    let mut problems = Vec::new();
    let mut changed = Vec::new();
    for (key, item) in view.iter() {
        let Item::Policy(policy) = &**item else { continue };
        let (beside, missing) = policy.beside(is_there);
        problems.extend(missing.into_iter().chain(policy.lacking()).map(|target| Problem {
            file: files.clone().find(|file| file.holds(key)).map(|file| file.path.to_owned()).unwrap_or_default(),
            line: target.line,
            object: key.to_string(),
            field: target.field,
            cause: target.cause,
        }));
        if beside != *policy {
            changed.push((key.clone(), Arc::new(Item::Policy(beside))));
        }
    }
    view.extend(changed);
    problems
}

/// A route over a Service that is not there, or that does not ask for it, has no effect; nor has a policy about these.
fn tell_of_routes<'a>(files: impl Iterator<Item = FileView<'a>> + Clone, view: &View) -> Vec<Problem> {
    let told = routes::unmet(view).into_iter().chain(routes::ineffective(view)).map(|(key, field, cause)| {
        let (file, line) = place(files.clone(), key);
        Problem { file, line, object: key.to_string(), field, cause }
    });
    told.collect()
}

/// The steps from one view to the next.
pub(super) fn difference(now: &View, next: &View) -> Vec<Delta> {
    let gone = now.iter().filter(|(key, _)| !next.contains_key(key));
    let gone = gone.filter_map(|(key, item)| match &**item {
        Item::Policy(policy) => Some(Delta::Policy(policy.delete())),
        _ => key.delete(),
    });
    let new = next.iter().filter(|(key, item)| now.get(key).is_none_or(|old| !Arc::ptr_eq(old, item) && old != *item));
    let new = new.filter_map(|(_, item)| item.apply());
    gone.chain(new).collect()
}

/// Keeps what is in force of an object that broke, and tells people what that is.
fn keep_broken(broken: &Broken, view: &mut View, now: &View) -> &'static str {
    let key = &broken.key;
    let good = now.get(key).filter(|item| is_good(item) && broken.stand_in.as_ref() != Some(*item));
    if view.contains_key(key) {
        return "; another version of it is in force";
    }
    let (stand_in, outcome) = broken.outcome(good.is_some());
    if let Some(item) = good.or(stand_in) {
        view.insert(key.clone(), item.clone());
    }
    outcome
}

fn is_good(item: &Item) -> bool {
    !matches!(item, Item::Policy(policy) if policy.is_malformed())
}
