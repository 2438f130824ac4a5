// SPDX-License-Identifier: Apache-2.0
//! The VMM locks itself in: after this, all that it can reach by a path are the shared trees.
//!
//! Mount, network, IPC and UTS namespaces of its own; the root is a read-only tmpfs that holds nothing but the trees'
//! mount points; the capabilities are those that a file server needs. The mounts exist in this mount namespace alone, so
//! they end with the process, however it ends.
//!
//! Only the calling thread moves in. Threads that are started later are born inside; those that live already must have
//! ended before the guest runs. Right before that the system calls are filtered that it may make from there on.

mod filter;
mod sys;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use caps::{CapSet, Capability};
use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
};
use rustix::process::DumpableBehavior;

use crate::config::{MachineConfig, PRIVATE_TAG, SHARED_TAG, ShareTree};
use crate::tree::{DetachedTree, mount_setattr};
pub use filter::filter_system_calls;
pub use sys::close_all_but;

/// What the file server needs of root: to act on files of any owner, and to give them their owner, mode and file
/// capabilities.
const KEPT_CAPABILITIES: [Capability; 5] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETFCAP,
];

/// A jail that could not be built: what was being done, and why it failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot lock the VMM in: cannot {doing}")]
pub struct JailError {
    /// Completes "cannot …".
    doing: String,
    #[source]
    source: io::Error,
}

impl JailError {
    fn new(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { doing: doing.into(), source: source.into() }
    }
}

/// Turns a system call's failure into an error that says what was being done.
fn cannot<E: Into<io::Error>>(doing: &str) -> impl FnOnce(E) -> JailError + '_ {
    move |source| JailError::new(doing, source)
}

/// The ways into the finished jail's trees, and to what is open.
#[derive(Debug)]
pub struct Jail {
    /// The directory of the private device's trees; absent without any, unless some can be added.
    pub private: Option<OwnedFd>,
    /// As above, of the shared device's.
    pub shared: Option<OwnedFd>,
    /// `/proc/self/fd`: how the file server opens a file that it holds by an `O_PATH` descriptor.
    pub proc_self_fd: OwnedFd,
}

/// Moves the calling thread into the jail. There is no way back.
///
/// # Errors
///
/// When a step fails; the process must end then.
pub fn enter(config: &MachineConfig) -> Result<Jail, JailError> {
    let namespaces =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    nix::sched::unshare(namespaces)
        .map_err(cannot("make namespaces (this needs root, or a user namespace: unshare --user --map-root-user)"))?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(cannot("keep mounts to itself"))?;
    let proc_self_fd = own_descriptors().map_err(cannot("open /proc/self/fd"))?;
    // In a mount namespace of this process' own user namespace it may, also where the host's is above that.
    let private = open(&config.private_trees)?;
    let shared = open(&config.shared_trees)?;

    let root = new_root().map_err(cannot("mount an empty root"))?;
    let private = config.has_private().then(|| place(&root, PRIVATE_TAG, private)).transpose()?;
    let shared = config.has_shared().then(|| place(&root, SHARED_TAG, shared)).transpose()?;
    mount_setattr(root.as_fd(), false, MountAttrFlags::MOUNT_ATTR_RDONLY).map_err(cannot("make its root read-only"))?;
    change_root(&root).map_err(cannot("change its root"))?;
    drop_privileges()?;
    Ok(Jail { private, shared, proc_self_fd })
}

/// `/proc/self/fd`, as a mount of its own that has no place: `..` ends there. From the directory in the host's /proc it would lead
/// to the host's root, whatever this process' own is.
fn own_descriptors() -> Result<OwnedFd, Errno> {
    open_tree(rustix::fs::CWD, "/proc/self/fd", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
}

/// A tmpfs, mounted over this namespace's root directory.
fn new_root() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "mode", "0755")?;
    fsconfig_set_string(context.as_fd(), "size", "1M")?;
    fsconfig_create(context.as_fd())?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(root.as_fd(), c"", rustix::fs::CWD, c"/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(root)
}

/// A tree of the description, and its mounts.
type OpenTree<'a> = (&'a ShareTree, DetachedTree);

fn open(trees: &[ShareTree]) -> Result<Vec<OpenTree<'_>>, JailError> {
    let open = |tree: &ShareTree| {
        DetachedTree::open(tree).map_err(|source| JailError::new(format!("share {}", tree.source.display()), source))
    };
    trees.iter().map(|tree| Ok((tree, open(tree)?))).collect()
}

/// Mounts a device's trees below its own directory, and opens that.
fn place(root: &OwnedFd, tag: &str, trees: Vec<OpenTree<'_>>) -> Result<OwnedFd, JailError> {
    let doing = || format!("make the directory of the {tag} trees");
    rustix::fs::mkdirat(root, tag, Mode::from_raw_mode(0o755)).map_err(|source| JailError::new(doing(), source))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory =
        rustix::fs::openat(root, tag, flags, Mode::empty()).map_err(|source| JailError::new(doing(), source))?;
    for (tree, mounts) in trees {
        attach(&mounts, &tree.name, &directory)
            .map_err(|errno| JailError::new(format!("mount {} as {}", tree.source.display(), tree.name), errno))?;
    }
    Ok(directory)
}

/// Mounts a tree under its name in `directory`. Two trees cannot have one name.
fn attach(tree: &DetachedTree, name: &str, directory: &OwnedFd) -> Result<(), Errno> {
    if tree.is_dir() {
        rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755))?;
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o644))?;
    }
    move_mount(tree.mount(), c"", directory, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Makes `root` the root directory and lets go of the old one.
fn change_root(root: &OwnedFd) -> Result<(), Errno> {
    const HERE: &CStr = c".";
    rustix::process::fchdir(root)?;
    // pivot_root(2): with both arguments the same, the old root ends up mounted on top, from where it is detached.
    rustix::process::pivot_root(HERE, HERE)?;
    unmount(HERE, UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")
}

fn drop_privileges() -> Result<(), JailError> {
    let failed =
        |source: caps::errors::CapsError| JailError::new("drop capabilities", io::Error::other(source.to_string()));
    let kept = caps::CapsHashSet::from(KEPT_CAPABILITIES);
    caps::clear(None, CapSet::Ambient).map_err(failed)?;
    let bounding = caps::read(None, CapSet::Bounding).map_err(failed)?;
    for capability in bounding.difference(&kept) {
        caps::drop(None, CapSet::Bounding, *capability).map_err(failed)?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(failed)?;
    let held = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let kept = kept.intersection(&held).copied().collect();
    caps::set(None, CapSet::Effective, &kept).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed)?;
    rustix::thread::set_no_new_privs(true).map_err(cannot("set no_new_privs"))?;
    // Others of the same user and rights, of other sandboxes, cannot look into it; and what handles core files on the host
    // is not called.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(cannot("keep others from looking into it"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    #[ignore = "needs root"]
    fn own_descriptors_lead_to_what_is_open_and_nowhere_else() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"open").unwrap();
        file.rewind().unwrap();
        // Of this thread alone.
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();

        let folder = own_descriptors().unwrap();

        let number = file.as_raw_fd().to_string();
        let again = rustix::fs::openat(&folder, number, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut text = String::new();
        std::fs::File::from(again).read_to_string(&mut text).unwrap();
        assert_eq!(text, "open");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let above = rustix::fs::openat(&folder, "../../..", flags, Mode::empty()).unwrap();
        let (own, above) = (rustix::fs::fstat(&folder).unwrap(), rustix::fs::fstat(&above).unwrap());
        assert_eq!((own.st_dev, own.st_ino), (above.st_dev, above.st_ino));
    }
}
