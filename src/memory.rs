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

/// When memory is to be given back: once starting is over, once most of a load has gone, and once what was kept for the
/// next load has gone too.
#[derive(Debug, Default)]
pub struct GivingBack {
    /// The most connections at once since memory was given back.
    peak: usize,
    looks: u32,
    /// The look at which it is given back once more.
    again: Option<u32>,
}

impl GivingBack {
    /// To be called every second, with the number of connections that there are. Whether it is time.
    #[must_use]
    pub fn look(&mut self, connections: usize) -> bool {
        self.peak = self.peak.max(connections);
        self.looks = self.looks.saturating_add(1);
        let has_gone = self.peak >= WORTH_IT && connections <= self.peak / 2;
        if has_gone {
            self.again = Some(self.looks.saturating_add(KEPT_FOR));
        } else if self.again == Some(self.looks) {
            self.again = None;
        } else if self.looks != STARTING {
            return false;
        }
        self.peak = connections;
        true
    }
}

/// Gives back what nothing lies in, and the pages of the program itself: those that are needed come again from the page
/// cache when they are, and most of them only starting needed.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim gives free pages of the allocator back to the kernel, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
    for (start, length) in pages_of_program() {
        // SAFETY: the mapping is the program's file and never written to: what is read there next comes from that file,
        // which the kernel keeps from being changed while it runs (ETXTBSY).
        unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    }
}

/// Where the program lies in memory as it is in its file: parts that are not writable, and have not been.
fn pages_of_program() -> Vec<(usize, usize)> {
    let Ok(program) = std::fs::read_link("/proc/self/exe") else { return Vec::new() };
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    clean_parts(&maps, &program.to_string_lossy())
}

/// proc_pid_smaps(5): each mapping's line, and below it what is there of it.
fn clean_parts(maps: &str, program: &str) -> Vec<(usize, usize)> {
    let mut parts = Vec::new();
    let mut here = None;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match (words.next().unwrap_or_default(), words.next()) {
            // Relocated, or otherwise of its own.
            ("Anonymous:", Some("0")) => parts.extend(here.take()),
            ("Anonymous:", _) => here = None,
            (range, Some(rights)) if !range.ends_with(':') => {
                here = (rights.starts_with('r') && !rights.contains('w') && line.ends_with(program))
                    .then(|| range.split_once('-'))
                    .flatten()
                    .and_then(|(start, end)| {
                        let number = |text| usize::from_str_radix(text, 16).ok();
                        Some((number(start)?, number(end)?.checked_sub(number(start)?)?))
                    });
            }
            _ => {}
        }
    }
    parts
}

/// Larger pieces are asked of the kernel, and given back as soon as they are free.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 * 1024;
#[cfg(target_env = "gnu")]
const KEPT_AT_THE_END: libc::c_int = 1024 * 1024;
/// Fewer connections hold too little.
const WORTH_IT: usize = 16;
/// The look by which starting is over.
const STARTING: u32 = 3;
/// So many looks behind a load tunnels are closed that nobody needs any more.
const KEPT_FOR: u32 = 90;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_once_half_of_a_load_has_gone_and_once_more_later() {
        let mut giving = GivingBack::default();
        assert_eq!([0, 0, 0].map(|none| giving.look(none)), [false, false, true], "starting is over");
        assert!(!giving.look(100));
        assert!(!giving.look(60), "most of it is there yet");
        assert!(giving.look(50), "half of it has gone");
        assert!(giving.look(10), "and most of that");
        assert!(!giving.look(0), "too little to be worth it");
        let later: Vec<bool> = (0..KEPT_FOR * 2).map(|_| giving.look(0)).collect();
        assert_eq!(later.iter().position(|time| *time), Some(KEPT_FOR as usize - 2));
        assert_eq!(later.iter().filter(|time| **time).count(), 1);
    }

    #[test]
    fn of_the_program_only_what_is_as_in_its_file_is_let_go() {
        let maps = "\
7f0000000000-7f0000002000 r--p 00000000 fe:00 7 /bin/agent\nRss: 8 kB\nAnonymous: 0 kB\n\
7f0000002000-7f0000006000 r-xp 00002000 fe:00 7 /bin/agent\nRss: 16 kB\nAnonymous: 0 kB\n\
7f0000006000-7f0000007000 r--p 00006000 fe:00 7 /bin/agent\nRss: 4 kB\nAnonymous: 4 kB\n\
7f0000007000-7f0000008000 rw-p 00007000 fe:00 7 /bin/agent\nRss: 4 kB\nAnonymous: 0 kB\n\
7f0000008000-7f0000009000 rw-p 00000000 00:00 0 \nRss: 4 kB\nAnonymous: 0 kB\n\
7f0000009000-7f000000a000 r-xp 00000000 fe:00 9 /lib/other\nRss: 4 kB\nAnonymous: 0 kB\n";
        let parts = [(0x7f00_0000_0000, 0x2000), (0x7f00_0000_2000, 0x4000)];
        assert_eq!(clean_parts(maps, "/bin/agent"), parts);
    }

    #[test]
    fn what_was_let_go_is_there_again() {
        assert!(!pages_of_program().is_empty(), "a program without pages");
        give_back();
        let text: String = ["still", "here"].join(" ");
        assert_eq!(text, "still here");
    }
}
