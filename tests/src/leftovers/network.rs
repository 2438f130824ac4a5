// SPDX-License-Identifier: Apache-2.0
//! What may be left of a network: taps and filters, on the host and in the namespaces that have a name; and these.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Where namespaces have names (ip-netns(8)).
const NAMED: &str = "/run/netns";

/// What the names of taps begin with.
const TAP: &str = "bh-";

/// All of it that is there now, each in words.
pub(super) fn found() -> BTreeSet<String> {
    // Not this process' own namespace, but that of the mount: the host's.
    let links = names("/sys/class/net");
    let mut found: BTreeSet<_> =
        links.iter().filter(|name| name.starts_with(TAP)).map(|name| format!("tap {name}")).collect();
    for name in names(NAMED) {
        let inside = in_namespace(&Path::new(NAMED).join(&name));
        found.extend(inside.into_iter().map(|what| format!("{what} in the network namespace {name}")));
        found.insert(format!("network namespace {name}"));
    }
    found
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Taps, and what frames could be filtered by. A name whose namespace has gone has none of either.
fn in_namespace(path: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for line in run(path, "ip -o link").lines() {
        let name = line.split([' ', ':', '@']).filter(|word| !word.is_empty()).nth(1).unwrap_or_default();
        if name.starts_with(TAP) {
            found.push(format!("tap {name}"));
        }
        let filters = run(path, &format!("tc filter show dev {name} ingress"));
        found
            .extend(filters.lines().filter(|line| line.starts_with("filter ")).map(|line| format!("{line} on {name}")));
    }
    let is_for_filters = |line: &&str| line.starts_with("qdisc ingress") || line.starts_with("qdisc clsact");
    found.extend(run(path, "tc qdisc show").lines().filter(is_for_filters).map(|line| line.trim().to_owned()));
    found
}

/// What a command prints in a namespace.
fn run(namespace: &Path, command: &str) -> String {
    let mut inside = Command::new("nsenter");
    inside.arg(format!("--net={}", namespace.display())).args(command.split_whitespace());
    inside.output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}
