// SPDX-License-Identifier: Apache-2.0
//! What lies where in the guest's image.

/// Where the kernel looks for the first program of an initramfs.
pub(crate) const INIT: &str = "init";

/// The directories that the agent mounts on. Sorted, parents first, relative to the image's root.
pub(crate) const DIRECTORIES: &[&str] = &["dev", "proc", "run", "sys"];

/// Permission bits of directories and programs.
pub(crate) const MODE_DIRECTORY: u32 = 0o755;

/// Permission bits of programs.
pub(crate) const MODE_PROGRAM: u32 = 0o755;

/// The console that the kernel opens for its first program: character device 5:1.
pub(crate) const CONSOLE: &str = "dev/console";

/// Major and minor number of [`CONSOLE`].
pub(crate) const CONSOLE_DEVICE: (u32, u32) = (5, 1);

/// Permission bits of [`CONSOLE`].
pub(crate) const MODE_CONSOLE: u32 = 0o600;
