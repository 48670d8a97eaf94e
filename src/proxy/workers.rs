use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc;

use crate::transport::hbone::{Pool, PoolSettings};
use crate::transport::{self, fast};
use crate::waypoint;

/// The threads that carry connections: one current-thread runtime a core. A connection lives its whole life on one.
pub struct Workers {
    handles: Vec<Handle>,
    threads: Vec<JoinHandle<()>>,
}

struct Handle {
    jobs: mpsc::UnboundedSender<Job>,
    load: Arc<AtomicUsize>,
}

/// What a worker thread owns alone, without a lock.
pub struct Thread {
    pub pool: Pool,
    pub fast: fast::Pool,
    /// Connections that speak HTTP to applications.
    pub http: waypoint::Pool,
    index: usize,
}

type Job = Box<dyn FnOnce(Rc<Thread>) + Send>;

impl Workers {
    pub fn start(count: usize, pool: &PoolSettings, fast: &fast::PoolSettings) -> io::Result<Self> {
        let mut workers = Self { handles: Vec::new(), threads: Vec::new() };
        for index in 0..count.max(1) {
            let (jobs, receiver) = mpsc::unbounded_channel();
            let settings = (pool.clone(), fast.clone());
            let (failed, started) = std::sync::mpsc::sync_channel(1);
            // A runtime of tasks that stay on their thread is made there.
            let work = move || match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
                Ok(runtime) => {
                    drop(failed);
                    runtime.block_on(run(receiver, index, settings));
                }
                Err(error) => drop(failed.send(error)),
            };
            let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(work)?;
            // Nothing is sent where all is well.
            if let Ok(error) = started.recv() {
                return Err(error);
            }
            workers.handles.push(Handle { jobs, load: Arc::default() });
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Runs a future on one thread, chosen by its number.
    pub fn spawn_on<F: Future<Output = ()> + 'static>(
        &self,
        index: usize,
        make: impl FnOnce(Rc<Thread>) -> F + Send + 'static,
    ) {
        let handle = &self.handles[index % self.handles.len()];
        let job: Job = Box::new(move |thread| drop(tokio::task::spawn_local(make(thread))));
        // A closed channel means that the agent ends; what came too late is dropped, and its sockets reset.
        let _ = handle.jobs.send(job);
    }

    /// Runs the life of one connection on the thread that has the fewest: on `here`, which has accepted it, where
    /// others have no fewer, since that one is awake and has what it needs at hand. The guard counts it there.
    pub fn spawn_connection<F: Future<Output = ()> + 'static>(
        &self,
        here: &Rc<Thread>,
        make: impl FnOnce(Rc<Thread>, LoadGuard) -> F + Send + 'static,
    ) {
        let load = |handle: &Handle| handle.load.load(Ordering::Relaxed);
        let loads = self.handles.iter().enumerate().map(|(index, handle)| (load(handle), index != here.index, index));
        let index = loads.min().map_or(here.index, |(.., index)| index);
        let guard = LoadGuard::new(&self.handles[index].load);
        // No block around it: a block would hold the whole future twice, as what it captured and as what it awaits.
        let life = move |thread| make(thread, guard);
        if index == here.index {
            tokio::task::spawn_local(life(here.clone()));
        } else {
            self.spawn_on(index, life);
        }
    }

    /// Runs a job on every thread, for example to evict a pod from their pools.
    pub fn on_each(&self, job: impl Fn(&Thread) + Send + Clone + 'static) {
        for handle in &self.handles {
            let job = job.clone();
            let _ = handle.jobs.send(Box::new(move |thread| job(&thread)));
        }
    }

    /// Lets go of the buffers that threads keep for the bytes of later; completes when all have.
    pub async fn give_back_buffers(&self) {
        let (done, mut all_done) = mpsc::channel::<()>(1);
        self.on_each(move |_| {
            let _done = &done;
            transport::give_back_buffers();
        });
        // Nothing is ever sent: it ends when the last thread has dropped its job.
        let _ = all_done.recv().await;
    }

    /// Waits until every connection has ended and every tunnel is closed, with all that was still to be sent. Tunnels
    /// that peers opened must have been asked to end.
    pub async fn settle(&self) {
        let (closed, mut all_closed) = mpsc::channel::<()>(1);
        for index in 0..self.handles.len() {
            let closed = closed.clone();
            self.spawn_on(index, move |thread| async move {
                tokio::join!(thread.pool.close(), thread.fast.close());
                drop(closed);
            });
        }
        drop(closed);
        // Nothing is ever sent: it ends when the last thread has dropped its sender.
        let _ = all_closed.recv().await;
        while self.handles.iter().any(|handle| handle.load.load(Ordering::Relaxed) > 0) {
            tokio::time::sleep(SETTLING).await;
        }
    }

    /// Ends the threads: whatever they still carry is reset.
    pub fn stop(self) {
        drop(self.handles);
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// Counts a connection for its thread, as long as it is held.
pub struct LoadGuard(Arc<AtomicUsize>);

impl LoadGuard {
    fn new(load: &Arc<AtomicUsize>) -> Self {
        load.fetch_add(1, Ordering::Relaxed);
        Self(load.clone())
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn run(mut jobs: mpsc::UnboundedReceiver<Job>, index: usize, (pool, fast): (PoolSettings, fast::PoolSettings)) {
    let thread =
        Rc::new(Thread { pool: Pool::new(pool), fast: fast::Pool::new(fast), http: waypoint::Pool::default(), index });
    HERE.set(Some(thread.clone()));
    while let Some(job) = jobs.recv().await {
        job(thread.clone());
    }
    // What it owns ends with it, not with the thread's own end.
    HERE.set(None);
}

impl Thread {
    /// That of whoever asks; none outside of the workers.
    pub fn here() -> Option<Rc<Self>> {
        HERE.with_borrow(Clone::clone)
    }
}

/// A tunnel ends a round trip after its last stream, so this is seldom waited twice.
const SETTLING: Duration = Duration::from_millis(5);

thread_local! {
    static HERE: RefCell<Option<Rc<Thread>>> = const { RefCell::new(None) };
    static RANDOM: RefCell<Option<rand::rngs::StdRng>> = const { RefCell::new(None) };
}

/// The thread's own generator, seeded once from the system.
pub fn with_random<T>(f: impl FnOnce(&mut rand::rngs::StdRng) -> T) -> T {
    RANDOM.with_borrow_mut(|random| f(random.get_or_insert_with(rand::make_rng)))
}
