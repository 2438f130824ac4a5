// SPDX-License-Identifier: Apache-2.0
//! The `mounts` of a configuration.

use std::io;
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::agent::{Device, Mount};
use libc::{MS_BIND, MS_REC};
use oci_spec::runtime::Mount as OciMount;

use super::error::{FieldError, without_nul};
use super::mount_options::MountOptions;
use crate::storage::{BindSource, ShareError, Shares};

/// The file systems that a container may ask for by type; `cgroup` is served as `cgroup2`, as runc does on a host that
/// has only that.
const FILE_SYSTEMS: &[&str] = &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// The mounts in their wire form, and the devices that stand for bound devices.
#[derive(Debug, Default)]
pub(crate) struct Translated {
    pub(crate) mounts: Vec<Mount>,
    pub(crate) devices: Vec<Device>,
}

/// Checks the mounts, takes the sources of bind mounts into `shares`, and brings all to their wire form.
pub(crate) fn translate(mounts: &[OciMount], bundle: &Path, shares: &mut Shares) -> Result<Translated, FieldError> {
    let mut translated = Translated::default();
    for (index, mount) in mounts.iter().enumerate() {
        translate_one(index, mount, bundle, shares, &mut translated)?;
    }
    Ok(translated)
}

fn translate_one(
    index: usize,
    mount: &OciMount,
    bundle: &Path,
    shares: &mut Shares,
    translated: &mut Translated,
) -> Result<(), FieldError> {
    let destination = clean_destination(mount.destination());
    let field = |name: &str| format!("mounts[{index}].{name} (destination {})", crate::text::one_line(&destination));
    without_nul(|| field("destination"), &destination)?;
    if mount.destination().as_os_str().is_empty() {
        return Err(FieldError::missing(field("destination"), "it names the place of the mount"));
    }
    let mapped = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
    if mapped(mount.uid_mappings()) || mapped(mount.gid_mappings()) {
        return Err(FieldError::unsupported(field("uidMappings"), "ID-mapped mounts"));
    }
    let words = mount.options().as_deref().unwrap_or_default();
    for word in words {
        without_nul(|| field("options"), word)?;
    }
    let options = MountOptions::parse(words.iter().map(String::as_str));
    if options.idmap {
        return Err(FieldError::unsupported(field("options"), "ID-mapped mounts"));
    }
    let fs_type = mount.typ().as_deref().unwrap_or_default();
    let source = mount.source().clone().unwrap_or_default();
    let mut wire = Mount {
        destination: destination.clone(),
        flags: options.flags,
        propagation: options.propagation,
        recursive_set: options.recursive_set,
        recursive_clear: options.recursive_clear,
        tmpcopyup: options.tmpcopyup,
        data: options.data.join(","),
        ..Mount::default()
    };
    if fs_type == "bind" || options.flags & MS_BIND != 0 {
        // `type: bind` alone means `bind`.
        wire.flags |= MS_BIND;
        if let Some(option) = options.data.first() {
            return Err(FieldError::invalid(field("options"), option, "an option of a bind mount"));
        }
        if source.as_os_str().is_empty() {
            return Err(FieldError::missing(field("source"), "it names what is bound"));
        }
        let source = bundle.join(source);
        match shares.add_bind(&source, options.read_only(), options.flags & MS_REC != 0) {
            Ok(BindSource::Share { path, is_dir }) => {
                wire.share = Some(path).into();
                wire.source_is_dir = is_dir;
                translated.mounts.push(wire);
            }
            Ok(BindSource::GuestDevice { major, minor }) => {
                translated.devices.push(guest_device(destination.clone(), major, minor));
            }
            Err(ShareError::Path(error)) => return Err(FieldError::path(field("source"), source, error)),
            Err(error) => return Err(FieldError::path(field("source"), source, io::Error::other(error))),
        }
        return Ok(());
    }
    if !FILE_SYSTEMS.contains(&fs_type) {
        let expected = format!("bind, or one of {}", FILE_SYSTEMS.join(", "));
        return Err(FieldError::invalid(field("type"), fs_type, expected));
    }
    wire.fs_type = if fs_type == "cgroup" { "cgroup2" } else { fs_type }.to_owned();
    wire.source = source.to_string_lossy().into_owned();
    without_nul(|| field("source"), &wire.source)?;
    translated.mounts.push(wire);
    Ok(())
}

/// The guest's own device in the place of a bind mount of the host's same one.
fn guest_device(path: String, major: i64, minor: i64) -> Device {
    Device { path, kind: "c".to_owned(), major, minor, mode: 0o666, ..Device::default() }
}

/// The destination as a path that starts at the container's root and has no `.` or `..`; links are the agent's to
/// resolve, inside the container.
fn clean_destination(destination: &Path) -> String {
    let mut clean = PathBuf::from("/");
    for component in destination.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(mount: Value, bundle: &Path) -> (Result<Mount, String>, Shares) {
        let mount: OciMount = serde_json::from_value(mount).unwrap();
        let mut shares = Shares::default();
        let result = translate(&[mount], bundle, &mut shares);
        (result.map(|mut translated| translated.mounts.remove(0)).map_err(|error| error.to_string()), shares)
    }

    #[test]
    fn a_file_system_keeps_its_source_and_data() {
        let mount = json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "mode=0620"]});

        let mount = translated(mount, Path::new("/b")).0.unwrap();

        assert_eq!((mount.fs_type.as_str(), mount.source.as_str()), ("devpts", "devpts"));
        assert_eq!(mount.flags, libc::MS_NOSUID | libc::MS_NOEXEC);
        assert_eq!(mount.data, "newinstance,mode=0620");
        assert!(mount.share.is_none());
    }

    #[test]
    fn cgroup_is_served_as_version_2() {
        let mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"});

        assert_eq!(translated(mount, Path::new("/b")).0.unwrap().fs_type, "cgroup2");
    }

    #[test]
    fn a_relative_bind_source_lies_in_the_bundle() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("data")).unwrap();
        let mount =
            json!({"destination": "/d/../data/.", "type": "bind", "source": "data", "options": ["rbind", "ro"]});

        let (mount, shares) = translated(mount, bundle.path());

        let mount = mount.unwrap();
        assert_eq!(mount.destination, "/data");
        assert_eq!(mount.flags, libc::MS_BIND | libc::MS_REC | libc::MS_RDONLY);
        assert!(mount.source_is_dir);
        assert_eq!(mount.share.tree, "m0");
        assert!(shares.shared[0].read_only);
        assert_eq!(shares.shared[0].source, bundle.path().join("data").canonicalize().unwrap());
    }

    #[test]
    fn a_bound_device_is_the_guests() {
        let mount = json!({"destination": "/dev/x", "source": "/dev/zero", "options": ["bind"]});
        let mount: OciMount = serde_json::from_value(mount).unwrap();
        let mut shares = Shares::default();

        let translated = translate(&[mount], Path::new("/b"), &mut shares).unwrap();

        assert!(translated.mounts.is_empty());
        assert_eq!(translated.devices, [guest_device("/dev/x".to_owned(), 1, 5)]);
        assert_eq!(shares, Shares::default());
    }

    #[test]
    fn each_bad_mount_is_refused_with_its_index_and_destination() {
        let map = json!([{"containerID": 0, "hostID": 0, "size": 1}]);
        let cases = [
            (
                json!({"destination": "/a", "type": "bind", "source": "/no/such"}),
                "mounts[0].source (destination /a): cannot use /no/such: No such file or directory (os error 2)",
            ),
            (
                json!({"destination": "/a", "type": "bind"}),
                "mounts[0].source (destination /a): missing; it names what is bound",
            ),
            (
                json!({"destination": "/a", "type": "bind", "source": "/tmp", "options": ["size=1"]}),
                "mounts[0].options (destination /a): \"size=1\" is not an option of a bind mount",
            ),
            (
                json!({"destination": "/a", "type": "nfs", "source": "x"}),
                "mounts[0].type (destination /a): \"nfs\" is not bind, or one of \
                 proc, sysfs, tmpfs, devpts, mqueue, cgroup, cgroup2",
            ),
            (
                json!({"destination": "/a", "type": "bind", "source": "/tmp", "options": ["ridmap"]}),
                "mounts[0].options (destination /a): not supported: ID-mapped mounts",
            ),
            (
                json!({"destination": "/a", "type": "bind", "source": "/tmp", "uidMappings": map, "gidMappings": map}),
                "mounts[0].uidMappings (destination /a): not supported: ID-mapped mounts",
            ),
            (
                json!({"destination": "", "type": "tmpfs"}),
                "mounts[0].destination (destination /): missing; it names the place of the mount",
            ),
        ];
        for (mount, expected) in cases {
            assert_eq!(translated(mount, Path::new("/b")).0.unwrap_err(), expected);
        }
    }
}
