// SPDX-License-Identifier: Apache-2.0
//! Whole bundles.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::text;

/// A bundle with the template as configuration, changed, and an empty rootfs.
fn bundle(change: impl FnOnce(&mut Value)) -> TempDir {
    let mut config = template::template();
    change(&mut config);
    bundle_of(&config.to_string())
}

fn bundle_of(config: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    fs::write(dir.path().join(CONFIG_FILE), config).unwrap();
    dir
}

/// What a user is told, without the bundle's path.
fn refusal(bundle: &TempDir) -> String {
    let path = fs::canonicalize(bundle.path()).unwrap();
    text::chain(&load(bundle.path()).unwrap_err()).replace(path.to_str().unwrap(), "BUNDLE")
}

#[test]
fn the_template_is_translated() {
    let bundle = bundle(|_| {});

    let translated = load(bundle.path()).unwrap();

    assert_eq!(translated.request.process.args, ["sh"]);
    assert_eq!(translated.request.mounts.len(), 7);
    assert_eq!(translated.request.namespaces.len(), 6);
    assert!(translated.request.rootfs_readonly);
    assert_eq!(translated.shares.private.len(), 1);
    assert!(translated.shares.private[0].read_only);
    assert!(translated.shares.shared.is_empty());
}

#[test]
fn a_configuration_without_linux_and_mounts_is_enough() {
    let bundle = bundle_of(
        r#"{"ociVersion": "1.0.2-dev", "root": {"path": "rootfs"}, "process": {"args": ["x"], "cwd": "/", "user": {}}}"#,
    );

    let translated = load(bundle.path()).unwrap();

    assert_eq!(translated.request.namespaces.len(), 2);
    assert!(translated.request.mounts.is_empty() && translated.request.masked_paths.is_empty());
}

#[test]
fn an_absent_bundle_and_an_absent_configuration_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();

    assert!(matches!(load(&dir.path().join("absent")), Err(SpecError::Bundle(..))));
    assert!(matches!(load(dir.path()), Err(SpecError::Read(..))));
}

#[test]
fn broken_json_is_told_with_line_column_and_field() {
    assert_eq!(
        refusal(&bundle_of("{\n  \"ociVersion\": \"1.0.0\",\n  \"root\": {,}\n}")),
        "BUNDLE/config.json, line 3, column 12: root: key must be a string"
    );
    assert_eq!(refusal(&bundle_of("")), "BUNDLE/config.json, line 1, column 0: EOF while parsing a value");
    assert_eq!(
        refusal(&bundle_of("{\"process\": {\"cwd\": \"/\", \"user\": {\"uid\": -1}}}")),
        "BUNDLE/config.json, line 1, column 43: process.user.uid: invalid value: integer `-1`, expected u32"
    );
}

#[test]
fn each_broken_whole_is_refused_by_field() {
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 12] = [
        (|c| c["ociVersion"] = json!(""), "ociVersion: missing; it says which specification the file follows"),
        (|c| c["ociVersion"] = json!("2.0.0"), "ociVersion: \"2.0.0\" is not a version 1.x.y"),
        (|c| c["ociVersion"] = json!("1.0"), "ociVersion: \"1.0\" is not a version 1.x.y"),
        (|c| c["process"] = Value::Null, "process: missing; it says what to run"),
        (|c| c["process"]["args"] = json!([]), "process.args: missing; it names the program to run"),
        (|c| c["root"] = Value::Null, "root: missing; it names the folder of the root file system"),
        (|c| c["root"]["path"] = json!(""), "root.path: missing; it names the folder of the root file system"),
        (
            |c| c["root"]["path"] = json!("absent"),
            "root.path: cannot use BUNDLE/absent: No such file or directory (os error 2)",
        ),
        (|c| c["root"]["path"] = json!("config.json"), "root.path: cannot use BUNDLE/config.json: it is not a folder"),
        (
            |c| c["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "linux.seccomp.defaultAction: not supported: SCMP_ACT_NOTIFY: a process of the host cannot answer system calls of a guest",
        ),
        (|c| c["linux"]["maskedPaths"] = json!(["proc"]), "linux.maskedPaths[0]: \"proc\" is not an absolute path"),
        (
            |c| c["linux"]["rootfsPropagation"] = json!("up"),
            "linux.rootfsPropagation: \"up\" is not a propagation mode such as private",
        ),
    ];
    for (change, expected) in cases {
        assert_eq!(refusal(&bundle(change)), format!("BUNDLE/config.json: {expected}"));
    }
}

#[test]
fn any_version_1_is_accepted() {
    for version in ["1.0.0", "1.0.2-dev", "1.1.0+x", "1.2.1", "1.99.0"] {
        assert!(load(bundle(|c| c["ociVersion"] = json!(version)).path()).is_ok(), "{version}");
    }
}

#[test]
fn unknown_properties_are_ignored() {
    let bundle = bundle(|c| {
        c["future"] = json!({"x": 1});
        c["process"]["future"] = json!(true);
    });

    assert!(load(bundle.path()).is_ok());
}
