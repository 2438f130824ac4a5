// SPDX-License-Identifier: Apache-2.0
//! The place where everything is measured: a root on a tmpfs that holds the measured programs with their libraries and
//! data, and nothing else, so that no file comes from a disk or from another machine while a clock runs.
//!
//! The root is this process' own: it lives in a mount namespace of its own, and is gone with it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};

use crate::error::{BenchError, file};

/// Where the new root is put together; what is there is only covered, in our own namespace.
const MOUNT_POINT: &str = "/mnt";

/// A root under construction.
#[derive(Debug)]
pub(crate) struct Stage {
    root: PathBuf,
}

impl Stage {
    /// Leaves the caller's mount namespace and mounts the empty new root.
    ///
    /// # Errors
    ///
    /// Needs root's privileges; fails with the call that was refused.
    pub(crate) fn new() -> Result<Self, BenchError> {
        unshare(CloneFlags::CLONE_NEWNS).map_err(file("leave the mount namespace of", "this process"))?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(file("make private", "/"))?;
        mount(Some("bench"), MOUNT_POINT, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .map_err(file("mount a tmpfs on", MOUNT_POINT))?;
        Ok(Self { root: MOUNT_POINT.into() })
    }

    /// The place of `path`, absolute, before the stage is entered.
    pub(crate) fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Copies the file `from` to `to`, following symbolic links, with its mode.
    ///
    /// # Errors
    ///
    /// The file that could not be copied.
    pub(crate) fn copy(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<(), BenchError> {
        let (from, to) = (from.as_ref(), self.at(to));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(file("create", parent))?;
        }
        fs::copy(from, &to).map_err(file("copy", from))?;
        Ok(())
    }

    /// Copies all files of the folder `from`, without its subfolders, to the folder `to`.
    ///
    /// # Errors
    ///
    /// The file or folder that could not be read or copied.
    pub(crate) fn copy_folder(&self, from: &Path, to: &Path) -> Result<(), BenchError> {
        for entry in fs::read_dir(from).map_err(file("list", from))? {
            let entry = entry.map_err(file("list", from))?;
            // A dangling link is of no use to anyone.
            if fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file()) {
                self.copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok(())
    }

    /// Copies the program `name` from PATH, to the same path, with the libraries it is linked with. Gives its path.
    ///
    /// # Errors
    ///
    /// The program is not there, or one of its files cannot be copied.
    pub(crate) fn program(&self, name: &str) -> Result<PathBuf, BenchError> {
        let path = find_program(name)?;
        self.copy(&path, &path)?;
        self.libraries(&path)?;
        Ok(path)
    }

    /// Copies the libraries that the program at `path` is linked with, to the same paths.
    ///
    /// # Errors
    ///
    /// `ldd` cannot be run, or a library cannot be copied.
    pub(crate) fn libraries(&self, path: &Path) -> Result<(), BenchError> {
        self.libraries_below(Path::new("/"), path)
    }

    /// The same, to a root file system at `root` on the stage.
    ///
    /// # Errors
    ///
    /// As of [`Self::libraries`].
    pub(crate) fn libraries_below(&self, root: &Path, path: &Path) -> Result<(), BenchError> {
        let output = Command::new("ldd").arg(path).output().map_err(file("run ldd on", path))?;
        // A static program: ldd says so and fails.
        for library in library_paths(&String::from_utf8_lossy(&output.stdout)) {
            let to = root.join(library.strip_prefix("/").unwrap_or(&library));
            if !self.at(&to).exists() {
                self.copy(&library, &to)?;
            }
        }
        Ok(())
    }

    /// Makes the stage this process' root, with fresh /proc, and the machine's /dev and /sys.
    ///
    /// # Errors
    ///
    /// The mount that was refused.
    pub(crate) fn enter(self) -> Result<(), BenchError> {
        if Path::new("/etc/ld.so.cache").exists() {
            self.copy("/etc/ld.so.cache", "/etc/ld.so.cache")?;
        }
        for folder in ["dev", "sys", "proc", "tmp", "run", "outside"] {
            let path = self.at(folder);
            fs::create_dir_all(&path).map_err(file("create", &path))?;
        }
        let none = None::<&str>;
        for folder in ["/dev", "/sys"] {
            mount(Some(folder), &self.at(folder), none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
                .map_err(file("bind", folder))?;
        }
        mount(Some("proc"), &self.at("proc"), Some("proc"), MsFlags::empty(), none).map_err(file("mount", "/proc"))?;
        pivot_root(&self.root, &self.at("outside")).map_err(file("pivot to", &self.root))?;
        chdir("/").map_err(file("change to", "/"))?;
        umount2("/outside", MntFlags::MNT_DETACH).map_err(file("unmount", "/outside"))
    }
}

/// The path of the program `name` in PATH.
///
/// # Errors
///
/// It is not there.
pub(crate) fn find_program(name: &str) -> Result<PathBuf, BenchError> {
    let path = env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let found = env::split_paths(&path).chain(sbin).map(|folder| folder.join(name)).find(|path| is_program(path));
    found.ok_or_else(|| BenchError::NoProgram(name.to_owned()))
}

fn is_program(path: &Path) -> bool {
    path.is_absolute() && path.file_name() != Some(OsStr::new("")) && path.metadata().is_ok_and(|file| file.is_file())
}

/// The paths in what ldd prints: `name => PATH (0x…)`, and `PATH (0x…)` for the loader itself.
fn library_paths(ldd: &str) -> Vec<PathBuf> {
    let words = ldd.lines().map(|line| line.rsplit_once("=> ").map_or(line, |(_, path)| path));
    let paths = words.filter_map(|line| line.trim().rsplit_once(" (0x").map(|(path, _)| PathBuf::from(path)));
    paths.filter(|path| path.is_absolute()).collect()
}

/// Reads a small text file.
///
/// # Errors
///
/// The file's path and why it could not be read.
pub(crate) fn read(path: impl AsRef<Path>) -> Result<String, BenchError> {
    fs::read_to_string(path.as_ref()).map_err(file::<io::Error>("read", path.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_prints() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibz.so.1 => /lib/libz.so.1 (0x00007f11)\n\
                   \tlibgone.so => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f12)\n";

        let paths = library_paths(ldd);

        assert_eq!(paths, ["/lib/libz.so.1", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from));
    }

    #[test]
    fn static_program_has_no_libraries() {
        assert!(library_paths("\tnot a dynamic executable\n").is_empty());
    }
}
