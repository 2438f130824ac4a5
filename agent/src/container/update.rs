// SPDX-License-Identifier: Apache-2.0
//! New limits for a container that runs: all of them, or none.

use bulkhead_protocol::agent as wire;

use super::cgroup::{Cgroup, CgroupError, Setting};
use super::control::refuse_stopped;
use super::error::ControlError;
use super::{Engine, spec};
use crate::process::{Reaper, apart};

/// What the names of files begin with that may make the kernel reclaim memory.
const RECLAIMING: &str = "memory.";

impl Engine {
    /// Changes the settings of a container's cgroup, in this order, and its filter of devices. Where one of them is refused,
    /// those before it are taken back.
    pub async fn update(&self, request: wire::UpdateContainerRequest) -> Result<(), ControlError> {
        let instance = self.find(&request.container_id)?;
        refuse_stopped(&instance, "update")?;
        let settings = request.cgroup_settings.into_iter().map(spec::cgroup_setting).collect::<Result<Vec<_>, _>>()?;
        let filter = spec::device_filter(request.device_filter)?;
        let _changing = instance.changing.lock().await;
        let mut change = Change { cgroup: instance.needs_cgroup()?, reaper: &self.reaper, before: Vec::new() };
        let changed = change.make(&settings, &filter).await;
        if changed.is_err() {
            change.take_back().await;
        }
        Ok(changed?)
    }
}

/// A change that is under way.
struct Change<'a> {
    cgroup: &'a Cgroup,
    reaper: &'a Reaper,
    /// What the files had that have been written to, in the order in which that was done.
    before: Vec<Setting>,
}

impl Change<'_> {
    async fn make(&mut self, settings: &[Setting], filter: &[u8]) -> Result<(), CgroupError> {
        for setting in settings {
            let before = self.cgroup.read(&setting.file);
            self.write(setting).await?;
            self.before.extend(before.map(|text| Setting::new(setting.file.as_str(), text)));
        }
        self.cgroup.filter_devices(filter)
    }

    /// Gives the files what they had. What has been refused is the error to tell of.
    async fn take_back(self) {
        for Setting { file, value, .. } in self.before.iter().rev() {
            // Nothing at all is written as an empty line.
            let value = if value.is_empty() { "\n" } else { value.as_str() };
            // Of a file with several lines each is a value of its own.
            for line in value.split_inclusive('\n') {
                if let Err(error) = self.write(&Setting::new(file.as_str(), line)).await {
                    crate::log::write(crate::log::Level::Warning, &format!("after a change was refused: {error}"));
                }
            }
        }
    }

    async fn write(&self, setting: &Setting) -> Result<(), CgroupError> {
        if setting.file.starts_with(RECLAIMING) {
            return set_apart(self.cgroup, setting, self.reaper).await;
        }
        self.cgroup.set(setting)
    }
}

/// Writes a setting in a process of its own: where it makes the kernel reclaim memory, it may take long.
async fn set_apart(cgroup: &Cgroup, setting: &Setting, reaper: &Reaper) -> Result<(), CgroupError> {
    let set = || match cgroup.set(setting) {
        Err(CgroupError::Set { source, .. }) => Err(source),
        _ => Ok(()),
    };
    let failed = |source| CgroupError::Set { file: setting.file.clone(), value: setting.value.clone(), source };
    apart(reaper, set).await.map_err(failed)
}
