// SPDX-License-Identifier: Apache-2.0
//! A request in the making.

use crate::attributes;
use crate::headers::Header;

/// Bytes of `struct nlmsghdr`.
pub(crate) const HEADER_LEN: usize = 16;

/// A request; its length and its number are filled in when it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request of a kind (`RTM_*`), with flags (`NLM_F_*`) besides `NLM_F_REQUEST`.
    pub fn new(kind: u16, flags: i32, header: &impl Header) -> Self {
        let mut message = Self::with_content(kind, flags, &[]);
        header.write(&mut message.bytes);
        message
    }

    /// A request whose header and attributes are those of another one.
    pub fn with_content(kind: u16, flags: i32, content: &[u8]) -> Self {
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(content);
        Self { bytes }
    }

    /// Its header and its attributes.
    #[must_use]
    pub fn into_content(mut self) -> Vec<u8> {
        self.bytes.split_off(HEADER_LEN)
    }

    /// With attributes as they are written.
    #[must_use]
    pub fn with_all(mut self, attributes: &[u8]) -> Self {
        self.bytes.extend(attributes);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// With an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        attributes::put(&mut self.bytes, kind, |bytes| bytes.extend(value));
        self
    }

    /// With an attribute that is a number.
    #[must_use]
    pub fn with_number(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    /// With an attribute that is a text.
    #[must_use]
    pub fn with_text(self, kind: u16, value: &str) -> Self {
        self.with(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// With an attribute that holds those which `fill` adds.
    #[must_use]
    pub fn with_nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        attributes::put(&mut self.bytes, kind, |bytes| {
            *bytes = fill(Self { bytes: std::mem::take(bytes) }).bytes;
        });
        self
    }

    /// The request as it is sent.
    pub(crate) fn finish(mut self, sequence: u32, flags: i32) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        if let Some((header, _)) = self.bytes.split_first_chunk_mut::<HEADER_LEN>() {
            let flags = u16::from_ne_bytes([header[6], header[7]]) | flags as u16;
            header[..4].copy_from_slice(&len.to_ne_bytes());
            header[6..8].copy_from_slice(&flags.to_ne_bytes());
            header[8..12].copy_from_slice(&sequence.to_ne_bytes());
        }
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Attributes, LinkHeader};

    #[test]
    fn the_content_of_one_request_is_good_for_another() {
        let message = Message::new(1, 0, &LinkHeader::default()).with_number(2, 3).with_all(&[5, 0, 4, 0, 9]);
        let content = message.clone().into_content();

        assert_eq!(content.len(), LinkHeader::LEN + 8 + 8);
        assert_eq!(Message::with_content(1, 0, &content), message);
    }

    #[test]
    fn a_request_has_its_length_its_flags_and_its_number() {
        let message = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE, &LinkHeader::default())
            .with_text(libc::IFLA_IFNAME, "eth0")
            .with_nested(18, |inner| inner.with_text(1, "veth").with_number(2, 5));

        let bytes = message.finish(7, libc::NLM_F_ACK);

        assert_eq!(bytes[..4], (bytes.len() as u32).to_ne_bytes());
        assert_eq!(bytes[4..6], libc::RTM_NEWLINK.to_ne_bytes());
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_CREATE | libc::NLM_F_ACK) as u16;
        assert_eq!(bytes[6..8], flags.to_ne_bytes());
        assert_eq!(bytes[8..12], 7_u32.to_ne_bytes());
        let nested = Attributes::new(&bytes[HEADER_LEN + LinkHeader::LEN..]).find_kind(18).unwrap();
        assert_eq!(nested.nested().find_kind(2).unwrap().number(), Some(5));
    }
}
