use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use super::around::Around;
use super::compile::Compiled;
use super::object::{PolicyObject, PolicyRef};
use super::problem::{self, Problem};
use super::standing::{PeerMode, Standing};
use super::{ROOT_NAMESPACE, RequestAuthentication, Scope};
use crate::mesh::{NamespacedName, Pod, PodUid, SharedMap, TrustDomain, Workload};

/// Every policy of the mesh, and what stands over each pod that was asked about.
///
/// A clone costs nothing, and a change costs what that policy does: what stood over pods of other namespaces stays
/// known, and what stands over a pod is found by its labels, not by looking at every policy.
#[derive(Clone, Debug)]
pub struct Policies {
    trust_domain: TrustDomain,
    by_namespace: SharedMap<Arc<str>, Around>,
    /// Policies with targetRefs, by Service.
    by_service: SharedMap<NamespacedName, Arc<BTreeMap<PolicyRef, Arc<Compiled>>>>,
    /// Of these, those that say whose tokens are taken.
    tokens_by_service: SharedMap<NamespacedName, Arc<BTreeMap<PolicyRef, RequestAuthentication>>>,
    problems: SharedMap<PolicyRef, Arc<[Problem]>>,
    /// Shared by all clones; who reads it holds what it finds against the versions that he has.
    cache: Arc<Cache>,
}

/// One step of the model.
#[derive(Clone, Debug)]
pub enum Delta {
    Apply(PolicyObject),
    Delete(PolicyRef),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) object: PolicyObject,
    /// None for a PeerAuthentication, which has no rules.
    pub(super) compiled: Option<Arc<Compiled>>,
}

impl Policies {
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            by_namespace: SharedMap::default(),
            by_service: SharedMap::default(),
            tokens_by_service: SharedMap::default(),
            problems: SharedMap::default(),
            cache: Arc::default(),
        }
    }

    /// Applies one step; what it changed may now stand, or stand no more, over what these scopes name.
    pub fn apply(&mut self, delta: Delta) -> Vec<Scope> {
        match delta {
            Delta::Apply(object) => {
                if self.get(&object.reference()).is_some_and(|old| *old == object) {
                    return Vec::new();
                }
                let now = object.scope().clone();
                let before = self.remove(&object.reference());
                self.insert(object);
                before.filter(|before| *before != now).into_iter().chain([now]).collect()
            }
            Delta::Delete(reference) => self.remove(&reference).into_iter().collect(),
        }
    }

    /// The policy in force under a name.
    pub fn get(&self, reference: &PolicyRef) -> Option<&PolicyObject> {
        Some(&self.by_namespace.get(&reference.name.namespace)?.get(reference)?.object)
    }

    /// Every policy in force, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &PolicyObject> {
        self.by_namespace.values().flat_map(Around::all).map(|entry| &entry.object)
    }

    /// Whether a pod accepts plaintext on one of its ports.
    pub fn peer_mode(&self, workload: &Workload, port: u16) -> PeerMode {
        self.standing(workload).peer_mode(port)
    }

    /// Policies that are not enforced as written.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flat_map(|problems| problems.iter())
    }

    /// What may stand over pods of a namespace: its own policies and the root's.
    pub(super) fn around(&self, namespace: &str) -> impl Iterator<Item = &Arc<Entry>> {
        self.arounds(namespace).into_iter().flatten().flat_map(Around::all)
    }

    /// What stands over endpoints of a Service by targetRefs.
    pub(super) fn at_service(&self, service: &NamespacedName) -> impl Iterator<Item = &Arc<Compiled>> {
        self.by_service.get(service).into_iter().flat_map(|policies| policies.values())
    }

    /// Whose tokens endpoints of a Service take by targetRefs.
    pub(super) fn authentications_at_service(
        &self,
        service: &NamespacedName,
    ) -> impl Iterator<Item = &RequestAuthentication> {
        self.tokens_by_service.get(service).into_iter().flat_map(|policies| policies.values())
    }

    pub(super) fn standing(&self, workload: &Workload) -> Arc<Standing> {
        let pod = &workload.pod;
        let arounds = self.arounds(&pod.name.namespace);
        let version = arounds.map(|around| around.map_or(0, |around| around.version));
        if let Some(standing) = self.cache.get(pod, version) {
            return standing;
        }
        let entries = arounds.into_iter().flatten().flat_map(|around| around.over(&pod.labels));
        let standing = Arc::new(Standing::over(pod, entries.map(|entry| (&entry.object, entry.compiled.as_ref()))));
        self.cache.insert(pod, version, standing.clone());
        standing
    }

    /// The policies of a namespace, and the root's.
    fn arounds(&self, namespace: &str) -> [Option<&Around>; 2] {
        let root = (namespace != ROOT_NAMESPACE).then_some(ROOT_NAMESPACE);
        [Some(namespace), root].map(|name| self.by_namespace.get(name?))
    }

    fn insert(&mut self, object: PolicyObject) {
        let reference = object.reference();
        let compiled = match &object {
            PolicyObject::Authorization(policy) => Some(Arc::new(Compiled::of(policy, &self.trust_domain))),
            PolicyObject::PeerAuthentication(_) | PolicyObject::RequestAuthentication(_) => None,
            PolicyObject::Malformed(policy) => Some(Arc::new(Compiled::malformed(policy))),
        };
        if let Some(compiled) = &compiled {
            for service in object.scope().services() {
                let mut policies = self.by_service.remove(service).unwrap_or_default();
                Arc::make_mut(&mut policies).insert(reference.clone(), compiled.clone());
                self.by_service.insert(service.clone(), policies);
            }
        }
        if let PolicyObject::RequestAuthentication(policy) = &object {
            for service in policy.scope.services() {
                let mut policies = self.tokens_by_service.remove(service).unwrap_or_default();
                Arc::make_mut(&mut policies).insert(reference.clone(), RequestAuthentication::clone(policy));
                self.tokens_by_service.insert(service.clone(), policies);
            }
        }
        let problems = problem::of(&object);
        if !problems.is_empty() {
            self.problems.insert(reference.clone(), problems.into());
        }
        let entry = Arc::new(Entry { object, compiled });
        self.change_around(&reference.name.namespace.clone(), |around| around.insert(reference, entry));
    }

    /// Takes a policy away, and says what it was over.
    fn remove(&mut self, reference: &PolicyRef) -> Option<Scope> {
        let namespace = &reference.name.namespace;
        let entry = self.by_namespace.get(namespace)?.get(reference)?.clone();
        self.change_around(namespace, |around| around.remove(reference));
        for service in entry.object.scope().services() {
            if let Some(mut policies) = self.by_service.remove(service) {
                Arc::make_mut(&mut policies).remove(reference);
                if !policies.is_empty() {
                    self.by_service.insert(service.clone(), policies);
                }
            }
            if let Some(mut policies) = self.tokens_by_service.remove(service) {
                Arc::make_mut(&mut policies).remove(reference);
                if !policies.is_empty() {
                    self.tokens_by_service.insert(service.clone(), policies);
                }
            }
        }
        self.problems.remove(reference);
        Some(entry.object.scope().clone())
    }

    fn change_around(&mut self, namespace: &Arc<str>, change: impl FnOnce(&mut Around)) {
        self.by_namespace.change(namespace, |around| {
            change(around);
            around.version = VERSIONS.fetch_add(1, Ordering::Relaxed);
        });
    }
}

/// Follows pods by their object: a pod applied anew is another object, and is compiled anew. Some shards, so that
/// threads seldom meet.
#[derive(Debug)]
struct Cache {
    shards: [RwLock<Shard>; SHARDS],
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Shard {
    pods: HashMap<PodUid, Known>,
    /// Entries of pods that left are swept out once this many are held.
    sweep_at: usize,
}

#[derive(Debug)]
struct Known {
    pod: Weak<Pod>,
    version: Version,
    standing: Arc<Standing>,
}

/// Of the pod's namespace and of the root's policies; 0 where there are none.
type Version = [u64; 2];

impl Cache {
    // The weak pointer keeps its allocation, so that no other pod can come to stand at the same place.
    fn get(&self, pod: &Arc<Pod>, version: Version) -> Option<Arc<Standing>> {
        let shard = self.shard(&pod.uid).read().unwrap_or_else(PoisonError::into_inner);
        let known = shard.pods.get(&pod.uid)?;
        let holds = known.version == version && std::ptr::eq(known.pod.as_ptr(), Arc::as_ptr(pod));
        holds.then(|| known.standing.clone())
    }

    fn insert(&self, pod: &Arc<Pod>, version: Version, standing: Arc<Standing>) {
        let mut shard = self.shard(&pod.uid).write().unwrap_or_else(PoisonError::into_inner);
        if shard.pods.len() >= shard.sweep_at {
            shard.pods.retain(|_, known| known.pod.strong_count() > 0);
            shard.sweep_at = (shard.pods.len() * 2).max(SWEEP_FROM);
        }
        shard.pods.insert(pod.uid.clone(), Known { pod: Arc::downgrade(pod), version, standing });
    }

    fn shard(&self, uid: &PodUid) -> &RwLock<Shard> {
        &self.shards[self.hasher.hash_one(uid) as usize % SHARDS]
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| RwLock::default()), hasher: RandomState::new() }
    }
}

/// Gives each version of a namespace's policies a number that no other has, of whichever clone.
static VERSIONS: AtomicU64 = AtomicU64::new(1);
const SHARDS: usize = 16;
const SWEEP_FROM: usize = 16;
