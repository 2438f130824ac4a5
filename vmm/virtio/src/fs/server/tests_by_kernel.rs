// SPDX-License-Identifier: Apache-2.0
//! The server behind a mount of this machine's own kernel, which speaks the same protocol over `/dev/fuse`: a script
//! has to see and leave there just what it sees and leaves in an ordinary directory.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, OFlags};
use vm_memory::VolatileSlice;

use super::*;
use crate::fs::wire::MAX_IO_LEN;

/// Runs in an empty directory; what it prints is compared, and so is what it leaves.
const SCRIPT: &str = r#"
set -e
umask 022
echo one >a; echo two >>a; cat a; stat -c '%n %F %a %s %u %g %h' a
head -c 3000000 /dev/zero | tr '\0' x >big; sha256sum big; truncate -s 1234567 big; sha256sum big
dd if=/dev/zero of=big bs=1 seek=100 count=3 conv=notrunc 2>/dev/null; sha256sum big
mkdir -p d/e/f; mv a d/e; ln d/e/a hard; ln -s d/e/a soft; cat soft; stat -c '%n %F %a %h' hard soft d d/e
(exec 3<hard; rm hard d/e/a; cat <&3; echo three >&3 || echo not writable) 2>/dev/null
cat soft 2>/dev/null || echo dangling
i=0; while [ $i -lt 400 ]; do : >d/file-with-a-name-$i; i=$((i+1)); done; ls -a d | wc -l; ls d | sha256sum
rm d/file-with-a-name-1*; ls d | wc -l
chmod 4755 big; stat -c %a big; chown 12:34 big; stat -c '%a %u %g' big; chmod 6711 big; echo more >>big; stat -c %a big
touch -d '2001-02-03 04:05:06.789' big; stat -c '%y' big; touch -hd '2002-02-03 00:00:00' soft; stat -c %y soft
mkdir sg; chown 5:6 sg; chmod 2777 sg; mkdir sg/in; : >sg/file; stat -c '%n %a %u %g' sg/in sg/file
setpriv --reuid 7 --regid 8 --clear-groups sh -c 'mkdir sg/m; echo x >sg/f; ln -s y sg/l; mkfifo sg/p; umask 077; : >sg/k'
stat -c '%n %F %a %u %g' sg/m sg/f sg/l sg/p sg/k
setpriv --reuid 7 --regid 8 --clear-groups sh -c 'echo x >>big || echo denied; cat d/file-with-a-name-2' 2>/dev/null
chmod 4777 big; setpriv --reuid 7 --regid 8 --clear-groups sh -c 'echo x >>big'; stat -c %a big
mkfifo fifo; (echo through >fifo &); cat fifo
mkdir full; : >full/x; rmdir full 2>/dev/null || echo not empty; rm -r full; mv -n d big 2>/dev/null || echo kept
cp -a big copy; cmp big copy; dd if=big of=part bs=4096 skip=3 count=5 2>/dev/null; sha256sum part
fallocate -l 100000 space; stat -c %s space; fallocate -p -o 0 -l 4096 space; cmp space copy | head -c 0 || true
printf '#!/bin/sh\necho ran "$0"\n' >run; chmod +x run; ./run; cp /bin/true binary; ./binary; echo $?
python3 -c 'import os; p="big"; os.setxattr(p,"user.a",b"1"); print(os.getxattr(p,"user.a"), os.listxattr(p)); os.removexattr(p,"user.a"); print(os.listxattr(p))'
tar cf t.tar d; rm -r d; tar xf t.tar; ls d | sha256sum; sync t.tar; rm t.tar; rm -r d
perl -e 'open F,"+>","m"; syswrite F,"0123456789"; sysseek F,4,0; syswrite F,"xx"; sysseek F,0,0; sysread F,$b,20; print "$b\n"'
perl -e 'open F,">>","m"; syswrite F,"end"; close F; open F,"<","m"; print <F>,"\n"'
: >m; stat -c %s m; rm -f m; [ ! -e m ]; mv copy m; stat -c %s m
perl -e 'use Fcntl; sysopen F,".",O_RDWR|020200000 or exit 0; syswrite F,"tmp"; print "tmpfile\n"'
find . -printf '%p %y %m %U %G %s\n' | grep -v -e '^. ' -e ' d ' | sort
"#;

#[test]
#[ignore = "needs root, /dev/fuse and the usual tools"]
fn a_script_cannot_tell_a_private_share_from_a_directory() {
    compare(CachePolicy::Private, false);
}

#[test]
#[ignore = "needs root, /dev/fuse and the usual tools"]
fn a_script_cannot_tell_a_private_share_with_a_read_only_tree_from_a_directory() {
    compare(CachePolicy::Private, true);
}

#[test]
#[ignore = "needs root, /dev/fuse and the usual tools"]
fn a_script_cannot_tell_a_shared_share_from_a_directory() {
    compare(CachePolicy::Shared, false);
}

/// Runs the script natively and through the server.
fn compare(cache: CachePolicy, has_read_only_tree: bool) {
    let folder = tempfile::tempdir().unwrap();
    let [native, top, mounted] = ["native", "top", "mounted"].map(|name| folder.path().join(name));
    for path in [&native, &top.join("tree"), &top.join("fixed"), &mounted] {
        fs::create_dir_all(path).unwrap();
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
    let nowhere: Option<&str> = None;
    mount(nowhere, "/", nowhere, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nowhere).unwrap();
    if has_read_only_tree {
        let fixed = top.join("fixed");
        mount(Some(&fixed), &fixed, nowhere, MsFlags::MS_BIND, nowhere).unwrap();
        mount(nowhere, &fixed, nowhere, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, nowhere).unwrap();
    }

    let expected = run(&native);
    let server = serve(&top, &mounted, cache);
    let seen = run(&mounted.join("tree"));
    let refused = fs::write(mounted.join("fixed/file"), "");
    nix::mount::umount(&mounted).unwrap();
    let requests = server.join().unwrap();

    assert_same(&seen, &expected);
    assert_same(&listing(&top.join("tree")), &listing(&native));
    assert_eq!(refused.is_err(), has_read_only_tree);
    println!("{cache:?}: {requests} requests");
}

fn assert_same(seen: &str, expected: &str) {
    let differing: Vec<_> = seen.lines().zip(expected.lines()).filter(|(seen, expected)| seen != expected).collect();
    assert_eq!(differing, []);
    assert_eq!(seen.lines().count(), expected.lines().count());
}

fn run(folder: &Path) -> String {
    let output = Command::new("sh").args(["-c", SCRIPT]).current_dir(folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    said
}

fn listing(folder: &Path) -> String {
    let find = r"find . ! -name . -printf '%p %y %m %U %G %n %l\n' | sort; find . -type f | sort | xargs sha256sum";
    let output = Command::new("sh").args(["-c", find]).current_dir(folder).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Mounts `top` at `mounted` and serves it until it is unmounted; the thread gives the number of requests.
fn serve(top: &Path, mounted: &Path, cache: CachePolicy) -> std::thread::JoinHandle<usize> {
    let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", fuse.as_raw_fd());
    mount(Some("share"), mounted, Some("fuse"), MsFlags::empty(), Some(options.as_str())).unwrap();
    let open = |path: &Path| rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let (root, proc_self_fd) = (open(top), open(Path::new("/proc/self/fd")));
    std::thread::spawn(move || {
        let mut server = Server::new(&root, Arc::new(proc_self_fd), cache, None).unwrap();
        server.enter_thread().unwrap();
        answer_all(&fuse, &mut server)
    })
}

fn answer_all(mut fuse: &File, server: &mut Server) -> usize {
    let room = MAX_IO_LEN as usize + 4096;
    let (mut request, mut answer) = (vec![0; room], vec![0; room]);
    for count in 0.. {
        // ENODEV: unmounted.
        let Ok(given) = fuse.read(&mut request) else { return count };
        let mut buffers = Buffers::default();
        buffers.readable.push(VolatileSlice::from(&mut request[..given]));
        buffers.writable.push(VolatileSlice::from(&mut answer[..]));
        let written = server.serve(&buffers).unwrap() as usize;
        drop(buffers);
        // An interrupted request is no longer waited for.
        if written != 0 {
            let _ = fuse.write(&answer[..written]);
        }
    }
    0
}
