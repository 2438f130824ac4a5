// SPDX-License-Identifier: Apache-2.0
//! Bundles and ids that cannot be run: one line says what is wrong, and nothing is left.

use std::fs;

use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Failure, Result, ensure, fail};

pub(super) const CASES: &[Case] = &[
    case!(no_bundle),
    case!(no_configuration),
    case!(configuration_is_a_folder),
    case!(broken_json_has_line_and_column),
    case!(wrong_type_has_line_and_field),
    case!(empty_configuration),
    case!(wrong_version),
    case!(no_process),
    case!(empty_arguments),
    case!(relative_working_folder),
    case!(root_file_system_is_missing),
    case!(root_file_system_is_a_file),
    case!(no_root),
    case!(user_out_of_range),
    case!(unknown_capability),
    case!(unknown_resource_limit),
    case!(unknown_namespace),
    case!(working_folder_is_a_file),
    case!(mount_source_is_absent),
    case!(mount_without_a_destination),
    case!(unknown_file_system),
    case!(folder_bound_over_a_file),
    case!(annotations_out_of_range),
    case!(fields_that_are_not_honoured),
    case!(ids_that_are_not_valid),
    case!(id_in_use),
    case!(longest_id),
    case!(arguments_that_are_not_valid),
];

/// Changes one field of a good configuration, which must then be refused with these words.
fn refused(env: &Env, pointer: &str, value: Value, words: &[&str]) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.set(pointer, value.clone());
    let output = env.run(&bundle)?.output()?;
    output.expect_error(words).map_err(|failure| match failure {
        Failure::Failed(reason) => Failure::Failed(format!("{pointer} = {value}: {reason}")),
        skipped @ Failure::Skipped(_) => skipped,
    })
}

fn no_bundle(env: &Env) -> Result {
    let folder = env.work.join("no-such-folder");

    env.run_folder(&folder, &env.id()).output()?.expect_error(&["no-such-folder"])
}

fn no_configuration(env: &Env) -> Result {
    let folder = env.folder("empty")?;
    env.run_folder(&folder, &env.id()).output()?.expect_error(&["config.json"])?;
    // The bundle is the current folder if none is named.
    env.call(["run", "some-id"]).in_folder(&folder).output()?.expect_error(&["config.json"])
}

fn configuration_is_a_folder(env: &Env) -> Result {
    let folder = env.folder("bundle")?;
    fs::create_dir(folder.join("config.json"))?;

    env.run_folder(&folder, &env.id()).output()?.expect_error(&["config.json"])
}

fn broken_json_has_line_and_column(env: &Env) -> Result {
    let bundle = Bundle::busybox(env)?;
    fs::write(bundle.config(), "{\n  \"ociVersion\": \"1.0.2\",\n  \"process\": ]\n}\n")?;

    let output = env.run_folder(&bundle.folder, &env.id()).output()?;

    output.expect_error(&["config.json", "line 3", "column 14"])
}

fn wrong_type_has_line_and_field(env: &Env) -> Result {
    let bundle = Bundle::busybox(env)?;
    fs::write(bundle.config(), "{\n  \"ociVersion\": \"1.0.2\",\n  \"process\": {\n    \"args\": \"true\"\n  }\n}\n")?;

    let output = env.run_folder(&bundle.folder, &env.id()).output()?;

    output.expect_error(&["config.json", "line 4", "args"])
}

fn empty_configuration(env: &Env) -> Result {
    let bundle = Bundle::busybox(env)?;
    for text in ["", "{}", "null", "[]", "\0\0\0\0"] {
        fs::write(bundle.config(), text)?;
        env.run_folder(&bundle.folder, &env.id()).output()?.expect_error(&["config.json"])?;
    }
    Ok(())
}

fn wrong_version(env: &Env) -> Result {
    env.only_bulkhead()?;
    for version in ["2.0.0", "0.1.0", "one", ""] {
        refused(env, "/ociVersion", json!(version), &["config.json", "ociVersion"])?;
    }
    Ok(())
}

fn no_process(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    if let Some(fields) = bundle.spec.as_object_mut() {
        fields.remove("process");
    }

    env.run(&bundle)?.output()?.expect_error(&["config.json", "process"])
}

fn empty_arguments(env: &Env) -> Result {
    refused(env, "/process/args", json!([]), &["process.args"])?;
    if env.kind == Kind::Bulkhead {
        refused(env, "/process/args", json!([""]), &["args"])?;
    }
    Ok(())
}

fn relative_working_folder(env: &Env) -> Result {
    refused(env, "/process/cwd", json!("tmp"), &["process.cwd", "tmp"])
}

fn root_file_system_is_missing(env: &Env) -> Result {
    refused(env, "/root/path", json!("no-such-rootfs"), &["root.path", "no-such-rootfs"])
}

fn root_file_system_is_a_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    fs::write(bundle.folder.join("a-file"), "")?;
    bundle.set("/root/path", json!("a-file"));

    env.run(&bundle)?.output()?.expect_error(&["root.path", "a-file"])
}

fn no_root(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    if let Some(fields) = bundle.spec.as_object_mut() {
        fields.remove("root");
    }

    env.run(&bundle)?.output()?.expect_error(&["config.json", "root"])
}

fn user_out_of_range(env: &Env) -> Result {
    for (name, value) in [("uid", json!(4_294_967_296u64)), ("uid", json!(-1)), ("gid", json!(4_294_967_296u64))] {
        refused(env, &format!("/process/user/{name}"), value, &["config.json"])?;
    }
    if env.kind == Kind::Bulkhead {
        // The number that means "no change" to the kernel is nobody's.
        refused(env, "/process/user/uid", json!(u32::MAX), &["process.user.uid", "4294967295"])?;
        refused(env, "/process/user/additionalGids", json!([1, u32::MAX]), &["additionalGids"])?;
    }
    Ok(())
}

fn unknown_capability(env: &Env) -> Result {
    env.only_bulkhead()?;
    refused(env, "/process/capabilities/effective", json!(["CAP_FLY"]), &["capabilities", "CAP_FLY"])
}

fn unknown_resource_limit(env: &Env) -> Result {
    let limit = json!([{ "type": "RLIMIT_WISHES", "soft": 3, "hard": 3 }]);
    refused(env, "/process/rlimits", limit, &["rlimits", "RLIMIT_WISHES"])
}

fn unknown_namespace(env: &Env) -> Result {
    refused(env, "/linux/namespaces", json!([{ "type": "mount" }, { "type": "dream" }]), &["namespaces", "dream"])
}

fn working_folder_is_a_file(env: &Env) -> Result {
    refused(env, "/process/cwd", json!("/etc/passwd"), &["/etc/passwd"])
}

fn mount_source_is_absent(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.bind(&env.work.join("no-such-source"), "/data", &["ro"]);

    env.run(&bundle)?.output()?.expect_error(&["mounts[7]", "no-such-source"])?;

    ensure!(!bundle.path("data").exists() || env.kind == Kind::Other, "its destination was made");
    Ok(())
}

fn mount_without_a_destination(env: &Env) -> Result {
    env.only_bulkhead()?;
    refused(env, "/mounts", json!([{ "type": "tmpfs", "source": "tmpfs" }]), &["config.json", "destination"])?;
    refused(
        env,
        "/mounts",
        json!([{ "type": "tmpfs", "source": "tmpfs", "destination": "" }]),
        &["mounts[0]", "destination"],
    )
}

fn unknown_file_system(env: &Env) -> Result {
    refused(env, "/mounts", json!([{ "type": "papyrus", "source": "x", "destination": "/data" }]), &["papyrus"])
}

fn folder_bound_over_a_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    bundle.bind(&folder, "/etc/passwd", &[]);

    env.run(&bundle)?.output()?.expect_error(&["/etc/passwd"])
}

fn annotations_out_of_range(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    let wrong = [
        ("io.bulkhead.vcpus", "0"),
        ("io.bulkhead.vcpus", "100000"),
        ("io.bulkhead.vcpus", "two"),
        ("io.bulkhead.memory_mib", "0"),
        ("io.bulkhead.memory_mib", "1"),
        ("io.bulkhead.memory_mib", "18446744073709551616"),
        ("io.bulkhead.no-such-thing", "1"),
    ];
    for (name, value) in wrong {
        bundle.annotation(name, value);
        env.run(&bundle)?.output()?.expect_error(&[name])?;
    }
    Ok(())
}

/// What is not done is refused by name, for the author of the configuration counts on it.
fn fields_that_are_not_honoured(env: &Env) -> Result {
    env.only_bulkhead()?;
    let fields = [
        ("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "linux.seccomp"),
        ("/process/apparmorProfile", json!("strict"), "process.apparmorProfile"),
        ("/process/selinuxLabel", json!("a:b:c"), "process.selinuxLabel"),
        ("/linux/intelRdt", json!({ "closID": "x" }), "linux.intelRdt"),
        ("/hooks/prestart", json!([{ "path": "true" }]), "hooks.prestart"),
    ];
    for (pointer, value, name) in fields {
        refused(env, pointer, value, &["config.json", name])?;
    }
    Ok(())
}

fn ids_that_are_not_valid(env: &Env) -> Result {
    let bundle = Bundle::busybox(env)?;
    let long = "x".repeat(if env.kind == Kind::Other { 1025 } else { 256 });
    for id in ["a/b", "/", "../up", "..", ".", "a b", "a\nb", "ä", long.as_str()] {
        if env.kind == Kind::Other && id == "." {
            continue;
        }
        let output = env.run_as(&bundle, id)?.output()?;
        ensure!(output.status.code().is_some_and(|code| code != 0), "the id {id:?}: {}", output.describe());
        output.expect_error(&["id"])?;
    }
    let output = env.run_as(&bundle, "")?.output()?;
    output.expect_error(&["id"])
}

fn id_in_use(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ready; read line; echo end");
    let id = env.id();

    let mut running = env.run_as(&bundle, &id)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let second = env.run_as(&bundle, &id)?.output()?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\nend\n")?;
    second.expect_error(&[&id])?;
    // And it is free again.
    env.run_as(&bundle, &id)?.output()?.expect_code(0)
}

fn longest_id(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo fine");
    let id = "L".repeat(255);

    env.run_as(&bundle, &id)?.output()?.expect_stdout("fine\n")?;

    // The folder of the state may be of any depth as well.
    let root = env.root.join("a-folder-with-a-long-name".repeat(6)).join("another");
    env.run_as(&bundle, &id)?.root(&root).output()?.expect_stdout("fine\n")?;
    let Some(top) = root.parent() else { fail!("no parent of {}", root.display()) };
    Ok(fs::remove_dir_all(top)?)
}

fn arguments_that_are_not_valid(env: &Env) -> Result {
    for arguments in
        [&["run"][..], &["frobnicate"], &["run", "--no-such-option", "x"], &["--log-format", "xml", "run", "x"]]
    {
        let output = env.call(arguments.iter().copied()).output()?;
        if env.kind == Kind::Bulkhead {
            output.expect_error(&[])?;
        }
        ensure!(!output.status.success(), "{arguments:?}: {}", output.describe());
    }
    Ok(())
}
