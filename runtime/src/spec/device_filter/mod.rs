// SPDX-License-Identifier: Apache-2.0
//! `linux.resources.devices`: which devices a container may make nodes of, read and write.
//!
//! Nothing is allowed that no rule allows; of those that speak of a device, the last decides, for each kind of access by
//! itself. The devices that every container has come last, so that no rule takes them away, as with runc.

mod program;

use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::error::FieldError;

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

/// Checks the rules and compiles them for the container's cgroup: instructions of eBPF, as they are in memory.
///
/// `devices` are those that the container has nodes of: one in the place of a default device goes without its rule.
pub(crate) fn translate(rules: &[LinuxDeviceCgroup], devices: &[LinuxDevice]) -> Result<Vec<u8>, FieldError> {
    if rules.len() > MAX_RULES {
        let expected = format!("at most {MAX_RULES} rules");
        return Err(FieldError::invalid("linux.resources.devices", format!("{} rules", rules.len()), expected));
    }
    let mut all = rules.iter().enumerate().map(|(index, rule)| parse(index, rule)).collect::<Result<Vec<_>, _>>()?;
    all.extend(default_rules(devices));
    Ok(program::compile(&all))
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
        translate(&rules, &devices).map_err(|error| error.to_string())
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
