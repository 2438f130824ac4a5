// SPDX-License-Identifier: Apache-2.0
//! The little of rtnetlink(7) that the runtime and the agent speak: messages are built and taken apart here, what they are
//! to say is the callers'. Numbers are in the machine's own byte order, and every piece is padded to 4 bytes.

mod attributes;
mod events;
mod headers;
mod message;
mod socket;

pub use attributes::{Attribute, Attributes};
pub use events::Events;
pub use headers::{
    AddressHeader, Header, LinkHeader, NeighbourHeader, NetfilterHeader, RouteHeader, RuleHeader, TrafficHeader,
};
pub use message::Message;
pub use socket::Socket;
