// SPDX-License-Identifier: Apache-2.0
//! What the container's own /etc/passwd says about a user.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// Bytes of /etc/passwd that are looked at: the file is the container's, and may be anything.
const MAX_LEN: u64 = 1 << 20;

/// The home directory of `uid` in the calling process's root file system; `/` where nothing is said.
pub(crate) fn home(uid: u32) -> String {
    home_in_file(uid).unwrap_or_else(|| "/".to_owned())
}

fn home_in_file(uid: u32) -> Option<String> {
    // Not blocking: it could be a fifo.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/etc/passwd").ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut content = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut content).ok()?;
    home_in(&String::from_utf8_lossy(&content), uid)
}

/// Fields of a line: name, password, uid, gid, comment, home, shell.
fn home_in(passwd: &str, uid: u32) -> Option<String> {
    let line = passwd.lines().find(|line| line.split(':').nth(2).and_then(|field| field.parse().ok()) == Some(uid))?;
    line.split(':').nth(5).filter(|home| !home.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\n#comment\nbroken\nuser:x:1000:1000::/home/user:\nempty:x:5:5:::\n";

    #[test]
    fn home_is_found_by_number() {
        assert_eq!(home_in(PASSWD, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(PASSWD, 1000).as_deref(), Some("/home/user"));
    }

    #[test]
    fn unknown_user_and_empty_field_have_none() {
        assert_eq!(home_in(PASSWD, 7), None);
        assert_eq!(home_in(PASSWD, 5), None);
        assert_eq!(home_in("", 0), None);
    }
}
