// SPDX-License-Identifier: Apache-2.0
//! A network that needs no network namespace, and no right to make one: passt(1), in the host's namespace, stands for what is
//! beyond the guest's device. It takes the guest's connections up and makes them again, as sockets of its own.
//!
//! | address | is |
//! | --- | --- |
//! | 10.0.2.15/24, fd62:756c:6b68::15/64 | the guest's |
//! | 10.0.2.2, fd62:756c:6b68::2 | the gateway's; the host's loopback addresses, where that is asked for |
//! | 10.0.2.3, fd62:756c:6b68::3 | at port 53 over UDP, the first name server of the host |
//!
//! They are the same for each guest, which has them to itself: what others see are the host's own.

mod families;
mod passt;
mod ports;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bulkhead_protocol::agent::{ConfigureNetworkRequest, NetworkAddress, NetworkInterface, NetworkRoute};
use bulkhead_vmm::config::{Limits, MacAddress};
use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};

use self::families::Families;
pub(crate) use self::passt::{Passt, PasstError, find};
use super::{Device, DeviceLink};
use crate::spec::{Protocol, Published, UserNetwork};

/// Who moves the frames.
pub(crate) const PASST: &str = "passt";

const IPV4_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const IPV4_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const IPV4_RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const IPV4_PREFIX_LEN: u8 = 24;

const IPV6_ADDRESS: Ipv6Addr = ipv6(0x15);
const IPV6_GATEWAY: Ipv6Addr = ipv6(2);
const IPV6_RESOLVER: Ipv6Addr = ipv6(3);
const IPV6_PREFIX_LEN: u8 = 64;

/// An address of the guest's network, which is one that nobody else's is likely to be (RFC 4193).
const fn ipv6(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd62, 0x756c, 0x6b68, 0, 0, 0, 0, number)
}

const GUEST_MAC: [u8; 6] = [0x02, 0x62, 0x68, 0, 0, 0x15];
const GATEWAY_MAC: MacAddress = MacAddress([0x02, 0x62, 0x68, 0, 0, 2]);

/// The most that passt takes: the longest frame without its Ethernet header, rounded down to what its own guests are told.
const MTU: u32 = 65_520;

/// How many bytes of frames may be under way to the guest. passt drops what finds no room, and waits seconds before it sends that
/// again: this is a connection's largest window.
const UNDER_WAY: usize = 4 << 20;

/// The guest's name for its interface, and the number that stands for one of the host's.
const INTERFACE: &str = "eth0";
const INTERFACE_ID: i32 = 1;

/// A network that is being set up: passt may not be ready yet.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) passt: Passt,
    pub(crate) device: Device,
    /// What the guest is told.
    pub(crate) request: ConfigureNetworkRequest,
}

/// Starts passt, the program at `path`, for a guest's network. To be called by the first thread of the process, while that is in
/// the host's network namespace: passt stays there.
///
/// # Errors
///
/// It cannot be started, or this host has no network that it could lead to.
pub(crate) fn start(path: &Path, network: &UserNetwork, limits: Limits) -> Result<Started, PasstError> {
    let prepare = |doing| move |source| PasstError::Prepare { doing, source };
    let families = Families::of_this_namespace().map_err(prepare("look for this host's default routes"))?;
    if families.is_empty() {
        return Err(PasstError::NoRoute);
    }
    ports::expect_free(&network.published, families)?;
    let (ours, theirs) = UnixStream::pair().map_err(prepare("make a socket"))?;
    // Who may not have so much has the most that there is.
    let _ = set_socket_send_buffer_size_force(&theirs, UNDER_WAY)
        .or_else(|_| set_socket_send_buffer_size(&theirs, UNDER_WAY));
    let passt = Passt::start(path, &arguments(network, families), &theirs)?;
    let link = DeviceLink::Stream(ours.into());
    let device = Device { link, limits, mac: GUEST_MAC, id: INTERFACE_ID, carrier: true };
    Ok(Started { passt, device, request: request(families) })
}

/// What passt is told of the network.
fn arguments(network: &UserNetwork, families: Families) -> Vec<String> {
    let mut arguments = vec![
        // The guest is told by its agent.
        "--no-dhcp".to_owned(),
        "--no-dhcpv6".to_owned(),
        "--no-ra".to_owned(),
        format!("--mac-addr={GATEWAY_MAC}"),
    ];
    if families.ipv4 {
        arguments.extend([
            format!("--address={IPV4_ADDRESS}"),
            format!("--netmask={IPV4_PREFIX_LEN}"),
            format!("--gateway={IPV4_GATEWAY}"),
            format!("--dns-forward={IPV4_RESOLVER}"),
        ]);
    } else {
        arguments.push("--ipv6-only".to_owned());
    }
    if families.ipv6 {
        arguments.extend([
            format!("--address={IPV6_ADDRESS}"),
            format!("--gateway={IPV6_GATEWAY}"),
            format!("--dns-forward={IPV6_RESOLVER}"),
        ]);
    } else {
        arguments.push("--ipv4-only".to_owned());
    }
    if !network.host_loopback {
        arguments.push("--no-map-gw".to_owned());
    }
    // Unless it is told of some, it takes the numbers of one protocol for the other's too.
    for (protocol, option) in [(Protocol::Tcp, "--tcp-ports"), (Protocol::Udp, "--udp-ports")] {
        let mut ports = network.published.iter().filter(|port| port.protocol == protocol).peekable();
        if ports.peek().is_none() {
            arguments.push(format!("{option}=none"));
        }
        arguments.extend(ports.map(|port| format!("{option}={}", port_argument(port))));
    }
    arguments
}

fn port_argument(published: &Published) -> String {
    let Published { address, host_port, port, .. } = published;
    match address {
        Some(address) => format!("{address}/{host_port}:{port}"),
        None => format!("{host_port}:{port}"),
    }
}

/// What the guest is told of it.
fn request(families: Families) -> ConfigureNetworkRequest {
    let (mut addresses, mut routes) = (Vec::new(), Vec::new());
    let route = |ipv6, gateway| NetworkRoute { interface: INTERFACE.to_owned(), ipv6, gateway, ..Default::default() };
    if families.ipv4 {
        let broadcast = u32::from(IPV4_ADDRESS) | (u32::MAX >> IPV4_PREFIX_LEN);
        addresses.push(NetworkAddress {
            address: IPV4_ADDRESS.octets().into(),
            prefix_len: IPV4_PREFIX_LEN.into(),
            broadcast: broadcast.to_be_bytes().into(),
            ..Default::default()
        });
        routes.push(route(false, IPV4_GATEWAY.octets().into()));
    }
    if families.ipv6 {
        addresses.push(NetworkAddress {
            address: IPV6_ADDRESS.octets().into(),
            prefix_len: IPV6_PREFIX_LEN.into(),
            // There is nobody else.
            flags: libc::IFA_F_NODAD,
            ..Default::default()
        });
        routes.push(route(true, IPV6_GATEWAY.octets().into()));
    }
    let interface = NetworkInterface {
        name: INTERFACE.to_owned(),
        mac: GUEST_MAC.into(),
        hardware_address: GUEST_MAC.into(),
        mtu: MTU,
        up: true,
        addresses,
        id: INTERFACE_ID,
        ..Default::default()
    };
    ConfigureNetworkRequest { interfaces: vec![interface], routes, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Families = Families { ipv4: true, ipv6: true };

    fn published(protocol: Protocol, address: Option<&str>, host_port: u16) -> Published {
        let (host_port, port) = (host_port.try_into().unwrap(), 80.try_into().unwrap());
        Published { protocol, address: address.map(|address| address.parse().unwrap()), host_port, port }
    }

    #[test]
    fn passt_is_told_of_each_port() {
        let published = [published(Protocol::Tcp, Some("::1"), 8080), published(Protocol::Tcp, None, 81)];
        let network = UserNetwork { published: published.into(), host_loopback: false };

        let arguments = arguments(&network, BOTH);

        let ports: Vec<_> = arguments.iter().filter(|argument| argument.contains("-ports=")).collect();
        assert_eq!(ports, ["--tcp-ports=::1/8080:80", "--tcp-ports=81:80", "--udp-ports=none"]);
        assert!(arguments.iter().any(|argument| argument == "--no-map-gw"));
    }

    #[test]
    fn the_guest_has_the_families_of_the_host() {
        let count = |families| {
            let request = request(families);
            (request.interfaces[0].addresses.len(), request.routes.len())
        };
        assert_eq!([count(BOTH), count(Families { ipv6: false, ..BOTH })], [(2, 2), (1, 1)]);
        let arguments = arguments(&UserNetwork::default(), Families { ipv4: false, ..BOTH });
        assert!(arguments.contains(&"--ipv6-only".to_owned()) && !arguments.contains(&"--ipv4-only".to_owned()));
    }

    #[test]
    fn the_broadcast_address_ends_the_network() {
        assert_eq!(request(BOTH).interfaces[0].addresses[0].broadcast, [10, 0, 2, 255]);
    }
}
