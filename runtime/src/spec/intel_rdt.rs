// SPDX-License-Identifier: Apache-2.0
//! `linux.intelRdt`: what the sandbox may use of the host's caches and memory bandwidth.

use oci_spec::runtime::LinuxIntelRdt;

use super::error::FieldError;
use super::pod::Role;
use crate::resctrl::{self, ResctrlSpec};

/// What a group must not be called: these the kernel has in the root group.
const RESERVED: [&str; 5] = [".", "..", "info", "mon_data", "mon_groups"];

/// Begins the line of memory bandwidth.
const BANDWIDTH: &str = "MB:";

/// Checks what is asked for, and that this host has the means.
pub(crate) fn translate(rdt: &LinuxIntelRdt, role: Role<'_>) -> Result<ResctrlSpec, FieldError> {
    let spec = to_spec(rdt)?;
    if !matches!(role, Role::Alone) {
        let what = "cache and bandwidth allocation in a pod, whose containers have one machine together";
        return Err(FieldError::unsupported("linux.intelRdt", what));
    }
    if !resctrl::is_mounted() {
        let what =
            format!("cache and bandwidth allocation, as this host has no resctrl file system at {}", resctrl::ROOT);
        return Err(FieldError::unsupported("linux.intelRdt", what));
    }
    Ok(spec)
}

fn to_spec(rdt: &LinuxIntelRdt) -> Result<ResctrlSpec, FieldError> {
    let text = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(str::to_owned);
    let class = text(rdt.clos_id());
    if let Some(name) = class.as_deref().filter(|name| !is_name(name)) {
        return Err(FieldError::invalid("linux.intelRdt.closID", name, "the name of a group"));
    }
    // Its older names have been respelled.
    let monitored = *rdt.enable_monitoring() == Some(true);
    Ok(ResctrlSpec { class, schemata: schemata(rdt)?, monitored })
}

fn is_name(name: &str) -> bool {
    !RESERVED.contains(&name) && !name.contains(|letter: char| letter == '/' || letter.is_control())
}

/// The lines of the group's schemata. Those that are given whole go before those by resource.
fn schemata(rdt: &LinuxIntelRdt) -> Result<Vec<String>, FieldError> {
    if let Some(lines) = rdt.schemata().as_ref().filter(|lines| !lines.is_empty()) {
        let is_line = |line: &&String| !line.contains(char::is_control);
        return match lines.iter().enumerate().find(|(_, line)| !is_line(line)) {
            Some((index, line)) => {
                Err(FieldError::invalid(format!("linux.intelRdt.schemata[{index}]"), line, "a line of schemata"))
            }
            None => Ok(lines.clone()),
        };
    }
    // Bandwidth is the other field's to say.
    let caches = rdt.l3_cache_schema().as_deref().unwrap_or_default();
    let caches = caches.lines().filter(|line| !line.trim().is_empty() && !line.starts_with(BANDWIDTH));
    let mut lines: Vec<String> = caches.map(str::to_owned).collect();
    if let Some(bandwidth) = rdt.mem_bw_schema().as_deref().filter(|line| !line.is_empty()) {
        if !bandwidth.starts_with(BANDWIDTH) || bandwidth.contains(char::is_control) {
            let expected = "a line that begins with MB:";
            return Err(FieldError::invalid("linux.intelRdt.memBwSchema", bandwidth, expected));
        }
        lines.push(bandwidth.to_owned());
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(value: Value) -> Result<ResctrlSpec, String> {
        to_spec(&serde_json::from_value(value).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn lines_are_those_of_caches_and_then_of_bandwidth() {
        let both = json!({"closID": "gold", "l3CacheSchema": "L3:0=f\nMB:0=1\n", "memBwSchema": "MB:0=20"});
        let whole = json!({"schemata": ["L2:0=3"], "l3CacheSchema": "L3:0=f"});

        assert_eq!(spec(both.clone()).unwrap().schemata, ["L3:0=f", "MB:0=20"]);
        assert_eq!(spec(both).unwrap().class.as_deref(), Some("gold"));
        assert_eq!(spec(whole).unwrap().schemata, ["L2:0=3"]);
        assert_eq!(spec(json!({"closID": ""})).unwrap(), ResctrlSpec::default());
    }

    #[test]
    fn a_group_is_watched_if_that_is_asked_for() {
        assert!(spec(json!({"enableMonitoring": true, "closID": "gold"})).unwrap().monitored);
        assert!(!spec(json!({"enableMonitoring": false})).unwrap().monitored);
    }

    #[test]
    fn what_is_no_name_and_no_line_is_refused() {
        let cases = [
            (json!({"closID": "a/b"}), "linux.intelRdt.closID: \"a/b\" is not the name of a group"),
            (json!({"closID": "info"}), "linux.intelRdt.closID: \"info\" is not the name of a group"),
            (
                json!({"memBwSchema": "L3:0=1"}),
                "linux.intelRdt.memBwSchema: \"L3:0=1\" is not a line that begins with MB:",
            ),
            (json!({"schemata": ["a", "b\nc"]}), "linux.intelRdt.schemata[1]: "),
        ];
        for (value, expected) in cases {
            let error = spec(value).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
