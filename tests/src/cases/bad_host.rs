// SPDX-License-Identifier: Apache-2.0
//! Hosts and installations on which nothing can run: one line says what is missing.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, skip};
use crate::images;

pub(super) const CASES: &[Case] = &[
    case!(kernel_is_missing),
    case!(kernel_is_damaged),
    case!(kernel_is_cut_short),
    case!(image_is_missing),
    case!(image_is_damaged),
    case!(image_is_cut_short),
    case!(vmm_is_missing),
    case!(kvm_is_absent),
    case!(kvm_cannot_be_opened),
    case!(kvm_is_something_else),
    case!(kvm_runs_no_guests),
    case!(too_little_memory_for_the_guest),
    case!(more_memory_than_the_host_has),
    case!(full_file_system_under_root),
    case!(no_inodes_under_root),
    case!(read_only_file_system_under_root),
    case!(root_is_a_file),
    case!(another_user_than_root),
    case!(few_descriptors),
    case!(moved_installation),
];

/// Runs a good bundle with a variable that names one part, which must be refused with these words.
fn refused(env: &Env, variable: &str, value: &std::path::Path, words: &[&str]) -> Result {
    env.only_bulkhead()?;
    let bundle = Bundle::busybox(env)?;
    let output = env.run(&bundle)?.variable(variable, value).output()?;
    output.expect_error_code(1, words)?;
    // `check` finds it as well.
    let checked = env.call(["check"]).variable(variable, value).output()?;
    let advises = checked.stdout().lines().any(|line| line.starts_with("FAIL ") && line.contains("; to mend it: "));
    ensure!(
        checked.status.code() == Some(1) && advises,
        "`check` with {variable}={}: {}",
        value.display(),
        checked.describe()
    );
    Ok(())
}

fn kernel_is_missing(env: &Env) -> Result {
    refused(env, "BULKHEAD_KERNEL", "/nowhere/vmlinux".as_ref(), &["kernel", "/nowhere/vmlinux"])
}

fn kernel_is_damaged(env: &Env) -> Result {
    let path = env.work.join("noise");
    fs::write(&path, vec![0xa5; 100_000])?;
    refused(env, "BULKHEAD_KERNEL", &path, &["kernel", "noise", "damaged"])?;
    fs::write(&path, "")?;
    refused(env, "BULKHEAD_KERNEL", &path, &["kernel", "noise"])
}

fn kernel_is_cut_short(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kernel = fs::read(images::installed(env, "vmlinux")?)?;
    let path = env.work.join("half-a-kernel");
    for length in [60, 4000, kernel.len() / 2] {
        fs::write(&path, &kernel[..length])?;
        refused(env, "BULKHEAD_KERNEL", &path, &["kernel", "half-a-kernel", "its end is missing"])?;
    }
    Ok(())
}

fn image_is_missing(env: &Env) -> Result {
    refused(env, "BULKHEAD_INITRAMFS", "/nowhere/initramfs.cpio".as_ref(), &["image", "/nowhere/initramfs.cpio"])
}

fn image_is_damaged(env: &Env) -> Result {
    let path = env.work.join("noise");
    fs::write(&path, vec![0xa5; 100_000])?;

    refused(env, "BULKHEAD_INITRAMFS", &path, &["image", "noise", "damaged"])?;
    fs::write(&path, "")?;
    refused(env, "BULKHEAD_INITRAMFS", &path, &["image", "noise"])
}

fn image_is_cut_short(env: &Env) -> Result {
    env.only_bulkhead()?;
    let image = fs::read(images::installed(env, "initramfs.cpio")?)?;
    let path = env.work.join("half-an-image");
    fs::write(&path, &image[..image.len() / 2])?;
    refused(env, "BULKHEAD_INITRAMFS", &path, &["image", "half-an-image", "its end is missing"])?;
    // What has its end, an entry of 124 bytes, may lack something before it: then it is the guest that says so.
    let trailer = image.len() - 124;
    fs::write(&path, [&image[..(image.len() / 2) & !3], &image[trailer..]].concat())?;
    let bundle = Bundle::busybox(env)?;
    env.run(&bundle)?.variable("BULKHEAD_INITRAMFS", &path).output()?.expect_error_code(1, &["panicked"])
}

fn vmm_is_missing(env: &Env) -> Result {
    refused(env, "BULKHEAD_VMM", "/nowhere/bulkhead-vmm".as_ref(), &["/nowhere/bulkhead-vmm"])
}

fn kvm_is_absent(env: &Env) -> Result {
    refused(env, "BULKHEAD_KVM", "/nowhere/kvm".as_ref(), &["KVM", "/nowhere/kvm"])
}

/// Root may open whatever has a mode; a device on a file system without devices is refused to root as well.
fn kvm_cannot_be_opened(env: &Env) -> Result {
    env.only_bulkhead()?;
    let folder = env.folder("closed")?;
    env.mount("tmpfs", "tmpfs", &folder, "size=1m")?;
    nix::mount::mount(
        None::<&str>,
        &folder,
        None::<&str>,
        nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_NODEV,
        None::<&str>,
    )?;
    let made = Command::new("mknod").arg(folder.join("kvm")).args(["c", "10", "232"]).status()?;
    ensure!(made.success(), "mknod failed");

    refused(env, "BULKHEAD_KVM", &folder.join("kvm"), &["KVM", "closed/kvm", "ermission denied"])
}

fn kvm_is_something_else(env: &Env) -> Result {
    refused(env, "BULKHEAD_KVM", "/dev/null".as_ref(), &["/dev/null"])?;
    let file = env.work.join("plain-file");
    fs::write(&file, "")?;
    refused(env, "BULKHEAD_KVM", &file, &["plain-file"])
}

/// A KVM that answers every question and cannot run Linux.
fn kvm_runs_no_guests(env: &Env) -> Result {
    env.only_bulkhead()?;
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    if cpu.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") || !std::path::Path::new("/dev/kvm").exists() {
        skip!("KVM is genuine, or absent, on this machine");
    }
    let checked = env.call(["check"]).output()?;
    let told = checked.stdout().lines().any(|line| line.starts_with("FAIL KVM: ") && line.contains("; to mend it: "));
    ensure!(checked.status.code() == Some(1) && told, "{}", checked.describe());
    let bundle = Bundle::busybox(env)?;
    let output = env.run(&bundle)?.output()?;
    output.expect_error_code(1, &["KVM"])?;
    output.expect_within(Duration::from_secs(45))
}

fn too_little_memory_for_the_guest(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.annotation("io.bulkhead.memory_mib", "16");
    env.run(&bundle)?.output()?.expect_error(&["io.bulkhead.memory_mib", "16"])?;
    // A limit of the container's is honoured whatever it is; the guest has what it needs beside it.
    let mut small = Bundle::busybox(env)?;
    small.set("/linux/resources", serde_json::json!({ "memory": { "limit": 8 << 20 } })).sh("echo fine");
    env.run(&small)?.output()?.expect_stdout("fine\n")
}

fn more_memory_than_the_host_has(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    for size in ["1000000000000", "1000000"] {
        bundle.annotation("io.bulkhead.memory_mib", size);
        env.run(&bundle)?.output()?.expect_error(&["memory_mib", size])?;
    }
    // What the host has, but not for this user.
    bundle.annotation("io.bulkhead.memory_mib", "2048");
    env.run(&bundle)?.wrapper("ulimit -v 1000000; exec \"$@\"").output()?.expect_error(&["2048 MiB", "memory"])
}

fn full_file_system_under_root(env: &Env) -> Result {
    let root = env.folder("full")?;
    env.mount("tmpfs", "tmpfs", &root, "size=64k")?;
    let mut filler = fs::File::create(root.join("filler"))?;
    while filler.write_all(&[0; 4096]).is_ok() {}
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo fine");

    env.run(&bundle)?.root(&root).output()?.expect_error(&["full", "No space left on device"])?;
    ensure!(fs::read_dir(&root)?.count() == 1, "something was left in the full file system");
    Ok(())
}

fn no_inodes_under_root(env: &Env) -> Result {
    let root = env.folder("full")?;
    env.mount("tmpfs", "tmpfs", &root, "nr_inodes=1")?;
    let bundle = Bundle::busybox(env)?;
    env.run(&bundle)?.root(&root).output()?.expect_error(&["full", "No space left on device"])?;
    // One more file each time: the same at every step of the way.
    for inodes in 2..6 {
        let root = env.folder(&format!("full{inodes}"))?;
        env.mount("tmpfs", "tmpfs", &root, &format!("nr_inodes={inodes}"))?;
        let output = env.run(&bundle)?.root(&root).output()?;
        if !output.status.success() {
            output.expect_error(&["full", "No space left on device"])?;
        }
        ensure!(fs::read_dir(&root)?.count() == 0, "something was left in {}", root.display());
    }
    Ok(())
}

fn read_only_file_system_under_root(env: &Env) -> Result {
    let root = env.folder("fixed")?;
    env.mount("tmpfs", "tmpfs", &root, "ro")?;
    let bundle = Bundle::busybox(env)?;

    env.run(&bundle)?.root(&root).output()?.expect_error(&["fixed", "Read-only file system"])
}

fn root_is_a_file(env: &Env) -> Result {
    let root = env.work.join("a-file");
    fs::write(&root, "")?;
    let bundle = Bundle::busybox(env)?;

    env.run(&bundle)?.root(&root).output()?.expect_error(&["a-file"])
}

fn another_user_than_root(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo fine");
    let run = env.run(&bundle)?.wrapper("exec setpriv --reuid 65534 --regid 65534 --clear-groups -- \"$@\"");

    run.output()?.expect_error(&["ermission denied"])?;
    let wrappers = [
        "exec setpriv --reuid 65534 --regid 65534 --clear-groups -- \"$@\"",
        "exec setpriv --bounding-set -sys_admin --inh-caps -sys_admin -- \"$@\"",
    ];
    for wrapper in wrappers {
        let checked = env.call(["check"]).wrapper(wrapper).output()?;
        let told = checked.stdout();
        let told = told.lines().any(|line| line.starts_with("FAIL user rights: ") && line.contains("; to mend it: "));
        ensure!(checked.status.code() == Some(1) && told, "`check` under {wrapper}: {}", checked.describe());
    }
    Ok(())
}

fn few_descriptors(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo fine");

    env.run(&bundle)?.wrapper("ulimit -n 8; exec \"$@\"").output()?.expect_error(&["Too many open files"])
}

/// An installed tree works from where it lies, by whatever name it is called.
fn moved_installation(env: &Env) -> Result {
    env.only_bulkhead()?;
    let prefix = env.folder("moved")?;
    for (folder, names) in
        [("bin", &["bulkhead"][..]), ("lib/bulkhead", &["bulkhead-vmm", "vmlinux", "initramfs.cpio"])]
    {
        fs::create_dir_all(prefix.join(folder))?;
        for name in names {
            let from = if folder == "bin" { env.runtime.clone() } else { images::installed(env, name)? };
            fs::copy(from, prefix.join(folder).join(name))?;
        }
    }
    let link = env.work.join("container-runtime");
    symlink(prefix.join("bin/bulkhead"), &link)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo moved");
    bundle.write()?;
    let words = [
        "--root".as_ref(),
        env.root.as_os_str(),
        "run".as_ref(),
        "--bundle".as_ref(),
        bundle.folder.as_os_str(),
        "moved".as_ref(),
    ];

    let output = Command::new(&link).args(words).output()?;

    ensure!(
        output.stdout == b"moved\n",
        "status {:?}, stderr {}",
        output.status.code(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
