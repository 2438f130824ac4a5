// SPDX-License-Identifier: Apache-2.0
//! Where the parts lie: the VMM, the guest's kernel and image, the KVM device; and passt(1), which is not Bulkhead's.
//!
//! In falling order of precedence, for each part on its own:
//!
//! 1. an environment variable: `BULKHEAD_VMM`, `BULKHEAD_KERNEL`, `BULKHEAD_INITRAMFS`, `BULKHEAD_KVM`,
//!    `BULKHEAD_PASST`, `BULKHEAD_BOOT_TIMEOUT_MS`; `BULKHEAD_LIB_DIR` for the folder of the first three;
//! 2. the configuration file, `/etc/bulkhead/config.json` or the one named by `BULKHEAD_CONFIG`: a JSON object with any of
//!    `vmm`, `kernel`, `initramfs`, `kvm`, `passt`, `boot_timeout_ms`, `lib_dir`;
//! 3. `../lib/bulkhead/` from the folder of the program's own file; for passt, the folders of `PATH`.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

use crate::network::user::{self, PasstError};

const CONFIG_FILE: &str = "/etc/bulkhead/config.json";
const KVM_DEVICE: &str = "/dev/kvm";
const DEFAULT_BOOT_TIMEOUT: Duration = Duration::from_secs(30);

/// The first bytes of an ELF file.
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// The first bytes of a `newc` cpio archive.
const CPIO_MAGIC: &[u8] = b"070701";

/// The places of all parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Install {
    /// The VMM's program.
    pub(crate) vmm: PathBuf,
    /// The guest's kernel.
    pub(crate) kernel: PathBuf,
    /// The guest's image.
    pub(crate) initramfs: PathBuf,
    /// The KVM device.
    pub(crate) kvm: PathBuf,
    /// passt's program, if it is named.
    pub(crate) passt: Option<PathBuf>,
    /// How long a guest may take until its agent answers.
    pub(crate) boot_timeout: Duration,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConfigFile {
    lib_dir: Option<PathBuf>,
    vmm: Option<PathBuf>,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    kvm: Option<PathBuf>,
    passt: Option<PathBuf>,
    boot_timeout_ms: Option<u64>,
}

/// Parts that cannot be named.
#[derive(Debug, Error)]
pub(crate) enum FindPartsError {
    #[error("cannot find the program's own file, so not its parts (BULKHEAD_LIB_DIR can name their folder)")]
    OwnFile(#[source] io::Error),
    #[error("cannot read the configuration file {}", .0.display())]
    ReadConfig(PathBuf, #[source] io::Error),
    #[error("the configuration file {} is wrong", .0.display())]
    ParseConfig(PathBuf, #[source] serde_json::Error),
    #[error("BULKHEAD_BOOT_TIMEOUT_MS is {0:?}, which is not a number of milliseconds from 1 to 3600000")]
    BootTimeout(OsString),
    #[error("boot_timeout_ms in {} is {ms}, which is not from 1 to 3600000", path.display())]
    ConfigBootTimeout { path: PathBuf, ms: u64 },
}

/// A part that cannot be used.
#[derive(Debug, Error)]
pub(crate) enum OpenPartError {
    #[error("cannot open the {part} {}{}", path.display(), hint(part))]
    Open { part: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot read the {part} {}", path.display())]
    Read { part: &'static str, path: PathBuf, source: io::Error },
    #[error("the {part} {} is damaged: it does not begin as {kind} does; install it again", path.display())]
    Damaged { part: &'static str, path: PathBuf, kind: &'static str },
    #[error("the {part} {} is damaged: its end is missing; install it again", path.display())]
    CutShort { part: &'static str, path: PathBuf },
}

/// The number that Linux has given to KVM, major and minor (Documentation/admin-guide/devices.txt).
const KVM_DEVICE_NUMBER: (u32, u32) = (10, 232);

fn hint(part: &str) -> &'static str {
    match part {
        "KVM device" => " (`bulkhead check` says what is missing)",
        _ => " (is Bulkhead installed completely? `bulkhead check` says)",
    }
}

/// The parts that the VMM gets as descriptors.
#[derive(Debug)]
pub(crate) struct OpenParts {
    /// The KVM device, for reading and writing.
    pub(crate) kvm: File,
    /// The guest's kernel.
    pub(crate) kernel: File,
    /// The guest's image.
    pub(crate) initramfs: File,
}

impl Install {
    /// Finds the parts as the module's documentation says; opens none.
    ///
    /// # Errors
    ///
    /// The configuration file or a variable is wrong.
    pub(crate) fn find() -> Result<Self, FindPartsError> {
        let named = env::var_os("BULKHEAD_CONFIG").map(PathBuf::from);
        let file = named.as_deref().unwrap_or(Path::new(CONFIG_FILE));
        let config = match fs::read(file) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|error| FindPartsError::ParseConfig(file.to_owned(), error))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => ConfigFile::default(),
            Err(error) => return Err(FindPartsError::ReadConfig(file.to_owned(), error)),
        };
        if let Some(ms) = config.boot_timeout_ms.filter(|ms| !valid_timeout(*ms)) {
            return Err(FindPartsError::ConfigBootTimeout { path: file.to_owned(), ms });
        }
        Self::from_sources(&|name| env::var_os(name).filter(|value| !value.is_empty()), config, &|| {
            env::current_exe()?.canonicalize()
        })
    }

    fn from_sources(
        variable: &dyn Fn(&str) -> Option<OsString>,
        config: ConfigFile,
        own_file: &dyn Fn() -> io::Result<PathBuf>,
    ) -> Result<Self, FindPartsError> {
        let lib_dir = match variable("BULKHEAD_LIB_DIR").map(PathBuf::from).or(config.lib_dir) {
            Some(dir) => dir,
            None => {
                let program = own_file().map_err(FindPartsError::OwnFile)?;
                let prefix = program.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
                prefix.join("lib/bulkhead")
            }
        };
        let place = |name: &str, configured: Option<PathBuf>, file: &str| {
            variable(name).map(PathBuf::from).or(configured).unwrap_or_else(|| lib_dir.join(file))
        };
        let boot_timeout = match (variable("BULKHEAD_BOOT_TIMEOUT_MS"), config.boot_timeout_ms) {
            (Some(text), _) => {
                let ms = text.to_str().and_then(|text| text.parse().ok()).filter(|ms| valid_timeout(*ms));
                Duration::from_millis(ms.ok_or(FindPartsError::BootTimeout(text))?)
            }
            (None, Some(ms)) => Duration::from_millis(ms),
            (None, None) => DEFAULT_BOOT_TIMEOUT,
        };
        Ok(Self {
            vmm: place("BULKHEAD_VMM", config.vmm, "bulkhead-vmm"),
            kernel: place("BULKHEAD_KERNEL", config.kernel, "vmlinux"),
            initramfs: place("BULKHEAD_INITRAMFS", config.initramfs, "initramfs.cpio"),
            kvm: variable("BULKHEAD_KVM").map(PathBuf::from).or(config.kvm).unwrap_or_else(|| KVM_DEVICE.into()),
            passt: variable("BULKHEAD_PASST").map(PathBuf::from).or(config.passt),
            boot_timeout,
        })
    }

    /// Finds passt's program; where it is named, that one.
    ///
    /// # Errors
    ///
    /// It is named nowhere, and in no folder of `PATH`.
    pub(crate) fn passt(&self) -> Result<PathBuf, PasstError> {
        self.passt.clone().map_or_else(user::find, Ok)
    }

    /// Opens what the VMM gets as descriptors, and looks at the first bytes of each file.
    ///
    /// # Errors
    ///
    /// A part that is absent, not readable, or plainly not what it should be.
    pub(crate) fn open(&self) -> Result<OpenParts, OpenPartError> {
        Ok(OpenParts { kvm: self.open_kvm()?, kernel: self.open_kernel()?, initramfs: self.open_initramfs()? })
    }

    /// Opens the KVM device.
    pub(crate) fn open_kvm(&self) -> Result<File, OpenPartError> {
        let failed = |source| OpenPartError::Open { part: "KVM device", path: self.kvm.clone(), source };
        let device = File::options().read(true).write(true).open(&self.kvm).map_err(failed)?;
        let status = device.metadata().map_err(failed)?;
        let number = (rustix::fs::major(status.rdev()), rustix::fs::minor(status.rdev()));
        if status.file_type().is_char_device() && number == KVM_DEVICE_NUMBER {
            return Ok(device);
        }
        Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not KVM")))
    }

    /// Opens the guest's kernel.
    pub(crate) fn open_kernel(&self) -> Result<File, OpenPartError> {
        open_file("guest kernel", &self.kernel, ELF_MAGIC, "an ELF file", segments_are_whole)
    }

    /// Opens the guest's image.
    pub(crate) fn open_initramfs(&self) -> Result<File, OpenPartError> {
        open_file("guest image", &self.initramfs, CPIO_MAGIC, "an uncompressed cpio archive", archive_is_whole)
    }
}

fn valid_timeout(ms: u64) -> bool {
    (1..=3_600_000).contains(&ms)
}

fn open_file(
    part: &'static str,
    path: &Path,
    magic: &[u8],
    kind: &'static str,
    is_whole: fn(&File, u64) -> io::Result<bool>,
) -> Result<File, OpenPartError> {
    let path = || path.to_owned();
    let file = File::open(path()).map_err(|source| OpenPartError::Open { part, path: path(), source })?;
    let mut head = [0; 6];
    match file.read_exact_at(&mut head, 0) {
        Ok(()) if head.starts_with(magic) => {}
        Err(source) if source.kind() != io::ErrorKind::UnexpectedEof => {
            return Err(OpenPartError::Read { part, path: path(), source });
        }
        _ => return Err(OpenPartError::Damaged { part, path: path(), kind }),
    }
    match file.metadata().and_then(|metadata| is_whole(&file, metadata.len())) {
        Ok(true) => Ok(file),
        Err(source) if source.kind() != io::ErrorKind::UnexpectedEof => {
            Err(OpenPartError::Read { part, path: path(), source })
        }
        _ => Err(OpenPartError::CutShort { part, path: path() }),
    }
}

/// Whether an ELF file has all that its segments are made of (System V ABI, Object Files: ELF-64 header, program header).
fn segments_are_whole(file: &File, length: u64) -> io::Result<bool> {
    const HEADER_LEN: u16 = 56;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    let (offset, entry_len, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if entry_len != HEADER_LEN {
        return Ok(false);
    }
    let mut headers = vec![0; usize::from(count) * usize::from(HEADER_LEN)];
    file.read_exact_at(&mut headers, offset)?;
    Ok(count != 0
        && headers.chunks_exact(usize::from(HEADER_LEN)).all(|header| {
            let (offset, len) = (u64_at(header, 8), u64_at(header, 32));
            offset.checked_add(len).is_some_and(|end| end <= length)
        }))
}

/// Whether a cpio archive has its last entry (Documentation/driver-api/early-userspace/buffer-format.rst), which zeros may
/// follow as far as the next block of 512 bytes.
fn archive_is_whole(file: &File, length: u64) -> io::Result<bool> {
    let mut tail = vec![0; 1024.min(length) as usize];
    let start = length - tail.len() as u64;
    file.read_exact_at(&mut tail, start)?;
    let end = tail.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    Ok(tail[..end].ends_with(b"TRAILER!!!"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes[at..].first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(variables: &[(&str, &str)], config: &str) -> Result<Install, FindPartsError> {
        let variable = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        Install::from_sources(&variable, serde_json::from_str(config).unwrap(), &|| Ok("/opt/x/bin/bulkhead".into()))
    }

    #[test]
    fn parts_lie_beside_the_program_by_default() {
        let install = find(&[], "{}").unwrap();

        assert_eq!(install.vmm, Path::new("/opt/x/lib/bulkhead/bulkhead-vmm"));
        assert_eq!(install.kernel, Path::new("/opt/x/lib/bulkhead/vmlinux"));
        assert_eq!(install.initramfs, Path::new("/opt/x/lib/bulkhead/initramfs.cpio"));
        assert_eq!(install.kvm, Path::new("/dev/kvm"));
        assert_eq!(install.boot_timeout, Duration::from_secs(30));
    }

    #[test]
    fn a_variable_goes_before_the_file_and_a_part_before_the_folder() {
        let variables = [("BULKHEAD_LIB_DIR", "/v"), ("BULKHEAD_KERNEL", "/k"), ("BULKHEAD_BOOT_TIMEOUT_MS", "5")];
        let config = r#"{"lib_dir": "/c", "kernel": "/ck", "initramfs": "/ci", "passt": "/p", "boot_timeout_ms": 7}"#;

        let install = find(&variables, config).unwrap();

        assert_eq!(install.vmm, Path::new("/v/bulkhead-vmm"));
        assert_eq!(install.kernel, Path::new("/k"));
        assert_eq!(install.initramfs, Path::new("/ci"));
        assert_eq!(install.passt().unwrap(), Path::new("/p"));
        assert_eq!(install.boot_timeout, Duration::from_millis(5));
    }

    #[test]
    fn a_timeout_that_is_no_number_or_out_of_range_is_refused() {
        for value in ["soon", "0", "-1", "3600001"] {
            let found = find(&[("BULKHEAD_BOOT_TIMEOUT_MS", value)], "{}");
            assert!(matches!(found, Err(FindPartsError::BootTimeout(_))), "{value}");
        }
    }

    #[test]
    fn a_kernel_that_is_short_or_something_else_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        for content in [&b""[..], b"\x7fEL", b"PE file or so"] {
            fs::write(&path, content).unwrap();
            let opened = open_file("guest kernel", &path, ELF_MAGIC, "an ELF file", segments_are_whole);
            assert!(matches!(opened, Err(OpenPartError::Damaged { .. })), "{content:?}");
        }
    }

    #[test]
    fn a_kernel_without_its_end_is_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        // One program header behind the ELF header, and behind it a segment of 8 bytes.
        let mut kernel = vec![0; 64 + 56 + 8];
        kernel[..4].copy_from_slice(ELF_MAGIC);
        (kernel[32], kernel[54], kernel[56]) = (64, 56, 1);
        (kernel[64 + 8], kernel[64 + 32]) = (120, 8);

        let open = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            open_file("guest kernel", &path, ELF_MAGIC, "an ELF file", segments_are_whole)
        };

        assert!(open(&kernel).is_ok());
        for length in [6, 63, 64, 119, 120, 127] {
            assert!(matches!(open(&kernel[..length]), Err(OpenPartError::CutShort { .. })), "{length} bytes");
        }
        kernel[64 + 8..64 + 16].fill(0xff);
        assert!(matches!(open(&kernel), Err(OpenPartError::CutShort { .. })), "an offset without end");
    }

    #[test]
    fn an_image_without_its_trailer_is_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initramfs.cpio");
        let open = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            open_file("guest image", &path, CPIO_MAGIC, "an uncompressed cpio archive", archive_is_whole)
        };

        assert!(open(b"070701 TRAILER!!!").is_ok());
        assert!(open(&[&b"070701 TRAILER!!!"[..], &[0; 600]].concat()).is_ok());
        for content in [&b"070701"[..], b"070701 TRAILER!!", b"070701 TRAILER!!! and more"] {
            assert!(matches!(open(content), Err(OpenPartError::CutShort { .. })), "{content:?}");
        }
    }
}
