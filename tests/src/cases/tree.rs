// SPDX-License-Identifier: Apache-2.0
//! Many files and deep folders.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(many_files_of_the_container),
    case!(many_files_of_the_host),
    case!(deep_folders),
    case!(copy_pack_and_remove),
    case!(listing_while_it_changes),
];

fn many_files_of_the_container(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("mkdir /many; cd /many; n=0; while [ $n -lt 500 ]; do echo $n >file-$n; n=$((n + 1)); done; ls | wc -l; cat file-* | wc -l");

    env.run(&bundle)?.output()?.expect_stdout("500\n500\n")?;

    ensure_eq!(fs::read_dir(bundle.path("many"))?.count(), 500, "files on the host");
    ensure_eq!(fs::read_to_string(bundle.path("many/file-234"))?, "234\n", "one of them");
    Ok(())
}

fn many_files_of_the_host(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let shared = env.folder("shared")?;
    for number in 0..600 {
        fs::write(shared.join(format!("a-rather-long-file-name-{number:05}")), [])?;
    }
    bundle
        .bind(&shared, "/shared", &["ro"])
        .sh("ls /shared | wc -l; ls /shared | sort -u | wc -l; find /shared -type f | wc -l");

    env.run(&bundle)?.output()?.expect_stdout("600\n600\n600\n")
}

fn deep_folders(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /tmp; n=0; while [ $n -lt 150 ]; do mkdir d; cd d; n=$((n + 1)); done; echo deep >file; cat file; \
               cd /tmp; find . -name file | tr -cd d | wc -c");

    env.run(&bundle)?.output()?.expect_stdout("deep\n150\n")?;

    let path = bundle.path("tmp").join("d/".repeat(150)).join("file");
    ensure_eq!(fs::read_to_string(path)?, "deep\n", "the file on the host");
    Ok(())
}

fn copy_pack_and_remove(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /tmp; mkdir -p tree/a/b; seq 1 1000 >tree/a/numbers; ln tree/a/numbers tree/a/same; ln -s numbers tree/a/link; \
               chmod 4711 tree/a/numbers; chown 7:8 tree/a/b; cp -a tree copy; tar cf tree.tar tree; mkdir out; tar xf tree.tar -C out; \
               cmp tree/a/numbers out/tree/a/numbers; cmp tree/a/numbers copy/a/same; stat -c '%a %u:%g %h' out/tree/a/numbers out/tree/a/b; \
               readlink copy/a/link; rm -r tree copy tree.tar; ls");

    env.run(&bundle)?.output()?.expect_stdout("4711 0:0 2\n755 7:8 2\nnumbers\nout\n")?;

    let numbers = bundle.path("tmp/out/tree/a/numbers").metadata()?;
    ensure_eq!((numbers.mode() & 0o7777, numbers.nlink()), (0o4711, 2), "the unpacked file");
    Ok(())
}

fn listing_while_it_changes(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("mkdir /many; cd /many; n=0; while [ $n -lt 200 ]; do : >f$n; n=$((n + 1)); done; rm -r /many; ls -d /many 2>/dev/null || echo gone");

    env.run(&bundle)?.output()?.expect_stdout("gone\n")?;

    ensure!(!bundle.path("many").exists(), "the folder is on the host");
    Ok(())
}
