// SPDX-License-Identifier: Apache-2.0
//! Running the machine until it ends, or until nobody wants it any more.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_kvm::{Stop, Vcpu, VcpuError};
use bulkhead_virtio::thread;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::bus::Bus;
use super::console::Console;
use super::orders::Orders;
use super::{Machine, MachineError, NetworkWatch, StreamWatch};
use crate::jail;
use crate::report::{End, Report, Reporter};

/// How a vCPU thread ended.
type VcpuEnd = Result<Stop, VcpuError>;

/// Runs the machine, from a thread that has no others beside it. `supervisor` is a descriptor that hangs up when the
/// supervisor is gone.
///
/// # Errors
///
/// When the filter cannot be installed or a thread not be started; the guest has not run then, or only in part.
pub fn run(machine: Machine, supervisor: BorrowedFd<'_>, reporter: &Arc<Reporter>) -> Result<End, MachineError> {
    let host = |doing: &'static str| move |source| MachineError::Host { doing, source };
    let ended = Arc::new(EventFd::new(EFD_CLOEXEC).map_err(host("make an eventfd"))?);
    let (sender, receiver) = channel();
    let Machine { _vm, vcpus, bus, console, orders, network } = machine;
    reporter.phase("system call filter", jail::filter_system_calls)?;
    reporter.phase("vcpu threads", || {
        vcpus.into_iter().try_for_each(|vcpu| {
            start_vcpu(vcpu, bus.clone(), sender.clone(), Arc::clone(&ended)).map_err(host("start a vCPU thread"))
        })
    })?;
    reporter.phase("kernel entry", || ());
    let watched = Watched { orders: &orders, network: &network, ended: &ended, receiver: &receiver };
    let end = match watched.wait(supervisor, reporter)? {
        None => End::Abandoned,
        Some(vcpu_end) => interpret(vcpu_end, &console),
    };
    Ok(end)
}

fn start_vcpu(
    mut vcpu: Vcpu,
    mut bus: Bus,
    sender: Sender<VcpuEnd>,
    ended: Arc<EventFd>,
) -> Result<(), std::io::Error> {
    thread::builder(&format!("vcpu-{}", vcpu.id())).spawn(move || {
        let end = vcpu.run(&mut bus);
        // The first end is the machine's; who receives the later ones is gone.
        let _ = sender.send(end);
        let _ = ended.write(1);
    })?;
    Ok(())
}

/// What the main thread waits for, besides the supervisor's end.
struct Watched<'a> {
    orders: &'a Orders,
    network: &'a NetworkWatch,
    ended: &'a EventFd,
    receiver: &'a Receiver<VcpuEnd>,
}

impl Watched<'_> {
    /// Waits for the first vCPU that ends (its end), or for the supervisor's (`None`); does meanwhile what that asks for.
    fn wait(&self, supervisor: BorrowedFd<'_>, reporter: &Arc<Reporter>) -> Result<Option<VcpuEnd>, MachineError> {
        let host = |source| MachineError::Host { doing: "wait for the machine", source };
        loop {
            let mut fds = vec![
                PollFd::new(supervisor, PollFlags::empty()),
                PollFd::new(borrow(self.ended), PollFlags::POLLIN),
                PollFd::new(self.orders.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.network.fallback.as_fd(), PollFlags::POLLIN),
            ];
            fds.extend(self.network.streams.iter().map(|stream| PollFd::new(stream.lost.as_fd(), PollFlags::POLLIN)));
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result.map_err(|error| host(error.into()))?,
            };
            if let Ok(end) = self.receiver.try_recv() {
                return Ok(Some(end));
            }
            if let Some(reason) = self.network.fallback.take() {
                if self.network.needs_vhost {
                    return Err(MachineError::NoVhost { reason });
                }
                reporter.send(&Report::NoVhost { reason });
            }
            for StreamWatch { port, lost } in &self.network.streams {
                if let Some(reason) = lost.take() {
                    port.detach();
                    reporter.send(&Report::LinkDown { mac: port.state().permanent_mac, reason });
                }
            }
            if fds[0].any() == Some(true)
                || (fds[2].any() == Some(true) && !self.orders.serve(reporter).map_err(host)?)
            {
                return Ok(None);
            }
        }
    }
}

/// vmm-sys-util's eventfd offers its descriptor only as a number.
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open as long as `event` lives, which the lifetime says.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Tells the ends apart. A guest's kernel that panics resets the machine too: what it printed makes the difference.
fn interpret(end: VcpuEnd, console: &Mutex<Console>) -> End {
    let console = console.lock().unwrap_or_else(PoisonError::into_inner);
    match (end, console.panic_message()) {
        (Ok(Stop::Reset | Stop::Crash), Some(message)) => End::GuestPanic { message: message.to_owned() },
        (Ok(Stop::Crash), None) => End::GuestPanic { message: "the guest gave no reason".to_owned() },
        (Ok(Stop::Reset), None) => End::Shutdown,
        (Ok(Stop::TripleFault), _) => End::TripleFault,
        (Err(error), _) => End::KvmError { message: describe(&error) },
    }
}

/// An error and its causes in one line.
#[must_use]
pub fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use bulkhead_virtio::net::{Backend, Limits, LinkKind, MacAddress, Net, NetConfig, Notice};

    use super::super::orders::Changeable;
    use super::*;
    use crate::control;

    fn console(text: &str) -> Mutex<Console> {
        let mut console = Console::new(tempfile::tempfile().unwrap());
        text.bytes().for_each(|byte| console.write(0, byte));
        Mutex::new(console)
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let console = console("Kernel panic - not syncing: Attempted to kill init!\n");
        let message = "Attempted to kill init!".to_owned();
        assert_eq!(interpret(Ok(Stop::Reset), &console), End::GuestPanic { message });
    }

    #[test]
    fn a_quiet_reset_is_a_shutdown() {
        assert_eq!(interpret(Ok(Stop::Reset), &console("hello\n")), End::Shutdown);
    }

    #[test]
    fn kvm_errors_say_what_kvm_said() {
        let error = VcpuError::Internal { id: 0, suberror: 1, rip: 0x1000 };
        let End::KvmError { message } = interpret(Err(error), &console("")) else { panic!("another end") };
        assert!(message.contains("suberror 1, at instruction 0x1000"), "{message}");
    }

    /// Waits for a machine until its supervisor hangs up; returns how that went, and what was reported.
    fn wait(needs_vhost: bool, fallback: Option<&str>) -> (Result<Option<VcpuEnd>, MachineError>, String) {
        let network = NetworkWatch { fallback: Notice::new().unwrap(), needs_vhost, streams: Vec::new() };
        if let Some(reason) = fallback {
            network.fallback.tell(&reason);
        }
        wait_with(&network)
    }

    fn wait_with(network: &NetworkWatch) -> (Result<Option<VcpuEnd>, MachineError>, String) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (_sender, receiver) = channel();
        let (_supervisor, socket) = control::pair().unwrap();
        let orders = Orders { socket, machine: Changeable::default() };
        let report = tempfile::NamedTempFile::new().unwrap();
        let reporter = Arc::new(Reporter::new(report.reopen().unwrap(), false));
        drop(theirs);
        let ended = EventFd::new(0).unwrap();
        let watched = Watched { orders: &orders, network, ended: &ended, receiver: &receiver };
        let end = watched.wait(ours.as_fd(), &reporter);
        (end, std::fs::read_to_string(report.path()).unwrap())
    }

    #[test]
    fn a_supervisor_that_hangs_up_ends_the_wait() {
        let (end, report) = wait(true, None);
        assert!(matches!(end, Ok(None)));
        assert_eq!(report, "");
    }

    #[test]
    fn a_device_whose_socket_is_lost_has_its_link_down() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let lost = Notice::new().unwrap();
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let net = Net::new(&NetConfig { mac, link: LinkKind::Stream, pairs: 1, limits: Limits::default() })
            .on(Backend::Stream { socket: socket.into(), lost: lost.clone() })
            .unwrap();
        lost.tell(&"it was closed");
        let streams = vec![StreamWatch { port: net.port().clone(), lost }];

        let (_, report) = wait_with(&NetworkWatch { fallback: Notice::new().unwrap(), needs_vhost: false, streams });

        assert_eq!(report, "{\"report\":\"link-down\",\"mac\":[2,0,0,0,0,1],\"reason\":\"it was closed\"}\n");
        assert!(!net.port().state().link_up);
    }

    #[test]
    fn a_network_without_vhost_is_told_or_ends_the_machine() {
        let (end, report) = wait(false, Some("no room"));
        assert!(matches!(end, Ok(None)));
        assert_eq!(report, "{\"report\":\"no-vhost\",\"reason\":\"no room\"}\n");

        let (end, report) = wait(true, Some("no room"));
        assert!(matches!(end, Err(MachineError::NoVhost { reason }) if reason == "no room"));
        assert_eq!(report, "");
    }
}
