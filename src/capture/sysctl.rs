//! Writing a setting of the thread's present network namespace.
//!
//! In a container that is not privileged `/proc/sys` is read-only: an overmount, in front of a file system that our
//! rights suffice for. A second instance of it, which is mounted nowhere, has no such front.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

/// Writes `/proc/sys/...`.
pub fn write(path: &str, value: &str) -> io::Result<()> {
    match fs::write(path, value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let below = path.strip_prefix("/proc/").unwrap_or(path);
            fs::write(Path::new("/proc/self/fd").join(own_proc()?.as_raw_fd().to_string()).join(below), value)
        }
        written => written,
    }
}

/// An instance of procfs that is mounted nowhere, made once.
fn own_proc() -> io::Result<&'static OwnedFd> {
    static OWN: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let made = mount_proc()?;
    Ok(OWN.get_or_init(|| made))
}

/// fsopen(2), fsconfig(2) and fsmount(2), of Linux 5.2.
fn mount_proc() -> io::Result<OwnedFd> {
    let name = CString::new("proc")?;
    // SAFETY: the name ends in a zero, and lives longer than the call.
    let context = made(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) })?;
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: the descriptor is open, and this command takes neither key nor value.
    let created = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0) };
    if created != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and is the one made above.
    made(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })
}

fn made(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the call succeeded, so this is a new descriptor of ours alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `linux/mount.h`.
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
