// SPDX-License-Identifier: Apache-2.0
//! An ordinary user's containers: the runtime is root of a user namespace, and of nothing else.

use std::ffi::OsString;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, mknod};

use super::network_user::{ask, container, host_network, serve_page};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq};
use crate::run::Run;

pub(super) const CASES: &[Case] = &[
    case!(a_container_runs_and_leaves_nothing),
    case!(its_network_is_passts),
    case!(what_create_makes_is_found_by_other_verbs),
    case!(its_files_belong_to_the_user),
    case!(the_host_is_checked_for_it),
];

/// The user's and the group's id.
const USER: u32 = 4321;

/// Becomes that user, with nothing of root's, and then root of a user namespace.
const AS_USER: &str = "exec setpriv --reuid=4321 --regid=4321 --clear-groups --no-new-privs --bounding-set=-all \
                       unshare --user --map-root-user \"$@\"";

/// What an ordinary user has of a host: a folder for what goes with the session, and access to KVM.
struct User<'a> {
    env: &'a Env,
    runtime_dir: PathBuf,
    kvm: PathBuf,
}

impl<'a> User<'a> {
    fn new(env: &'a Env) -> Result<Self> {
        env.only_bulkhead()?;
        let home = env.folder("user")?;
        env.mount("tmpfs", "tmpfs", &home, "mode=755")?;
        let (runtime_dir, kvm) = (home.join("run"), home.join("kvm"));
        fs::create_dir(&runtime_dir)?;
        fs::set_permissions(&runtime_dir, fs::Permissions::from_mode(0o700))?;
        let device = fs::metadata("/dev/kvm").context(|| "looking at /dev/kvm".to_owned())?.rdev();
        mknod(&kvm, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), device)?;
        chown(&kvm, Some(USER), Some(USER))?;
        chown(&runtime_dir, Some(USER), Some(USER))?;
        for folder in env.work.ancestors().take_while(|folder| *folder != Path::new("/")) {
            let mode = fs::metadata(folder)?.mode();
            ensure!(mode & 0o001 != 0, "{} cannot be passed by others", folder.display());
        }
        Ok(Self { env, runtime_dir, kvm })
    }

    /// The runtime with these arguments, without `--root`.
    fn call<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Run<'a> {
        self.env
            .tool(&self.env.runtime, arguments)
            .wrapper(AS_USER)
            .variable("XDG_RUNTIME_DIR", &self.runtime_dir)
            .variable("BULKHEAD_KVM", &self.kvm)
    }

    fn run(&self, bundle: &Bundle) -> Result<Run<'a>> {
        self.give(bundle)?;
        Ok(self.call(["run".into(), "--bundle".into(), bundle.folder.clone().into_os_string(), self.env.id().into()]))
    }

    /// Makes a bundle the user's.
    fn give(&self, bundle: &Bundle) -> Result {
        bundle.write()?;
        give_all(&bundle.folder)
    }

    /// What is in the folder of the states.
    fn states(&self) -> Result<Vec<OsString>> {
        let entries = fs::read_dir(self.runtime_dir.join("bulkhead"))?;
        Ok(entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?)
    }
}

fn give_all(path: &Path) -> Result {
    std::os::unix::fs::lchown(path, Some(USER), Some(USER))?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            give_all(&entry?.path())?;
        }
    }
    Ok(())
}

fn a_container_runs_and_leaves_nothing(env: &Env) -> Result {
    let user = User::new(env)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("id -u; cat; exit 7");

    let output = user.run(&bundle)?.input(b"through\n".to_vec()).output()?;

    output.expect_code(7)?;
    ensure_eq!(output.stdout(), "0\nthrough\n", "the output ({})", output.describe());
    ensure_eq!(user.states()?, Vec::<OsString>::new(), "what is left below $XDG_RUNTIME_DIR");
    Ok(())
}

fn its_network_is_passts(env: &Env) -> Result {
    host_network(env)?;
    let user = User::new(env)?;
    let listener = TcpListener::bind("198.51.100.1:4000")?;
    let script =
        "wget -q -O - http://198.51.100.1:4000/page; nc -l -p 80 -e sh -c 'read line; echo served $line' & wait";
    let bundle = container(env, script, &[("io.bulkhead.net.publish", "8080:80")])?;

    let running = user.run(&bundle)?.spawn()?;
    let page = serve_page(&listener, "heard\n");
    if page.is_err() {
        return running.finish()?.expect_stdout("heard\n");
    }
    ensure_eq!(ask("198.51.100.1:8080", "one\n")?, "served one\n", "the answer of the container");
    running.finish()?.expect_stdout("heard\n")
}

fn what_create_makes_is_found_by_other_verbs(env: &Env) -> Result {
    let user = User::new(env)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sleep 1000");
    user.give(&bundle)?;
    let id = env.id();
    let call = |words: &[&str]| -> Result<String> {
        let output = user.call(words).output()?;
        output.expect_code(0)?;
        Ok(output.stdout())
    };

    // What lives on has its streams.
    let null = || fs::File::options().read(true).write(true).open("/dev/null");
    let folder = bundle.folder.display().to_string();
    let created = user.call(["create", "--bundle", &folder, &id]).stdout(null()?).stderr(null()?).output()?;
    created.expect_code(0)?;
    call(&["start", &id])?;
    ensure_eq!(call(&["exec", &id, "echo", "inside"])?, "inside\n", "what exec prints");
    ensure!(call(&["state", &id])?.contains("\"running\""), "the state is another");
    call(&["delete", "--force", &id])?;
    ensure_eq!(user.states()?, Vec::<OsString>::new(), "what is left below $XDG_RUNTIME_DIR");
    Ok(())
}

fn its_files_belong_to_the_user(env: &Env) -> Result {
    let user = User::new(env)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo content > /tmp/file && mkdir /tmp/folder && chmod 750 /tmp/folder && stat -c '%u %a' /tmp/file; chown 7 /tmp/file 2>/dev/null || echo no");

    let output = user.run(&bundle)?.output()?;

    output.expect_stdout("0 644\nno\n")?;
    let file = fs::metadata(bundle.path("/tmp/file"))?;
    ensure_eq!((file.uid(), file.gid()), (USER, USER), "the owner of a file that the container made");
    ensure_eq!(fs::metadata(bundle.path("/tmp/folder"))?.mode() & 0o7777, 0o750, "the mode of a folder");
    Ok(())
}

fn the_host_is_checked_for_it(env: &Env) -> Result {
    let user = User::new(env)?;
    let output = user.call(["check"]).output()?;
    output.expect_in_stdout(&["ok   user rights: root of a user namespace", "ok   KVM: ", "ok   vsock path: "])?;
    // Without a namespace of its own it is nobody.
    let alone =
        env.tool(&env.runtime, ["check"]).wrapper("exec setpriv --reuid=4321 --regid=4321 --clear-groups \"$@\"");
    let output = alone.variable("XDG_RUNTIME_DIR", &user.runtime_dir).output()?;
    output.expect_code(1)?;
    ensure!(output.stdout().contains("unshare --user --map-root-user"), "{}", output.describe());
    Ok(())
}
