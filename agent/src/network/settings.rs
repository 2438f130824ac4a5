// SPDX-License-Identifier: Apache-2.0
//! What the kernel does by itself, on an interface or on all of them: sysctls, which are as the host has them.

use std::collections::HashMap;
use std::path::Path;
use std::{fs, io};

use bulkhead_protocol::agent::{Ipv6Settings, NetworkInterface};

use crate::log::{self, Level};

/// Of what it does about IPv4, what is as the host has it: the numbers (`IPV4_DEVCONF_*`, linux/ip.h), the files, and what is in
/// these of a new interface.
const IPV4: [(usize, &str, i32); 18] = [
    (1, "forwarding", 0),
    (3, "proxy_arp", 0),
    (4, "accept_redirects", 1),
    (5, "secure_redirects", 1),
    (6, "send_redirects", 1),
    (8, "rp_filter", 0),
    (9, "accept_source_route", 1),
    (11, "log_martians", 0),
    (13, "arp_filter", 0),
    (18, "arp_announce", 0),
    (19, "arp_ignore", 0),
    (20, "promote_secondaries", 0),
    (21, "arp_accept", 0),
    (22, "arp_notify", 0),
    (23, "accept_local", 0),
    (24, "src_valid_mark", 0),
    (26, "route_localnet", 0),
    (29, "ignore_routes_with_linkdown", 0),
];

/// With this the kernel sets `forwarding` of each interface, and of those to come, and turns `REDIRECTS` on or off: it is set first. That of
/// IPv6 does so to interfaces too, of which the host tells no such setting one by one.
const FORWARDING: &str = "ipv4/conf/all/forwarding";
const REDIRECTS: &str = "ipv4/conf/all/accept_redirects";

/// Makes what is below `folder` what the host wants, as far as it has wanted something else before; what a container has changed
/// stays. What this kernel does not take is left, with a word in its log. Returns how IPv4 is forwarded on each interface now, if that
/// has been set.
pub(super) fn follow_common(
    folder: &Path,
    old: &HashMap<String, String>,
    wanted: &HashMap<String, String>,
) -> Option<i32> {
    let is_news = |file: &str| wanted.get(file) != old.get(file);
    let forwarding = wanted.get(FORWARDING).filter(|_| is_news(FORWARDING));
    let forwarding = forwarding.filter(|value| set_or_tell(folder, FORWARDING, value));
    let is_to_set = |file: &str| file != FORWARDING && is_news(file) || file == REDIRECTS && forwarding.is_some();
    let mut news: Vec<_> = wanted.iter().filter(|(file, _)| is_to_set(file)).collect();
    news.sort();
    // Some are bounds of others: they may be set in this order alone, or in the other one.
    news.retain(|(file, value)| set(&folder.join(file), value).is_err());
    for (file, value) in news {
        set_or_tell(folder, file, value);
    }
    forwarding?.trim().parse().ok()
}

/// Whether a file says this then.
fn set_or_tell(folder: &Path, file: &str, value: &str) -> bool {
    let set = set(&folder.join(file), value);
    if let Err(error) = &set {
        log::write(Level::Warning, &format!("cannot set net/{file} to {value:?}: {error}"));
    }
    set.is_ok()
}

/// Has a file say this, unless it does, or there is none.
fn set(path: &Path, value: &str) -> io::Result<()> {
    let current = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        current => current?,
    };
    if current.split_whitespace().eq(value.split_whitespace()) {
        return Ok(());
    }
    // A line of its own: one without anything in it empties a list.
    fs::write(path, format!("{value}\n"))
}

/// A file, and the number that is to be in it.
type Setting = (&'static str, i32);

/// An interface that is new, where this was set last for all interfaces of forwarding: the rest is as the kernel has it.
pub(super) fn of_new(forwarding: i32) -> NetworkInterface {
    NetworkInterface { ipv4: vec![forwarding], ..Default::default() }
}

/// Has an interface forward IPv4 like this, if there is any word of its IPv4.
pub(super) fn set_forwarding(interface: &mut NetworkInterface, forwarding: i32) {
    // It is number 1.
    if let Some(first) = interface.ipv4.first_mut() {
        *first = forwarding;
    }
}

/// Makes what is below `folder` about the interface that is called `link` by now what the host wants, as far as it has wanted
/// something else before; what a container has changed stays.
pub(super) fn follow(folder: &Path, link: &str, old: &NetworkInterface, wanted: &NetworkInterface) -> io::Result<()> {
    let ipv6 = folder.join("ipv6/conf").join(link);
    write_news(&folder.join("ipv4/conf").join(link), of_ipv4(old).zip(of_ipv4(wanted)))?;
    // A guest that was told to do without IPv6 has nothing to be set. Nor is there a word of it if the host does without.
    if wanted.ipv6.is_none() || !ipv6.exists() {
        return Ok(());
    }
    write_news(&ipv6, of_ipv6(old).into_iter().zip(of_ipv6(wanted)))
}

fn write_news(folder: &Path, settings: impl Iterator<Item = (Setting, Setting)>) -> io::Result<()> {
    for (_, (file, value)) in settings.filter(|(before, wanted)| before != wanted) {
        fs::write(folder.join(file), value.to_string())?;
    }
    Ok(())
}

fn of_ipv4(interface: &NetworkInterface) -> impl Iterator<Item = Setting> {
    IPV4.iter().map(|(number, file, default)| (*file, interface.ipv4.get(number - 1).copied().unwrap_or(*default)))
}

fn of_ipv6(interface: &NetworkInterface) -> [Setting; 4] {
    let defaults = Ipv6Settings { accept_ra: 1, autoconf: 1, accept_dad: 1, ..Default::default() };
    let Ipv6Settings { accept_ra, autoconf, disable_ipv6, accept_dad, .. } =
        *interface.ipv6.as_ref().unwrap_or(&defaults);
    [("accept_ra", accept_ra), ("autoconf", autoconf), ("disable_ipv6", disable_ipv6), ("accept_dad", accept_dad)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows, and tells what is in the files of a family that were ever written.
    fn set(folder: &Path, family: &str, old: &NetworkInterface, wanted: &NetworkInterface) -> Vec<String> {
        for family in ["ipv4", "ipv6"] {
            fs::create_dir_all(folder.join(family).join("conf/eth0")).unwrap();
        }
        follow(folder, "eth0", old, wanted).unwrap();
        let entries = fs::read_dir(folder.join(family).join("conf/eth0")).unwrap();
        let mut files: Vec<_> = entries
            .map(|entry| {
                let entry = entry.unwrap();
                format!("{}={}", entry.file_name().display(), fs::read_to_string(entry.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    #[test]
    fn what_is_common_is_set_where_it_differs() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        fs::create_dir(file("core")).unwrap();
        let map = |entries: &[(&str, &str)]| entries.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let none: HashMap<String, String> = HashMap::new();
        for (name, content) in [("core/somaxconn", "4096\n"), ("range", "32768\t60999\n"), ("list", "7\n")] {
            fs::write(file(name), content).unwrap();
        }
        let first = map(&[("core/somaxconn", "99"), ("range", "32768 60999"), ("list", ""), ("no/such", "1")]);

        follow_common(folder.path(), &none, &first);
        let read = |name: &str| fs::read_to_string(file(name)).unwrap();
        assert_eq!([read("core/somaxconn"), read("range"), read("list")], ["99\n", "32768\t60999\n", "\n"]);
        assert!(!file("no").exists());

        // A container has changed it.
        fs::write(file("core/somaxconn"), "5").unwrap();
        follow_common(folder.path(), &first, &map(&[("core/somaxconn", "99"), ("range", "1 2")]));
        assert_eq!([read("core/somaxconn"), read("range")], ["5", "1 2\n"]);
    }

    #[test]
    fn what_forwarding_changes_is_set_again() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("ipv4/conf/all")).unwrap();
        let map = |forwarding: &str| {
            let entries = [(FORWARDING, forwarding), (REDIRECTS, "1")];
            entries.map(|(file, value)| (file.to_owned(), value.to_owned())).into_iter().collect()
        };
        // As the kernel leaves it when all forward.
        fs::write(folder.path().join(FORWARDING), "0").unwrap();
        fs::write(folder.path().join(REDIRECTS), "0").unwrap();
        let redirects = || fs::read_to_string(folder.path().join(REDIRECTS)).unwrap();

        assert_eq!(follow_common(folder.path(), &map("0"), &map("0")), None);
        assert_eq!(redirects(), "0", "nothing was news");
        assert_eq!(follow_common(folder.path(), &map("0"), &map("1")), Some(1));
        assert_eq!(redirects(), "1\n");
    }

    #[test]
    fn one_interface_forwards_otherwise_than_all() {
        let folder = tempfile::tempdir().unwrap();
        let with = |forwarding| NetworkInterface { ipv4: vec![forwarding, 0], ..Default::default() };
        let set = |old: &NetworkInterface, wanted: &NetworkInterface| set(folder.path(), "ipv4", old, wanted);

        assert_eq!(set(&of_new(1), &with(1)), [""; 0]);
        assert_eq!(set(&of_new(1), &with(0)), ["forwarding=0"]);
        let mut known = with(1);
        set_forwarding(&mut known, 0);
        assert_eq!(set(&known, &with(1)), ["forwarding=1"]);
    }

    #[test]
    fn only_what_is_news_is_set_of_ipv6() {
        let folder = tempfile::tempdir().unwrap();
        let with = |accept_ra, autoconf| {
            let ipv6 = Ipv6Settings { accept_ra, autoconf, accept_dad: 1, ..Default::default() };
            NetworkInterface { ipv6: Some(ipv6).into(), ..Default::default() }
        };
        let set = |old: &NetworkInterface, wanted: &NetworkInterface| set(folder.path(), "ipv6", old, wanted);

        assert_eq!(set(&of_new(0), &NetworkInterface::default()), [""; 0]);
        assert_eq!(set(&of_new(0), &with(0, 1)), ["accept_ra=0"]);
        // A container has changed it.
        fs::write(folder.path().join("ipv6/conf/eth0/accept_ra"), "2").unwrap();
        assert_eq!(set(&with(0, 1), &with(0, 0)), ["accept_ra=2", "autoconf=0"]);
    }

    #[test]
    fn only_what_is_news_is_set_of_ipv4() {
        let folder = tempfile::tempdir().unwrap();
        let with = |rp_filter, arp_ignore| {
            let number = |number| match number {
                8 => rp_filter,
                19 => arp_ignore,
                _ => IPV4.iter().find(|(known, ..)| *known == number).map_or(7, |(.., default)| *default),
            };
            NetworkInterface { ipv4: (1..=33).map(number).collect(), ..Default::default() }
        };
        let set = |old: &NetworkInterface, wanted: &NetworkInterface| set(folder.path(), "ipv4", old, wanted);

        assert_eq!(set(&of_new(0), &NetworkInterface::default()), [""; 0]);
        assert_eq!(set(&of_new(0), &with(2, 0)), ["rp_filter=2"]);
        assert_eq!(set(&with(2, 0), &with(2, 1)), ["arp_ignore=1", "rp_filter=2"]);
        assert_eq!(set(&with(2, 1), &with(0, 1)), ["arp_ignore=1", "rp_filter=0"]);
    }
}
