// SPDX-License-Identifier: Apache-2.0
//! The lines of a resctrl group's `schemata`: `L3:0=7f0;1=1f`, by resource and domain.

use std::collections::BTreeMap;

/// What a resource's line gives to each domain, by its number. A line of the kernel's has all domains; one that is asked for
/// need not have. Shares are hexadecimal or decimal, as the resource has it, and are compared as they are written, but for
/// their leading zeros.
type Shares<'a> = BTreeMap<&'a str, String>;

fn parse(line: &str) -> Option<(&str, Shares<'_>)> {
    let (resource, domains) = line.trim().split_once(':')?;
    let domains = domains.split(';').filter(|domain| !domain.trim().is_empty());
    Some((resource, domains.map(share).collect::<Option<_>>()?))
}

fn share(domain: &str) -> Option<(&str, String)> {
    let (domain, share) = domain.split_once('=')?;
    let share = share.trim().trim_start_matches("0x").trim_start_matches('0').to_ascii_lowercase();
    Some((domain.trim(), share))
}

/// The first of the lines `wanted` that does not hold in a group whose schemata are `have`.
pub(super) fn mismatch<'a>(wanted: &'a [String], have: &str) -> Option<&'a str> {
    let have: Vec<_> = have.lines().filter_map(parse).collect();
    let holds = |line: &str| {
        let Some((resource, wanted)) = parse(line) else { return false };
        have.iter().any(|(name, shares)| {
            *name == resource && wanted.iter().all(|(domain, share)| shares.get(domain) == Some(share))
        })
    };
    wanted.iter().map(String::as_str).find(|line| !holds(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HAVE: &str = "    MB:0= 20;1= 70\n    L3:0=07f0;1=001f\n";

    fn missing(lines: &[&str]) -> Option<String> {
        let lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        mismatch(&lines, HAVE).map(str::to_owned)
    }

    #[test]
    fn lines_hold_however_they_are_written() {
        assert_eq!(missing(&[]), None);
        assert_eq!(missing(&["L3:0=7f0;1=1f", "MB:0=20;1=70"]), None);
        assert_eq!(missing(&["L3:1=1F", "MB:0=20;"]), None);
    }

    #[test]
    fn the_first_that_does_not_hold_is_told() {
        assert_eq!(missing(&["MB:0=20", "L3:0=7f0;1=3f"]).as_deref(), Some("L3:0=7f0;1=3f"));
        assert_eq!(missing(&["L2:0=1"]).as_deref(), Some("L2:0=1"));
        assert_eq!(missing(&["L3:2=1"]).as_deref(), Some("L3:2=1"));
        assert_eq!(missing(&["nonsense"]).as_deref(), Some("nonsense"));
    }
}
