// SPDX-License-Identifier: Apache-2.0
//! Building the machine.
//!
//! Three things that wait for the kernel rather than work are done side by side: creating the VM (it waits for a grace
//! period), loading the kernel (page faults), and building the jail.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;

use bulkhead_kvm::{GuestMemory, Kvm, Reserve, ReserveLayout, StartState, Vcpu, VcpuTopology, allocate};
use bulkhead_virtio::device::VirtioDevice;
use bulkhead_virtio::fs::{AddedTrees, CachePolicy, FsConfig, FsDevice};
use bulkhead_virtio::mmio::MmioTransport;
use bulkhead_virtio::net::{Backend, LinkKind, Net, NetConfig, Notice, Port};
use bulkhead_virtio::rng::Rng;
use bulkhead_virtio::thread::builder;
use bulkhead_virtio::vsock::{Vsock, VsockConfig};

use super::bus::Bus;
use super::console::Console;
use super::disks::{self, Disks};
use super::nets::{self, Nets};
use super::orders::{Changeable, Orders};
use super::{Machine, MachineError, NetworkWatch, Parts, StreamWatch, check};
use crate::arch::x86_64::boot;
use crate::config::{self, MachineConfig, NetLink, PRIVATE_TAG, SHARED_TAG, ShareTree};
use crate::jail::{self, Jail};
use crate::report::Reporter;

/// The guest's end of the kernel's command line: no console device but the early one, no waiting on panic.
const KERNEL_ARGS: &str = "quiet console=ttynull earlyprintk=serial,0x3f8,115200,keep panic=-1 reboot=k";

/// The guest's context id for vsock: each sandbox has a device of its own, so all are alike.
const GUEST_CID: u64 = 3;

/// Builds the machine that `config` describes, and locks the calling thread in.
///
/// # Errors
///
/// When a part cannot be had; the process must end then, since it may be half locked in.
pub fn build(config: &MachineConfig, reporter: &Reporter) -> Result<Machine, MachineError> {
    check(config)?;
    let kvm_device = owned(config.kvm_fd);
    let (jail, parts, memory) = thread::scope(|scope| {
        let parts = builder("setup-kvm")
            .spawn_scoped(scope, || reporter.phase("kvm set-up", || create_vm(kvm_device, config.possible_vcpus())))
            .map_err(|source| MachineError::Host { doing: "start a thread", source })?;
        let memory = builder("setup-memory")
            .spawn_scoped(scope, || reporter.phase("guest memory", || load_guest(config)))
            .map_err(|source| MachineError::Host { doing: "start a thread", source })?;
        let jail = reporter.phase("jail", || jail::enter(config));
        // A panic in either ends the process, by the hook that `main` installs, before it could be joined.
        let lost =
            || MachineError::Host { doing: "set the machine up", source: std::io::Error::other("a thread died") };
        Ok::<_, MachineError>((jail?, parts.join().map_err(|_| lost())??, memory.join().map_err(|_| lost())??))
    })?;
    reporter.phase("devices", || assemble(config, jail, parts, memory))
}

/// Takes over an inherited descriptor.
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the supervisor has opened the descriptor for the VMM alone, and each field of the configuration is taken
    // over exactly once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn create_vm(device: OwnedFd, vcpus: u8) -> Result<Parts, MachineError> {
    let kvm = Kvm::new(device)?;
    let vm = kvm.create_vm()?;
    vm.create_irqchip()?;
    let vcpus = (0..vcpus).map(|id| vm.create_vcpu(id)).collect::<Result<_, _>>()?;
    Ok((kvm, vm, vcpus))
}

/// RAM with a guest in it, what may be added, and where the guest begins.
type LoadedGuest = (GuestMemory, Option<Reserve>, StartState);

/// What the kernel and the image take before the devices are known: their words go to the command line later.
fn load_guest(config: &MachineConfig) -> Result<LoadedGuest, MachineError> {
    let memory = allocate(config.mem_size_mib)?;
    // Where there is no room for it, the machine does not grow, and says so when it is asked to.
    let reserve = ReserveLayout::new(config.mem_size_mib, config.max_mem_size_mib).and_then(Reserve::map);
    let mut kernel = File::from(owned(config.kernel_fd));
    let mut initramfs = File::from(owned(config.initramfs_fd));
    let start = boot::load(&memory, config.possible_vcpus(), &mut kernel, &mut initramfs, &command_line(config))?;
    Ok((memory, reserve, start))
}

fn device_count(config: &MachineConfig) -> u64 {
    let shares = u64::from(config.has_private()) + u64::from(config.has_shared());
    2 + shares + (config.nets.len() + config.disks.len() + config.spare_nets + config.spare_disks) as u64
}

fn command_line(config: &MachineConfig) -> String {
    let windows = (0..device_count(config)).map(|index| Bus::kernel_word(index as usize));
    let vcpus = (config.possible_vcpus() > config.vcpus).then(|| format!("maxcpus={}", config.vcpus));
    let own = std::iter::once(KERNEL_ARGS.to_owned()).chain(vcpus).chain(windows);
    own.chain(config.kernel_args.iter().cloned()).collect::<Vec<_>>().join(" ")
}

fn assemble(
    config: &MachineConfig,
    jail: Jail,
    (kvm, mut vm, vcpus): Parts,
    (ram, reserve, start): LoadedGuest,
) -> Result<Machine, MachineError> {
    let memory = vm.set_memory(ram, reserve)?;
    set_up_vcpus(&kvm, &vcpus, start)?;
    let console = Arc::new(Mutex::new(Console::new(File::from(owned(config.console_fd)))));
    let mut bus = Bus::new(Arc::clone(&console));
    let mut changeable = changeable(config)?;
    let mut network = NetworkWatch { fallback: notice()?, needs_vhost: config.needs_vhost, streams: Vec::new() };
    let mut ports = Vec::with_capacity(config.nets.len());
    for (name, device) in devices(config, jail, &changeable, &mut network, &mut ports)? {
        let transport = MmioTransport::new(device, memory.clone())
            .map_err(|source| MachineError::Device { device: name, source: source.into() })?;
        bus.attach(&vm, transport)?;
    }
    let end = device_count(config) as usize;
    let (first_disk, first_net) = (end - config.spare_disks, end - config.spare_disks - config.spare_nets);
    for _ in first_net..end {
        bus.reserve()?;
    }
    let vm = Arc::new(vm);
    let boot_disks = config.disks.iter().map(|disk| disk.serial.clone()).collect();
    changeable.disks = Some(Disks::new(Arc::clone(&vm), memory.clone(), bus.clone(), first_disk..end, boot_disks));
    let empty = Mutex::new(first_net..first_disk);
    changeable.nets = Some(Nets {
        ports: Mutex::new(ports),
        vm: Arc::clone(&vm),
        memory,
        bus: bus.clone(),
        fallback: network.fallback.clone(),
        empty,
    });
    changeable.vm = Some(Arc::clone(&vm));
    let orders = Orders { socket: owned(config.control_fd), machine: changeable };
    Ok(Machine { _vm: vm, vcpus, bus, console, orders, network })
}

fn set_up_vcpus(kvm: &Kvm, vcpus: &[Vcpu], start: StartState) -> Result<(), MachineError> {
    let count = vcpus.len() as u8; // checked to be at most MAX_VCPUS
    for vcpu in vcpus {
        let topology = VcpuTopology { id: vcpu.id(), count };
        vcpu.set_up(kvm, topology, (vcpu.id() == 0).then_some(start))?;
    }
    Ok(())
}

fn changeable(config: &MachineConfig) -> Result<Changeable, MachineError> {
    let follows = config.shared_trees.iter().any(|tree| tree.follows);
    let added = |trees: &[ShareTree]| {
        AddedTrees::new(trees.iter().map(|tree| tree.name.clone()))
            .map_err(|source| MachineError::Host { doing: "make an eventfd", source })
    };
    let private = config.trees_grow.then(|| added(&config.private_trees)).transpose()?;
    let shared = (config.trees_grow || follows).then(|| added(&config.shared_trees)).transpose()?;
    Ok(Changeable { private, shared, ..Changeable::default() })
}

/// A device, and what to call it.
type NamedDevice = (String, Box<dyn VirtioDevice>);

/// The devices in the order of their windows; as many as [`device_count`] says. The host's sides of network devices are added to
/// `ports`, by their numbers.
fn devices(
    config: &MachineConfig,
    jail: Jail,
    changeable: &Changeable,
    network: &mut NetworkWatch,
    ports: &mut Vec<(u32, Port)>,
) -> Result<Vec<NamedDevice>, MachineError> {
    let vsock = Vsock::new(VsockConfig {
        guest_cid: GUEST_CID,
        listener: UnixListener::from(owned(config.vsock.listener_fd)),
        agent: Some(UnixStream::from(owned(config.vsock.agent_fd))),
        agent_port: config.vsock.agent_port,
    });
    let mut devices: Vec<NamedDevice> = vec![("vsock".into(), Box::new(vsock))];
    let trees = [
        (PRIVATE_TAG, CachePolicy::Private, jail.private, &changeable.private),
        (SHARED_TAG, CachePolicy::Shared, jail.shared, &changeable.shared),
    ];
    for (tag, cache, root, added) in trees {
        let Some(root) = root else { continue };
        let doing = "duplicate a descriptor";
        if let Some(added) = added {
            added.lie_in(&root).map_err(|source| MachineError::Host { doing, source })?;
        }
        let proc_self_fd = jail.proc_self_fd.try_clone().map_err(|source| MachineError::Host { doing, source })?;
        let device = FsDevice::new(FsConfig { tag: tag.into(), root, proc_self_fd, cache, added: added.clone() })
            .map_err(|source| MachineError::Device { device: format!("{tag} file system"), source: source.into() })?;
        devices.push((format!("{tag} file system"), Box::new(device)));
    }
    devices.push(("rng".into(), Box::new(Rng::new())));
    for net in &config.nets {
        let device = network_device(net, network)?;
        device.port().set_carrier(net.carrier);
        ports.push((net.id, device.port().clone()));
        devices.push((format!("{} network", net.mac), Box::new(device)));
    }
    for disk in &config.disks {
        devices.push((
            disks::disk_name(&disk.serial),
            Box::new(disks::disk(&disk.serial, owned(disk.fd), disk.read_only)?),
        ));
    }
    Ok(devices)
}

fn network_device(config: &config::NetConfig, network: &mut NetworkWatch) -> Result<Net, MachineError> {
    let pairs = config.link.pairs() as u16; // checked to be at most MAX_NET_PAIRS
    let made = |link| NetConfig { mac: config.mac, link, pairs, limits: config.limits };
    match &config.link {
        NetLink::Tap { tap_fds, vhost_fds } => {
            let owned = |fds: &[RawFd]| fds.iter().copied().map(owned).collect();
            let (taps, vhosts) = (owned(tap_fds), owned(vhost_fds));
            nets::net(&made(LinkKind::Tap), Backend::Tap { taps, vhosts, fallback: network.fallback.clone() })
        }
        NetLink::Stream { socket_fd } => {
            let lost = notice()?;
            let backend = Backend::Stream { socket: owned(*socket_fd), lost: lost.clone() };
            let net = nets::net(&made(LinkKind::Stream), backend)?;
            network.streams.push(StreamWatch { port: net.port().clone(), lost });
            Ok(net)
        }
    }
}

fn notice() -> Result<Notice, MachineError> {
    Notice::new().map_err(|source| MachineError::Host { doing: "make an eventfd", source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout;

    fn config(vcpus: u8, max_vcpus: u8) -> MachineConfig {
        let json = serde_json::json!({
            "id": "x", "vcpus": vcpus, "max_vcpus": max_vcpus, "mem_size_mib": 64, "kernel_args": ["debug"],
            "kvm_fd": -1, "kernel_fd": -1, "initramfs_fd": -1, "console_fd": -1, "report_fd": -1, "control_fd": -1,
            "vsock": { "listener_fd": -1, "agent_fd": -1, "agent_port": 1 },
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_kernel_is_told_which_vcpus_to_begin_with() {
        for (vcpus, max_vcpus, possible, told) in [(1, 0, 1, None), (2, 2, 2, None), (1, 4, 4, Some("maxcpus=1"))] {
            let config = config(vcpus, max_vcpus);
            let line = command_line(&config);
            assert_eq!(config.possible_vcpus(), possible);
            assert_eq!(line.split(' ').find(|word| word.starts_with("maxcpus")), told, "{line}");
            // What the configuration adds has the last word.
            assert!(line.ends_with(" debug"), "{line}");
        }
    }

    #[test]
    fn more_vcpus_than_the_kernel_knows_are_refused() {
        for (vcpus, max_vcpus, value) in [(0, 0, 0), (65, 0, 65), (1, 65, 65)] {
            let refused = check(&config(vcpus, max_vcpus));
            assert!(
                matches!(refused, Err(MachineError::Config { what: "the number of vCPUs", value: told, .. }) if told == value)
            );
        }
        assert!(check(&config(1, 64)).is_ok());
    }

    #[test]
    fn windows_follow_each_other() {
        assert_eq!(Bus::kernel_word(0), "virtio_mmio.device=4K@0xd0000000:5");
        assert_eq!(Bus::kernel_word(2), format!("virtio_mmio.device=4K@0xd0002000:{}", layout::FIRST_IRQ + 2));
    }
}
