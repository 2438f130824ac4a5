// SPDX-License-Identifier: Apache-2.0
//! The `mounts` of a configuration.

use std::fs;
use std::io;
use std::mem;
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::agent::{self as wire, Device, Mount, SandboxTmpfs};
use libc::{MS_BIND, MS_REC, MS_REMOUNT, MS_SHARED};
use oci_spec::runtime::Mount as OciMount;

use super::error::{FieldError, without_nul};
use super::id_mappings::IdMappings;
use super::mount_options::{Depth, MountOptions};
use crate::logging;
use crate::storage::{self, BindSource, HostSocket, MemoryVolume, ShareError, Shares};

/// The file systems that a container may ask for by type; `cgroup` is served as `cgroup2`, as runc does on a host that
/// has only that.
const FILE_SYSTEMS: &[&str] = &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Where processes look for POSIX shared memory. An engine makes a tmpfs of the host for it, and binds that into each
/// container of a pod.
const SHM: &str = "/dev/shm";
const SHM_NAME: &str = "shm";

/// What begins the names of a pod's volumes of memory.
const VOLUME_PREFIX: &str = "volume-";

/// The mounts in their wire form, and what is not a mount in the guest.
#[derive(Debug, Default)]
pub(crate) struct Translated {
    pub(crate) mounts: Vec<Mount>,
    /// What stands for bound devices.
    pub(crate) devices: Vec<Device>,
    /// The bound sockets, by their numbers.
    pub(crate) sockets: Vec<HostSocket>,
}

/// Checks the mounts, takes the sources of bind mounts into `shares`, and brings all to their wire form. `user_namespace`
/// is the container's, if it has one.
pub(crate) fn translate(
    mounts: &[OciMount],
    bundle: &Path,
    user_namespace: Option<&IdMappings>,
    shares: &mut Shares,
) -> Result<Translated, FieldError> {
    let mut translated = Translated::default();
    for (index, mount) in mounts.iter().enumerate() {
        translate_one(index, mount, bundle, user_namespace, shares, &mut translated)?;
    }
    Ok(translated)
}

fn translate_one(
    index: usize,
    mount: &OciMount,
    bundle: &Path,
    user_namespace: Option<&IdMappings>,
    shares: &mut Shares,
    translated: &mut Translated,
) -> Result<(), FieldError> {
    let destination = clean_destination(mount.destination());
    let field = |name: &str| format!("mounts[{index}].{name} (destination {})", crate::text::one_line(&destination));
    without_nul(|| field("destination"), &destination)?;
    if mount.destination().as_os_str().is_empty() {
        return Err(FieldError::missing(field("destination"), "it names the place of the mount"));
    }
    let words = mount.options().as_deref().unwrap_or_default();
    for word in words {
        without_nul(|| field("options"), word)?;
    }
    let options = MountOptions::parse(words.iter().map(String::as_str));
    let mappings = id_mappings(mount, &options, field, user_namespace)?;
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
    }
    if options.flags & MS_REMOUNT != 0 {
        if options.tmpcopyup || mappings.is_some() {
            let what = "a remount that is to copy what lies below, or to map ids";
            return Err(FieldError::unsupported(field("options"), what));
        }
        wire.remount = true;
        translated.mounts.push(wire);
        return Ok(());
    }
    if wire.flags & MS_BIND != 0 {
        if source.as_os_str().is_empty() {
            return Err(FieldError::missing(field("source"), "it names what is bound"));
        }
        return bind(wire, bundle.join(source), (&options, mappings), field, shares, translated);
    }
    if mappings.is_some() {
        return Err(FieldError::unsupported(field("options"), "mapped ids but for a bind mount"));
    }
    if shares.are_of_pod() && destination == SHM && fs_type == "tmpfs" {
        // What a configuration has that nobody has made a tmpfs of the host for.
        wire.sandbox_tmpfs = Some(shm(mem::take(&mut wire.data))).into();
        wire.flags |= MS_BIND;
        translated.mounts.push(wire);
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

/// Takes the source of a bind mount.
fn bind(
    mut wire: Mount,
    source: PathBuf,
    (options, mappings): (&MountOptions, Option<IdMappings>),
    field: impl Fn(&str) -> String,
    shares: &mut Shares,
    translated: &mut Translated,
) -> Result<(), FieldError> {
    if shares.are_of_pod()
        && wire.destination == SHM
        && let Some(data) = storage::tmpfs_options(&source)
    {
        // What is mapped there is memory that processes of several containers share, which no file of the host can be.
        wire.sandbox_tmpfs = Some(shm(data)).into();
        translated.mounts.push(wire);
        return Ok(());
    }
    if shares.are_of_pod()
        && mappings.is_none()
        && let Some(MemoryVolume { name, folder, options }) = MemoryVolume::find(&source)
    {
        // Apart from the names of the guest's own.
        let name = format!("{VOLUME_PREFIX}{name}");
        wire.sandbox_tmpfs = Some(SandboxTmpfs { name, folder, options, ..SandboxTmpfs::default() }).into();
        translated.mounts.push(wire);
        return Ok(());
    }
    let recursive = options.flags & MS_REC != 0;
    if options.id_map == Some(Depth::Tree) && recursive && has_mounts_below(&source) {
        return Err(FieldError::unsupported(field("options"), "ridmap where something is mounted below the source"));
    }
    let unusable = |error: ShareError| match error {
        ShareError::Path(error) => FieldError::path(field("source"), source.clone(), error),
        error => FieldError::path(field("source"), source.clone(), io::Error::other(error)),
    };
    match shares.add_bind(&source, options.read_only(), recursive, options.follows_host(), mappings.is_some()) {
        Ok(BindSource::GuestDevice { .. }) if mappings.is_some() => {
            return Err(FieldError::unsupported(field("source"), "a device with mapped ids"));
        }
        Ok(BindSource::Socket(_)) if mappings.is_some() => {
            return Err(FieldError::unsupported(field("source"), "a socket with mapped ids"));
        }
        Ok(BindSource::Share { path, is_dir }) => {
            if let Some(IdMappings { uids, gids }) = mappings {
                (wire.uid_mappings, wire.gid_mappings) = (uids, gids);
            }
            // A bind has what the mount of its source has, as far as it does not say otherwise; the share itself has none of it.
            wire.flags |= storage::restrictions(&source) & !(options.cleared | options.recursive_clear);
            if is_dir && options.propagation & MS_SHARED != 0 {
                let what = "what the container mounts there is not seen on the host";
                logging::warn(format_args!("{}: {what}", field("options")));
            }
            wire.share = Some(path).into();
            wire.source_is_dir = is_dir;
            translated.mounts.push(wire);
        }
        Ok(BindSource::GuestDevice { major, minor }) => {
            translated.devices.push(guest_device(wire.destination, major, minor));
        }
        Ok(BindSource::Socket(path)) => {
            let socket = HostSocket::find(path).map_err(unusable)?;
            wire.socket = Some(to_wire(&socket, translated.sockets.len())).into();
            translated.mounts.push(wire);
            translated.sockets.push(socket);
        }
        Err(error) => return Err(unusable(error)),
    }
    Ok(())
}

/// The shared memory of a pod's containers.
fn shm(options: String) -> SandboxTmpfs {
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    SandboxTmpfs { name: SHM_NAME.to_owned(), flags, options, ..SandboxTmpfs::default() }
}

/// How the ids of a mount's files are to be mapped: by its own mappings, else, where the options ask for it, by those of
/// the container.
fn id_mappings(
    mount: &OciMount,
    options: &MountOptions,
    field: impl Fn(&str) -> String,
    user_namespace: Option<&IdMappings>,
) -> Result<Option<IdMappings>, FieldError> {
    let own = IdMappings::translate(&field, mount.uid_mappings().as_ref(), mount.gid_mappings().as_ref())?;
    match (own, options.id_map, user_namespace) {
        (Some(own), ..) => Ok(Some(own)),
        (None, None, _) => Ok(None),
        (None, Some(_), Some(container)) => Ok(Some(container.clone())),
        (None, Some(_), None) => {
            let needed = "idmap needs them, as the container has no user namespace whose mappings could be used";
            Err(FieldError::missing(field("uidMappings"), needed))
        }
    }
}

/// Whether something is mounted below a path. What cannot be found out is left to the mount itself.
fn has_mounts_below(path: &Path) -> bool {
    let below = fs::canonicalize(path).and_then(|path| storage::mounts_below(&path));
    below.is_ok_and(|mounts| !mounts.is_empty())
}

/// The guest's own device in the place of a bind mount of the host's same one.
fn guest_device(path: String, major: i64, minor: i64) -> Device {
    Device { path, kind: "c".to_owned(), major, minor, mode: 0o666, ..Device::default() }
}

fn to_wire(socket: &HostSocket, number: usize) -> wire::HostSocket {
    let (mode, uid, gid) = socket.attributes();
    // A configuration is too short for more.
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    wire::HostSocket { number, mode, uid, gid, ..wire::HostSocket::default() }
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
    use std::os::unix::net::UnixListener;

    use super::*;
    use serde_json::{Value, json};

    fn translated(mount: Value, bundle: &Path) -> (Result<Mount, String>, Shares) {
        let mount: OciMount = serde_json::from_value(mount).unwrap();
        let mut shares = Shares::default();
        let result = translate(&[mount], bundle, None, &mut shares);
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
    fn ids_are_mapped_by_the_mounts_own_mappings_or_the_containers() {
        let source = tempfile::tempdir().unwrap();
        let line = |host: u32| json!([{"containerID": 0, "hostID": host, "size": 1}]);
        let bind =
            |options: Value| json!({"destination": "/a", "type": "bind", "source": source.path(), "options": options});
        let mut own = bind(json!(["bind"]));
        own["uidMappings"] = line(5);
        own["gidMappings"] = line(6);
        let uids = serde_json::from_value(line(7)).unwrap();
        let container = IdMappings::translate(str::to_owned, Some(&uids), Some(&uids)).unwrap();
        let mounts = [own, bind(json!(["bind", "idmap"])), bind(json!(["bind"]))];
        let mounts = mounts.map(|mount| serde_json::from_value::<OciMount>(mount).unwrap());
        let mut shares = Shares::default();

        let translated = translate(&mounts, Path::new("/b"), container.as_ref(), &mut shares).unwrap();

        let first = |list: &[bulkhead_protocol::agent::IdMapping]| list.first().map(|line| line.outside);
        let mapped = translated.mounts.iter().map(|mount| (first(&mount.uid_mappings), first(&mount.gid_mappings)));
        assert_eq!(mapped.collect::<Vec<_>>(), [(Some(5), Some(6)), (Some(7), Some(7)), (None, None)]);
        assert_eq!(shares.shared.iter().map(|tree| tree.name.as_str()).collect::<Vec<_>>(), ["part-m0", "m1"]);
    }

    #[test]
    fn a_bound_device_is_the_guests() {
        let mount = json!({"destination": "/dev/x", "source": "/dev/zero", "options": ["bind"]});
        let mount: OciMount = serde_json::from_value(mount).unwrap();
        let mut shares = Shares::default();

        let translated = translate(&[mount], Path::new("/b"), None, &mut shares).unwrap();

        assert!(translated.mounts.is_empty());
        assert_eq!(translated.devices, [guest_device("/dev/x".to_owned(), 1, 5)]);
        assert_eq!(shares, Shares::default());
    }

    #[test]
    fn a_remount_needs_no_source_and_shares_nothing() {
        let remount =
            |options: Value| json!({"destination": "/data", "type": "bind", "source": "/none", "options": options});

        let (mount, shares) = translated(remount(json!(["remount", "ro", "nosuid"])), Path::new("/b"));

        let mount = mount.unwrap();
        assert!(mount.remount && mount.share.is_none() && mount.fs_type.is_empty());
        assert_eq!(mount.flags, MS_BIND | MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOSUID);
        assert_eq!(shares, Shares::default());
        let tmpfs = json!({"destination": "/data", "type": "tmpfs", "options": ["remount", "size=2m"]});
        assert_eq!(translated(tmpfs, Path::new("/b")).0.unwrap().data, "size=2m");
        let refused = translated(remount(json!(["remount", "tmpcopyup"])), Path::new("/b")).0.unwrap_err();
        assert!(refused.starts_with("mounts[0].options (destination /data): not supported: a remount"), "{refused}");
    }

    #[test]
    fn bound_sockets_are_numbered() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        let _listeners = [&one, &other].map(|path| UnixListener::bind(path).unwrap());
        let bind = |source: &Path| json!({"destination": "/s", "type": "bind", "source": source, "options": ["ro"]});
        let mounts = [bind(&one), bind(folder.path()), bind(&other)];
        let mounts = mounts.map(|mount| serde_json::from_value::<OciMount>(mount).unwrap());
        let mut shares = Shares::default();

        let translated = translate(&mounts, Path::new("/b"), None, &mut shares).unwrap();

        let numbers = translated.mounts.iter().map(|mount| mount.socket.as_ref().map(|socket| socket.number));
        assert_eq!(numbers.collect::<Vec<_>>(), [Some(0), None, Some(1)]);
        assert_eq!((translated.sockets.len(), shares.shared.len()), (2, 1));
        assert_eq!(translated.mounts[0].flags, MS_BIND | libc::MS_RDONLY);
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
                "mounts[0].uidMappings (destination /a): missing; idmap needs them, as the container has no user \
                 namespace whose mappings could be used",
            ),
            (
                json!({"destination": "/a", "type": "tmpfs", "uidMappings": map, "gidMappings": map}),
                "mounts[0].options (destination /a): not supported: mapped ids but for a bind mount",
            ),
            (
                json!({"destination": "/a", "type": "bind", "source": "/tmp", "uidMappings": map}),
                "mounts[0].gidMappings (destination /a): missing; users and groups are mapped together",
            ),
            (
                json!({"destination": "/a", "type": "bind", "source": "/dev/null", "uidMappings": map, "gidMappings": map}),
                "mounts[0].source (destination /a): not supported: a device with mapped ids",
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
