// SPDX-License-Identifier: Apache-2.0
//! What is asked of a VMM that runs: requests go out by its control socket, their answers come with its report.
//!
//! The VMM is not trusted: an answer that nobody waits for is passed over, its words are cleaned, and its silence has a
//! deadline.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_vmm::config::{MacAddress, ShareTree};
use bulkhead_vmm::control::{self, Order, Request, ShareDevice};
use bulkhead_vmm::tree::DetachedTree;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::apart::apart;
use crate::logging;
use crate::network::{Carrier, Device};
use crate::spec::BlockDevice;
use crate::text;

/// How long the VMM may take to answer; in the unit tests, none that is to answer waits.
const ANSWER_TIMEOUT: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(10) };

/// A request that did not succeed.
#[derive(Debug, Error)]
pub(crate) enum ControlError {
    #[error("cannot share {path}")]
    Share { path: String, source: io::Error },
    #[error("cannot ask the VMM to {doing}")]
    Send { doing: String, source: io::Error },
    #[error("the VMM cannot {doing}: {reason}")]
    Refused { doing: String, reason: String },
    #[error("the VMM does not answer when asked to {doing}")]
    NoAnswer { doing: String },
    #[error("the VMM ended before it could {doing}")]
    Gone { doing: String },
}

/// The window of a device that is new, if one was asked for, or why it was not done.
type Answer = Result<Option<u32>, String>;

/// The supervisor's end of the control socket; copies mean the same.
#[derive(Clone)]
pub(crate) struct VmmControl(Arc<Inner>);

struct Inner {
    socket: OwnedFd,
    waiting: Mutex<Waiting>,
}

/// The requests that have no answer yet.
#[derive(Default)]
struct Waiting {
    last: u64,
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    is_over: bool,
}

/// Mounts a tree for a VMM, while others go on.
pub(crate) async fn open_tree(tree: &ShareTree) -> Result<DetachedTree, ControlError> {
    let wanted = tree.clone();
    let opened = apart("tree", move || DetachedTree::open(&wanted)).await.flatten();
    opened.map_err(|source| ControlError::Share { path: tree.source.display().to_string(), source })
}

impl VmmControl {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(Inner { socket, waiting: Mutex::default() }))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing panics while the lock is held.
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shares a further tree, which this process has mounted for the VMM: that has no right to.
    pub(crate) async fn add_tree(
        &self,
        device: ShareDevice,
        tree: &ShareTree,
        opened: &DetachedTree,
    ) -> Result<(), ControlError> {
        self.hand_over(device, &tree.name, &[opened.mount()], format!("share {}", tree.source.display())).await
    }

    async fn hand_over(
        &self,
        device: ShareDevice,
        name: &str,
        mount: &[BorrowedFd<'_>],
        doing: String,
    ) -> Result<(), ControlError> {
        let added = self.ask(Order::AddTree { device, name: name.to_owned() }, mount, doing).await;
        if matches!(added, Err(ControlError::NoAnswer { .. })) {
            self.order_without_answer(Order::RemoveTree { device, name: name.to_owned() });
        }
        added
    }

    /// Takes back what may still come to be of an order that was not answered: orders are carried out in turn. Nobody waits for it.
    fn order_without_answer(&self, order: Order) {
        if let Some((sequence, _)) = self.expect() {
            let _ = control::send(&self.0.socket, &Request { sequence, order }, &[]);
            self.waiting().answers.remove(&sequence);
        }
    }

    /// Takes a tree back that was added. What the guest still has of it is void.
    pub(crate) async fn remove_tree(&self, device: ShareDevice, name: &str) -> Result<(), ControlError> {
        let order = Order::RemoveTree { device, name: name.to_owned() };
        self.ask(order, &[], format!("take back the tree {name}")).await
    }

    /// Has a mount of the host's seen in a tree, over what it covers there; `parent` is the one that it lies in, if any was told.
    pub(crate) async fn add_mount(
        &self,
        (tree, parent, name): (&str, Option<&str>, &str),
        covered: BorrowedFd<'_>,
        opened: &DetachedTree,
        place: &Path,
    ) -> Result<(), ControlError> {
        let (tree, parent, name) = (tree.to_owned(), parent.map(str::to_owned), name.to_owned());
        let order = Order::AddMount { tree, parent, name: name.clone() };
        let doing = format!("share what is mounted on {}", place.display());
        let added = self.ask(order, &[covered, opened.mount()], doing).await;
        if matches!(added, Err(ControlError::NoAnswer { .. })) {
            self.order_without_answer(Order::RemoveMount { name });
        }
        added
    }

    /// Takes such a mount back.
    pub(crate) async fn remove_mount(&self, name: &str, place: &Path) -> Result<(), ControlError> {
        let doing = format!("take back what was mounted on {}", place.display());
        self.ask(Order::RemoveMount { name: name.to_owned() }, &[], doing).await
    }

    /// Gives the machine a network device, for the interface of that name; the window that the guest is to look at.
    pub(crate) async fn attach_net(&self, device: &Device, name: &str) -> Result<u32, ControlError> {
        let order = Order::AttachNet {
            id: device.id.cast_unsigned(),
            mac: MacAddress(device.mac),
            pairs: device.pairs() as u16, // a number of vCPUs
            limits: device.limits,
        };
        let descriptors: Vec<_> = device.descriptors().collect();
        self.plug(order, &descriptors, format!("attach the network interface {name}")).await
    }

    /// Gives the machine a block device of the host, which the guest knows by that serial number; the window that it is to look at.
    pub(crate) async fn attach_disk(&self, serial: &str, device: &BlockDevice) -> Result<u32, ControlError> {
        let BlockDevice { path, number, opened } = device;
        let order = Order::AttachDisk { serial: serial.to_owned(), read_only: opened.read_only };
        let doing = format!("attach the block device {number} of the host for {path}");
        let attached = self.plug(order, &[opened.file.as_fd()], doing).await;
        if matches!(attached, Err(ControlError::NoAnswer { .. })) {
            // It may yet be put into a window, and that is to be emptied again.
            self.order_without_answer(Order::DetachDisk { serial: serial.to_owned(), is_released: false });
        }
        attached
    }

    /// Takes a block device back that was added, which the guest has let go of or not.
    pub(crate) async fn detach_disk(&self, serial: &str, is_released: bool) -> Result<(), ControlError> {
        let order = Order::DetachDisk { serial: serial.to_owned(), is_released };
        self.ask(order, &[], format!("take back the block device {serial}")).await
    }

    /// Takes the guest's link of an interface up or down.
    pub(crate) async fn set_carrier(&self, carrier: &Carrier) -> Result<(), ControlError> {
        let Carrier { id, name, on } = carrier;
        let order = Order::SetCarrier { id: id.cast_unsigned(), on: *on };
        let way = if *on { "up" } else { "down" };
        self.ask(order, &[], format!("take the link of the network interface {name} {way}")).await
    }

    /// Grants the guest so much in all of what its memory may become.
    pub(crate) async fn grant_memory(&self, total_mib: u64) -> Result<(), ControlError> {
        self.ask(Order::GrantMemory { total_mib }, &[], format!("add {total_mib} MiB of memory")).await
    }

    /// Has something done. `doing` completes "cannot …".
    async fn ask(&self, order: Order, descriptors: &[BorrowedFd<'_>], doing: String) -> Result<(), ControlError> {
        self.ask_for_answer(order, descriptors, doing).await.map(drop)
    }

    /// Has a device put into the machine; its window.
    async fn plug(&self, order: Order, descriptors: &[BorrowedFd<'_>], doing: String) -> Result<u32, ControlError> {
        match self.ask_for_answer(order, descriptors, doing.clone()).await {
            Ok(Some(window)) => Ok(window),
            Ok(None) => Err(ControlError::Refused { doing, reason: "it does not tell where that is".to_owned() }),
            Err(error) => Err(error),
        }
    }

    async fn ask_for_answer(
        &self,
        order: Order,
        descriptors: &[BorrowedFd<'_>],
        doing: String,
    ) -> Result<Option<u32>, ControlError> {
        let (sequence, answer) = match self.expect() {
            Some(expected) => expected,
            None => return Err(ControlError::Gone { doing }),
        };
        if let Err(source) = control::send(&self.0.socket, &Request { sequence, order }, descriptors) {
            self.waiting().answers.remove(&sequence);
            return Err(ControlError::Send { doing, source });
        }
        match timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(Ok(window))) => Ok(window),
            Ok(Ok(Err(reason))) => Err(ControlError::Refused { doing, reason }),
            Ok(Err(_)) => Err(ControlError::Gone { doing }),
            Err(_) => {
                self.waiting().answers.remove(&sequence);
                Err(ControlError::NoAnswer { doing })
            }
        }
    }

    /// The number of a new request, and its answer to come; `None` when the VMM is gone.
    fn expect(&self) -> Option<(u64, oneshot::Receiver<Answer>)> {
        let mut waiting = self.waiting();
        if waiting.is_over {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        waiting.last += 1;
        let sequence = waiting.last;
        waiting.answers.insert(sequence, sender);
        Some((sequence, receiver))
    }

    /// An answer has come.
    pub(super) fn answered(&self, sequence: u64, answer: Answer) {
        let answer = answer.map_err(|failure| text::one_line(&failure));
        match self.waiting().answers.remove(&sequence) {
            Some(asker) => drop(asker.send(answer)),
            None => logging::debug(format_args!("the VMM answered the request {sequence}, which nobody waits for")),
        }
    }

    /// No answer will come any more.
    pub(super) fn gone(&self) {
        let mut waiting = self.waiting();
        waiting.is_over = true;
        waiting.answers.clear();
    }
}

impl fmt::Debug for VmmControl {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("VmmControl").field("socket", &self.0.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm::control::Received;

    use super::*;

    fn control() -> (VmmControl, OwnedFd) {
        let (ours, theirs) = control::pair().unwrap();
        (VmmControl::new(ours), theirs)
    }

    fn sequence(socket: &OwnedFd) -> u64 {
        match control::receive(socket).unwrap() {
            Received::Request(request, _) => request.sequence,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn each_request_gets_its_own_answer() {
        let (control, vmm) = control();
        let (first, second) =
            (control.remove_tree(ShareDevice::Private, "a"), control.remove_tree(ShareDevice::Shared, "b"));
        let answer = async {
            let (first, second) = (sequence(&vmm), sequence(&vmm));
            control.answered(4711, Ok(None));
            control.answered(second, Err("no\x1b tree\n".to_owned()));
            control.answered(first, Ok(None));
            control.answered(first, Err("again".to_owned()));
        };

        let (first, second, ()) = tokio::join!(first, second, answer);

        first.unwrap();
        let refused = second.unwrap_err().to_string();
        assert_eq!(refused, "the VMM cannot take back the tree b: no\u{fffd} tree");
    }

    #[tokio::test]
    async fn a_tree_whose_adding_is_not_answered_is_taken_back() {
        let (control, vmm) = control();

        let added = control.hand_over(ShareDevice::Private, "t", &[], "share /t".to_owned()).await;

        assert!(matches!(added, Err(ControlError::NoAnswer { .. })), "{added:?}");
        let orders = [(); 2].map(|()| match control::receive(&vmm).unwrap() {
            Received::Request(request, _) => request.order,
            other => panic!("{other:?}"),
        });
        let (device, name) = (ShareDevice::Private, "t".to_owned());
        assert_eq!(orders, [Order::AddTree { device, name: name.clone() }, Order::RemoveTree { device, name }]);
    }

    #[tokio::test]
    async fn a_vmm_that_ends_answers_nobody() {
        let (control, _vmm) = control();

        let (asked, ()) = tokio::join!(control.remove_tree(ShareDevice::Private, "a"), async { control.gone() });

        assert!(matches!(asked, Err(ControlError::Gone { .. })));
        assert!(matches!(control.remove_tree(ShareDevice::Private, "b").await, Err(ControlError::Gone { .. })));
    }

    #[tokio::test]
    async fn a_vmm_that_has_closed_its_end_is_asked_in_vain() {
        let (control, vmm) = control();
        drop(vmm);

        assert!(matches!(control.remove_tree(ShareDevice::Private, "a").await, Err(ControlError::Send { .. })));
    }

    #[tokio::test]
    async fn an_absent_folder_is_named() {
        let tree = ShareTree {
            name: "t".into(),
            source: "/no/such".into(),
            read_only: false,
            recursive: true,
            follows: false,
        };

        let error = open_tree(&tree).await.unwrap_err();

        assert_eq!(error.to_string(), "cannot share /no/such");
    }
}
