// SPDX-License-Identifier: Apache-2.0
//! A network that belongs to no network namespace, and that the supervisor makes: the annotations `io.bulkhead.net.user` and
//! what goes with it.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU16;
use std::path::Path;

use super::error::FieldError;
use super::net_device::{self, NetSettings};

const USER: &str = "io.bulkhead.net.user";
const PUBLISH: &str = "io.bulkhead.net.publish";
const HOST_LOOPBACK: &str = "io.bulkhead.net.host_loopback";
/// All of them.
pub(super) const ANNOTATIONS: [&str; 3] = [USER, PUBLISH, HOST_LOOPBACK];

/// Most ports that are published.
const MAX_PUBLISHED: usize = 128;
/// Most bytes of the list of them that an error quotes.
const MAX_QUOTED: usize = 64;

/// What the annotations say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UserNetwork {
    pub(crate) published: Vec<Published>,
    /// Whether the gateway's address stands for the host's own loopback addresses.
    pub(crate) host_loopback: bool,
}

/// A port of the host that leads to one of the container's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Published {
    pub(crate) protocol: Protocol,
    /// That of the host; all of them if there is none.
    pub(crate) address: Option<IpAddr>,
    pub(crate) host_port: NonZeroU16,
    pub(crate) port: NonZeroU16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

impl UserNetwork {
    /// `None` where there is to be none.
    pub(super) fn translate(
        annotations: &HashMap<String, String>,
        device: &NetSettings,
    ) -> Result<Option<Self>, FieldError> {
        if net_device::flag(annotations, USER)? != Some(true) {
            return match [PUBLISH, HOST_LOOPBACK].into_iter().find(|key| annotations.contains_key(*key)) {
                Some(key) => Err(FieldError::unsupported(field(key), format!("without {USER}=true it has no meaning"))),
                None => Ok(None),
            };
        }
        if device.vhost == Some(true) {
            let what = "with io.bulkhead.net.vhost=true: the host's kernel has no part in such a network";
            return Err(FieldError::unsupported(field(USER), what));
        }
        let published = annotations.get(PUBLISH).map(|list| published(list)).transpose()?.unwrap_or_default();
        let host_loopback = net_device::flag(annotations, HOST_LOOPBACK)? == Some(true);
        Ok(Some(Self { published, host_loopback }))
    }
}

/// Checks whether a network, if there is to be one, can be had where the configuration names that network namespace.
pub(super) fn check(network: Option<&UserNetwork>, namespace: Option<&Path>, is_alone: bool) -> Result<(), FieldError> {
    let what = match (network, namespace) {
        (None, _) => return Ok(()),
        (Some(_), Some(path)) => format!(
            "with the network namespace {}, whose interfaces are the container's network: leave out one of them",
            path.display()
        ),
        (Some(_), None) if !is_alone => "in a pod, whose network is that of its namespace".to_owned(),
        (Some(_), None) => return Ok(()),
    };
    Err(FieldError::unsupported(field(USER), what))
}

impl fmt::Display for Published {
    /// As in the annotation.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V4(address)) => write!(formatter, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(formatter, "[{address}]:")?,
            None => {}
        }
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(formatter, "{}:{}/{protocol}", self.host_port, self.port)
    }
}

fn field(key: &str) -> String {
    format!("annotations[{key:?}]")
}

fn published(list: &str) -> Result<Vec<Published>, FieldError> {
    let wrong = |value: &str, expected: String| {
        let quoted: String = value.chars().take(MAX_QUOTED).collect();
        Err(FieldError::invalid(field(PUBLISH), quoted, expected))
    };
    let mut all: Vec<Published> = Vec::new();
    for item in list.split(',').map(str::trim) {
        let Some(one) = parse(item) else {
            return wrong(item, "a port as in 8080:80, 127.0.0.1:8080:80/tcp, [::1]:5353:53/udp".to_owned());
        };
        if let Some(other) = all.iter().find(|other| collide(other, &one)) {
            return wrong(item, format!("a port of the host that is free: {other} has it"));
        }
        if all.len() == MAX_PUBLISHED {
            return wrong(item, format!("among the {MAX_PUBLISHED} ports that may be published"));
        }
        all.push(one);
    }
    Ok(all)
}

/// passt has one port of the container for each of the host, whatever the address.
fn collide(one: &Published, other: &Published) -> bool {
    one.protocol == other.protocol && one.host_port == other.host_port
}

/// `[ADDRESS:]HOST_PORT:PORT[/PROTOCOL]`, an IPv6 address in brackets.
fn parse(item: &str) -> Option<Published> {
    let (ports, protocol) = match item.rsplit_once('/') {
        None => (item, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return None,
    };
    let (host, port) = ports.rsplit_once(':')?;
    let (address, host_port) = match host.rsplit_once(':') {
        None => (None, host),
        Some((address, host_port)) => (Some(parse_address(address)?), host_port),
    };
    // `parse` would take a sign.
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
    Some(Published { protocol, address, host_port: number(host_port)?, port: number(port)? })
}

fn parse_address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => text.parse().ok().filter(IpAddr::is_ipv4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translate(annotations: &[(&str, &str)]) -> Result<Option<UserNetwork>, String> {
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let device = NetSettings::translate(&annotations).unwrap();
        UserNetwork::translate(&annotations, &device).map_err(|error| error.to_string())
    }

    #[test]
    fn there_is_one_where_it_is_asked_for() {
        assert_eq!(translate(&[]).unwrap(), None);
        assert_eq!(translate(&[(USER, "false")]).unwrap(), None);
        assert_eq!(translate(&[(USER, "true")]).unwrap(), Some(UserNetwork::default()));
        assert!(translate(&[(USER, "true"), (HOST_LOOPBACK, "true")]).unwrap().unwrap().host_loopback);
        let error = translate(&[(USER, "yes")]).unwrap_err();
        assert_eq!(error, "annotations[\"io.bulkhead.net.user\"]: \"yes\" is not true or false");
        for key in [PUBLISH, HOST_LOOPBACK] {
            let error = translate(&[(key, "8080:80")]).unwrap_err();
            assert!(error.contains(key) && error.contains("without io.bulkhead.net.user=true"), "{error}");
        }
        assert!(translate(&[(USER, "true"), ("io.bulkhead.net.vhost", "true")]).unwrap_err().contains("vhost"));
    }

    #[test]
    fn it_is_for_a_container_that_is_alone_and_without_a_namespace() {
        let network = UserNetwork::default();
        assert!(check(None, Some(Path::new("/run/netns/x")), false).is_ok());
        assert!(check(Some(&network), None, true).is_ok());
        assert!(check(Some(&network), None, false).is_err());
        let error = check(Some(&network), Some(Path::new("/run/netns/x")), true).unwrap_err().to_string();
        assert!(error.contains("the network namespace /run/netns/x"), "{error}");
    }

    #[test]
    fn ports_are_published_as_they_are_written() {
        let list = "8080:80, 127.0.0.1:8443:443/tcp,5353:53/udp,8080:80/udp,[::1]:9090:90/tcp";
        let network = translate(&[(USER, "true"), (PUBLISH, list)]).unwrap().unwrap();

        let written: Vec<_> = network.published.iter().map(ToString::to_string).collect();
        assert_eq!(
            written,
            ["8080:80/tcp", "127.0.0.1:8443:443/tcp", "5353:53/udp", "8080:80/udp", "[::1]:9090:90/tcp"]
        );
    }

    #[test]
    fn what_is_no_port_is_refused() {
        let wrong = [
            "",
            "80",
            "80:",
            ":80",
            "0:80",
            "80:0",
            "65536:80",
            "80:-1",
            "+80:80",
            "80:80/sctp",
            "80:80/",
            "80:80,",
            "80-90:80",
            "host:80:80",
            "::1:80:80",
            "[127.0.0.1]:80:80",
            "1.2.3.4.5:80:80",
            "127.0.0.1%lo:80:80",
            "~80:80",
            "80:80/tcp/udp",
        ];
        for list in wrong {
            let error = translate(&[(USER, "true"), (PUBLISH, list)]).unwrap_err();
            assert!(
                error.starts_with("annotations[\"io.bulkhead.net.publish\"]: ")
                    && error.contains("is not a port as in"),
                "{error}"
            );
        }
        for list in ["80:80,80:81", "80:80,127.0.0.1:80:81", "127.0.0.1:80:80,127.0.0.2:80:80/tcp"] {
            assert!(translate(&[(USER, "true"), (PUBLISH, list)]).unwrap_err().contains("has it"), "{list}");
        }
        let many: Vec<_> = (1..=MAX_PUBLISHED + 1).map(|port| format!("{port}:80")).collect();
        assert!(translate(&[(USER, "true"), (PUBLISH, &many[1..].join(","))]).is_ok());
        assert!(translate(&[(USER, "true"), (PUBLISH, &many.join(","))]).unwrap_err().contains("128 ports"));
    }
}
