// SPDX-License-Identifier: Apache-2.0
//! The kubelet's volumes of memory: an `emptyDir` of the medium `Memory` is a tmpfs that it mounts for one pod, and that nobody on the
//! host looks into. It is one of the guest's then.
//!
//! They are known by the kubelet's paths: `…/volumes/kubernetes.io~empty-dir/NAME`, and for a part of one, which the kubelet binds,
//! `…/volume-subpaths/NAME/CONTAINER/NUMBER`. Secrets, config maps and tokens are mounted as such too, but belong to the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::mountinfo;

const PLUGIN: &str = "volumes/kubernetes.io~empty-dir";
const PARTS: &str = "volume-subpaths";

/// A volume, or a part of one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MemoryVolume {
    /// Its name in the pod.
    pub(crate) name: String,
    /// The part, as a path in it; empty for all of it.
    pub(crate) folder: String,
    /// The options by which a tmpfs of the guest's is like it.
    pub(crate) options: String,
}

impl MemoryVolume {
    /// What the source of a bind mount is; `None` if it is no such volume.
    pub(crate) fn find(source: &Path) -> Option<Self> {
        let source = fs::canonicalize(source).ok()?;
        let (top, name) = top_of(&source)?;
        let (status, part) = (fs::metadata(&top).ok()?, fs::metadata(&source).ok()?);
        let is_own_tmpfs = status.dev() != fs::metadata(top.parent()?).ok()?.dev() && super::is_tmpfs(&top);
        if !is_own_tmpfs || part.dev() != status.dev() || !part.is_dir() {
            return None;
        }
        let folder = if source == top { PathBuf::new() } else { mountinfo::root_of(&source)? };
        let size = super::tmpfs_size(&top).map(|size| format!(",size={size}")).unwrap_or_default();
        let options = format!("mode={:o},uid={},gid={}{size}", status.mode() & 0o7777, status.uid(), status.gid());
        Some(Self { name, folder: folder.to_str()?.trim_start_matches('/').to_owned(), options })
    }
}

/// The top of the volume that a path is or may be bound from, and its name.
fn top_of(source: &Path) -> Option<(PathBuf, String)> {
    let name = |component: Component<'_>| component.as_os_str().to_str().map(str::to_owned);
    if source.parent()?.ends_with(PLUGIN) {
        return Some((source.to_owned(), name(source.components().next_back()?)?));
    }
    let pod = source.ancestors().find(|ancestor| ancestor.ends_with(PARTS))?;
    let name = name(source.strip_prefix(pod).ok()?.components().next()?)?;
    Some((pod.parent()?.join(PLUGIN).join(&name), name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "/var/lib/kubelet/pods/7e57";

    fn top(below: &str) -> Option<(PathBuf, String)> {
        top_of(&Path::new(POD).join(below))
    }

    #[test]
    fn volumes_are_known_by_the_kubelets_paths() {
        let cache = (Path::new(POD).join(PLUGIN).join("cache"), "cache".to_owned());

        assert_eq!(top("volumes/kubernetes.io~empty-dir/cache"), Some(cache.clone()));
        assert_eq!(top("volume-subpaths/cache/second/0"), Some(cache));
        for other in ["volumes/kubernetes.io~secret/key", "volumes/kubernetes.io~empty-dir/cache/below", "etc-hosts"] {
            assert_eq!(top(other), None, "{other}");
        }
    }

    #[test]
    fn a_folder_that_is_no_tmpfs_of_its_own_is_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join(PLUGIN).join("disk");
        fs::create_dir_all(&volume).unwrap();

        assert_eq!(MemoryVolume::find(&volume), None);
        assert_eq!(MemoryVolume::find(&dir.path().join("absent")), None);
    }
}
