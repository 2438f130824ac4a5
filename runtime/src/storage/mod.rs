// SPDX-License-Identifier: Apache-2.0
//! Which files of the host a guest gets to see: its root file system and the sources of its bind mounts, each a tree
//! of a share device.

pub(crate) mod block_device;
mod host_socket;
mod memory_volume;
pub(crate) mod mount_points;
pub(crate) mod mount_tree;
mod mountinfo;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{ShareDevice, SharePath};
use bulkhead_vmm::config::{PART_PREFIX, ShareTree};
use nix::sys::stat::{major, minor};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, statx};
use thiserror::Error;

pub(crate) use self::host_socket::HostSocket;
pub(crate) use self::memory_volume::MemoryVolume;
pub(crate) use self::mountinfo::mounts_below;
use crate::user_namespace::is_root_of_host;

/// The name of the tree that holds the root file system.
const ROOTFS_TREE: &str = "rootfs";

/// Devices of the host that every guest has as well, major and minor number: null, zero, full, random, urandom, tty,
/// net/tun, fuse.
const COMMON_DEVICES: &[(u64, u64)] = &[(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (10, 200), (10, 229)];

/// The trees of one sandbox, as they are collected.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Shares {
    /// Trees that nobody else writes while the sandbox lives.
    pub(crate) private: Vec<ShareTree>,
    /// Trees that the host may change at any time.
    pub(crate) shared: Vec<ShareTree>,
    /// What begins the names of the trees of a container in a pod.
    prefix: Option<String>,
}

/// Where the guest finds the source of a bind mount.
#[derive(Debug, PartialEq)]
pub(crate) enum BindSource {
    /// In a shared tree.
    Share {
        /// The place.
        path: SharePath,
        /// Whether it is a directory.
        is_dir: bool,
    },
    /// A character device that the guest has itself.
    GuestDevice {
        /// Its major number.
        major: i64,
        /// Its minor number.
        minor: i64,
    },
    /// A socket of the host, at this path.
    Socket(PathBuf),
}

/// A source that cannot be shared with a guest.
#[derive(Debug, Error)]
pub(crate) enum ShareError {
    #[error(transparent)]
    Path(#[from] io::Error),
    #[error("it is a {0}, which cannot be shared with a virtual machine")]
    Kind(&'static str),
    #[error("it is not a folder")]
    NotAFolder,
}

/// The options by which a guest's tmpfs is like the one that is mounted at `path`; `None` if none is.
pub(crate) fn tmpfs_options(path: &Path) -> Option<String> {
    is_tmpfs(path).then(|| options_of(tmpfs_size(path)))
}

fn options_of(size: Option<u64>) -> String {
    let size = size.map(|size| format!(",size={size}")).unwrap_or_default();
    format!("mode=1777{size}")
}

/// What the mount at a path does not allow of its files, as MS_* flags: set-user-ids, devices, programs. What cannot be found out is
/// left to the mount itself.
pub(crate) fn restrictions(path: &Path) -> u64 {
    // The flags of statvfs(3) have the values of mount(2)'s.
    let flags = rustix::fs::statvfs(path).map_or(0, |status| status.f_flag.bits());
    flags & (libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC)
}

/// Whether a path lies on a tmpfs.
fn is_tmpfs(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|status| i128::from(status.f_type) == i128::from(libc::TMPFS_MAGIC))
}

/// The size of the file system at a path; `None` for one without a limit, for which the guest's memory is one.
fn tmpfs_size(path: &Path) -> Option<u64> {
    let status = rustix::fs::statfs(path).ok()?;
    size_of_blocks(u64::try_from(status.f_bsize).unwrap_or(0), status.f_blocks)
}

fn size_of_blocks(block_size: u64, blocks: u64) -> Option<u64> {
    Some(block_size.saturating_mul(blocks)).filter(|size| *size > 0)
}

impl Shares {
    /// Those of a container in a pod.
    pub(crate) fn of_pod(prefix: &str) -> Self {
        Self { prefix: Some(prefix.to_owned()), ..Self::default() }
    }

    /// Whether the container is in a pod.
    pub(crate) fn are_of_pod(&self) -> bool {
        self.prefix.is_some()
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix.as_deref().unwrap_or_default())
    }

    /// Takes the root file system.
    ///
    /// # Errors
    ///
    /// It is absent, or not a folder.
    pub(crate) fn add_rootfs(&mut self, source: &Path, read_only: bool) -> Result<SharePath, ShareError> {
        let source = fs::canonicalize(source)?;
        if !fs::metadata(&source)?.is_dir() {
            return Err(ShareError::NotAFolder);
        }
        let name = self.name(ROOTFS_TREE);
        let path = share_path(ShareDevice::PRIVATE, &name);
        self.private.push(ShareTree { name, source, read_only, recursive: true, follows: false });
        Ok(path)
    }

    /// Takes the source of a bind mount; if `recursive`, with what is mounted below it. The same source in the same mode
    /// is taken once. What is mounted below a folder while the guest runs is seen if it `follows` the host. One whose ids the
    /// guest is to map is not a file system of its own there, and does not follow.
    ///
    /// # Errors
    ///
    /// It is absent, or something that means nothing in another machine: a named pipe, most devices.
    pub(crate) fn add_bind(
        &mut self,
        source: &Path,
        read_only: bool,
        recursive: bool,
        follows: bool,
        id_mapped: bool,
    ) -> Result<BindSource, ShareError> {
        let source = fs::canonicalize(source)?;
        let metadata = fs::metadata(&source)?;
        let kind = metadata.file_type();
        if kind.is_char_device() {
            let number = (major(metadata.rdev()), minor(metadata.rdev()));
            if !COMMON_DEVICES.contains(&number) {
                return Err(ShareError::Kind("device of the host that the guest does not have"));
            }
            return Ok(BindSource::GuestDevice { major: number.0.cast_signed(), minor: number.1.cast_signed() });
        }
        if kind.is_socket() {
            return Ok(BindSource::Socket(source));
        }
        if !kind.is_dir() && !kind.is_file() {
            return Err(ShareError::Kind(if kind.is_fifo() { "named pipe" } else { "block device" }));
        }
        // A copy of a mount is for the owner of its namespace to make.
        let follows = follows && kind.is_dir() && !id_mapped && is_root_of_host() && mount_tree::spreads(&source);
        let name = String::new();
        let name = self.shared_tree(ShareTree { name, source, read_only, recursive, follows }, id_mapped);
        Ok(BindSource::Share { path: share_path(ShareDevice::SHARED, &name), is_dir: kind.is_dir() })
    }

    /// Names a tree, and takes it unless it is there.
    fn shared_tree(&mut self, tree: ShareTree, id_mapped: bool) -> String {
        let prefix = if id_mapped { PART_PREFIX } else { "" };
        let name = format!("{prefix}{}", self.name(&format!("m{}", self.shared.len())));
        let tree = ShareTree { name, ..tree };
        let same = self.shared.iter().find(|known| {
            let name = known.name.clone();
            name.starts_with(PART_PREFIX) == id_mapped && ShareTree { name, ..tree.clone() } == **known
        });
        if let Some(known) = same {
            return known.name.clone();
        }
        self.shared.push(tree.clone());
        tree.name
    }
}

/// The mount that a path leads to.
pub(crate) fn mount_id(path: &Path) -> io::Result<u64> {
    mount_id_of(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// The mount that a file was opened in.
pub(crate) fn mount_id_of(file: impl AsFd) -> io::Result<u64> {
    Ok(statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// The top of a tree.
fn share_path(device: ShareDevice, tree: &str) -> SharePath {
    SharePath { device: device.into(), tree: tree.to_owned(), ..SharePath::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    #[test]
    fn folders_and_files_become_trees_once_each() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "").unwrap();
        symlink(&file, dir.path().join("link")).unwrap();
        let mut shares = Shares::default();

        let folder = shares.add_bind(dir.path(), false, true, false, false).unwrap();
        let by_name = shares.add_bind(&file, true, true, false, false).unwrap();
        let by_link = shares.add_bind(&dir.path().join("link"), true, true, false, false).unwrap();
        shares.add_bind(&file, false, true, false, false).unwrap();

        assert!(matches!(folder, BindSource::Share { is_dir: true, .. }));
        assert!(matches!(&by_name, BindSource::Share { is_dir: false, path } if path.tree == "m1"));
        assert_eq!(by_name, by_link);
        assert_eq!(shares.shared.iter().map(|tree| tree.read_only).collect::<Vec<_>>(), [false, true, false]);
        shares.add_bind(&file, false, false, false, false).unwrap();
        assert_eq!(shares.shared.len(), 4);
    }

    #[test]
    fn trees_of_a_pods_container_have_names_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let mut shares = Shares::of_pod("c16-");

        let rootfs = shares.add_rootfs(dir.path(), false).unwrap();
        let bound = shares.add_bind(dir.path(), false, true, false, false).unwrap();

        assert_eq!(rootfs.tree, "c16-rootfs");
        assert!(matches!(bound, BindSource::Share { path, .. } if path.tree == "c16-m0"));
        assert!(shares.are_of_pod() && !Shares::default().are_of_pod());
    }

    #[test]
    fn a_tmpfs_is_known_with_its_size() {
        assert_eq!(options_of(size_of_blocks(4096, 16384)), "mode=1777,size=67108864");
        assert_eq!(options_of(size_of_blocks(4096, 0)), "mode=1777");
        assert_eq!(tmpfs_options(Path::new("/proc")), None);
        assert_eq!(tmpfs_options(Path::new("/no/such")), None);
    }

    #[test]
    fn common_devices_are_the_guests_own() {
        let bound = Shares::default().add_bind(Path::new("/dev/null"), false, false, false, false).unwrap();

        assert_eq!(bound, BindSource::GuestDevice { major: 1, minor: 3 });
    }

    #[test]
    fn a_socket_is_no_tree() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().canonicalize().unwrap().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        symlink("s", dir.path().join("link")).unwrap();
        let mut shares = Shares::default();

        let bound = shares.add_bind(&dir.path().join("link"), false, false, false, false).unwrap();

        assert_eq!(bound, BindSource::Socket(socket));
        assert_eq!(shares, Shares::default());
    }

    #[test]
    fn a_named_pipe_cannot_be_shared() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("p");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();

        let error = Shares::default().add_bind(&pipe, false, false, false, false).unwrap_err();

        assert!(matches!(error, ShareError::Kind("named pipe")), "{error}");
    }

    #[test]
    fn an_absent_source_and_a_rootfs_that_is_a_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "").unwrap();
        let mut shares = Shares::default();

        assert!(matches!(
            shares.add_bind(&dir.path().join("absent"), false, false, false, false),
            Err(ShareError::Path(_))
        ));
        assert!(matches!(shares.add_rootfs(&file, false), Err(ShareError::NotAFolder)));
        assert_eq!(shares, Shares::default());
    }
}
