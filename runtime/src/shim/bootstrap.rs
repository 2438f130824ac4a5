// SPDX-License-Identifier: Apache-2.0
//! What containerd writes to `start`, and the form of the answer that follows from it.
//!
//! | containerd | on stdin | the answer |
//! | --- | --- | --- |
//! | up to 2.2 | nothing, or the runtime's options from its configuration | the plain address; task API version 2 |
//! | from 2.3 on | `BootstrapParams` | `BootstrapResult` |
//!
//! Both messages have a text as their first field. Bootstrap parameters are those whose first two say what the flags say.

use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::{Enum, Message};
use thiserror::Error;

use super::arguments::Arguments;

/// Most bytes that are taken: options are small.
const MAX_LEN: u64 = 4 << 20;

/// The newest version of the task API that is served.
const VERSION: i32 = 3;

/// The protocol that is spoken on the socket.
const PROTOCOL: &str = "ttrpc";

/// Parameters that cannot be followed.
#[derive(Debug, Error)]
pub(super) enum BootstrapError {
    #[error("cannot read stdin")]
    Read(#[source] io::Error),
    #[error("containerd wrote more than {MAX_LEN} bytes to stdin")]
    TooLong,
    #[error("socket_dir of the bootstrap parameters is {0:?}, which is not an absolute path")]
    SocketDir(String),
    #[error("cannot encode the answer")]
    Encode(#[source] protobuf::Error),
}

/// How `start` is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    Message,
}

/// Reads stdin to its end, and takes from bootstrap parameters what they say. A terminal is a person's, who has none.
pub(super) fn read(arguments: &mut Arguments) -> Result<Form, BootstrapError> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(Form::Plain);
    }
    let mut bytes = Vec::new();
    stdin.lock().take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(BootstrapError::Read)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(BootstrapError::TooLong);
    }
    take(&bytes, arguments)
}

fn take(bytes: &[u8], arguments: &mut Arguments) -> Result<Form, BootstrapError> {
    let Ok(params) = BootstrapParams::parse_from_bytes(bytes) else {
        return Ok(Form::Plain);
    };
    if params.instance_id != arguments.id || params.namespace != arguments.namespace {
        return Ok(Form::Plain);
    }
    // Less than a level is more verbose.
    arguments.debug |= params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value();
    // The flag goes first while there is one: sockets are named after it.
    if arguments.address.is_empty() {
        arguments.address = params.containerd_grpc_address;
    }
    let events = &params.containerd_ttrpc_address;
    if !events.is_empty() {
        arguments.events = Some(events.strip_prefix("unix://").unwrap_or(events).into());
    }
    if let Some(folder) = params.socket_dir.filter(|folder| !folder.is_empty()) {
        let path = PathBuf::from(&folder);
        if !path.is_absolute() {
            return Err(BootstrapError::SocketDir(folder));
        }
        arguments.sockets = Some(path);
    }
    Ok(Form::Message)
}

/// The answer that names the server's address.
pub(super) fn answer(form: Form, address: String) -> Result<Vec<u8>, BootstrapError> {
    match form {
        Form::Plain => Ok(address.into_bytes()),
        Form::Message => {
            let protocol = PROTOCOL.to_owned();
            let result = BootstrapResult { version: VERSION, address, protocol, ..BootstrapResult::default() };
            result.write_to_bytes().map_err(BootstrapError::Encode)
        }
    }
}

#[cfg(test)]
mod tests {
    use protobuf::well_known_types::any::Any;

    use super::*;

    fn arguments() -> Arguments {
        let words = ["-namespace", "ns", "-id", "c1", "-address", "/c.sock", "start"];
        Arguments::parse(words.iter().map(Into::into)).unwrap()
    }

    fn params(id: &str) -> BootstrapParams {
        BootstrapParams {
            instance_id: id.to_owned(),
            namespace: "ns".to_owned(),
            containerd_grpc_address: "/new.sock".to_owned(),
            containerd_ttrpc_address: "unix:///events.sock".to_owned(),
            log_level: LogLevel::LOG_LEVEL_TRACE.into(),
            ..BootstrapParams::default()
        }
    }

    #[test]
    fn bootstrap_parameters_are_followed() {
        let mut arguments = arguments();
        let mut params = params("c1");
        params.socket_dir = Some("/run/sockets".to_owned());

        let form = take(&params.write_to_bytes().unwrap(), &mut arguments).unwrap();

        assert_eq!((form, arguments.debug, arguments.address.as_str()), (Form::Message, true, "/c.sock"));
        assert_eq!(arguments.events, Some("/events.sock".into()));
        assert_eq!(arguments.sockets, Some("/run/sockets".into()));
        let answer = answer(form, "unix:///s".to_owned()).unwrap();
        let answer = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!((answer.version, answer.address.as_str(), answer.protocol.as_str()), (3, "unix:///s", "ttrpc"));
    }

    #[test]
    fn what_is_none_is_passed_over() {
        let options = Any { type_url: "runtimeoptions.v1.Options".to_owned(), value: b"ns".to_vec(), ..Any::default() };
        let others = params("c2").write_to_bytes().unwrap();

        for bytes in [vec![], b"\xff\xff".to_vec(), options.write_to_bytes().unwrap(), others] {
            let mut taken = arguments();
            assert_eq!(take(&bytes, &mut taken).unwrap(), Form::Plain);
            assert_eq!(taken, arguments());
        }
        assert_eq!(answer(Form::Plain, "unix:///s".to_owned()).unwrap(), b"unix:///s");
    }

    #[test]
    fn a_relative_folder_of_sockets_is_refused() {
        let mut params = params("c1");
        params.socket_dir = Some("sockets".to_owned());

        let refused = take(&params.write_to_bytes().unwrap(), &mut arguments()).unwrap_err();

        assert!(refused.to_string().starts_with("socket_dir of the bootstrap parameters is \"sockets\""), "{refused}");
    }
}
