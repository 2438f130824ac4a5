// SPDX-License-Identifier: Apache-2.0
//! A Debian root file system, on an overlay as engines give it.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(apt_tells_its_version),
    case!(package_database_can_be_read),
    case!(perl_script),
    case!(python_script),
    case!(c_program_is_compiled_and_runs),
    case!(fault_of_a_program),
    case!(shell_with_many_processes),
    case!(extended_attributes),
    case!(memory_mapped_files),
    case!(file_locks),
    case!(sockets),
    case!(pseudo_terminals),
    case!(whiteouts),
];

fn apt_tells_its_version(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    bundle.args(&["apt-get", "--version"]);

    env.run(&bundle)?.output()?.expect_in_stdout(&["apt ", "(amd64)"])
}

fn package_database_can_be_read(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    bundle.args(&["bash", "-c", "set -e; dpkg -l | grep -c ^ii; dpkg -S /bin/bash; apt-cache policy bash | head -n 1"]);

    env.run(&bundle)?.output()?.expect_in_stdout(&["bash: /bin/bash\n"])
}

fn perl_script(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    let script = "#!/usr/bin/perl\nuse strict; use warnings;\nmy %n; $n{$_ % 7}++ for 1..1000;\n\
                  print join(',', map { \"$_=$n{$_}\" } sort keys %n), \"\\n\"; exit 5;\n";
    bundle.add_file("opt/script", script, 0o755)?;
    bundle.args(&["/opt/script"]);

    let output = env.run(&bundle)?.output()?;

    output.expect_code(5)?;
    ensure_eq!(output.stdout(), "0=142,1=143,2=143,3=143,4=143,5=143,6=143\n", "stdout");
    Ok(())
}

/// Runs a Python script as the container's process.
fn python(bundle: &mut Bundle, script: &str) {
    bundle.args(&["python3", "-c", script]);
}

fn python_script(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    python(
        &mut bundle,
        "import sys, os\nprint(sum(i * i for i in range(1000)), os.getpid())\nprint('to stderr', file=sys.stderr)\nsys.exit(6)",
    );

    let output = env.run(&bundle)?.output()?;

    output.expect_code(6)?;
    ensure_eq!((output.stdout().as_str(), output.stderr().as_str()), ("332833500 1\n", "to stderr\n"), "the streams");
    Ok(())
}
const PROGRAM: &str = "#include <stdio.h>\n#include <string.h>\n\
    int main(int argc, char **argv) {\n\
      if (argc > 1 && !strcmp(argv[1], \"fault\")) return *(volatile int *)16;\n\
      double sum = 0; for (int i = 1; i < 100; i++) sum += 1.0 / i;\n\
      printf(\"%.6f %s\\n\", sum, __VERSION__ ? \"compiled\" : \"\"); return 12; }\n";

fn c_program_is_compiled_and_runs(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    bundle.add_file("src/program.c", PROGRAM, 0o644)?;
    bundle.sh("cd /src && gcc -O2 -Wall -o program program.c && ./program");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(12)?;
    ensure_eq!(output.stdout(), "5.177378 compiled\n", "stdout");
    let status = bundle.path("src/program").metadata()?;
    ensure_eq!((status.mode() & 0o7777, status.uid()), (0o755, 0), "the program on the host");
    Ok(())
}

/// A fault ends process 1 as well.
fn fault_of_a_program(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    bundle.add_file("src/program.c", PROGRAM, 0o644)?;
    bundle.sh("gcc -o /src/program /src/program.c && exec /src/program fault");
    env.run(&bundle)?.output()?.expect_code(128 + 11)
}

fn shell_with_many_processes(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    let script = "p=; for n in {1..100}; do (exit $((n % 3))) & p=\"$p $!\"; done; s=0; for j in $p; do wait $j || s=$((s + $?)); done; echo $s";
    bundle.args(&["bash", "-c", script]);

    env.run(&bundle)?.output()?.expect_stdout("100\n")
}

fn extended_attributes(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    // File systems in memory keep capabilities, and not all of them users' attributes.
    python(
        &mut bundle,
        "import os\np = '/tmp/file'\nopen(p, 'w').close()\n\
         c = bytes.fromhex('0100000200040000000000000000000000000000')\nos.setxattr(p, 'security.capability', c)\n\
         assert os.getxattr(p, 'security.capability') == c, 'read back'\nassert 'security.capability' in os.listxattr(p), 'listed'\n\
         os.removexattr(p, 'security.capability')\nassert 'security.capability' not in os.listxattr(p), 'removed'\n\
         os.setxattr(p, 'security.capability', c)\n\
         try:\n    os.setxattr(p, 'user.note', b'x' * 100); assert os.getxattr(p, 'user.note') == b'x' * 100; print('user attributes')\n\
         except OSError as e:\n    import errno; assert e.errno == errno.ENOTSUP, e\n\
         print('done')",
    );

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    ensure!(output.stdout().ends_with("done\n"), "{}", output.describe());
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(bundle.path("tmp/file"), "security.capability", &mut value)?;
    ensure_eq!(length, 20, "bytes of the attribute on the host");
    Ok(())
}

const MAPPER: &str = "#include <fcntl.h>\n#include <stdio.h>\n#include <string.h>\n#include <sys/mman.h>\n#include <unistd.h>\n\
    int main(void) { int fd = open(\"/tmp/map\", O_RDWR | O_CREAT | O_TRUNC, 0644); ftruncate(fd, 1 << 20);\n\
      char *map = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), seen[6] = {0}; if (map == MAP_FAILED) return 1;\n\
      memcpy(map + 5000, \"hello\", 5); map[(1 << 20) - 1] = '!'; pread(fd, seen, 5, 5000); puts(seen);\n\
      pwrite(fd, \"other\", 5, 9000); printf(\"%.5s\\n\", map + 9000); memcpy(map, \"end\", 3); return 0; }\n";

/// What is mapped and what is read are one, and all of it is on the host at the end.
fn memory_mapped_files(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    bundle.add_file("src/mapper.c", MAPPER, 0o644)?;
    bundle.sh("gcc -o /src/mapper /src/mapper.c && exec /src/mapper");

    env.run(&bundle)?.output()?.expect_stdout("hello\nother\n")?;

    let content = fs::read(bundle.path("tmp/map"))?;
    let right = content.len() == 1 << 20
        && &content[..3] == b"end"
        && &content[5000..5005] == b"hello"
        && content.ends_with(b"!");
    ensure!(right, "the file on the host is not as mapped");
    Ok(())
}

fn file_locks(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    bundle.sh("exec 9>/tmp/lock; flock -n 9 && echo first; flock -n /tmp/lock true || echo busy; flock -u 9; flock -n /tmp/lock echo free");

    env.run(&bundle)?.output()?.expect_stdout("first\nbusy\nfree\n")
}

fn sockets(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    bundle.args(&["perl", "-e", "use Socket; socket(S, PF_UNIX, SOCK_STREAM, 0); bind(S, sockaddr_un('/tmp/socket')) or die $!; listen(S, 1); \
        if (!fork) { socket(C, PF_UNIX, SOCK_STREAM, 0); connect(C, sockaddr_un('/tmp/socket')) or die $!; syswrite(C, 'through'); exit } \
        accept(A, S); sysread(A, $b, 99); print \"$b\\n\";"]);

    env.run(&bundle)?.output()?.expect_stdout("through\n")
}

fn pseudo_terminals(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    python(
        &mut bundle,
        "import os\nm, s = os.openpty()\nprint(os.ttyname(s))\nos.write(m, b'typed\\n')\nprint(os.read(s, 99))\nprint(os.read(m, 99))",
    );

    env.run(&bundle)?.output()?.expect_stdout("/dev/pts/0\nb'typed\\n'\nb'typed\\r\\n'\n")
}

/// What a container removes of a lower layer is a matter of the host's overlay.
fn whiteouts(env: &Env) -> Result {
    let mut bundle = Bundle::debian(env)?;
    bundle.sh("rm /etc/debian_version; rm -r /usr/share/doc; mkdir /usr/share/doc; mv /etc/issue /etc/moved; ls /usr/share/doc; ls /etc/moved; \
               cat /etc/debian_version 2>/dev/null || echo gone");

    env.run(&bundle)?.output()?.expect_stdout("/etc/moved\ngone\n")?;

    ensure!(!bundle.path("etc/debian_version").exists(), "the file is there");
    ensure!(env.debian()?.join("etc/debian_version").exists(), "the lower layer was changed");
    Ok(())
}
