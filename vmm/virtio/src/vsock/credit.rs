// SPDX-License-Identifier: Apache-2.0
//! How many bytes each side may send (virtio 1.2, section 5.10.6.3). All counters run modulo 2^32.

use serde::{Deserialize, Serialize};

/// Bytes that a guest may have sent on a connection and the host's socket not yet taken: the size that we advertise, and
/// the most that a connection buffers.
pub const RECEIVE_BUFFER_SIZE: u32 = 256 * 1024;

/// What the guest sends to us.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReceiveCredit {
    /// Bytes that came from the guest.
    received: u32,
    /// Bytes that are done with.
    forwarded: u32,
    /// What the guest has last been told of `forwarded`.
    announced: u32,
}

/// The guest has sent more than it was allowed to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CreditExceeded;

impl ReceiveCredit {
    /// The guest has sent `len` bytes.
    pub(super) fn receive(&mut self, len: u32) -> Result<(), CreditExceeded> {
        if len > RECEIVE_BUFFER_SIZE - self.pending() {
            return Err(CreditExceeded);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// `len` of the bytes that came are done with.
    pub(super) fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len.min(self.pending()));
    }

    /// All the bytes that came are done with.
    pub(super) fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// Bytes that came and are not done with; never above [`RECEIVE_BUFFER_SIZE`].
    fn pending(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Whether the guest needs to be told: it believes that less than half of the buffer is free, and there is more to
    /// tell than a few bytes, or nothing more to come.
    pub(super) fn update_is_due(&self) -> bool {
        let believed_free = RECEIVE_BUFFER_SIZE.saturating_sub(self.received.wrapping_sub(self.announced));
        let news = self.forwarded.wrapping_sub(self.announced);
        believed_free < RECEIVE_BUFFER_SIZE / 2 && (news >= RECEIVE_BUFFER_SIZE / 8 || news > 0 && self.pending() == 0)
    }

    /// The count that goes into a header, which tells the guest.
    pub(super) fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded
    }
}

/// What we send to the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SendCredit {
    sent: u32,
    peer_buffer_size: u32,
    peer_forwarded: u32,
    /// The guest has been asked for credit and has given none since.
    asked: bool,
}

impl SendCredit {
    /// The guest's header says this. A guest that lies only cuts off itself: what we send goes into its own buffers.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buffer_size = buf_alloc;
        self.peer_forwarded = fwd_cnt;
        if self.available() > 0 {
            self.asked = false;
        }
    }

    /// Bytes that may be sent now.
    pub(super) fn available(&self) -> u32 {
        self.peer_buffer_size.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// `len` bytes are being sent.
    pub(super) fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Whether there is no credit, and the guest has not been asked for it.
    pub(super) fn may_ask(&self) -> bool {
        !self.asked && self.available() == 0
    }

    /// The guest is being asked.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_fill_the_buffer_and_not_a_byte_more() {
        let mut credit = ReceiveCredit::default();
        assert_eq!(credit.receive(RECEIVE_BUFFER_SIZE), Ok(()));
        assert_eq!(credit.receive(1), Err(CreditExceeded));
        credit.forward(10);
        assert_eq!(credit.receive(11), Err(CreditExceeded));
        assert_eq!(credit.receive(10), Ok(()));
    }

    #[test]
    fn counters_wrap() {
        let mut receive = ReceiveCredit { received: u32::MAX - 5, forwarded: u32::MAX - 5, announced: u32::MAX - 5 };
        assert_eq!(receive.receive(RECEIVE_BUFFER_SIZE), Ok(()));
        receive.forward(RECEIVE_BUFFER_SIZE);
        assert_eq!(receive.pending(), 0);
        assert!(receive.update_is_due());

        let mut send = SendCredit { sent: u32::MAX - 5, ..SendCredit::default() };
        send.update(100, u32::MAX - 5);
        send.send(60);
        assert_eq!(send.available(), 40);
        send.update(100, 54);
        assert_eq!(send.available(), 100);
    }

    #[test]
    fn a_blocked_guest_is_always_told_once_the_buffer_is_empty() {
        let mut credit = ReceiveCredit::default();
        credit.receive(RECEIVE_BUFFER_SIZE).unwrap();
        assert!(!credit.update_is_due(), "nothing to tell");
        credit.forward(1);
        assert!(!credit.update_is_due(), "not worth a packet");
        credit.forward_all();
        assert!(credit.update_is_due());
        credit.announce();
        assert!(!credit.update_is_due());
    }

    #[test]
    fn a_guest_with_room_is_not_told() {
        let mut credit = ReceiveCredit::default();
        credit.receive(RECEIVE_BUFFER_SIZE / 2).unwrap();
        credit.forward_all();

        assert!(!credit.update_is_due());
    }

    #[test]
    fn a_guest_that_shrinks_its_buffer_gives_no_credit() {
        let mut credit = SendCredit::default();
        credit.update(1000, 0);
        credit.send(800);
        credit.update(100, 0);
        assert_eq!(credit.available(), 0);
        credit.update(u32::MAX, 5000);
        assert_eq!(credit.available(), u32::MAX - (800_u32.wrapping_sub(5000)));
    }

    #[test]
    fn credit_is_asked_for_once() {
        let mut credit = SendCredit::default();
        assert!(credit.may_ask());
        credit.ask();
        credit.update(0, 0);
        assert!(!credit.may_ask());
        credit.update(10, 0);
        credit.send(10);
        assert!(credit.may_ask());
    }
}
