// SPDX-License-Identifier: Apache-2.0
//! The change of containerd's configuration as text: a block at its end, between two lines that mark it.

use thiserror::Error;
use toml::{Table, Value};

/// The lines around the block. The second of the first ones is for a file that was made for it.
const BEGIN: &str = "# bulkhead: begin (`bulkhead install-containerd --remove` removes this block)\n";
const BEGIN_FILE: &str = "# bulkhead: begin (`bulkhead install-containerd --remove` removes this file)\n";
const END: &str = "# bulkhead: end\n";

/// The runtime's settings. The annotations of a pod reach it only if they are listed. A privileged container gets the devices
/// of its machine, not those of the host.
const SETTINGS: &str = "runtime_type = \"io.containerd.bulkhead.v2\"
pod_annotations = [\"io.bulkhead.*\"]
privileged_without_host_devices = true
";

/// What is to be done with the file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Edit {
    /// Nothing; why.
    None(&'static str),
    /// This is its new text.
    Text(String),
    /// Nothing is left of it.
    NoFile,
}

/// A configuration that is not changed.
#[derive(Debug, Error)]
pub(super) enum EditError {
    #[error("it is no TOML: {0}")]
    Syntax(String),
    #[error(
        "it names no version, which containerd takes for 1; only 2 and 3 are understood (`containerd config migrate`)"
    )]
    NoVersion,
    #[error("version is {0}; only 2 and 3 are understood (`containerd config migrate`)")]
    Version(String),
    #[error("it has a runtime {0} already, which is not of this command's making")]
    Taken(String),
    #[error("{0} is there and cannot be added to: {1}")]
    Closed(String, String),
    #[error("the block that begins with {0:?} has no end {1:?}")]
    Torn(&'static str, &'static str),
}

/// Adds the runtime.
pub(super) fn add(text: Option<&str>) -> Result<Edit, EditError> {
    let Some(text) = text else {
        return Ok(Edit::Text(format!("{BEGIN_FILE}version = 2\n{}{END}", block("io.containerd.grpc.v1.cri"))));
    };
    let own = find(text)?;
    let parsed = parse(text)?;
    let plugin = plugin(&parsed)?;
    let wanted = block(plugin);
    if let Some(own) = &own {
        if text[own.clone()].contains(&wanted) {
            return Ok(Edit::None("it has the runtime bulkhead"));
        }
        // One of another version of this command.
        let Edit::Text(without) = remove(Some(text))? else {
            return add(None);
        };
        return add(Some(&without));
    }
    if runtime(&parsed, plugin).is_some() {
        return Err(EditError::Taken(path(plugin)));
    }
    // The first end of line is the block's: the last line of the file may have none.
    let new = format!("{text}\n{BEGIN}{wanted}{END}");
    match new.parse::<Table>() {
        Ok(table) if runtime(&table, plugin).is_some() => Ok(Edit::Text(new)),
        Ok(_) => Err(EditError::Closed(path(plugin), "it would not be found".to_owned())),
        Err(error) => Err(EditError::Closed(path(plugin), error.message().to_owned())),
    }
}

/// Removes what [`add`] has added.
pub(super) fn remove(text: Option<&str>) -> Result<Edit, EditError> {
    let Some(text) = text else {
        return Ok(Edit::None("there is no such file"));
    };
    let Some(own) = find(text)? else {
        return Ok(Edit::None("it has no block of this command's"));
    };
    let is_own_file = text[own.clone()].starts_with(BEGIN_FILE);
    let mut left = String::from(&text[..own.start]);
    left.push_str(&text[own.end..]);
    if is_own_file && left.trim().is_empty() {
        return Ok(Edit::NoFile);
    }
    // The version of a file that was made here stays with what others have added.
    Ok(Edit::Text(if is_own_file { format!("version = 2\n{left}") } else { left }))
}

/// Where the block is, with the end of line that comes before it.
fn find(text: &str) -> Result<Option<std::ops::Range<usize>>, EditError> {
    for begin in [BEGIN, BEGIN_FILE] {
        let Some(start) = text.find(begin) else { continue };
        let Some(len) = text[start..].find(END) else { return Err(EditError::Torn(begin.trim_end(), END.trim_end())) };
        let gap = usize::from(begin == BEGIN && text[..start].ends_with('\n'));
        return Ok(Some(start - gap..start + len + END.len()));
    }
    Ok(None)
}

fn parse(text: &str) -> Result<Table, EditError> {
    text.parse().map_err(|error: toml::de::Error| EditError::Syntax(error.message().to_owned()))
}

/// The name of CRI's plugin in a configuration of that version.
fn plugin(parsed: &Table) -> Result<&'static str, EditError> {
    match parsed.get("version") {
        None => Err(EditError::NoVersion),
        Some(Value::Integer(2)) => Ok("io.containerd.grpc.v1.cri"),
        Some(Value::Integer(3)) => Ok("io.containerd.cri.v1.runtime"),
        Some(Value::Integer(other)) => Err(EditError::Version(other.to_string())),
        Some(_) => Err(EditError::Version("no number".to_owned())),
    }
}

/// The runtime's table in the words of the file.
fn path(plugin: &str) -> String {
    format!("plugins.\"{plugin}\".containerd.runtimes.bulkhead")
}

fn block(plugin: &str) -> String {
    format!("[{}]\n{SETTINGS}", path(plugin))
}

fn runtime<'a>(parsed: &'a Table, plugin: &str) -> Option<&'a Value> {
    parsed.get("plugins")?.get(plugin)?.get("containerd")?.get("runtimes")?.get("bulkhead")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(text: &str) -> String {
        match add(Some(text)).unwrap() {
            Edit::Text(text) => text,
            other => panic!("{other:?}"),
        }
    }

    fn refused(text: &str) -> String {
        add(Some(text)).unwrap_err().to_string()
    }

    #[test]
    fn each_version_has_its_plugin_and_gets_the_text_back() {
        for (version, plugin) in [(2, "io.containerd.grpc.v1.cri"), (3, "io.containerd.cri.v1.runtime")] {
            for rest in ["", "[plugins]\n", "[a]\nb = '# bulkhead: end'\n", "# no end"] {
                let text = format!("version = {version}\n{rest}");
                let new = added(&text);

                let runtime = runtime(&new.parse().unwrap(), plugin).unwrap().clone();
                assert_eq!(runtime["runtime_type"].as_str(), Some("io.containerd.bulkhead.v2"));
                assert_eq!(add(Some(&new)).unwrap(), Edit::None("it has the runtime bulkhead"));
                assert_eq!(remove(Some(&new)).unwrap(), Edit::Text(text));
            }
        }
    }

    #[test]
    fn an_older_block_is_replaced_and_later_lines_stay() {
        let new = added("version = 3\n").replace("privileged", "#privileged") + "[later]\n";

        let again = added(&new);

        assert!(again.contains("\nprivileged_without_host_devices"), "{again}");
        assert_eq!(remove(Some(&again)).unwrap(), Edit::Text("version = 3\n[later]\n".to_owned()));
    }

    #[test]
    fn a_file_that_was_made_goes_unless_it_has_more() {
        let Edit::Text(made) = add(None).unwrap() else { panic!() };

        assert_eq!(add(Some(&made)).unwrap(), Edit::None("it has the runtime bulkhead"));
        assert_eq!(remove(Some(&made)).unwrap(), Edit::NoFile);
        assert_eq!(remove(Some(&(made + "[x]\n"))).unwrap(), Edit::Text("version = 2\n[x]\n".to_owned()));
        assert_eq!(remove(None).unwrap(), Edit::None("there is no such file"));
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        assert!(refused("version = \n").starts_with("it is no TOML: "));
        assert!(refused("[plugins]\n").starts_with("it names no version"));
        assert!(refused("version = 4\n").starts_with("version is 4;"));
        let taken = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.bulkhead]\n";
        assert!(refused(taken).contains("runtimes.bulkhead already"), "{}", refused(taken));
        let closed = "version = 2\nplugins = {}\n";
        assert!(refused(closed).contains("cannot be added to"), "{}", refused(closed));
        assert!(refused(&format!("version = 2\n{BEGIN}")).contains("has no end"));
    }
}
