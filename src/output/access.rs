//! The access rights of a file that takes another's place.

use std::fs::File;
#[cfg(unix)]
use std::fs::Permissions;
use std::io;
use std::path::Path;

/// Gives a new file the group, the access list and the mode of the one at `from`, which it is to
/// replace. Where it cannot have the group or the list, no user has more rights than before: all
/// but its owner then have fewer, or none.
#[cfg(unix)]
pub(super) fn take_access(file: &File, from: &Path, there: &std::fs::Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    // The mode comes last: until then the file is private.
    let (own, group) = (file.metadata()?.gid(), there.gid());
    let has_group = own == group || fchown(file, None, Some(group)).is_ok();
    let mode = match (take_list(file, from, has_group), has_group) {
        (None | Some(true), true) => there.mode() & 0o7777,
        (None, false) => of_another_group(there.mode()),
        // With a list, the mode's bits of the group are only a bound for what the list grants.
        (Some(_), _) => there.mode() & 0o700,
    };
    file.set_permissions(Permissions::from_mode(mode))
}

#[cfg(not(unix))]
pub(super) fn take_access(file: &File, _from: &Path, there: &std::fs::Metadata) -> io::Result<()> {
    file.set_permissions(there.permissions())
}

/// A mode in place of one that was about another group: both the new group, whose users were among
/// the others, and the others, who include the old group now, have what both had.
#[cfg(unix)]
pub(super) fn of_another_group(mode: u32) -> u32 {
    let both = (mode >> 3) & mode & 0o007;
    (mode & 0o700) | (both << 3) | both
}

/// The attribute that is a file's POSIX access list.
#[cfg(target_os = "linux")]
const LIST: &std::ffi::CStr = c"system.posix_acl_access";

/// Whether an error of a call about a file's access list says that there is none: the file has
/// none, its file system knows none, or the system refuses all such calls, as in a sandbox.
#[cfg(target_os = "linux")]
fn is_without_list(e: &io::Error) -> bool {
    use libc::{EINVAL, ENODATA, ENOSYS, ENOTSUP, EPERM};
    matches!(e.raw_os_error(), Some(ENODATA | ENOTSUP | EPERM | ENOSYS | EINVAL))
}

/// Gives a file the POSIX access list of the one at `from`, or none if that has none or the file
/// has another group: what a list says of the file's group would be about other users. Returns
/// whether it has that list, or nothing if neither has one.
#[cfg(target_os = "linux")]
fn take_list(file: &File, from: &Path, has_group: bool) -> Option<bool> {
    use std::ffi::CString;
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;
    let has_none = || is_without_list(&io::Error::last_os_error());
    // A thousand entries.
    let mut list = [0u8; 8 << 10];
    let Ok(path) = CString::new(from.as_os_str().as_bytes()) else { return Some(false) };
    let (to, most) = (list.as_mut_ptr().cast(), list.len());
    // SAFETY: both names end with a NUL, and at most as many bytes are written as there are.
    let length = unsafe { libc::getxattr(path.as_ptr(), LIST.as_ptr(), to, most) };
    let length = usize::try_from(length).ok();
    if length.is_none() && !has_none() {
        return Some(false);
    }
    let Some(length) = length.filter(|_| has_group) else {
        // The new file may have one from its folder.
        // SAFETY: the name ends with a NUL, and the file is open.
        let removed = unsafe { libc::fremovexattr(file.as_raw_fd(), LIST.as_ptr()) };
        let is_left = removed != 0 && !has_none();
        return (is_left || length.is_some()).then_some(false);
    };
    let from = list.as_ptr().cast();
    // SAFETY: the name ends with a NUL, the file is open, and `length` bytes were written above.
    Some(unsafe { libc::fsetxattr(file.as_raw_fd(), LIST.as_ptr(), from, length, 0) } == 0)
}

#[cfg(all(unix, not(target_os = "linux")))]
fn take_list(_file: &File, _from: &Path, _has_group: bool) -> Option<bool> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::output::tests::mode_of;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_list_is_not_given_without_the_group() {
        use std::os::fd::AsRawFd;
        let error = io::Error::from_raw_os_error;
        for code in [libc::ENODATA, libc::ENOTSUP, libc::EPERM, libc::ENOSYS, libc::EINVAL] {
            assert!(is_without_list(&error(code)), "{}", error(code));
        }
        for code in [libc::EIO, libc::EACCES, libc::ERANGE] {
            assert!(!is_without_list(&error(code)), "{}", error(code));
        }
        // Owner, one more user, group, bound, others: what each is, their rights, and who.
        let entries = [(1u16, 6u16, !0u32), (2, 4, 4321), (4, 4, !0), (16, 4, !0), (32, 0, !0)];
        let mut list = 2u32.to_le_bytes().to_vec();
        for (kind, rights, who) in entries {
            list.extend(kind.to_le_bytes());
            list.extend(rights.to_le_bytes());
            list.extend(who.to_le_bytes());
        }
        let give = |file: &File| {
            let (from, length) = (list.as_ptr().cast(), list.len());
            // SAFETY: the name ends with a NUL, the file is open, and the list is `length` bytes.
            unsafe { libc::fsetxattr(file.as_raw_fd(), LIST.as_ptr(), from, length, 0) == 0 }
        };
        let has_one = |file: &File| {
            let to = std::ptr::null_mut();
            // SAFETY: the name ends with a NUL, the file is open, and nothing is written.
            unsafe { libc::fgetxattr(file.as_raw_fd(), LIST.as_ptr(), to, 0) > 0 }
        };
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| folder.path().join(name));
        let [there, file] = [&from, &to].map(|path| File::create(path).unwrap());
        if !give(&there) {
            return eprintln!("skipped: files have no access lists here");
        }
        // As one that has a list from its folder, and is private while it is written.
        assert!(give(&file));
        file.set_permissions(Permissions::from_mode(0o600)).unwrap();
        assert_eq!(take_list(&file, &from, false), Some(false));
        assert!(!has_one(&file) && mode_of(&to) == 0o600);
        assert_eq!(take_list(&file, &from, true), Some(true));
        assert!(has_one(&file) && mode_of(&to) == 0o640);
    }
}
