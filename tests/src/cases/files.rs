// SPDX-License-Identifier: Apache-2.0
//! Files that a container writes, as the host sees them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};

use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(owner_and_mode_of_roots_files),
    case!(owner_of_a_users_files),
    case!(set_id_bits),
    case!(set_id_bits_fall_with_a_write),
    case!(permissions_are_enforced),
    case!(permissions_of_further_groups),
    case!(links),
    case!(renames),
    case!(times),
    case!(names_of_any_bytes),
    case!(removed_while_open),
    case!(append_truncate_and_holes),
    case!(large_file),
    case!(beyond_four_gib),
    case!(pipes_in_the_file_system),
    case!(device_nodes_are_refused),
    case!(written_at_the_last_moment),
    case!(synced_before_a_kill),
    case!(free_space_is_told),
];

/// Type and permission bits, owner and group.
fn status(bundle: &Bundle, below: &str) -> Result<(u32, u32, u32)> {
    let status = bundle.path(below).symlink_metadata()?;
    Ok((status.mode(), status.uid(), status.gid()))
}

fn owner_and_mode_of_roots_files(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /tmp; echo x >plain; echo x >tight; chmod 600 tight; mkdir -m 751 folder; echo x >given; chown 123:456 given; \
               mkdir sticky; chmod 1777 sticky; touch none; chmod 0 none; ln -s plain link; chown -h 9:9 link");

    env.run(&bundle)?.output()?.expect_stdout("")?;

    ensure_eq!(status(&bundle, "tmp/plain")?, (0o100_644, 0, 0), "plain");
    ensure_eq!(status(&bundle, "tmp/tight")?, (0o100_600, 0, 0), "tight");
    ensure_eq!(status(&bundle, "tmp/folder")?, (0o40_751, 0, 0), "folder");
    ensure_eq!(status(&bundle, "tmp/given")?, (0o100_644, 123, 456), "given");
    ensure_eq!(status(&bundle, "tmp/sticky")?, (0o41_777, 0, 0), "sticky");
    ensure_eq!(status(&bundle, "tmp/none")?, (0o100_000, 0, 0), "none");
    ensure_eq!(status(&bundle, "tmp/link")?, (0o120_777, 9, 9), "link");
    Ok(())
}

fn owner_of_a_users_files(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    fs::set_permissions(bundle.path("tmp"), fs::Permissions::from_mode(0o1777))?;
    bundle
        .set("/process/user", json!({ "uid": 1000, "gid": 1001, "additionalGids": [1002] }))
        .set("/process/capabilities", json!({}));
    bundle.sh(
        "cd /tmp; echo x >file; mkdir folder; ln -s file link; mkfifo pipe; chgrp 1002 folder; touch folder/file; \
               chown 0 file 2>/dev/null && echo 'gave a file away'",
    );

    env.run(&bundle)?.output()?.expect_code(1)?;

    ensure_eq!(status(&bundle, "tmp/file")?, (0o100_644, 1000, 1001), "file");
    ensure_eq!(status(&bundle, "tmp/folder")?, (0o40_755, 1000, 1002), "folder");
    ensure_eq!(status(&bundle, "tmp/folder/file")?, (0o100_644, 1000, 1001), "file in the folder");
    ensure_eq!(status(&bundle, "tmp/link")?, (0o120_777, 1000, 1001), "link");
    ensure_eq!(status(&bundle, "tmp/pipe")?, (0o10_644, 1000, 1001), "pipe");
    Ok(())
}

fn set_id_bits(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(
        "cd /tmp; touch tool; chown 5:6 tool; chmod 6755 tool; mkdir shared; chown 0:77 shared; chmod 2775 shared; \
               touch shared/file; mkdir shared/folder",
    );

    env.run(&bundle)?.output()?.expect_stdout("")?;

    ensure_eq!(status(&bundle, "tmp/tool")?, (0o106_755, 5, 6), "tool");
    ensure_eq!(status(&bundle, "tmp/shared")?, (0o42_775, 0, 77), "shared");
    ensure_eq!(status(&bundle, "tmp/shared/file")?, (0o100_644, 0, 77), "file in a set-group-id folder");
    ensure_eq!(status(&bundle, "tmp/shared/folder")?, (0o42_755, 0, 77), "folder in a set-group-id folder");
    Ok(())
}

fn set_id_bits_fall_with_a_write(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("tmp/tool", "x", 0o6777)?;
    bundle.add_file("tmp/owned", "x", 0o6777)?;
    bundle.user(1000, 1000).set("/process/capabilities", json!({}));
    bundle.sh("echo more >>/tmp/tool; stat -c %a /tmp/tool");

    env.run(&bundle)?.output()?.expect_stdout("777\n")?;

    ensure_eq!(status(&bundle, "tmp/tool")?.0, 0o100_777, "the mode after a user's write");
    ensure_eq!(status(&bundle, "tmp/owned")?.0, 0o106_777, "the mode without one");
    Ok(())
}

fn permissions_are_enforced(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("tmp/roots", "secret\n", 0o600)?;
    bundle.add_file("closed/file", "secret\n", 0o666)?;
    fs::set_permissions(bundle.path("closed"), fs::Permissions::from_mode(0o700))?;
    bundle.add_file("tmp/plain", "text\n", 0o644)?;
    bundle.user(1000, 1000).set("/process/capabilities", json!({}));
    bundle.sh("for try in 'cat /tmp/roots' 'cat /closed/file' 'ls /closed' 'echo x >>/tmp/plain' 'touch /etc/new' 'rm /tmp/plain' \
               'chmod 777 /tmp/plain' 'rm -r /etc'; do sh -c \"$try\" >/dev/null 2>&1 && echo \"could: $try\"; done; cat /tmp/plain");

    env.run(&bundle)?.output()?.expect_stdout("text\n")
}

fn permissions_of_further_groups(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let file = bundle.add_file("tmp/file", "for the group\n", 0o660)?;
    chown(&file, Some(0), Some(3000))?;
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 1000, "additionalGids": [2000, 3000] }));
    bundle.set("/process/capabilities", json!({})).sh("cat /tmp/file; echo more >>/tmp/file");

    env.run(&bundle)?.output()?.expect_stdout("for the group\n")?;

    ensure_eq!(fs::read_to_string(file)?, "for the group\nmore\n", "the file");
    Ok(())
}

fn links(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(
        "cd /tmp; echo text >file; ln file second; mkdir d; ln file d/third; stat -c %h file; echo more >>d/third; \
               ln -s file soft; ln -s /absent/target dangling; cat second soft; readlink dangling; rm file; cat second",
    );

    env.run(&bundle)?.output()?.expect_stdout("3\ntext\nmore\ntext\nmore\n/absent/target\ntext\nmore\n")?;

    let [second, third] = [bundle.path("tmp/second").metadata()?, bundle.path("tmp/d/third").metadata()?];
    ensure_eq!((second.nlink(), second.ino()), (2, third.ino()), "links and number");
    ensure_eq!(fs::read_link(bundle.path("tmp/soft"))?.as_os_str(), "file", "the soft link's target");
    Ok(())
}

fn renames(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(
        "cd /tmp; echo a >a; echo b >b; mkdir d e; echo c >d/c; mv a b; mv b d/b; mv d e/f; ls -R .; cat e/f/b e/f/c; \
               mv e/f/b e/f/c; cat e/f/c; mkdir full; touch full/x; mv -T e/f full 2>/dev/null || echo 'not empty'",
    );

    let expected = ".:\ne\n\n./e:\nf\n\n./e/f:\nb\nc\na\nc\na\nnot empty\n";
    env.run(&bundle)?.output()?.expect_stdout(expected)?;

    ensure_eq!(fs::read_to_string(bundle.path("tmp/e/f/c"))?, "a\n", "the file");
    Ok(())
}

fn times(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("touch -d '2001-02-03 04:05:06' /tmp/old; touch /tmp/new; stat -c %Y /tmp/old; test /tmp/new -nt /tmp/old && echo newer; date +%s");

    let output = env.run(&bundle)?.output()?;

    output.expect_in_stdout(&["981173106\nnewer\n"])?;
    ensure_eq!(bundle.path("tmp/old").metadata()?.mtime(), 981_173_106, "the time on the host");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs().cast_signed();
    let made = bundle.path("tmp/new").metadata()?.mtime();
    ensure!((now - made).abs() <= 10, "a new file is {} s old", now - made);
    let clock: i64 = output.stdout().lines().last().and_then(|line| line.parse().ok()).unwrap_or_default();
    ensure!((now - clock).abs() <= 10, "the container's clock differs by {} s", now - clock);
    Ok(())
}

fn names_of_any_bytes(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /tmp; mkdir names; cd names; long=$(printf '%0255d' 0); touch $'line\\nend' $'\\xff\\xfe' ' ' '*' \"$long\" $'tab\\t' 'ü'; \
               touch \"0$long\" 2>&1 | grep -o 'File name too long'; ls | wc -c; rm '*'; touch ./-n");

    let output = env.run(&bundle)?.output()?;

    output.expect_in_stdout(&["File name too long\n"])?;
    let long = "0".repeat(255);
    let names: [&[u8]; 7] = [b"line\nend", b"\xff\xfe", b" ", b"tab\t", "ü".as_bytes(), long.as_bytes(), b"-n"];
    for name in names {
        let path = bundle.path("tmp/names").join(OsStr::from_bytes(name));
        ensure!(path.symlink_metadata().is_ok(), "{name:?} is not on the host");
    }
    ensure_eq!(fs::read_dir(bundle.path("tmp/names"))?.count(), names.len(), "files on the host");
    Ok(())
}

fn removed_while_open(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /tmp; echo text >file; exec 3<file 4>>file; rm file; echo more >&4; cat <&3; ls; echo again >file; cat file");

    env.run(&bundle)?.output()?.expect_stdout("text\nmore\nagain\n")?;

    ensure_eq!(fs::read_to_string(bundle.path("tmp/file"))?, "again\n", "the new file");
    Ok(())
}

fn append_truncate_and_holes(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("tmp/short", "0123456789", 0o644)?;
    bundle.add_file("tmp/over", "old content", 0o644)?;
    bundle.sh("cd /tmp; truncate -s 4 short; truncate -s 8 short; echo new >over; for n in 1 2 3; do echo $n >>log; done; \
               echo end | dd of=hole bs=1 seek=100000 2>/dev/null; wc -c <hole; dd if=hole bs=1 skip=100000 2>/dev/null; \
               printf XY | dd of=log bs=1 seek=2 conv=notrunc 2>/dev/null; cat log");

    env.run(&bundle)?.output()?.expect_stdout("100004\nend\n1\nXY3\n")?;

    ensure_eq!(fs::read(bundle.path("tmp/short"))?, b"0123\0\0\0\0", "short");
    ensure_eq!(fs::read_to_string(bundle.path("tmp/over"))?, "new\n", "over");
    ensure_eq!(fs::read_to_string(bundle.path("tmp/log"))?, "1\nXY3\n", "log");
    let hole = fs::read(bundle.path("tmp/hole"))?;
    ensure!(
        hole.len() == 100_004 && hole[..100_000].iter().all(|byte| *byte == 0) && hole.ends_with(b"end\n"),
        "the file with a hole"
    );
    Ok(())
}

fn large_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("seq 1 300000 >/tmp/large; cp /tmp/large /tmp/copy; cmp /tmp/large /tmp/copy && wc -c </tmp/copy");
    let expected: String = (1..=300_000).map(|number| format!("{number}\n")).collect();

    env.run(&bundle)?.output()?.expect_stdout(&format!("{}\n", expected.len()))?;

    ensure!(fs::read_to_string(bundle.path("tmp/copy"))? == expected, "the copy differs on the host");
    Ok(())
}

fn beyond_four_gib(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /tmp; truncate -s 6G big; printf mark | dd of=big bs=1M seek=5000 conv=notrunc 2>/dev/null; stat -c %s big; \
               dd if=big bs=1M skip=5000 count=1 2>/dev/null | head -c 4");

    env.run(&bundle)?.output()?.expect_stdout("6442450944\nmark")?;

    let status = bundle.path("tmp/big").metadata()?;
    ensure_eq!(status.len(), 6 << 30, "the length on the host");
    ensure!(status.blocks() < 100_000, "{} blocks for a file of holes", status.blocks());
    Ok(())
}

fn pipes_in_the_file_system(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /tmp; mkfifo pipe; (echo through >pipe) & cat pipe");

    env.run(&bundle)?.output()?.expect_stdout("through\n")?;

    ensure!(bundle.path("tmp/pipe").symlink_metadata()?.file_type().is_fifo(), "it is no pipe on the host");
    Ok(())
}

/// A guest makes no device on the host's disk.
fn device_nodes_are_refused(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("mknod /tmp/disk b 8 0 2>/dev/null || mknod /tmp/mem c 1 1 2>/dev/null || echo refused; ls /tmp");

    env.run(&bundle)?.output()?.expect_stdout("refused\n")?;

    ensure_eq!(fs::read_dir(bundle.path("tmp"))?.count(), 0, "files on the host");
    Ok(())
}

/// What is written but not yet on the host when the container ends is not lost.
fn written_at_the_last_moment(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(
        "for n in 1 2 3 4 5 6 7 8; do head -c 1000000 /dev/zero | tr '\\0' $n >/tmp/$n; done; printf last >/tmp/last",
    );

    env.run(&bundle)?.output()?.expect_stdout("")?;

    for number in 1..=8u8 {
        let content = fs::read(bundle.path(&format!("tmp/{number}")))?;
        ensure!(
            content.len() == 1_000_000 && content.iter().all(|byte| *byte == b'0' + number),
            "file {number} is not as written"
        );
    }
    ensure_eq!(fs::read_to_string(bundle.path("tmp/last"))?, "last", "the last file");
    Ok(())
}

fn synced_before_a_kill(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo durable >/tmp/file; sync; echo ready; sleep 1000");

    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    drop(running);

    ensure_eq!(fs::read_to_string(bundle.path("tmp/file"))?, "durable\n", "the file");
    env.clean_up()
}

fn free_space_is_told(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("df -k / | tail -n 1 | awk '{ print $2 }'");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let size: u64 = output.stdout().trim().parse().unwrap_or_default();
    ensure!(size > 1000, "{}", output.describe());
    Ok(())
}
