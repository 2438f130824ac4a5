// SPDX-License-Identifier: Apache-2.0
//! Carrying out what the supervisor asks of a running machine.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_kvm::{GrantError, Vm};
use bulkhead_virtio::fs::{AddedTrees, TreeError};
use bulkhead_virtio::net::{Backend, LinkKind, MAX_PAIRS, NetConfig};

use super::MachineError;
use super::disks::Disks;
use super::nets::Nets;

use crate::control::{self, Order, Received, Request, ShareDevice};
use crate::report::{Report, Reporter};

/// A request that was not carried out.
#[derive(Debug, thiserror::Error)]
enum OrderError {
    #[error("the request has {given} descriptors, and needs {needed}")]
    Descriptors { given: usize, needed: usize },
    #[error("no trees can be added to this machine")]
    NotGrowing,
    #[error(
        "the request has {given} descriptors for {pairs} pairs of queues: it needs one or two for each of 1 to {MAX_PAIRS}"
    )]
    NetDescriptors { given: usize, pairs: u16 },
    #[error("no network devices can be added to this machine")]
    NoNets,
    #[error("there is no network device {0}")]
    NoNet(u32),
    #[error("no block devices can be added to this machine")]
    NoDisks,
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Device(#[from] MachineError),
    #[error(transparent)]
    Memory(#[from] GrantError),
}

/// What of a machine can be changed while it runs.
#[derive(Debug, Default)]
pub(super) struct Changeable {
    /// The trees of the private device, and of the shared one, if they can grow.
    pub(super) private: Option<AddedTrees>,
    pub(super) shared: Option<AddedTrees>,
    /// The network devices, and where further ones go.
    pub(super) nets: Option<Nets>,
    /// Where further block devices go.
    pub(super) disks: Option<Disks>,
    /// Whose memory grows.
    pub(super) vm: Option<Arc<Vm>>,
}

/// The machine's end of the control socket.
#[derive(Debug)]
pub(super) struct Orders {
    pub(super) socket: OwnedFd,
    pub(super) machine: Changeable,
}

impl Orders {
    /// Carries out what has come, and answers. False when the supervisor has closed its end.
    pub(super) fn serve(&self, reporter: &Arc<Reporter>) -> io::Result<bool> {
        loop {
            let (sequence, result) = match control::receive(&self.socket) {
                Ok(Received::Request(Request { sequence, order }, descriptors)) => {
                    let asker = Asker { reporter: Arc::clone(reporter), sequence };
                    match self.machine.carry_out(order, descriptors, asker) {
                        Ok(Progress::UnderWay) => continue,
                        Ok(Progress::Done(window)) => (sequence, Ok(window)),
                        Err(error) => (sequence, Err(super::describe(&error))),
                    }
                }
                Ok(Received::Bad(sequence, message)) => {
                    (sequence, Err(format!("the request cannot be understood: {message}")))
                }
                Ok(Received::Closed) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            reporter.send(&answer(sequence, result));
        }
    }
}

/// The answer to a request, which may have filled a window.
fn answer(sequence: u64, result: Result<Option<u32>, String>) -> Report {
    let (window, failure) = match result {
        Ok(window) => (window, None),
        Err(failure) => (None, Some(failure)),
    };
    Report::Answer { sequence, failure, window }
}

/// What has come of an order.
#[derive(Debug)]
enum Progress {
    /// With the window of a device that is new.
    Done(Option<u32>),
    /// The asker is told in the end.
    UnderWay,
}

/// Who is told what has come of an order that takes its time.
#[derive(Debug)]
struct Asker {
    reporter: Arc<Reporter>,
    sequence: u64,
}

impl Asker {
    fn answer(self, result: Result<(), MachineError>) {
        let result = result.map(|()| None).map_err(|error| super::describe(&error));
        self.reporter.send(&answer(self.sequence, result));
    }
}

impl Changeable {
    fn carry_out(&self, order: Order, descriptors: Vec<OwnedFd>, asker: Asker) -> Result<Progress, OrderError> {
        let mut window = None;
        match order {
            Order::AddTree { device, name } => {
                let [top] = exactly(descriptors)?;
                self.trees(device)?.add(&name, top)?;
            }
            Order::RemoveTree { device, name } => {
                let [] = exactly(descriptors)?;
                self.trees(device)?.remove(&name)?;
            }
            Order::AddMount { tree, parent, name } => {
                let [covered, top] = exactly(descriptors)?;
                let trees = self.trees(ShareDevice::Shared)?;
                trees.add_mount((&name, &tree, parent.as_deref()), covered, top)?;
            }
            Order::RemoveMount { name } => {
                let [] = exactly(descriptors)?;
                self.trees(ShareDevice::Shared)?.remove_mount(&name)?;
            }
            Order::AttachNet { id, mac, pairs, limits } => {
                let (taps, vhosts) = net_descriptors(pairs, descriptors)?;
                let nets = self.nets.as_ref().ok_or(OrderError::NoNets)?;
                let backend = Backend::Tap { taps, vhosts, fallback: nets.fallback.clone() };
                window = Some(nets.attach(id, &NetConfig { mac, link: LinkKind::Tap, pairs, limits }, backend)?);
            }
            Order::AttachDisk { serial, read_only } => {
                let [device] = exactly(descriptors)?;
                window = Some(self.disks()?.attach(&serial, device, read_only)?);
            }
            Order::DetachDisk { serial, is_released } => {
                let [] = exactly(descriptors)?;
                self.disks()?.detach(&serial, is_released, |result| asker.answer(result))?;
                return Ok(Progress::UnderWay);
            }
            Order::SetCarrier { id, on } => {
                let [] = exactly(descriptors)?;
                let port = self.nets.as_ref().and_then(|nets| nets.port(id)).ok_or(OrderError::NoNet(id))?;
                port.set_carrier(on);
            }
            Order::GrantMemory { total_mib } => {
                let [] = exactly(descriptors)?;
                let vm = self.vm.as_ref().ok_or(GrantError::NoReserve)?;
                vm.grant_memory(total_mib)?;
            }
        }
        Ok(Progress::Done(window))
    }

    fn disks(&self) -> Result<&Disks, OrderError> {
        self.disks.as_ref().ok_or(OrderError::NoDisks)
    }

    fn trees(&self, device: ShareDevice) -> Result<&AddedTrees, OrderError> {
        let trees = match device {
            ShareDevice::Private => &self.private,
            ShareDevice::Shared => &self.shared,
        };
        trees.as_ref().ok_or(OrderError::NotGrowing)
    }
}

/// The descriptors of a network device of `pairs` pairs of queues: a tap's, and vhost-net's, if there are any.
fn net_descriptors(pairs: u16, mut taps: Vec<OwnedFd>) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>), OrderError> {
    let (given, needed) = (taps.len(), usize::from(pairs));
    if pairs == 0 || pairs > MAX_PAIRS || (given != needed && given != 2 * needed) {
        return Err(OrderError::NetDescriptors { given, pairs });
    }
    let vhosts = taps.split_off(needed);
    Ok((taps, vhosts))
}

/// As many descriptors as a request needs; others are closed.
fn exactly<const N: usize>(descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; N], OrderError> {
    descriptors.try_into().map_err(|given: Vec<_>| OrderError::Descriptors { given: given.len(), needed: N })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::config::{Limits, MacAddress};

    /// Carries requests out, each with so many descriptors, and returns the failures.
    fn answers(machine: Changeable, orders: Vec<(Order, usize)>) -> Vec<Option<String>> {
        let (supervisor, socket) = control::pair().unwrap();
        let (report, reporter) = UnixStream::pair().unwrap();
        let reporter = Arc::new(Reporter::new(File::from(OwnedFd::from(reporter)), false));
        let directory = File::open("/").unwrap();
        for (sequence, (order, descriptors)) in (1..).zip(orders) {
            let descriptors = vec![directory.as_fd(); descriptors];
            control::send(&supervisor, &Request { sequence, order }, &descriptors).unwrap();
        }
        let orders = Orders { socket, machine };
        assert!(orders.serve(&reporter).unwrap());
        drop(supervisor);
        assert!(!orders.serve(&reporter).unwrap());
        drop(reporter);
        let lines = BufReader::new(report).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap());
        let answers = (1..).zip(lines).map(|(expected, report)| match report {
            Report::Answer { sequence, failure, window: None } if sequence == expected => failure,
            other => panic!("{other:?}"),
        });
        answers.collect()
    }

    fn add(device: ShareDevice, name: &str) -> Order {
        Order::AddTree { device, name: name.to_owned() }
    }

    fn remove(name: &str) -> Order {
        Order::RemoveTree { device: ShareDevice::Private, name: name.to_owned() }
    }

    #[test]
    fn trees_come_and_go_in_the_order_of_the_requests() {
        let private = Some(AddedTrees::new([]).unwrap());
        let machine = Changeable { private, ..Changeable::default() };
        let device = ShareDevice::Private;

        let orders = vec![(add(device, "a"), 1), (add(device, "a"), 1), (remove("a"), 0), (remove("a"), 0)];
        let failures = answers(machine, orders);

        assert_eq!(failures[0], None);
        assert_eq!(failures[1].as_deref(), Some("there is a tree \"a\" already"));
        assert_eq!(failures[2], None);
        assert_eq!(failures[3].as_deref(), Some("there is no tree \"a\" that was added"));
    }

    #[test]
    fn mounts_come_and_go_with_their_trees() {
        let machine = Changeable { shared: Some(AddedTrees::new([]).unwrap()), ..Changeable::default() };
        let device = ShareDevice::Shared;
        let mount = |parent: Option<&str>, name: &str| Order::AddMount {
            tree: "a".to_owned(),
            parent: parent.map(str::to_owned),
            name: name.to_owned(),
        };
        let unmount = |name: &str| Order::RemoveMount { name: name.to_owned() };
        let remove = Order::RemoveTree { device, name: "a".to_owned() };

        let orders = vec![
            (mount(None, "a-1"), 2),
            (add(device, "a"), 1),
            (mount(None, "a-1"), 1),
            (mount(None, "a-1"), 2),
            (mount(None, "a-2"), 2),
            (mount(Some("a-3"), "a-2"), 2),
            (unmount("a-1"), 0),
            (mount(None, "a-1"), 2),
            (remove, 0),
            (unmount("a-1"), 0),
        ];
        let failures = answers(machine, orders);

        let absent = |name: &str| Some(format!("there is no tree {name:?} that was added"));
        let few = Some("the request has 1 descriptors, and needs 2".to_owned());
        let twice = Some("there is a tree \"a-2\" already".to_owned());
        let expected = [absent("a"), None, few, None, twice, absent("a-3"), None, None, None, absent("a-1")];
        assert_eq!(failures, expected);
    }

    #[test]
    fn a_network_device_needs_a_tap_and_room() {
        let (mac, limits) = (MacAddress([2, 0, 0, 0, 0, 1]), Limits::default());
        let attach = |pairs| Order::AttachNet { id: 3, mac, pairs, limits };
        let (wrong, right) = ([(0, 0), (1, 0), (1, 3), (2, 3), (9, 9)], [(1, 1), (1, 2), (8, 16)]);
        let orders = wrong.iter().chain(&right).map(|(pairs, descriptors)| (attach(*pairs), *descriptors));

        let failures = answers(Changeable::default(), orders.collect());

        let (wrong, right) = failures.split_at(wrong.len());
        let is_wrong =
            |failure: &Option<String>| failure.as_ref().is_some_and(|why| why.contains("it needs one or two"));
        assert!(wrong.iter().all(is_wrong), "{wrong:?}");
        let no_room = Some("no network devices can be added to this machine".to_owned());
        assert!(right.iter().all(|failure| *failure == no_room), "{right:?}");
    }

    #[test]
    fn the_link_of_a_device_that_is_not_there_stays() {
        let failures = answers(Changeable::default(), vec![(Order::SetCarrier { id: 3, on: false }, 0)]);

        assert_eq!(failures[0].as_deref(), Some("there is no network device 3"));
    }

    #[test]
    fn a_disk_needs_its_descriptor_and_room() {
        let attach = || Order::AttachDisk { serial: "disk-1".to_owned(), read_only: false };
        let detach = || Order::DetachDisk { serial: "disk-1".to_owned(), is_released: true };
        let orders = vec![(attach(), 0), (attach(), 2), (detach(), 1), (attach(), 1), (detach(), 0)];

        let failures = answers(Changeable::default(), orders);

        assert_eq!(failures[0].as_deref(), Some("the request has 0 descriptors, and needs 1"));
        assert_eq!(failures[1].as_deref(), Some("the request has 2 descriptors, and needs 1"));
        assert_eq!(failures[2].as_deref(), Some("the request has 1 descriptors, and needs 0"));
        let no_room = Some("no block devices can be added to this machine");
        assert_eq!([failures[3].as_deref(), failures[4].as_deref()], [no_room, no_room]);
    }

    #[test]
    fn a_machine_that_does_not_grow_gets_no_memory() {
        let orders = vec![(Order::GrantMemory { total_mib: 128 }, 0), (Order::GrantMemory { total_mib: 128 }, 1)];

        let failures = answers(Changeable::default(), orders);

        assert_eq!(failures[0].as_deref(), Some("no memory can be added to this machine"));
        assert_eq!(failures[1].as_deref(), Some("the request has 1 descriptors, and needs 0"));
    }

    #[test]
    fn requests_that_do_not_fit_are_refused() {
        let private = Some(AddedTrees::new([]).unwrap());
        let machine = Changeable { private, ..Changeable::default() };

        let failures = answers(
            machine,
            vec![
                (add(ShareDevice::Private, "a"), 0),
                (add(ShareDevice::Private, "a"), 2),
                (add(ShareDevice::Shared, "a"), 1),
                (add(ShareDevice::Private, "../a"), 1),
                (remove("a"), 1),
            ],
        );

        assert_eq!(failures.iter().filter(|failure| failure.is_some()).count(), 5, "{failures:?}");
        assert_eq!(failures[2].as_deref(), Some("no trees can be added to this machine"));
    }
}
