//! Counts what the core does, so that tests can say what a thing costs without a clock.

use std::cell::Cell;

thread_local! {
    static DONE: Cell<usize> = const { Cell::new(0) };
}

/// One step: a node of a map visited, a workload or a candidate built, a policy looked at.
pub(crate) fn step() {
    DONE.set(DONE.get() + 1);
}

/// How many steps something takes.
pub(crate) fn of<T>(something: impl FnOnce() -> T) -> usize {
    let before = DONE.get();
    something();
    DONE.get() - before
}
