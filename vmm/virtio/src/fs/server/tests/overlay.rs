// SPDX-License-Identifier: Apache-2.0
//! Shares that are overlays on the host, as containers' root file systems are. Mounting one takes root, and a process
//! of several threads cannot make itself root of a user namespace instead.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

impl Guest {
    /// A guest whose tree is an overlay, with `names` in its lower layer.
    fn on_overlay(names: &[String]) -> Self {
        let nowhere: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(nowhere, "/", nowhere, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nowhere).unwrap();
        let guest = Self::unstarted_in(tempfile::tempdir_in("/dev/shm").unwrap(), CachePolicy::Private);
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| guest.folder.path().join(name));
        [&lower, &upper, &work].into_iter().for_each(|path| fs::create_dir(path).unwrap());
        names.iter().for_each(|name| fs::write(lower.join(name), name).unwrap());
        let [lower, upper, work] = [lower, upper, work].map(|path| path.into_os_string().into_string().unwrap());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        mount(nowhere, &guest.path(""), Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Self::start(guest)
    }
}

#[test]
#[ignore = "needs root and overlayfs"]
fn times_of_a_removed_file_are_let_go() {
    let mut guest = Guest::on_overlay(&["file".to_owned()]);
    let tree = guest.tree();
    let node = guest.find(tree, "file").unwrap();

    let removed = guest.ask(opcode::UNLINK, tree, &text("file"));
    let times = guest.ask(opcode::SETATTR, node, &set_attr(setattr::MTIME, 0, 0));

    assert_eq!((removed.0, times.0), (0, 0));
}

#[test]
#[ignore = "needs root and overlayfs"]
fn a_listing_misses_nothing_when_files_of_both_layers_are_removed() {
    let names: Vec<_> = (0..200).map(|number| number.to_string()).collect();
    let mut guest = Guest::on_overlay(&names);
    (200..300).for_each(|number| fs::write(guest.path(&number.to_string()), "").unwrap());

    directories::remove_while_listing(&mut guest, opcode::READDIRPLUS, 1000);

    assert_eq!(fs::read_dir(guest.path("")).unwrap().count(), 0);
}
