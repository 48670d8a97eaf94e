//! What this process holds of the machine's memory.

/// Keeps the allocator from holding on to what a load has needed: to be called before any thread is started.
///
/// glibc raises the size from which it asks the kernel for memory of its own, each time that such memory is freed, and
/// then keeps up to twice as much at the end of each of its arenas.
pub fn tune() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, KEPT_AT_THE_END)] {
        // SAFETY: mallopt changes numbers of the allocator, and refuses by its result what it does not know.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives memory back once most of a load has gone.
#[derive(Debug, Default)]
pub struct GivingBack {
    /// The most connections at once since memory was given back.
    peak: usize,
}

impl GivingBack {
    /// To be called now and then, with the number of connections that there are.
    pub fn look(&mut self, connections: usize) {
        self.peak = self.peak.max(connections);
        if self.peak >= WORTH_IT && connections <= self.peak / 2 {
            self.peak = connections;
            give_back();
        }
    }
}

fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim gives free pages of the allocator back to the kernel, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Larger pieces are asked of the kernel, and given back as soon as they are free.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 * 1024;
#[cfg(target_env = "gnu")]
const KEPT_AT_THE_END: libc::c_int = 1024 * 1024;
/// Fewer connections hold too little.
const WORTH_IT: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_once_half_of_a_load_has_gone() {
        let mut giving = GivingBack::default();
        let mut peak_after = |connections| {
            giving.look(connections);
            giving.peak
        };
        assert_eq!(peak_after(100), 100);
        assert_eq!(peak_after(60), 100, "most of it is there yet");
        assert_eq!(peak_after(50), 50, "half of it has gone");
        assert_eq!(peak_after(10), 10);
        assert_eq!(peak_after(0), 10, "too little to be worth it");
    }
}
