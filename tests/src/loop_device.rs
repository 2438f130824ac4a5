// SPDX-License-Identifier: Apache-2.0
//! Block devices of this host that are files (loop(4)).

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use crate::env::Env;
use crate::failure::{Context as _, Result, ensure};

/// How long a device may take to be gone that nobody has open.
const LIMIT: Duration = Duration::from_secs(10);

/// A block device, detached from its file when dropped.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    pub(crate) path: PathBuf,
    pub(crate) major: u64,
    pub(crate) minor: u64,
}

impl LoopDevice {
    /// A device on a new file of so many bytes.
    pub(crate) fn new(env: &Env, length: u64) -> Result<Self> {
        Self::attach(env, length, &[])
    }

    /// The same, which cannot be written to.
    pub(crate) fn read_only(env: &Env, length: u64) -> Result<Self> {
        Self::attach(env, length, &["--read-only"])
    }

    fn attach(env: &Env, length: u64, options: &[&str]) -> Result<Self> {
        env.tool(Path::new("modprobe"), ["loop"]).output()?.expect_code(0)?;
        let image = (1..).map(|number| env.work.join(format!("disk{number}.img"))).find(|image| !image.exists());
        let image = image.unwrap_or_default();
        File::create(&image).and_then(|file| file.set_len(length)).context(|| format!("making {}", image.display()))?;
        let words = ["--find", "--show"].iter().chain(options).map(|word| (*word).into());
        let output = env.tool(Path::new("losetup"), words.chain([image.into_os_string()])).output()?;
        output.expect_code(0)?;
        let path = PathBuf::from(output.stdout().trim_end());
        let number = fs::metadata(&path).context(|| format!("looking at {}", path.display()))?.rdev();
        Ok(Self { path, major: major(number), minor: minor(number) })
    }

    /// Its entry for `linux.devices`, at that path of a container.
    pub(crate) fn at(&self, path: &str) -> Value {
        json!({ "path": path, "type": "b", "major": self.major, "minor": self.minor, "fileMode": 0o660, "uid": 0, "gid": 0 })
    }

    /// A rule for it.
    pub(crate) fn rule(&self, allow: bool, access: &str) -> Value {
        json!({ "allow": allow, "type": "b", "major": self.major, "minor": self.minor, "access": access })
    }

    /// Writes to it, as a program of the host does.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result {
        let file = File::options().write(true).open(&self.path)?;
        file.write_all_at(bytes, offset).context(|| format!("writing to {}", self.path.display()))?;
        Ok(file.sync_all()?)
    }

    /// Reads from it.
    pub(crate) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let file = File::open(&self.path)?;
        file.read_exact_at(&mut bytes, offset).context(|| format!("reading {}", self.path.display()))?;
        Ok(bytes)
    }

    /// How many flushes it has carried out (Documentation/block/stat.rst of Linux).
    pub(crate) fn flushes(&self) -> Result<u64> {
        let stat = self.system_folder().join("stat");
        let text = fs::read_to_string(&stat).context(|| format!("reading {}", stat.display()))?;
        text.split_whitespace()
            .nth(15)
            .unwrap_or_default()
            .parse()
            .context(|| format!("{} is {text:?}", stat.display()))
    }

    fn system_folder(&self) -> PathBuf {
        Path::new("/sys/block").join(self.path.file_name().unwrap_or_default())
    }

    /// Detaches it from its file, which only happens when nobody has it open any more.
    pub(crate) fn end(self) -> Result {
        let backing = self.system_folder().join("loop/backing_file");
        let path = self.path.clone();
        drop(self);
        let end = Instant::now() + LIMIT;
        while backing.exists() {
            ensure!(Instant::now() < end, "somebody has {} open still", path.display());
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
