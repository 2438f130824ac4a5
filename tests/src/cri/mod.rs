// SPDX-License-Identifier: Apache-2.0
//! A client of CRI, the kubelet's interface to a container runtime: calls over gRPC, and streams over WebSocket.

mod grpc;
mod websocket;

pub(crate) use grpc::Client;
pub(crate) use websocket::{PORT_DATA, PORT_ERROR, RESIZE, STATUS, STDIN, STDOUT, WebSocket};

pub(crate) use crate::messages::cri as api;
