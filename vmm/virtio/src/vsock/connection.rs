// SPDX-License-Identifier: Apache-2.0
//! One connection's side of the protocol: a plain state that eats headers and says which packet is due. It knows nothing
//! of sockets or queues.

use serde::{Deserialize, Serialize};

use super::credit::{RECEIVE_BUFFER_SIZE, ReceiveCredit, SendCredit};
use super::packet::{HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};

/// The pair of ports that names a connection between the host and its one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct ConnectionId {
    /// The host's port.
    pub(super) host_port: u32,
    /// The guest's port.
    pub(super) guest_port: u32,
}

impl ConnectionId {
    /// The connection that a packet from the guest belongs to.
    pub(super) fn of(header: &Header) -> Self {
        Self { host_port: header.dst_port, guest_port: header.src_port }
    }
}

/// How far the connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// The host wants it; a request is due.
    RequestDue,
    /// The guest has not answered yet.
    Requested,
    /// The guest wanted it and gets it; a response is due, before anything else.
    ResponseDue,
    /// It stands.
    Established,
}

/// What a packet from the guest asks of the host's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing.
    Noted,
    /// The guest has taken the connection.
    Connected,
    /// The packet's data, at least one byte, is to be forwarded.
    Data,
    /// The guest has shut a direction down: see [`Connection::guest_sends`] and [`Connection::guest_receives`].
    ShutDown,
    /// The guest knows the connection no more.
    Gone,
    /// The guest broke the protocol: the connection is to be reset.
    Violation,
}

/// The protocol state of one connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Connection {
    id: ConnectionId,
    guest_cid: u64,
    phase: Phase,
    receive_credit: ReceiveCredit,
    send_credit: SendCredit,
    /// `SHUTDOWN_*` flags that the guest has sent.
    guest_shutdown: u32,
    /// `SHUTDOWN_*` flags that hold for the host's side.
    host_shutdown: u32,
    /// Those of the above that the guest has been told.
    announced_shutdown: u32,
    credit_asked: bool,
    guest_gone: bool,
}

impl Connection {
    /// A connection that the host wants.
    pub(super) fn from_host(id: ConnectionId, guest_cid: u64) -> Self {
        Self::new(id, guest_cid, Phase::RequestDue)
    }

    /// A connection that the guest wants and gets.
    pub(super) fn from_guest(request: &Header) -> Self {
        let mut connection = Self::new(ConnectionId::of(request), request.src_cid, Phase::ResponseDue);
        connection.send_credit.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(id: ConnectionId, guest_cid: u64, phase: Phase) -> Self {
        Self {
            id,
            guest_cid,
            phase,
            receive_credit: ReceiveCredit::default(),
            send_credit: SendCredit::default(),
            guest_shutdown: 0,
            host_shutdown: 0,
            announced_shutdown: 0,
            credit_asked: false,
            guest_gone: false,
        }
    }

    /// Takes note of a packet from the guest. For data, `data_len` is how many bytes really came.
    pub(super) fn receive(&mut self, header: &Header, data_len: u32) -> Outcome {
        let Some(operation) = Operation::of(header) else { return Outcome::Violation };
        if operation == Operation::Reset {
            self.guest_gone = true;
            self.guest_shutdown = SHUTDOWN_BOTH;
            return Outcome::Gone;
        }
        self.send_credit.update(header.buf_alloc, header.fwd_cnt);
        match (self.phase, operation) {
            (Phase::Requested, Operation::Response) => {
                self.phase = Phase::Established;
                Outcome::Connected
            }
            (Phase::RequestDue | Phase::Requested, _) | (_, Operation::Request | Operation::Response) => {
                Outcome::Violation
            }
            (_, Operation::Shutdown) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                Outcome::ShutDown
            }
            (_, Operation::ReadWrite) if data_len == 0 => Outcome::Noted,
            (_, Operation::ReadWrite) => {
                if !self.guest_sends() || self.receive_credit.receive(data_len).is_err() {
                    return Outcome::Violation;
                }
                Outcome::Data
            }
            (_, Operation::CreditRequest) => {
                self.credit_asked = true;
                Outcome::Noted
            }
            (_, Operation::CreditUpdate | Operation::Reset) => Outcome::Noted,
        }
    }

    /// The host's socket has taken `len` of the guest's bytes.
    pub(super) fn forwarded(&mut self, len: usize) {
        self.receive_credit.forward(u32::try_from(len).unwrap_or(u32::MAX));
    }

    /// The host's socket takes nothing any more: what the guest has sent is lost, and it is to be told.
    pub(super) fn host_stops_receiving(&mut self) {
        self.receive_credit.forward_all();
        self.host_shutdown |= SHUTDOWN_RECEIVE;
    }

    /// The host's socket has given its last byte.
    pub(super) fn host_stops_sending(&mut self) {
        self.host_shutdown |= SHUTDOWN_SEND;
    }

    /// Whether the guest may still send.
    pub(super) fn guest_sends(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND == 0
    }

    /// Whether the guest still receives.
    pub(super) fn guest_receives(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the guest has forgotten the connection, so that it must not be sent anything.
    pub(super) fn guest_is_gone(&self) -> bool {
        self.guest_gone
    }

    /// Whether the host's socket may be read at all: the connection stands and neither side has ended this direction.
    pub(super) fn may_read_host(&self) -> bool {
        matches!(self.phase, Phase::Established | Phase::ResponseDue)
            && self.guest_receives()
            && self.host_shutdown & SHUTDOWN_SEND == 0
    }

    /// Whether the host's socket may be written to.
    pub(super) fn host_receives(&self) -> bool {
        self.host_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the guest has seen a request: it needs to be told when the connection ends.
    pub(super) fn is_known_to_guest(&self) -> bool {
        self.phase != Phase::RequestDue && !self.guest_gone
    }

    /// How many bytes may be read from the host's socket and sent to the guest at once.
    pub(super) fn data_allowance(&self) -> u32 {
        if self.phase == Phase::Established && self.may_read_host() { self.send_credit.available() } else { 0 }
    }

    /// The packet without data that is due, most urgent first. `host_has_data` says that the host's socket waits for
    /// the guest's credit.
    pub(super) fn due(&self, host_has_data: bool) -> Option<Operation> {
        if self.guest_gone {
            return None;
        }
        match self.phase {
            Phase::RequestDue => return Some(Operation::Request),
            Phase::Requested => return None,
            Phase::ResponseDue => return Some(Operation::Response),
            Phase::Established => {}
        }
        if self.announced_shutdown == SHUTDOWN_BOTH {
            // The guest's last word is a reset; until then it has nothing to learn.
            return None;
        }
        if self.host_shutdown != self.announced_shutdown {
            return Some(Operation::Shutdown);
        }
        if self.credit_asked || self.guest_sends() && self.receive_credit.update_is_due() {
            return Some(Operation::CreditUpdate);
        }
        (host_has_data && self.may_read_host() && self.send_credit.may_ask()).then_some(Operation::CreditRequest)
    }

    /// The header of a packet without data, which is then no longer due.
    pub(super) fn send(&mut self, operation: Operation) -> Header {
        let mut flags = 0;
        match operation {
            Operation::Request => self.phase = Phase::Requested,
            Operation::Response => self.phase = Phase::Established,
            Operation::Shutdown => {
                flags = self.host_shutdown;
                self.announced_shutdown = self.host_shutdown;
            }
            Operation::CreditRequest => self.send_credit.ask(),
            Operation::Reset | Operation::ReadWrite | Operation::CreditUpdate => {}
        }
        Header { flags, ..self.header(operation) }
    }

    /// The header of a packet with `len` bytes of data, at most [`Self::data_allowance`].
    pub(super) fn send_data(&mut self, len: u32) -> Header {
        self.send_credit.send(len);
        Header { len, ..self.header(Operation::ReadWrite) }
    }

    fn header(&mut self, operation: Operation) -> Header {
        // Each header tells the guest its credit.
        self.credit_asked = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.id.host_port,
            dst_port: self.id.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op: operation as u16,
            flags: 0,
            buf_alloc: RECEIVE_BUFFER_SIZE,
            fwd_cnt: self.receive_credit.announce(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ConnectionId = ConnectionId { host_port: 0x4000_0000, guest_port: 1025 };

    fn packet(operation: Operation) -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: ID.guest_port,
            dst_port: ID.host_port,
            kind: 1,
            op: operation as u16,
            buf_alloc: 1000,
            ..Header::default()
        }
    }

    fn shutdown(flags: u32) -> Header {
        Header { flags, ..packet(Operation::Shutdown) }
    }

    fn established() -> Connection {
        let mut connection = Connection::from_host(ID, 3);
        connection.send(Operation::Request);
        assert_eq!(connection.receive(&packet(Operation::Response), 0), Outcome::Connected);
        connection
    }

    #[test]
    fn a_connection_from_the_host_is_asked_for_once() {
        let mut connection = Connection::from_host(ID, 3);
        assert_eq!(connection.due(true), Some(Operation::Request));
        assert!(!connection.is_known_to_guest());

        let header = connection.send(Operation::Request);

        assert_eq!((header.src_cid, header.dst_cid, header.src_port, header.dst_port), (2, 3, 0x4000_0000, 1025));
        assert_eq!((header.op, header.kind, header.buf_alloc), (1, 1, RECEIVE_BUFFER_SIZE));
        assert_eq!(connection.due(true), None);
        assert_eq!(connection.data_allowance(), 0);
        assert_eq!(connection.receive(&packet(Operation::Response), 0), Outcome::Connected);
        assert_eq!(connection.data_allowance(), 1000);
    }

    #[test]
    fn a_connection_from_the_guest_is_answered_before_data_flows() {
        let mut connection = Connection::from_guest(&packet(Operation::Request));
        assert_eq!(connection.due(true), Some(Operation::Response));
        assert_eq!(connection.data_allowance(), 0);
        assert!(connection.may_read_host());

        connection.send(Operation::Response);

        assert_eq!(connection.data_allowance(), 1000);
    }

    #[test]
    fn packets_at_the_wrong_time_are_violations() {
        for operation in [Operation::ReadWrite, Operation::Shutdown, Operation::CreditUpdate, Operation::Request] {
            let mut connection = Connection::from_host(ID, 3);
            connection.send(Operation::Request);
            assert_eq!(connection.receive(&packet(operation), 1), Outcome::Violation, "{operation:?}");
        }
        for operation in [Operation::Request, Operation::Response] {
            assert_eq!(established().receive(&packet(operation), 0), Outcome::Violation, "{operation:?}");
        }
        let unknown = Header { op: 8, ..packet(Operation::ReadWrite) };
        assert_eq!(established().receive(&unknown, 0), Outcome::Violation);
        let mut unasked = Connection::from_host(ID, 3);
        assert_eq!(unasked.receive(&packet(Operation::Response), 0), Outcome::Violation);
    }

    #[test]
    fn data_beyond_the_credit_or_after_a_shutdown_is_a_violation() {
        let mut connection = established();
        assert_eq!(connection.receive(&packet(Operation::ReadWrite), RECEIVE_BUFFER_SIZE), Outcome::Data);
        assert_eq!(connection.receive(&packet(Operation::ReadWrite), 1), Outcome::Violation);

        let mut connection = established();
        assert_eq!(connection.receive(&shutdown(SHUTDOWN_SEND), 0), Outcome::ShutDown);
        assert_eq!(connection.receive(&packet(Operation::ReadWrite), 1), Outcome::Violation);
    }

    #[test]
    fn credit_runs_out_and_comes_back() {
        let mut connection = established();
        connection.send_data(1000);
        assert_eq!(connection.data_allowance(), 0);
        assert_eq!(connection.due(false), None);
        assert_eq!(connection.due(true), Some(Operation::CreditRequest));
        connection.send(Operation::CreditRequest);
        assert_eq!(connection.due(true), None, "asked already");

        connection.receive(&Header { fwd_cnt: 600, ..packet(Operation::CreditUpdate) }, 0);

        assert_eq!(connection.data_allowance(), 600);
    }

    #[test]
    fn a_credit_request_is_answered() {
        let mut connection = established();
        connection.receive(&packet(Operation::ReadWrite), 10);
        connection.forwarded(10);
        connection.receive(&packet(Operation::CreditRequest), 0);
        assert_eq!(connection.due(false), Some(Operation::CreditUpdate));

        let header = connection.send(Operation::CreditUpdate);

        assert_eq!(header.fwd_cnt, 10);
        assert_eq!(connection.due(false), None);
    }

    #[test]
    fn shutdowns_are_told_once_each_and_add_up() {
        let mut connection = established();
        connection.host_stops_sending();
        assert_eq!(connection.due(false), Some(Operation::Shutdown));
        assert_eq!(connection.send(Operation::Shutdown).flags, SHUTDOWN_SEND);
        assert_eq!(connection.due(false), None);
        assert_eq!(connection.data_allowance(), 0);

        connection.host_stops_receiving();
        assert_eq!(connection.send(Operation::Shutdown).flags, SHUTDOWN_BOTH);

        connection.receive(&packet(Operation::CreditRequest), 0);
        assert_eq!(connection.due(true), None, "after both, only the guest's reset is left");
    }

    #[test]
    fn a_guest_that_does_not_receive_is_sent_no_data() {
        let mut connection = established();
        connection.receive(&shutdown(SHUTDOWN_RECEIVE), 0);

        assert!(!connection.may_read_host() && connection.guest_sends());
        assert_eq!(connection.data_allowance(), 0);
    }

    #[test]
    fn a_reset_ends_it_in_any_phase() {
        let mut waiting = Connection::from_host(ID, 3);
        waiting.send(Operation::Request);
        for mut connection in [waiting, established(), Connection::from_guest(&packet(Operation::Request))] {
            assert_eq!(connection.receive(&packet(Operation::Reset), 0), Outcome::Gone);
            assert!(connection.guest_is_gone() && !connection.is_known_to_guest());
            assert_eq!(connection.due(true), None);
        }
    }

    #[test]
    fn the_state_survives_being_saved() {
        let mut connection = established();
        connection.receive(&packet(Operation::ReadWrite), 10);

        let saved = serde_json::to_string(&connection).unwrap();

        assert_eq!(serde_json::from_str::<Connection>(&saved).unwrap(), connection);
    }
}
