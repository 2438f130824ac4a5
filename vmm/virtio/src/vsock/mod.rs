// SPDX-License-Identifier: Apache-2.0
//! The vsock device (virtio 1.2, section 5.10): streams between the guest's sockets and Unix sockets of the host.
//!
//! A client on the host connects to the device's listening socket, writes `CONNECT <port>\n`, and reads `OK <host port>\n`
//! once the guest has accepted; from there on the socket is the stream, half-closes included. If the guest refuses, the
//! socket is closed. The guest itself may connect to one port only, the agent's, and only once.
//!
//! No byte is lost: data that was sent before a close arrives before the end of the stream, however slow the reader is,
//! in both directions. What a side may have in flight is bounded by credit, so each connection buffers at most
//! [`RECEIVE_BUFFER_SIZE`] bytes of the guest's, and nothing of the host's.
//!
//! What a misbehaving guest meets:
//!
//! | the guest | fate |
//! | --- | --- |
//! | breaks a ring (index out of range, ring out of memory) | all connections are closed, the device needs a reset |
//! | sends a chain that holds no header | ignored |
//! | announces data that the chain does not hold, or more than 64 KiB, or in over 64 pieces | that connection is reset |
//! | sends from a context id that is not its own | ignored |
//! | sends to another than the host's context id, or not of type stream | reset |
//! | sends a packet of no connection, other than a good request | reset, unless it is one |
//! | connects to any port but the agent's, or a second time to that | reset |
//! | sends an unknown operation, or one that is not due | that connection is reset |
//! | sends more than its credit, or data after it has shut down sending | that connection is reset |
//! | lies about its own credit | it cuts itself off |
//! | sends packets that need a reset as answer and takes none from the receive queue | nothing is taken from it |
//! | gives receive buffers that cannot hold a header and a byte of data | they come back unused |
//! | never answers a request or a shutdown | that connection stays until its client, or the device, goes |
//!
//! And a misbehaving client on the host:
//!
//! | the client | fate |
//! | --- | --- |
//! | says something other than `CONNECT <port>\n`, in more than [`MAX_CONNECT_LINE`] bytes or less | closed |
//! | says nothing, or only a part of the line | takes one of the [`MAX_CONNECTIONS`] places until it goes |
//! | finds no place | waits in the listener's backlog |
//! | does not read | the guest's credit runs out and its writers wait |

mod bridge;
mod connection;
mod credit;
mod device;
mod engine;
mod handshake;
mod host_socket;
mod muxer;
pub mod packet;
mod tx_buffer;

pub use credit::RECEIVE_BUFFER_SIZE;
pub use device::{Vsock, VsockConfig};
pub use handshake::MAX_CONNECT_LINE;
pub use muxer::{MAX_CONNECTIONS, MAX_WAITING_RESETS, Muxer};
