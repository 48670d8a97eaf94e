use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use super::compile::Compiled;
use super::object::{PolicyObject, PolicyRef};
use super::problem::{self, Problem};
use super::standing::{PeerMode, Standing};
use super::{ROOT_NAMESPACE, Scope};
use crate::mesh::{NamespacedName, Pod, PodUid, TrustDomain, Workload};

/// Every policy of the mesh, and what stands over each pod that was asked about.
#[derive(Debug)]
pub struct Policies {
    trust_domain: TrustDomain,
    by_namespace: HashMap<Arc<str>, BTreeMap<PolicyRef, Entry>>,
    /// Policies with targetRefs, by Service.
    by_service: HashMap<NamespacedName, BTreeMap<PolicyRef, Arc<Compiled>>>,
    problems: BTreeMap<PolicyRef, Vec<Problem>>,
    cache: RwLock<Cache>,
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
            by_namespace: HashMap::new(),
            by_service: HashMap::new(),
            problems: BTreeMap::new(),
            cache: RwLock::default(),
        }
    }

    pub fn apply(&mut self, delta: Delta) {
        match delta {
            Delta::Apply(object) => {
                if self.get(&object.reference()).is_some_and(|old| *old == object) {
                    return;
                }
                self.remove(&object.reference());
                self.insert(object);
            }
            Delta::Delete(reference) => self.remove(&reference),
        }
    }

    /// The policy in force under a name.
    pub fn get(&self, reference: &PolicyRef) -> Option<&PolicyObject> {
        Some(&self.by_namespace.get(&reference.name.namespace)?.get(reference)?.object)
    }

    /// Every policy in force, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &PolicyObject> {
        self.by_namespace.values().flat_map(BTreeMap::values).map(|entry| &entry.object)
    }

    /// Whether a pod accepts plaintext on one of its ports.
    pub fn peer_mode(&self, workload: &Workload, port: u16) -> PeerMode {
        self.standing(workload).peer_mode(port)
    }

    /// Policies that are not enforced as written.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    /// What may stand over pods of a namespace: its own policies and the root's.
    pub(super) fn around(&self, namespace: &str) -> impl Iterator<Item = &Entry> {
        let root = (namespace != ROOT_NAMESPACE).then_some(ROOT_NAMESPACE);
        [Some(namespace), root]
            .into_iter()
            .flatten()
            .filter_map(|name| self.by_namespace.get(name))
            .flat_map(BTreeMap::values)
    }

    /// What stands over endpoints of a Service by targetRefs.
    pub(super) fn at_service(&self, service: &NamespacedName) -> impl Iterator<Item = &Arc<Compiled>> {
        self.by_service.get(service).into_iter().flat_map(BTreeMap::values)
    }

    pub(super) fn standing(&self, workload: &Workload) -> Arc<Standing> {
        let known = self.cache.read().unwrap_or_else(PoisonError::into_inner).get(&workload.pod);
        if let Some(standing) = known {
            return standing;
        }
        let around = self.around(&workload.name().namespace).map(|entry| (&entry.object, entry.compiled.as_ref()));
        let standing = Arc::new(Standing::over(&workload.pod, around));
        self.cache.write().unwrap_or_else(PoisonError::into_inner).insert(&workload.pod, standing.clone());
        standing
    }

    fn insert(&mut self, object: PolicyObject) {
        let reference = object.reference();
        let compiled = match &object {
            PolicyObject::Authorization(policy) => Some(Arc::new(Compiled::of(policy, &self.trust_domain))),
            PolicyObject::PeerAuthentication(_) => None,
            PolicyObject::Malformed(policy) => Some(Arc::new(Compiled::malformed(policy))),
        };
        if let Some(compiled) = &compiled {
            for service in object.scope().services() {
                self.by_service.entry(service.clone()).or_default().insert(reference.clone(), compiled.clone());
            }
        }
        let problems = problem::of(&object);
        if !problems.is_empty() {
            self.problems.insert(reference.clone(), problems);
        }
        self.forget_standing(object.scope());
        self.by_namespace
            .entry(reference.name.namespace.clone())
            .or_default()
            .insert(reference, Entry { object, compiled });
        problem::count(self.problems.len());
    }

    fn remove(&mut self, reference: &PolicyRef) {
        let Some(policies) = self.by_namespace.get_mut(&reference.name.namespace) else { return };
        let Some(entry) = policies.remove(reference) else { return };
        if policies.is_empty() {
            self.by_namespace.remove(&reference.name.namespace);
        }
        for service in entry.object.scope().services() {
            if let Some(policies) = self.by_service.get_mut(service) {
                policies.remove(reference);
                if policies.is_empty() {
                    self.by_service.remove(service);
                }
            }
        }
        self.problems.remove(reference);
        problem::count(self.problems.len());
        self.forget_standing(entry.object.scope());
    }

    fn forget_standing(&mut self, scope: &Scope) {
        self.cache.get_mut().unwrap_or_else(PoisonError::into_inner).forget(scope);
    }
}

/// Follows pods by their object: a pod applied anew is another object, and is compiled anew.
#[derive(Debug, Default)]
struct Cache {
    pods: HashMap<PodUid, (Weak<Pod>, Arc<Standing>)>,
    /// Entries of pods that left are swept out once this many are held.
    sweep_at: usize,
}

impl Cache {
    // The weak pointer keeps its allocation, so that no other pod can come to stand at the same place.
    fn get(&self, pod: &Arc<Pod>) -> Option<Arc<Standing>> {
        let (known, standing) = self.pods.get(&pod.uid)?;
        std::ptr::eq(known.as_ptr(), Arc::as_ptr(pod)).then(|| standing.clone())
    }

    fn insert(&mut self, pod: &Arc<Pod>, standing: Arc<Standing>) {
        if self.pods.len() >= self.sweep_at {
            self.pods.retain(|_, (pod, _)| pod.strong_count() > 0);
            self.sweep_at = (self.pods.len() * 2).max(SWEEP_FROM);
        }
        self.pods.insert(pod.uid.clone(), (Arc::downgrade(pod), standing));
    }

    fn forget(&mut self, scope: &Scope) {
        self.pods.retain(|_, (pod, _)| pod.upgrade().is_some_and(|pod| !scope.selects(&pod)));
    }
}

const SWEEP_FROM: usize = 64;
