// SPDX-License-Identifier: Apache-2.0
//! What a driver asks for by the control queue (virtio 1.2, section 5.1.6.5): bytes become a command, or none.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC,
};

use super::MacAddress;

/// Most addresses of each table. Linux has one for each address of its interfaces on top of the device, and for each group
/// that it has joined.
pub const TABLE_MAX: usize = 1024;

/// Bytes of a class and a command, in front of what the command needs.
const HEAD_LEN: usize = 2;
const ADDRESS_LEN: usize = 6;
const COUNT_LEN: usize = 4;

/// Most bytes of a command.
pub(super) const COMMAND_MAX: usize = HEAD_LEN + 2 * (COUNT_LEN + TABLE_MAX * ADDRESS_LEN);

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Whether the guest wants every frame.
    Promiscuous(bool),
    /// Whether it wants every frame to a group.
    AllMulticast(bool),
    /// Whose frames it wants.
    Table { unicast: Vec<MacAddress>, multicast: Vec<MacAddress> },
    /// Its own address.
    Mac(MacAddress),
    /// How many queue pairs it uses.
    Pairs(u16),
}

impl Command {
    /// Understands the bytes of a command; `None` if they are none that is known, or have another length.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (&[class, command], rest) = bytes.split_first_chunk::<HEAD_LEN>()?;
        match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC) => Some(Self::Promiscuous(flag(rest)?)),
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI) => Some(Self::AllMulticast(flag(rest)?)),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                let (unicast, rest) = table(rest)?;
                let (multicast, rest) = table(rest)?;
                rest.is_empty().then_some(Self::Table { unicast, multicast })
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                let mac = MacAddress(rest.try_into().ok()?);
                (!mac.is_group()).then_some(Self::Mac(mac))
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                Some(Self::Pairs(u16::from_le_bytes(rest.try_into().ok()?)))
            }
            _ => None,
        }
    }
}

fn flag(bytes: &[u8]) -> Option<bool> {
    let &[value] = bytes else { return None };
    Some(value != 0)
}

/// A table at the front, and what follows it.
fn table(bytes: &[u8]) -> Option<(Vec<MacAddress>, &[u8])> {
    let (count, rest) = bytes.split_first_chunk::<COUNT_LEN>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok().filter(|count| *count <= TABLE_MAX)?;
    let (addresses, rest) = rest.split_at_checked(count * ADDRESS_LEN)?;
    let (addresses, _) = addresses.as_chunks::<ADDRESS_LEN>();
    Some((addresses.iter().copied().map(MacAddress).collect(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

    #[test]
    fn commands_are_understood() {
        assert_eq!(Command::parse(&[0, 0, 1]), Some(Command::Promiscuous(true)));
        assert_eq!(Command::parse(&[0, 1, 0]), Some(Command::AllMulticast(false)));
        assert_eq!(Command::parse(&[4, 0, 2, 1]), Some(Command::Pairs(0x102)));
        assert_eq!(Command::parse(&[&[1, 1][..], &ONE].concat()), Some(Command::Mac(MacAddress(ONE))));
        let tables = [&[1, 0, 1, 0, 0, 0][..], &ONE, &[2, 0, 0, 0], &GROUP, &GROUP].concat();
        let table = Command::Table { unicast: vec![MacAddress(ONE)], multicast: vec![MacAddress(GROUP); 2] };
        assert_eq!(Command::parse(&tables), Some(table));
        assert!(tables.len() <= COMMAND_MAX);
    }

    #[test]
    fn what_is_too_short_too_long_or_unknown_is_none() {
        let empty_tables = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(Command::parse(&empty_tables).is_some());
        for len in 0..empty_tables.len() {
            assert_eq!(Command::parse(&empty_tables[..len]), None, "{len}");
        }
        for bytes in [
            &[0, 0][..],
            &[0, 0, 1, 1],
            &[0, 2, 1],
            &[2, 0, 1, 0],
            &[4, 0, 1],
            &[4, 1, 0, 0],
            &[9, 9, 9],
            &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[1, 0, 1, 4, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[&[1, 1][..], &GROUP].concat(),
        ] {
            assert_eq!(Command::parse(bytes), None, "{bytes:?}");
        }
    }
}
