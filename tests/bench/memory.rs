//! What a model of a large cluster takes: resident memory, the time to build it, and how long a reader waits
//! meanwhile.
//!
//! `cargo bench --bench memory`

mod cluster;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::Cluster;
use selvedge::model::{Delta, Model};

fn main() {
    let size = Cluster::LARGE;
    let model = Model::new(Cluster::settings());
    // What is not the model's own is paid before it is measured.
    model.apply(Cluster::SMALL.deltas());
    let before = resident();
    let (building, longest) = while_read(&model, || size.deltas().for_each(|delta| model.apply([delta])));
    let after = resident();
    println!("{} pods, {} Services, {} policies", size.pods, size.services(), size.policies);
    println!(
        "memory:          {} MiB, {} bytes a pod with all of these",
        (after - before) >> 20,
        (after - before) / size.pods
    );
    println!("object by object: {building:.1?}; a reader waited {longest:.1?} at most");

    let at_once = Model::new(Cluster::settings());
    let deltas: Vec<Delta> = size.deltas().collect();
    let (building, longest) = while_read(&at_once, || at_once.apply(deltas));
    println!("in one step:      {building:.1?}; a reader waited {longest:.1?} at most");

    let (changing, longest) = while_read(&model, || (0..CHANGES).for_each(|n| model.apply([changed(n)])));
    println!("{CHANGES} changes:   {:.1?} each; a reader waited {longest:.1?} at most", changing / CHANGES as u32);
    let grown = resident().saturating_sub(after);
    drop(at_once);
    println!("memory after them: {} KiB more, the second model still held", grown >> 10);
}

/// The time that something takes, and the longest that a look-up took meanwhile on another thread.
fn while_read(model: &Model, something: impl FnOnce()) -> (Duration, Duration) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !done.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let state = model.read();
                std::hint::black_box(state.mesh.destination(cluster::pod_address(0)));
                std::hint::black_box(state.mesh.destination(cluster::service_address(0)));
                drop(state);
                longest = longest.max(begun.elapsed());
            }
            longest
        });
        let begun = Instant::now();
        something();
        let taken = begun.elapsed();
        done.store(true, Ordering::Relaxed);
        (taken, reader.join().unwrap_or_default())
    })
}

/// A slice that has an endpoint less.
fn changed(n: usize) -> Delta {
    cluster::apply(cluster::slice(n % Cluster::LARGE.services(), 9))
}

/// Resident memory in bytes.
fn resident() -> usize {
    let pages = fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.as_deref().and_then(|text| text.split(' ').nth(1)?.parse::<usize>().ok());
    pages.unwrap_or_default() * 4096
}

const CHANGES: usize = 10_000;
