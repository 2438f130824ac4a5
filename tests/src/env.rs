// SPDX-License-Identifier: Apache-2.0
//! What one case works with: the runtime, its own folders, its own ids.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::failure::{Context as _, Result, ensure, skip};

/// Which runtime is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Bulkhead,
    /// Another OCI runtime (runc, crun), to check the cases.
    Other,
}

/// How long what was killed may take to let go of a mount.
const SETTLE: Duration = Duration::from_secs(10);

/// Guests that an emulated processor may lose in a case of hundreds of starts.
const MOST_LOST: u32 = 2;

/// Whether this machine's processor is emulated (QEMU's TCG).
pub(crate) fn is_emulated() -> bool {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    processor.lines().any(|line| line.starts_with("model name") && line.contains("QEMU TCG"))
}

/// The surroundings of one case.
#[derive(Debug)]
pub(crate) struct Env {
    pub(crate) runtime: PathBuf,
    pub(crate) kind: Kind,
    /// The case's own folder, removed after it.
    pub(crate) work: PathBuf,
    /// The `--root` that every run uses unless told otherwise; nothing may be left below it.
    pub(crate) root: PathBuf,
    debian: Option<PathBuf>,
    ids: AtomicU32,
    lost: AtomicU32,
    mounts: Mutex<Vec<PathBuf>>,
}

impl Env {
    pub(crate) fn new(runtime: &Path, work: &Path) -> Result<Self> {
        let name = runtime.file_name().unwrap_or_default();
        let kind = if name == "runc" || name == "crun" { Kind::Other } else { Kind::Bulkhead };
        let root = work.join("root");
        fs::create_dir_all(&root).context(|| format!("making {}", root.display()))?;
        Ok(Self {
            runtime: runtime.to_owned(),
            kind,
            work: work.to_owned(),
            root,
            debian: std::env::var_os("BULKHEAD_TEST_DEBIAN").filter(|path| !path.is_empty()).map(PathBuf::from),
            ids: AtomicU32::new(0),
            lost: AtomicU32::new(0),
            mounts: Mutex::default(),
        })
    }

    /// A container id that no other case uses.
    pub(crate) fn id(&self) -> String {
        format!("{}{}", self.id_prefix(), self.ids.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// What all ids of this case begin with.
    pub(crate) fn id_prefix(&self) -> String {
        format!("e2e-{}-", std::process::id())
    }

    /// Whether a start that failed with this text is to be forgiven: an emulated processor (QEMU's TCG) spoils a guest's
    /// flags once in some hundred boots, to what no instruction of its kernel sets, and that panics. Told on stdout, and not
    /// forgiven again and again.
    pub(crate) fn forgives(&self, text: &str) -> bool {
        let forgiven = text.contains("the guest's kernel panicked")
            && is_emulated()
            && self.lost.load(Ordering::Relaxed) < MOST_LOST;
        if forgiven {
            self.lost.fetch_add(1, Ordering::Relaxed);
            println!("forgiven: {text}");
        }
        forgiven
    }

    /// A new folder of that name.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.work.join(name);
        fs::create_dir_all(&path).context(|| format!("making {}", path.display()))?;
        Ok(path)
    }

    /// Skips the case unless it is Bulkhead that is tested.
    pub(crate) fn only_bulkhead(&self) -> Result {
        match self.kind {
            Kind::Bulkhead => Ok(()),
            Kind::Other => skip!("holds for Bulkhead only"),
        }
    }

    /// The Debian root file system, or a skip that says how to get it.
    pub(crate) fn debian(&self) -> Result<&Path> {
        match &self.debian {
            Some(path) if path.join("etc/debian_version").exists() => Ok(path),
            Some(path) => skip!("BULKHEAD_TEST_DEBIAN={} is no Debian root file system", path.display()),
            None => skip!("BULKHEAD_TEST_DEBIAN is not set (tests/rootfs/make-debian makes the root file system)"),
        }
    }

    /// Removes what killed runs left below the root, by the runtime's own means.
    pub(crate) fn clean_up(&self) -> Result {
        match self.kind {
            // It sweeps what a killed command left.
            Kind::Bulkhead => self.call(["check"]).output().map(drop),
            Kind::Other => {
                for entry in fs::read_dir(&self.root)? {
                    let id = entry?.file_name();
                    self.call(["delete".into(), "--force".into(), id]).output()?.expect_code(0)?;
                }
                Ok(())
            }
        }
    }

    /// Gives this case, and what it starts from then on, a network of its own: bridges and rules of an engine's are not the
    /// host's, and end with it.
    pub(crate) fn own_network(&self) -> Result {
        unshare(CloneFlags::CLONE_NEWNET).context(|| "making a network namespace".to_owned())?;
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
        ensure!(up.success(), "turning on the loopback interface: {up}");
        Ok(())
    }

    /// Mounts something for this case; it is unmounted at its end.
    pub(crate) fn mount(&self, kind: &str, source: &str, target: &Path, options: &str) -> Result {
        mount(Some(source), target, Some(kind), MsFlags::empty(), Some(options))
            .context(|| format!("mounting {kind} on {}", target.display()))?;
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner).push(target.to_owned());
        Ok(())
    }

    /// Gives a mount of this case other flags.
    pub(crate) fn remount(&self, target: &Path, flags: MsFlags) -> Result {
        let none: Option<&str> = None;
        mount(none, target, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, none)
            .context(|| format!("mounting {} again", target.display()))
    }

    /// Binds a folder; undone likewise.
    pub(crate) fn bind(&self, source: &Path, target: &Path) -> Result {
        let none: Option<&str> = None;
        mount(Some(source), target, none, MsFlags::MS_BIND, none)
            .context(|| format!("binding {} on {}", source.display(), target.display()))?;
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner).push(target.to_owned());
        Ok(())
    }

    /// Undoes [`Self::mount`]. A mount that something uses, and does not let go of soon, is an error.
    pub(crate) fn unmount_all(&self) -> Result {
        let mounts = std::mem::take(&mut *self.mounts.lock().unwrap_or_else(PoisonError::into_inner));
        for target in mounts.into_iter().rev() {
            let end = Instant::now() + SETTLE;
            loop {
                match umount2(&target, MntFlags::empty()) {
                    // A killed machine's end is not waited for by anyone.
                    Err(Errno::EBUSY) if Instant::now() < end => thread::sleep(Duration::from_millis(50)),
                    result => break result.context(|| format!("unmounting {}", target.display()))?,
                }
            }
        }
        Ok(())
    }
}
