// SPDX-License-Identifier: Apache-2.0
//! The fixed parts that messages begin with, as far as they are used; what is not is 0.

/// The fixed part of a kind of message.
pub trait Header: Sized {
    /// Its length in bytes.
    const LEN: usize;

    /// Adds it to `bytes`.
    fn write(&self, bytes: &mut Vec<u8>);

    /// Reads it from the start of `bytes`, and returns what follows; `None` when there is less.
    fn read(bytes: &[u8]) -> Option<(Self, &[u8])>;
}

/// `struct ifinfomsg`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkHeader {
    /// `ARPHRD_*`.
    pub hardware: u16,
    /// The interface's number.
    pub index: i32,
    /// `IFF_*`.
    pub flags: u32,
    /// Which of the flags are to be changed.
    pub change: u32,
}

impl Header for LinkHeader {
    const LEN: usize = 16;

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend([libc::AF_UNSPEC as u8, 0]);
        bytes.extend(self.hardware.to_ne_bytes());
        bytes.extend(self.index.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(self.change.to_ne_bytes());
    }

    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let [_, _, h0, h1, i0, i1, i2, i3, f0, f1, f2, f3, c0, c1, c2, c3] = *header;
        let hardware = u16::from_ne_bytes([h0, h1]);
        let index = i32::from_ne_bytes([i0, i1, i2, i3]);
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        let change = u32::from_ne_bytes([c0, c1, c2, c3]);
        Some((Self { hardware, index, flags, change }, rest))
    }
}

/// `struct ifaddrmsg`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AddressHeader {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// Bits of the network's part.
    pub prefix_len: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// The interface's number.
    pub index: u32,
}

impl Header for AddressHeader {
    const LEN: usize = 8;

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend([self.family, self.prefix_len, 0, self.scope]);
        bytes.extend(self.index.to_ne_bytes());
    }

    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let [family, prefix_len, _, scope, i0, i1, i2, i3] = *header;
        Some((Self { family, prefix_len, scope, index: u32::from_ne_bytes([i0, i1, i2, i3]) }, rest))
    }
}

/// `struct nfgenmsg` (linux/netfilter/nfnetlink.h).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetfilterHeader {
    /// `NFPROTO_*`.
    pub family: u8,
}

impl Header for NetfilterHeader {
    const LEN: usize = 4;

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend([self.family, 0, 0, 0]);
    }

    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let ([family, ..], rest) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        Some((Self { family: *family }, rest))
    }
}

/// `struct rtmsg`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouteHeader {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// Bits of the destination's network part.
    pub prefix_len: u8,
    /// Bits of the network part of the source that packets must have.
    pub source_len: u8,
    /// The type of service that packets must have.
    pub tos: u8,
    /// `RT_TABLE_*`; a larger number is in an attribute.
    pub table: u8,
    /// `RTPROT_*`: who made it.
    pub protocol: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTN_*`.
    pub kind: u8,
    /// `RTNH_F_*` and `RTM_F_*`.
    pub flags: u32,
}

impl Header for RouteHeader {
    const LEN: usize = 12;

    fn write(&self, bytes: &mut Vec<u8>) {
        let Self { family, prefix_len, source_len, tos, table, protocol, scope, kind, .. } = *self;
        bytes.extend([family, prefix_len, source_len, tos, table, protocol, scope, kind]);
        bytes.extend(self.flags.to_ne_bytes());
    }

    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let [family, prefix_len, source_len, tos, table, protocol, scope, kind, f0, f1, f2, f3] = *header;
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        Some((Self { family, prefix_len, source_len, tos, table, protocol, scope, kind, flags }, rest))
    }
}

/// `struct fib_rule_hdr` (linux/fib_rules.h), of which the little is taken apart that callers ask for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RuleHeader {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// `RT_TABLE_*`; a larger number is in an attribute.
    pub table: u8,
    /// `FR_ACT_*`.
    pub kind: u8,
    /// The whole of it. It is what is written.
    pub bytes: [u8; 12],
}

impl Header for RuleHeader {
    const LEN: usize = 12;

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.bytes);
    }

    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let [family, _, _, _, table, _, _, kind, ..] = *header;
        Some((Self { family, table, kind, bytes: *header }, rest))
    }
}

/// `struct ndmsg`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NeighbourHeader {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// The interface's number.
    pub index: i32,
    /// `NUD_*`.
    pub state: u16,
    /// `NTF_*`.
    pub flags: u8,
}

impl Header for NeighbourHeader {
    const LEN: usize = 12;

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend([self.family, 0, 0, 0]);
        bytes.extend(self.index.to_ne_bytes());
        bytes.extend(self.state.to_ne_bytes());
        bytes.extend([self.flags, 0]);
    }

    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let [family, _, _, _, i0, i1, i2, i3, s0, s1, flags, _] = *header;
        let (index, state) = (i32::from_ne_bytes([i0, i1, i2, i3]), u16::from_ne_bytes([s0, s1]));
        Some((Self { family, index, state, flags }, rest))
    }
}

/// `struct tcmsg`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrafficHeader {
    /// The interface's number.
    pub index: i32,
    /// The number of what is meant, or to be made.
    pub handle: u32,
    /// What it hangs on.
    pub parent: u32,
    /// Of a filter: priority and protocol.
    pub info: u32,
}

impl Header for TrafficHeader {
    const LEN: usize = 20;

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend([0; 4]);
        bytes.extend(self.index.to_ne_bytes());
        bytes.extend(self.handle.to_ne_bytes());
        bytes.extend(self.parent.to_ne_bytes());
        bytes.extend(self.info.to_ne_bytes());
    }

    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let [_, _, _, _, i0, i1, i2, i3, h0, h1, h2, h3, p0, p1, p2, p3, n0, n1, n2, n3] = *header;
        let index = i32::from_ne_bytes([i0, i1, i2, i3]);
        let handle = u32::from_ne_bytes([h0, h1, h2, h3]);
        let parent = u32::from_ne_bytes([p0, p1, p2, p3]);
        let info = u32::from_ne_bytes([n0, n1, n2, n3]);
        Some((Self { index, handle, parent, info }, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comes_back<H: Header + PartialEq + std::fmt::Debug>(header: &H) {
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        assert_eq!(bytes.len(), H::LEN);
        bytes.push(9);
        assert_eq!(H::read(&bytes), Some((H::read(&bytes[..H::LEN]).unwrap().0, &[9][..])));
        assert_eq!(H::read(&bytes).unwrap().0, *header);
        assert!(H::read(&bytes[..H::LEN - 1]).is_none());
    }

    #[test]
    fn each_header_is_read_as_it_was_written() {
        comes_back(&LinkHeader { hardware: 1, index: -2, flags: 3, change: u32::MAX });
        comes_back(&AddressHeader { family: 2, prefix_len: 24, scope: 253, index: 0x0102_0304 });
        let (source_len, tos) = (32, 8);
        let (table, protocol, scope, kind, flags) = (254, 3, 1, 1, 4);
        comes_back(&RouteHeader { family: 10, prefix_len: 64, source_len, tos, table, protocol, scope, kind, flags });
        comes_back(&RuleHeader { family: 2, table: 7, kind: 1, bytes: [2, 0, 24, 0, 7, 0, 0, 1, 4, 3, 2, 1] });
        comes_back(&NeighbourHeader { family: 2, index: 7, state: 0x80, flags: 2 });
        comes_back(&TrafficHeader { index: 3, handle: 0xffff_0000, parent: 0xffff_fff1, info: 0x1_0003 });
    }
}
