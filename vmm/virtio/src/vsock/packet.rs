// SPDX-License-Identifier: Apache-2.0
//! A packet's header, and how packets lie in descriptor chains (virtio 1.2, section 5.10.6).

use virtio_queue::DescriptorChain;
use virtio_vsock::packet::VsockPacket;
use vm_memory::{Address, GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

pub use virtio_vsock::packet::PKT_HEADER_SIZE as HEADER_SIZE;

use crate::device::GuestMemory;

/// Most data bytes of one packet, in either direction. A Linux driver sends no more.
pub const MAX_DATA_SIZE: u32 = 64 * 1024;

/// The context id of the host.
pub const HOST_CID: u64 = 2;

/// The one type of socket that there is here: a stream.
pub const TYPE_STREAM: u16 = 1;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Refuses a connection, ends one, or answers a packet that belongs to none.
    Reset = 3,
    /// The sender will not receive ([`SHUTDOWN_RECEIVE`]), or not send ([`SHUTDOWN_SEND`]), any more.
    Shutdown = 4,
    /// Carries data.
    ReadWrite = 5,
    /// Tells the sender's credit.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Operation {
    /// The operation of a header; `None` if there is none such.
    #[must_use]
    pub fn of(header: &Header) -> Option<Self> {
        Some(match header.op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Flag of [`Operation::Shutdown`]: the sender will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Operation::Shutdown`]: the sender will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both of the above.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `struct virtio_vsock_hdr`: 44 bytes, little endian, in this order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's context id.
    pub src_cid: u64,
    /// The receiver's context id.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data.
    pub len: u32,
    /// The type of socket.
    pub kind: u16,
    /// The [`Operation`], as it came.
    pub op: u16,
    /// What they mean depends on the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The header that `bytes` hold.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16::from_le_bytes([bytes[28], bytes[29]]),
            op: u16::from_le_bytes([bytes[30], bytes[31]]),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }
}

/// Most pieces that a packet's data may lie in. A Linux driver makes no more than 18.
pub const MAX_DATA_PIECES: usize = 64;

/// What a chain of the transmit queue holds.
#[derive(Debug)]
pub enum FromGuest<'a> {
    /// A packet. Its data, as many bytes as the header says, still lies in guest memory and may change there.
    Packet(Header, Vec<VolatileSlice<'a>>),
    /// A header without the data that it announces, or with more than [`MAX_DATA_SIZE`] of it or in more than
    /// [`MAX_DATA_PIECES`]: bytes of the stream are lost.
    DataLost(Header),
    /// Not even a header.
    Nothing,
}

/// Reads the packet of a chain of the transmit queue, however header and data are spread over its descriptors: Linux sends
/// larger pieces of data as several.
#[must_use]
pub fn parse_transmitted<'a>(memory: &'a GuestMemory, chain: DescriptorChain<&GuestMemory>) -> FromGuest<'a> {
    let mut bytes = [0; HEADER_SIZE];
    let mut pieces = Pieces { memory, chain, rest: None };
    let mut filled = 0;
    while filled < HEADER_SIZE {
        let Some(piece) = pieces.next_of(HEADER_SIZE - filled) else { return FromGuest::Nothing };
        piece.copy_to(&mut bytes[filled..]);
        filled += piece.len();
    }
    let header = Header::from_bytes(&bytes);
    let mut data = Vec::new();
    let mut missing = header.len as usize;
    if header.len > MAX_DATA_SIZE {
        return FromGuest::DataLost(header);
    }
    while missing > 0 {
        match pieces.next_of(missing) {
            Some(piece) if data.len() < MAX_DATA_PIECES => {
                missing -= piece.len();
                data.push(piece);
            }
            _ => return FromGuest::DataLost(header),
        }
    }
    FromGuest::Packet(header, data)
}

/// The readable memory that a chain describes, piece by piece.
struct Pieces<'a, 'm> {
    memory: &'a GuestMemory,
    chain: DescriptorChain<&'m GuestMemory>,
    /// Where the current descriptor goes on, and how many bytes of it are left.
    rest: Option<(GuestAddress, usize)>,
}

impl<'a> Pieces<'a, '_> {
    /// The next piece, of `wanted` bytes at most and at least one; `None` at the chain's end, or where it stops being
    /// readable memory.
    fn next_of(&mut self, wanted: usize) -> Option<VolatileSlice<'a>> {
        let (address, len) = match self.rest.take() {
            Some(rest) => rest,
            None => self.next_descriptor()?,
        };
        let piece = self.memory.get_slices(address, len.min(wanted), Permissions::Read).ok()?.next()?.ok()?;
        let left = len - piece.len();
        if left > 0 {
            self.rest = Some((address.checked_add(piece.len() as u64)?, left));
        }
        Some(piece)
    }

    fn next_descriptor(&mut self) -> Option<(GuestAddress, usize)> {
        let descriptor = self.chain.by_ref().find(|descriptor| descriptor.len() > 0)?;
        let len = usize::try_from(descriptor.len()).ok()?;
        (!descriptor.is_write_only()).then_some((descriptor.addr(), len))
    }
}

/// A chain of the receive queue, to be filled with one packet.
#[derive(Debug)]
pub struct ReceiveBuffer<'a> {
    packet: VsockPacket<'a, ()>,
    data: VolatileSlice<'a>,
}

impl<'a> ReceiveBuffer<'a> {
    /// The buffer that a chain describes; `None` if it has no room for a header and a byte, or may not be written.
    #[must_use]
    pub fn parse(memory: &'a GuestMemory, mut chain: DescriptorChain<&GuestMemory>) -> Option<Self> {
        let packet = VsockPacket::from_rx_virtq_chain(memory, &mut chain, u32::MAX).ok()?;
        let data = packet.data_slice()?;
        let data = data.subslice(0, data.len().min(MAX_DATA_SIZE as usize)).ok()?;
        Some(Self { packet, data })
    }

    /// Where the packet's data goes, at most [`MAX_DATA_SIZE`] bytes.
    #[must_use]
    pub fn data(&self) -> &VolatileSlice<'a> {
        &self.data
    }

    /// Writes the header and returns how many bytes of the chain are used.
    #[must_use]
    pub fn finish(mut self, header: &Header) -> u32 {
        match self.packet.set_header_from_raw(&header.to_bytes()) {
            Ok(()) => HEADER_SIZE as u32 + header.len,
            // The header's place was checked when the chain was parsed; should it be gone, the chain holds nothing.
            Err(_) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueOwnedT};
    use vm_memory::Bytes;

    const WRITE: u16 = 2;
    const AT: u64 = 0x10_0000;

    fn header() -> Header {
        Header {
            src_cid: 0x1_0000_0003,
            dst_cid: 2,
            src_port: 0x1111_2222,
            dst_port: 1024,
            len: 5,
            kind: 1,
            op: 5,
            flags: 3,
            buf_alloc: 0x4_0000,
            fwd_cnt: 0xffff_fff0,
        }
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap()
    }

    fn chain<'a>(memory: &'a GuestMemory, parts: &[(u64, u32, u16)]) -> DescriptorChain<&'a GuestMemory> {
        let descriptors: Vec<_> = parts
            .iter()
            .map(|&(address, len, flags)| RawDescriptor::from(Descriptor::new(address, len, flags, 0)))
            .collect();
        let mock = MockSplitQueue::new(memory, 128);
        mock.build_desc_chain(&descriptors).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.iter(memory).unwrap().next().unwrap()
    }

    #[test]
    fn a_header_survives_its_bytes() {
        assert_eq!(Header::from_bytes(&header().to_bytes()), header());
    }

    #[test]
    fn a_packet_is_read_from_one_descriptor_or_two() {
        let memory = memory();
        memory.write_slice(&header().to_bytes(), GuestAddress(AT)).unwrap();
        memory.write_slice(b"hello", GuestAddress(AT + 44)).unwrap();
        memory.write_slice(b"HELLO", GuestAddress(AT + 0x1000)).unwrap();

        for (parts, expected) in [(&[(AT, 49, 0)][..], b"hello"), (&[(AT, 44, 0), (AT + 0x1000, 5, 0)], b"HELLO")] {
            let FromGuest::Packet(read, data) = parse_transmitted(&memory, chain(&memory, parts)) else {
                panic!("no packet in {parts:?}");
            };
            assert_eq!((read, &content(&data)[..]), (header(), &expected[..]));
        }
    }

    #[test]
    fn a_packet_is_read_from_any_number_of_descriptors() {
        let memory = memory();
        memory.write_slice(&header().to_bytes(), GuestAddress(AT)).unwrap();
        for (offset, byte) in b"hello".iter().enumerate() {
            memory.write_slice(&[*byte], GuestAddress(AT + 0x1000 * (offset as u64 + 1))).unwrap();
        }
        let mut parts = vec![(AT, 20, 0), (0, 0, 0), (AT + 20, 24, 0)];
        parts.extend((1..=5).map(|page| (AT + 0x1000 * page, 1, 0)));

        let parsed = parse_transmitted(&memory, chain(&memory, &parts));

        let FromGuest::Packet(read, data) = parsed else { panic!("{parsed:?}") };
        assert_eq!((read, data.len(), content(&data)), (header(), 5, b"hello".to_vec()));
    }

    #[test]
    fn data_in_too_many_pieces_is_lost() {
        let memory = memory();
        let long = Header { len: MAX_DATA_PIECES as u32 + 1, ..header() };
        memory.write_slice(&long.to_bytes(), GuestAddress(AT)).unwrap();
        let mut parts = vec![(AT, 44, 0)];
        parts.extend([(AT + 0x1000, 1, 0)].repeat(MAX_DATA_PIECES + 1));

        assert!(matches!(parse_transmitted(&memory, chain(&memory, &parts)), FromGuest::DataLost(_)));
    }

    fn content(data: &[VolatileSlice<'_>]) -> Vec<u8> {
        let mut content = Vec::new();
        for piece in data {
            let mut bytes = vec![0; piece.len()];
            piece.copy_to(&mut bytes);
            content.extend(bytes);
        }
        content
    }

    #[test]
    fn missing_or_too_much_data_still_names_the_connection() {
        let memory = memory();
        let mut long = header();
        for (len, parts) in [
            (5, &[(AT, 48, 0)][..]),
            (5, &[(AT, 44, 0), (AT + 0x1000, 4, 0)]),
            (5, &[(AT, 44, 0), (AT + 0x1000, 5, WRITE)]),
            (5, &[(AT, 44, 0), (u64::MAX - 2, 5, 0)]),
            (MAX_DATA_SIZE + 1, &[(AT, 44, 0), (AT + 0x1000, MAX_DATA_SIZE + 1, 0)]),
            (u32::MAX, &[(AT, u32::MAX, 0)]),
        ] {
            long.len = len;
            memory.write_slice(&long.to_bytes(), GuestAddress(AT)).unwrap();
            let parsed = parse_transmitted(&memory, chain(&memory, parts));
            assert!(matches!(parsed, FromGuest::DataLost(read) if read == long), "{parts:?}: {parsed:?}");
        }
    }

    #[test]
    fn chains_without_a_header_hold_nothing() {
        let memory = memory();
        for parts in [&[(AT, 43, 0)][..], &[(AT, 44, WRITE)], &[(0x20_0000 - 40, 44, 0)], &[(u64::MAX, 44, 0)]] {
            assert!(matches!(parse_transmitted(&memory, chain(&memory, parts)), FromGuest::Nothing), "{parts:?}");
        }
    }

    #[test]
    fn receive_buffers_are_filled_in_both_layouts() {
        let memory = memory();
        for (parts, data_at) in
            [(&[(AT, 4096, WRITE)][..], AT + 44), (&[(AT, 44, WRITE), (AT + 0x1000, 100, WRITE)], AT + 0x1000)]
        {
            let buffer = ReceiveBuffer::parse(&memory, chain(&memory, parts)).unwrap();
            buffer.data().subslice(0, 5).unwrap().copy_from(b"hello");
            assert_eq!(buffer.finish(&header()), 49);

            let mut bytes = [0; HEADER_SIZE];
            memory.read_slice(&mut bytes, GuestAddress(AT)).unwrap();
            assert_eq!(Header::from_bytes(&bytes), header());
            assert_eq!(memory.read_obj::<[u8; 5]>(GuestAddress(data_at)).unwrap(), *b"hello");
        }
    }

    #[test]
    fn receive_buffers_without_room_are_none() {
        let memory = memory();
        for parts in [
            &[(AT, 44, WRITE)][..],
            &[(AT, 4096, 0)],
            &[(AT, 44, WRITE), (AT + 0x1000, 0, WRITE)],
            &[(u64::MAX - 50, 60, WRITE)],
        ] {
            assert!(ReceiveBuffer::parse(&memory, chain(&memory, parts)).is_none(), "{parts:?}");
        }
    }

    #[test]
    fn a_receive_buffer_takes_no_more_than_a_packet_may_hold() {
        let memory = memory();
        let buffer = ReceiveBuffer::parse(&memory, chain(&memory, &[(AT, 0x8_0000, WRITE)])).unwrap();

        assert_eq!(buffer.data().len(), MAX_DATA_SIZE as usize);
    }
}
