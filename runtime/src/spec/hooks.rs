// SPDX-License-Identifier: Apache-2.0
//! The `hooks` of a configuration: those of the host, and those that run in the container.

use std::time::Duration;

use bulkhead_protocol::agent::Hook as WireHook;
use oci_spec::runtime::{Hook as OciHook, Hooks as OciHooks};

use super::error::{FieldError, without_nul};
use super::list;
use crate::hooks::{Hook, Hooks};

/// Checks the hooks. The second part is the agent's to run.
pub(crate) fn translate(hooks: &OciHooks) -> Result<(Hooks, Vec<WireHook>), FieldError> {
    #[allow(deprecated, reason = "a configuration may still use it, and engines do")]
    let prestart = hooks.prestart().as_ref();
    let mut create = translate_list("prestart", list(prestart))?;
    create.extend(translate_list("createRuntime", list(hooks.create_runtime().as_ref()))?);
    let create_container = translate_list("createContainer", list(hooks.create_container().as_ref()))?;
    let poststart = translate_list("poststart", list(hooks.poststart().as_ref()))?;
    let poststop = translate_list("poststop", list(hooks.poststop().as_ref()))?;
    let start = translate_list("startContainer", list(hooks.start_container().as_ref()))?;
    Ok((Hooks { create, create_container, poststart, poststop }, start.into_iter().map(to_wire).collect()))
}

fn translate_list(kind: &str, hooks: &[OciHook]) -> Result<Vec<Hook>, FieldError> {
    let one = |(index, hook)| translate_one(format!("hooks.{kind}[{index}]"), hook);
    hooks.iter().enumerate().map(one).collect()
}

fn translate_one(field: String, hook: &OciHook) -> Result<Hook, FieldError> {
    let path = hook.path().to_string_lossy();
    without_nul(|| format!("{field}.path"), &path)?;
    if !hook.path().is_absolute() {
        return Err(FieldError::invalid(format!("{field}.path"), path, "an absolute path"));
    }
    let args = hook.args().clone().unwrap_or_default();
    let texts = hook.env().clone().unwrap_or_default();
    for (name, list) in [("args", &args), ("env", &texts)] {
        for (index, text) in list.iter().enumerate() {
            without_nul(|| format!("{field}.{name}[{index}]"), text)?;
        }
    }
    let mut env = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        match text.split_once('=').filter(|(name, _)| !name.is_empty()) {
            Some((name, value)) => env.push((name.to_owned(), value.to_owned())),
            None => return Err(FieldError::invalid(format!("{field}.env[{index}]"), text, "of the form NAME=VALUE")),
        }
    }
    let timeout = match hook.timeout() {
        None => None,
        Some(seconds) => match u64::try_from(seconds).ok().filter(|seconds| *seconds > 0) {
            Some(seconds) => Some(Duration::from_secs(seconds)),
            None => return Err(FieldError::invalid(format!("{field}.timeout"), seconds, "more than 0")),
        },
    };
    Ok(Hook { path: hook.path().clone(), field, args, env, timeout })
}

fn to_wire(hook: Hook) -> WireHook {
    WireHook {
        path: hook.path.to_string_lossy().into_owned(),
        args: hook.args,
        env: hook.env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
        timeout_s: hook.timeout.map_or(0, |timeout| timeout.as_secs()),
        ..WireHook::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(value: Value) -> Result<(Hooks, Vec<WireHook>), String> {
        translate(&serde_json::from_value(value).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn hooks_keep_their_order() {
        let hook = |path: &str| json!([{"path": path, "args": ["name", "x"], "env": ["A=b=c"], "timeout": 3}]);
        let (hooks, start) = translated(json!({
            "createContainer": hook("/3"), "createRuntime": hook("/2"), "prestart": hook("/1"),
            "startContainer": hook("/4"), "poststart": hook("/5"), "poststop": hook("/6"),
        }))
        .unwrap();

        let paths: Vec<_> = hooks.create.iter().map(|hook| hook.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/1", "/2"]);
        assert_eq!(hooks.create_container[0].path.to_str(), Some("/3"));
        assert_eq!(hooks.create[0].field, "hooks.prestart[0]");
        assert_eq!(hooks.create[0].env, [("A".to_owned(), "b=c".to_owned())]);
        assert_eq!(hooks.poststop[0].timeout, Some(Duration::from_secs(3)));
        assert_eq!((start[0].path.as_str(), start[0].timeout_s), ("/4", 3));
        assert_eq!(start[0].env, ["A=b=c"]);
        assert_eq!(translated(json!({"prestart": [], "poststop": []})).unwrap(), Default::default());
    }

    #[test]
    fn bad_hooks_are_refused_by_name() {
        let cases = [
            (json!({"path": "x"}), "hooks.poststop[0].path: \"x\" is not an absolute path"),
            (json!({"path": "/x", "timeout": 0}), "hooks.poststop[0].timeout: \"0\" is not more than 0"),
            (json!({"path": "/x", "env": ["A"]}), "hooks.poststop[0].env[0]: \"A\" is not of the form NAME=VALUE"),
            (json!({"path": "/x", "args": ["\0"]}), "hooks.poststop[0].args[0]: \"\\0\" is not a text without NUL"),
        ];
        for (hook, expected) in cases {
            assert_eq!(translated(json!({"poststop": [hook]})).unwrap_err(), expected);
        }
    }
}
