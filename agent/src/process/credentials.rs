// SPDX-License-Identifier: Apache-2.0
//! Who a process is and what it may do: user, groups, capabilities, no-new-privileges, system calls.

use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::container::{Capabilities, Failure, ProcessSpec, Stage};

fn failed<E: Into<std::io::Error>>(what: &str) -> impl Fn(E) -> Failure + '_ {
    move |error| Failure::new(Stage::Credentials, what, error)
}

/// Makes the calling process, which has all capabilities in its user namespace, root of it.
pub(crate) fn become_root() -> Result<(), Failure> {
    set_thread_groups(&[]).map_err(failed("no additional groups in the user namespace"))?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).map_err(failed("group 0 of the user namespace"))?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).map_err(failed("user 0 of the user namespace"))
}

/// Gives the calling process the spec's user, groups and capabilities, in the one order in which each step is still
/// allowed: bounding set first, user and groups while the permitted set is kept, the other sets last.
pub(crate) fn apply(process: &ProcessSpec) -> Result<(), Failure> {
    if process.no_new_privileges {
        set_no_new_privs(true).map_err(failed("no_new_privs"))?;
    }
    bound(process.capabilities.bounding)?;
    set_keep_capabilities(true).map_err(failed("that capabilities are kept over a change of user"))?;
    change_user(process)?;
    set_keep_capabilities(false).map_err(failed("that capabilities are no longer kept"))?;
    let capabilities = process.capabilities;
    let held = if holds_sys_admin(process) { CapabilitySet::SYS_ADMIN.bits() } else { 0 };
    set_sets(&Capabilities {
        effective: capabilities.effective | held,
        permitted: capabilities.permitted | held,
        ..capabilities
    })?;
    set_ambient(capabilities.ambient)
}

/// The last steps before execve. What comes after the filter has to be allowed by it, so that is as little as possible:
/// capset(2) without no-new-privileges, and execve(2).
pub(crate) fn seal(process: &ProcessSpec) -> Result<(), Failure> {
    if let Some(filter) = &process.seccomp {
        filter.install()?;
    }
    if holds_sys_admin(process) { set_sets(&process.capabilities) } else { Ok(()) }
}

/// Whether a capability that the spec does not give is needed until the filter is installed.
fn holds_sys_admin(process: &ProcessSpec) -> bool {
    let given = process.capabilities.effective & CapabilitySet::SYS_ADMIN.bits() != 0;
    process.seccomp.is_some() && !process.no_new_privileges && !given
}

/// Leaves only `wanted` in the bounding set.
fn bound(wanted: u64) -> Result<(), Failure> {
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        // The first number that the kernel does not know ends the list.
        let Ok(present) = capability_is_in_bounding_set(capability) else { return Ok(()) };
        if present && wanted & 1 << number == 0 {
            remove_capability_from_bounding_set(capability)
                .map_err(failed(&format!("the bounding set without capability {number}")))?;
        }
    }
    Ok(())
}

fn change_user(process: &ProcessSpec) -> Result<(), Failure> {
    let groups: Vec<Gid> = process.additional_gids.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).map_err(failed("additional groups"))?;
    let gid = Gid::from_raw(process.gid);
    set_thread_res_gid(gid, gid, gid).map_err(failed(&format!("group {}", process.gid)))?;
    let uid = Uid::from_raw(process.uid);
    set_thread_res_uid(uid, uid, uid).map_err(failed(&format!("user {}", process.uid)))
}

fn set_sets(wanted: &Capabilities) -> Result<(), Failure> {
    let set = |mask: u64| CapabilitySet::from_bits_retain(mask);
    let sets = CapabilitySets {
        effective: set(wanted.effective),
        permitted: set(wanted.permitted),
        inheritable: set(wanted.inheritable),
    };
    set_capabilities(None, sets).map_err(failed("the effective, permitted and inheritable capabilities"))
}

fn set_ambient(wanted: u64) -> Result<(), Failure> {
    clear_ambient_capability_set().map_err(failed("an empty ambient set"))?;
    for number in (0..64).filter(|number| wanted & 1 << number != 0) {
        configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(1 << number), true)
            .map_err(failed(&format!("ambient capability {number}")))?;
    }
    Ok(())
}
