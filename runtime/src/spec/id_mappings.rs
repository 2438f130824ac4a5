// SPDX-License-Identifier: Apache-2.0
//! Mappings of user and group ids: `linux.uidMappings` and `gidMappings`, and those of a mount.

use bulkhead_protocol::agent::IdMapping;
use oci_spec::runtime::LinuxIdMapping;

use super::error::FieldError;

/// Most lines of a mapping in Linux.
const MAX_LINES: usize = 340;

/// The number of ids that there are: the last one means "none".
const IDS: u64 = u32::MAX as u64;

/// Mappings of both kinds of ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct IdMappings {
    pub(crate) uids: Vec<IdMapping>,
    pub(crate) gids: Vec<IdMapping>,
}

impl IdMappings {
    /// Checks the lists, whose fields `field` names; `None` if both are empty.
    pub(crate) fn translate(
        field: impl Fn(&str) -> String,
        uids: Option<&Vec<LinuxIdMapping>>,
        gids: Option<&Vec<LinuxIdMapping>>,
    ) -> Result<Option<Self>, FieldError> {
        let (uids, gids) = (super::list(uids), super::list(gids));
        let needed = "users and groups are mapped together";
        match (uids, gids) {
            ([], []) => Ok(None),
            ([], _) => Err(FieldError::missing(field("uidMappings"), needed)),
            (_, []) => Err(FieldError::missing(field("gidMappings"), needed)),
            _ => Ok(Some(Self {
                uids: one_kind(&field("uidMappings"), uids)?,
                gids: one_kind(&field("gidMappings"), gids)?,
            })),
        }
    }

    /// Whether a user of the container is mapped.
    pub(crate) fn has_user(&self, uid: u32) -> bool {
        has(&self.uids, uid)
    }

    /// Whether a group of the container is mapped.
    pub(crate) fn has_group(&self, gid: u32) -> bool {
        has(&self.gids, gid)
    }
}

fn has(list: &[IdMapping], id: u32) -> bool {
    list.iter().any(|line| id.checked_sub(line.inside).is_some_and(|offset| offset < line.count))
}

fn one_kind(field: &str, list: &[LinuxIdMapping]) -> Result<Vec<IdMapping>, FieldError> {
    if list.len() > MAX_LINES {
        let expected = format!("at most {MAX_LINES} of them");
        return Err(FieldError::invalid(field, list.len(), expected));
    }
    for (index, line) in list.iter().enumerate() {
        for (name, first) in [("containerID", line.container_id()), ("hostID", line.host_id())] {
            if line.size() == 0 || u64::from(first) + u64::from(line.size()) > IDS {
                let expected = format!("from 1 to {}, as {name} is {first}", IDS - u64::from(first).min(IDS - 1));
                return Err(FieldError::invalid(format!("{field}[{index}].size"), line.size(), expected));
            }
            let start = |line: &LinuxIdMapping| if name == "hostID" { line.host_id() } else { line.container_id() };
            let overlaps = |other: &&LinuxIdMapping| {
                let (one, two) = (u64::from(first), u64::from(start(other)));
                one < two + u64::from(other.size()) && two < one + u64::from(line.size())
            };
            if list[..index].iter().any(|other| overlaps(&other)) {
                let expected = "apart from those of the lines before";
                return Err(FieldError::invalid(format!("{field}[{index}].{name}"), first, expected));
            }
        }
    }
    let wire = |line: &LinuxIdMapping| IdMapping {
        inside: line.container_id(),
        outside: line.host_id(),
        count: line.size(),
        ..IdMapping::default()
    };
    Ok(list.iter().map(wire).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(uids: Value, gids: Value) -> Result<Option<IdMappings>, String> {
        let list = |value| serde_json::from_value::<Vec<LinuxIdMapping>>(value).unwrap();
        let field = |name: &str| format!("linux.{name}");
        IdMappings::translate(field, Some(&list(uids)), Some(&list(gids))).map_err(|error| error.to_string())
    }

    fn line(inside: u32, outside: u32, size: u32) -> Value {
        json!({"containerID": inside, "hostID": outside, "size": size})
    }

    #[test]
    fn ids_are_found_where_they_are_mapped() {
        let lines = json!([line(0, 100_000, 10), line(50, 7, 1)]);

        let mappings = translated(lines, json!([line(1, 1, 1)])).unwrap().unwrap();

        assert_eq!([0, 9, 10, 50, 51].map(|uid| mappings.has_user(uid)), [true, true, false, true, false]);
        assert_eq!([0, 1].map(|gid| mappings.has_group(gid)), [false, true]);
        assert_eq!(translated(json!([]), json!([])).unwrap(), None);
    }

    #[test]
    fn each_bad_list_is_refused_by_name() {
        let good = json!([line(0, 0, 1)]);
        let cases = [
            (json!([]), "linux.uidMappings: missing; users and groups are mapped together"),
            (json!([line(0, 0, 0)]), "linux.uidMappings[0].size: \"0\" is not from 1 to 4294967295, as containerID"),
            (json!([line(0, u32::MAX, 1)]), "linux.uidMappings[0].size: \"1\" is not from 1 to 1, as hostID is"),
            (
                json!([line(0, 0, 10), line(9, 100, 1)]),
                "linux.uidMappings[1].containerID: \"9\" is not apart from those of the lines before",
            ),
            (
                json!([line(0, 10, 10), line(100, 5, 6)]),
                "linux.uidMappings[1].hostID: \"5\" is not apart from those of the lines before",
            ),
        ];
        for (uids, expected) in cases {
            let error = translated(uids, good.clone()).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        let many: Vec<_> = (0..=MAX_LINES as u32).map(|id| line(id, id, 1)).collect();
        assert!(translated(json!(many), good).is_err());
    }
}
