// SPDX-License-Identifier: Apache-2.0
//! What a process is and how it starts and ends.

use crate::fixture::{Output, World, request};

pub(crate) async fn echo() {
    let output = World::new().run(request(&["echo", "hello", "world"])).await.unwrap();
    assert_eq!(output, Output { code: 0, stdout: "hello world\n".to_owned(), stderr: String::new() });
}

pub(crate) async fn exit_codes() {
    let world = World::new();
    for (script, code) in [("exit 0", 0), ("exit 1", 1), ("exit 255", 255)] {
        assert_eq!(world.run(request(&["sh", "-c", script])).await.unwrap().code, code, "{script}");
    }
}
