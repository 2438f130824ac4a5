// SPDX-License-Identifier: Apache-2.0
//! `linux.resources.devices`: which devices a container may make nodes of, read and write.
//!
//! Nothing is allowed that no rule allows; of those that speak of a device, the last decides, for each kind of access by
//! itself. The devices that every container has come last, so that no rule takes them away, as with runc.
//!
//! Rules name block devices by the host's numbers, and the guest's kernel knows them by its own: a rule for some of them becomes
//! one for each of the container's that it speaks of.

mod program;

use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::error::FieldError;
use crate::storage::block_device::Number;

/// Most rules of a configuration: an engine's privileged container has one for each device of its host.
const MAX_RULES: usize = 4096;

/// Largest major and minor number in Linux.
const MAX_MAJOR: i64 = 0xfff;
const MAX_MINOR: i64 = 0xf_ffff;

/// Accesses, as `BPF_DEVCG_ACC_*` of <linux/bpf.h>.
const MAKE: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MAKE | READ | WRITE;

/// What a rule speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Any,
    Block,
    Character,
}

/// One rule; a number that is absent stands for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Kind,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

/// A device that every container may use: its node's path, if it has one there by default, and its numbers.
const DEFAULT: &[(&str, u32, Option<u32>)] = &[
    ("/dev/null", 1, Some(3)),
    ("/dev/random", 1, Some(8)),
    ("/dev/full", 1, Some(7)),
    ("/dev/tty", 5, Some(0)),
    ("/dev/zero", 1, Some(5)),
    ("/dev/urandom", 1, Some(9)),
    // Pseudo-terminals and what makes them.
    ("", 136, None),
    ("", 5, Some(2)),
];

/// A block device of the host that the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GuestDisk {
    pub(crate) host: Number,
    pub(crate) guest: Number,
}

/// The rules of a container, and those that hold for all.
#[derive(Debug, Clone)]
pub(crate) struct DeviceRules(Vec<Rule>);

impl DeviceRules {
    /// Whether a block device of the host may be written to.
    pub(crate) fn allow_writing(&self, number: Number) -> bool {
        let speaks = |rule: &&Rule| rule.access & WRITE != 0 && rule.speaks_of_block(number);
        self.0.iter().rev().find(speaks).is_some_and(|rule| rule.allow)
    }

    /// Compiles them for the container's cgroup in a guest where its block devices are these: instructions of eBPF, as they are
    /// in memory.
    pub(crate) fn compile(&self, disks: &[GuestDisk]) -> Vec<u8> {
        let rules: Vec<Rule> = self.0.iter().flat_map(|rule| rule.in_guest(disks)).collect();
        program::compile(&rules)
    }
}

impl Rule {
    /// Whether it speaks of that block device.
    fn speaks_of_block(&self, number: Number) -> bool {
        self.kind != Kind::Character
            && self.major.is_none_or(|major| major == number.major)
            && self.minor.is_none_or(|minor| minor == number.minor)
    }

    /// The rules that say the same by the guest's numbers.
    fn in_guest(self, disks: &[GuestDisk]) -> Vec<Self> {
        if self.kind == Kind::Character || (self.major, self.minor) == (None, None) {
            return vec![self];
        }
        let characters = (self.kind == Kind::Any).then_some(Self { kind: Kind::Character, ..self });
        let of = |guest: Number| Self { kind: Kind::Block, major: Some(guest.major), minor: Some(guest.minor), ..self };
        let blocks = disks.iter().filter(|disk| self.speaks_of_block(disk.host)).map(|disk| of(disk.guest));
        characters.into_iter().chain(blocks).collect()
    }
}

/// Checks the rules.
///
/// `devices` are those that the container has nodes of: one in the place of a default device goes without its rule.
pub(crate) fn translate(rules: &[LinuxDeviceCgroup], devices: &[LinuxDevice]) -> Result<DeviceRules, FieldError> {
    if rules.len() > MAX_RULES {
        let expected = format!("at most {MAX_RULES} rules");
        return Err(FieldError::invalid("linux.resources.devices", format!("{} rules", rules.len()), expected));
    }
    let mut all = rules.iter().enumerate().map(|(index, rule)| parse(index, rule)).collect::<Result<Vec<_>, _>>()?;
    all.extend(default_rules(devices));
    Ok(DeviceRules(all))
}

fn parse(index: usize, rule: &LinuxDeviceCgroup) -> Result<Rule, FieldError> {
    let field = |name: &str| format!("linux.resources.devices[{index}].{name}");
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => Kind::Any,
        Some(LinuxDeviceType::B) => Kind::Block,
        Some(LinuxDeviceType::C) => Kind::Character,
        Some(other) => return Err(FieldError::invalid(field("type"), other.as_str(), "a, b or c")),
    };
    let number = |name: &str, number: Option<i64>, max: i64| match number {
        None | Some(-1) => Ok(None),
        Some(number) => match u32::try_from(number).ok().filter(|_| number <= max) {
            Some(number) => Ok(Some(number)),
            None => Err(FieldError::invalid(field(name), number, format!("-1 for all, or from 0 to {max}"))),
        },
    };
    let (major, minor) = (number("major", rule.major(), MAX_MAJOR)?, number("minor", rule.minor(), MAX_MINOR)?);
    let text = rule.access().as_deref().unwrap_or_default();
    if text.is_empty() {
        return Err(FieldError::missing(field("access"), "it says what is allowed or denied, as in rwm"));
    }
    let access = text.chars().try_fold(0, |access, letter| match letter {
        'r' => Ok(access | READ),
        'w' => Ok(access | WRITE),
        'm' => Ok(access | MAKE),
        _ => Err(FieldError::invalid(field("access"), text, "made of r, w and m")),
    })?;
    Ok(Rule { allow: rule.allow(), kind, major, minor, access })
}

/// Nodes may be made of everything: what counts is whether they can be opened.
fn default_rules(devices: &[LinuxDevice]) -> Vec<Rule> {
    let make = |kind| Rule { allow: true, kind, major: None, minor: None, access: MAKE };
    let mut rules = vec![make(Kind::Character), make(Kind::Block)];
    let taken = |path: &str| devices.iter().any(|device| device.path() == Path::new(path));
    rules.extend(DEFAULT.iter().filter(|(path, ..)| !taken(path)).map(|(_, major, minor)| Rule {
        allow: true,
        kind: Kind::Character,
        major: Some(*major),
        minor: *minor,
        access: ALL,
    }));
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(rules: Value, devices: Value) -> Result<Vec<u8>, String> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules).unwrap();
        let devices: Vec<LinuxDevice> = serde_json::from_value(devices).unwrap();
        translate(&rules, &devices).map(|rules| rules.compile(&[])).map_err(|error| error.to_string())
    }

    /// Whether the filter lets a character device be used.
    fn allows(filter: &[u8], major: u32, minor: u32, access: u8) -> bool {
        program::tests::run(filter, 2, access, major, minor)
    }

    #[test]
    fn without_rules_only_the_default_devices_can_be_used() {
        let filter = translated(json!([]), json!([])).unwrap();

        assert!(allows(&filter, 1, 3, ALL));
        assert!(allows(&filter, 136, 77, READ | WRITE));
        assert!(allows(&filter, 1, 11, MAKE));
        assert!(!allows(&filter, 1, 11, READ));
        assert!(!allows(&filter, 1, 11, READ | MAKE));
    }

    #[test]
    fn the_rules_of_an_engine_hold_in_their_order() {
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
            {"allow": true, "type": "c", "major": 1, "access": "r"},
            {"allow": false, "type": "c", "major": 1, "minor": 11, "access": "rw"},
        ]);

        let filter = translated(rules, json!([])).unwrap();

        assert!(allows(&filter, 10, 229, READ | WRITE));
        assert!(allows(&filter, 1, 12, READ) && !allows(&filter, 1, 12, READ | WRITE));
        assert!(!allows(&filter, 1, 11, READ));
        assert!(!allows(&filter, 10, 200, READ));
    }

    #[test]
    fn no_rule_takes_the_default_devices_away_but_a_device_in_their_place_does() {
        let deny = json!([{"allow": false, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]);
        let null = json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 5}]);

        assert!(allows(&translated(deny.clone(), json!([])).unwrap(), 1, 3, WRITE));
        assert!(!allows(&translated(deny, null).unwrap(), 1, 3, WRITE));
    }

    /// The container has 8:16 as 254:0 and 8:32 as 254:16; another one of the guest's has 254:32.
    #[test]
    fn block_devices_are_named_by_the_hosts_numbers() {
        let number = |major, minor| Number { major, minor };
        let disks =
            [(16, 0), (32, 16)].map(|(host, guest)| GuestDisk { host: number(8, host), guest: number(254, guest) });
        let translated = |rules: Value| translate(&serde_json::from_value::<Vec<_>>(rules).unwrap(), &[]).unwrap();
        let block = |filter: &[u8], minor, access| program::tests::run(filter, 1, access, 254, minor);

        let one = translated(json!([{"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rw"}]));
        let filter = one.compile(&disks);
        assert!(block(&filter, 0, READ | WRITE) && !block(&filter, 16, READ) && !block(&filter, 32, READ));
        assert!(one.allow_writing(number(8, 16)) && !one.allow_writing(number(8, 32)));

        let driver = translated(json!([
            {"allow": true, "type": "a", "major": 8, "access": "r"},
            {"allow": false, "type": "b", "major": 8, "minor": 32, "access": "r"},
            {"allow": true, "type": "b", "major": 254, "access": "rwm"},
        ]));
        let filter = driver.compile(&disks);
        assert!(block(&filter, 0, READ) && !block(&filter, 0, WRITE));
        assert!(!block(&filter, 16, READ) && !block(&filter, 32, READ));
        assert!(allows(&filter, 8, 1, READ) && !allows(&filter, 8, 1, WRITE));
        assert!(!driver.allow_writing(number(8, 16)));

        let all = translated(json!([{"allow": true, "access": "rwm"}]));
        assert!(block(&all.compile(&disks), 32, WRITE) && all.allow_writing(number(9, 9)));
    }

    #[test]
    fn each_bad_rule_is_refused_with_its_index() {
        let cases = [
            (json!({"access": "x"}), "linux.resources.devices[0].access: \"x\" is not made of r, w and m"),
            (json!({"allow": true}), "linux.resources.devices[0].access: missing; it says what"),
            (json!({"type": "p", "access": "r"}), "linux.resources.devices[0].type: \"p\" is not a, b or c"),
            (json!({"major": 4096, "access": "r"}), "linux.resources.devices[0].major: \"4096\" is not -1 for all"),
            (json!({"minor": -2, "access": "r"}), "linux.resources.devices[0].minor: \"-2\" is not -1 for all"),
        ];
        for (rule, expected) in cases {
            let error = translated(json!([rule]), json!([])).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        let many = vec![json!({"access": "r"}); MAX_RULES + 1];
        assert!(translated(json!(many), json!([])).is_err());
    }
}
