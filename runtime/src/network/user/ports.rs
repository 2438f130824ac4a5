// SPDX-License-Identifier: Apache-2.0
//! Whether ports of the host can be had: passt is content with one family of addresses where a port is taken in the other, and would
//! not tell.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};

use super::families::Families;
use super::passt::PasstError;
use crate::spec::{Protocol, Published};

/// Takes each port for a moment.
///
/// # Errors
///
/// The first that is somebody's, or that this user may not have.
pub(super) fn expect_free(published: &[Published], families: Families) -> Result<(), PasstError> {
    // Linux' IPv6 sockets take the port of both families.
    let all = if families.ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    for port in published {
        take(port, port.address.unwrap_or(all)).map_err(|source| PasstError::Port { port: *port, source })?;
    }
    Ok(())
}

fn take(port: &Published, address: IpAddr) -> io::Result<()> {
    let place = (address, port.host_port.get());
    match port.protocol {
        Protocol::Tcp => TcpListener::bind(place).map(drop),
        Protocol::Udp => UdpSocket::bind(place).map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_taken_for_one_family_is_not_free() {
        let families = Families { ipv4: true, ipv6: true };
        let taken = TcpListener::bind("0.0.0.0:0").unwrap();
        let host_port = taken.local_addr().unwrap().port().try_into().unwrap();
        let tcp = Published { protocol: Protocol::Tcp, address: None, host_port, port: host_port };
        let udp = Published { protocol: Protocol::Udp, ..tcp };

        let error = expect_free(&[udp, tcp], families).unwrap_err();

        assert_eq!(error.to_string(), format!("cannot publish the port {tcp}"));
        drop(taken);
        expect_free(&[udp, tcp], families).unwrap();
    }
}
