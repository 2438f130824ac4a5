// SPDX-License-Identifier: Apache-2.0
//! What is measured: each runtime with each bundle, and the bare machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bundle::{self, Bundle, ECHO_OUTPUT, GUEST_MEM_SIZE_MIB};
use crate::error::{BenchError, file};
use crate::exec;
use crate::image;
use crate::stage::Stage;

/// Where the Bulkhead under test is on the stage.
const TREE: &str = "/bulkhead";
/// Files of the QEMU case.
const KERNEL: &str = "/qemu/vmlinux";
const INITRAMFS: &str = "/qemu/initramfs.cpio";
const FIRMWARE: &str = "/usr/share/qemu";

/// The line of the QEMU guest's program.
const USER_SPACE: &str = "bench: user space";

/// One thing that is started again and again.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// Unique, for people and for `--cases`.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// What standard output must hold in the end; the time of first output is taken when this has come.
    pub(crate) output: &'static str,
}

/// How a case is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Bulkhead(Bundle),
    Runc(Bundle),
    Crun(Bundle),
    /// A further process in a container that runs all the time.
    Exec(Runtime),
    /// QEMU's microvm with Bulkhead's own guest kernel.
    Qemu,
}

/// Whose command line it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runtime {
    Bulkhead,
    Runc,
    Crun,
}

/// The cases, in the order in which they take turns.
pub(crate) const CASES: [Case; 11] = [
    Case { name: "bulkhead-echo", kind: Kind::Bulkhead(Bundle::Echo), output: ECHO_OUTPUT },
    Case { name: "bulkhead-true", kind: Kind::Bulkhead(Bundle::True), output: "" },
    Case { name: "bulkhead-spare-cpus", kind: Kind::Bulkhead(Bundle::Spare), output: ECHO_OUTPUT },
    Case { name: "qemu-microvm", kind: Kind::Qemu, output: USER_SPACE },
    Case { name: "runc-echo", kind: Kind::Runc(Bundle::Echo), output: ECHO_OUTPUT },
    Case { name: "runc-true", kind: Kind::Runc(Bundle::True), output: "" },
    Case { name: "crun-echo", kind: Kind::Crun(Bundle::Echo), output: ECHO_OUTPUT },
    Case { name: "crun-true", kind: Kind::Crun(Bundle::True), output: "" },
    Case { name: "bulkhead-exec", kind: Kind::Exec(Runtime::Bulkhead), output: "" },
    Case { name: "runc-exec", kind: Kind::Exec(Runtime::Runc), output: "" },
    Case { name: "crun-exec", kind: Kind::Exec(Runtime::Crun), output: "" },
];

/// Where the programs are on the stage; `None` of those that no chosen case needs.
#[derive(Debug, Default)]
pub(crate) struct Programs {
    bulkhead: Option<PathBuf>,
    runc: Option<PathBuf>,
    crun: Option<PathBuf>,
    qemu: Option<PathBuf>,
}

/// A program and its arguments, ready to be started in a folder.
#[derive(Debug)]
pub(crate) struct Invocation {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) folder: PathBuf,
}

impl Invocation {
    fn of(program: Option<&Path>, args: &[&str], folder: &Path) -> Self {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        Self {
            program: program.unwrap_or_else(|| Path::new("/not-staged")).to_owned(),
            args,
            folder: folder.to_owned(),
        }
    }

    /// The same in the network namespace that is mounted on `namespace`.
    pub(crate) fn inside(self, namespace: &Path) -> Self {
        let nsenter = [format!("--net={}", namespace.display()), self.program.display().to_string()];
        Self { program: "nsenter".into(), args: nsenter.into_iter().chain(self.args).collect(), folder: self.folder }
    }

    /// To be started with a clean environment.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).current_dir(&self.folder);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }
}

/// What tells one QEMU machine from another.
#[derive(Debug)]
pub(crate) struct QemuMachine<'a> {
    pub(crate) memory_mib: u64,
    /// Its initramfs on the stage.
    pub(crate) image: &'a str,
    /// More words for the kernel. The kernel gives what is after `--` to init, and so it does with those that QEMU appends.
    pub(crate) words: &'a str,
    /// Options for its devices.
    pub(crate) devices: &'a [&'a str],
}

impl Programs {
    /// Copies what `kinds` need to the stage: the Bulkhead installed in `tree`, the peers from PATH, the guest's only
    /// program `guest_init`.
    ///
    /// # Errors
    ///
    /// What is missing or cannot be copied.
    pub(crate) fn copy(stage: &Stage, kinds: &[Kind], tree: &Path, guest_init: &Path) -> Result<Self, BenchError> {
        let mut programs = Self::default();
        for kind in kinds {
            match kind {
                Kind::Bulkhead(_) | Kind::Exec(Runtime::Bulkhead) if programs.bulkhead.is_none() => {
                    let path = Path::new(TREE).join("bin/bulkhead");
                    stage.copy_folder(&tree.join("bin"), &Path::new(TREE).join("bin"))?;
                    stage.copy_folder(&tree.join("lib/bulkhead"), &Path::new(TREE).join("lib/bulkhead"))?;
                    stage.libraries(&tree.join("bin/bulkhead"))?;
                    stage.libraries(&tree.join("lib/bulkhead/bulkhead-vmm"))?;
                    programs.bulkhead = Some(path);
                }
                Kind::Runc(_) | Kind::Exec(Runtime::Runc) if programs.runc.is_none() => {
                    programs.runc = Some(stage.program("runc")?);
                }
                Kind::Crun(_) | Kind::Exec(Runtime::Crun) if programs.crun.is_none() => {
                    programs.crun = Some(stage.program("crun")?);
                }
                Kind::Qemu if programs.qemu.is_none() => {
                    programs.add_qemu(stage, tree)?;
                    let init = fs::read(guest_init).map_err(file("read", guest_init))?;
                    let initramfs = stage.at(INITRAMFS);
                    image::initramfs(&init)
                        .and_then(|image| fs::write(&initramfs, image))
                        .map_err(file("write", &initramfs))?;
                }
                _ => {}
            }
        }
        let busybox = stage.program("busybox")?;
        bundle::write_all(stage, &busybox)?;
        Ok(programs)
    }

    /// Copies QEMU and Bulkhead's guest kernel to the stage.
    ///
    /// # Errors
    ///
    /// What is missing or cannot be copied.
    pub(crate) fn add_qemu(&mut self, stage: &Stage, tree: &Path) -> Result<(), BenchError> {
        self.qemu = Some(stage.program("qemu-system-x86_64")?);
        stage.copy_folder(Path::new(FIRMWARE), Path::new(FIRMWARE))?;
        stage.copy(tree.join("lib/bulkhead/vmlinux"), KERNEL)
    }

    /// How to start `kind` as container `id`, with more options for Bulkhead.
    pub(crate) fn invocation(&self, kind: Kind, id: &str, options: &[&str]) -> Invocation {
        match kind {
            Kind::Bulkhead(bundle) => {
                let args = [&["--root", "/run/bulkhead"], options, &["run", id]].concat();
                Invocation::of(self.bulkhead.as_deref(), &args, bundle.folder())
            }
            Kind::Runc(bundle) => self.verb(Runtime::Runc, &["run", id], bundle.folder()),
            Kind::Crun(bundle) => self.verb(Runtime::Crun, &["run", id], bundle.folder()),
            Kind::Exec(runtime) => self.verb(runtime, &["exec", exec::id(runtime), "true"], Path::new("/")),
            Kind::Qemu => self.qemu(false),
        }
    }

    /// A verb of a runtime.
    pub(crate) fn verb(&self, runtime: Runtime, words: &[&str], folder: &Path) -> Invocation {
        let (program, root) = match runtime {
            Runtime::Bulkhead => (&self.bulkhead, "/run/bulkhead"),
            Runtime::Runc => (&self.runc, "/run/runc"),
            Runtime::Crun => (&self.crun, "/run/crun"),
        };
        Invocation::of(program.as_deref(), &[&["--root", root], words].concat(), folder)
    }

    /// The machine of the starts.
    pub(crate) fn qemu(&self, idle: bool) -> Invocation {
        let words = if idle { "-- idle" } else { "" };
        let machine = QemuMachine { memory_mib: GUEST_MEM_SIZE_MIB, image: INITRAMFS, words, devices: &[] };
        self.qemu_machine(&machine)
    }

    /// QEMU's smallest machine, without firmware tables, legacy timers and option ROMs. The kernel's words are those
    /// that Bulkhead gives it, but for the way to end: this machine has no keyboard controller to reset it.
    pub(crate) fn qemu_machine(&self, machine: &QemuMachine<'_>) -> Invocation {
        let memory = machine.memory_mib.to_string();
        let words = "quiet console=ttynull earlyprintk=serial,0x3f8,115200,keep panic=-1 reboot=t";
        let words = format!("{words} {}", machine.words);
        let kind = "microvm,acpi=off,pic=off,pit=off,rtc=off,x-option-roms=off,isa-serial=on,auto-kernel-cmdline=on";
        // Without xsave: the emulated host cannot virtualize it right, and the kernel loses time on telling so.
        #[rustfmt::skip]
        let args = [
            "-M", kind, "-accel", "kvm", "-cpu", "host,-xsave", "-m", &memory, "-smp", "1",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", KERNEL, "-initrd", machine.image, "-append", &words,
        ];
        Invocation::of(self.qemu.as_deref(), &[&args, machine.devices].concat(), Path::new("/"))
    }
}
