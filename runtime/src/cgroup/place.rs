// SPDX-License-Identifier: Apache-2.0
//! Where a cgroup is to be: `linux.cgroupsPath`.

use std::path::{Component, Path, PathBuf};

/// The slice of a path in systemd's form that names none.
const DEFAULT_SLICE: &str = "system.slice";

/// Longest text of a place, in bytes: with the hierarchy's own path it has to fit into the kernel's 4096.
const MAX_LENGTH: usize = 2048;

/// A place in each hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// From the hierarchy's root.
    Absolute(PathBuf),
    /// Beside the caller's cgroup, as runc has it: the caller's own has processes, and so cannot have both limits and
    /// children in version 2. In version 1, below the caller's.
    Relative(PathBuf),
}

impl Place {
    /// The place that `linux.cgroupsPath` names: a path, or `SLICE:PREFIX:NAME` as for systemd, which is where systemd
    /// would put the scope of that name. `None` if it leads out of the hierarchy or nowhere, or is
    /// too long.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        // The path is quoted in messages.
        if text.len() > MAX_LENGTH || text.chars().any(char::is_control) {
            return None;
        }
        if let [slice, prefix, name] = text.split(':').collect::<Vec<_>>()[..] {
            return systemd(slice, prefix, name).map(Self::Absolute);
        }
        let path = Path::new(text);
        let mut clean = PathBuf::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => clean.push(name),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => return None,
            }
        }
        if clean.as_os_str().is_empty() {
            return None;
        }
        Some(if path.is_absolute() { Self::Absolute(clean) } else { Self::Relative(clean) })
    }

    /// The place of a sandbox whose configuration names none.
    pub(crate) fn default_for(id: &str) -> Self {
        Self::Relative(id.into())
    }

    /// The path from the hierarchy's root, for a caller that is at `own` in it.
    pub(crate) fn below(&self, own: &Path, version_2: bool) -> PathBuf {
        match self {
            Self::Absolute(path) => path.clone(),
            Self::Relative(path) if version_2 => own.parent().unwrap_or(own).join(path),
            Self::Relative(path) => own.join(path),
        }
    }
}

/// The path of systemd's unit: slices are nested by the dashes in their names, and a scope's name is made of both parts.
fn systemd(slice: &str, prefix: &str, name: &str) -> Option<PathBuf> {
    let is_part = |part: &str| !part.contains('/') && !matches!(part, "." | "..");
    if name.is_empty() || ![slice, prefix, name].into_iter().all(is_part) {
        return None;
    }
    let slice = if slice.is_empty() { DEFAULT_SLICE } else { slice };
    let mut path = PathBuf::new();
    let stem = slice.strip_suffix(".slice")?;
    if stem != "-" {
        let mut so_far = String::new();
        for part in stem.split('-') {
            if part.is_empty() {
                return None;
            }
            so_far = if so_far.is_empty() { part.to_owned() } else { format!("{so_far}-{part}") };
            path.push(format!("{so_far}.slice"));
        }
    }
    path.push(match (name.ends_with(".slice"), prefix) {
        (true, _) => name.to_owned(),
        (false, "") => format!("{name}.scope"),
        (false, prefix) => format!("{prefix}-{name}.scope"),
    });
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Option<String> {
        Place::parse(text).map(|place| place.below(Path::new("me/session"), true).display().to_string())
    }

    #[test]
    fn each_form_has_its_path() {
        for (text, expected) in [
            ("/libpod_parent/libpod-1", "libpod_parent/libpod-1"),
            ("/a//./b/", "a/b"),
            ("docker/1", "me/docker/1"),
            ("machine.slice:libpod:1", "machine.slice/libpod-1.scope"),
            ("system.slice:docker:1", "system.slice/docker-1.scope"),
            (":docker:1", "system.slice/docker-1.scope"),
            ("a-b.slice::1", "a.slice/a-b.slice/1.scope"),
            ("-.slice:cri:1", "cri-1.scope"),
            ("kube.slice:cri:pod.slice", "kube.slice/pod.slice"),
        ] {
            assert_eq!(path(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_leads_nowhere_or_out_is_none() {
        for text in
            ["", "/", ".", "/a\nb", "/a/../b", "..", "a.slice:b:", "a:b:c", "a.slice:b/c:d", "a--b.slice:c:d", "..:a:b"]
        {
            assert_eq!(path(text), None, "{text}");
        }
    }

    #[test]
    fn version_1_counts_from_the_callers_own() {
        let place = Place::default_for("x");

        assert_eq!(place.below(Path::new("me"), false), Path::new("me/x"));
        assert_eq!(place.below(Path::new("me"), true), Path::new("x"));
        assert_eq!(place.below(Path::new(""), true), Path::new("x"));
    }
}
