// SPDX-License-Identifier: Apache-2.0
//! What needs no right to change a network: which interfaces are passed on, and what is written down.

use std::path::Path;

use super::*;

fn link(name: &str, kind: &str) -> Link {
    Link {
        index: 2,
        name: name.to_owned(),
        kind: kind.to_owned(),
        hardware: libc::ARPHRD_ETHER,
        mac: vec![2, 0, 0, 0, 0, 1],
        mtu: 1500,
        up: true,
        ..Link::default()
    }
}

fn check(link: &Link) -> Result<(), String> {
    let options = DeviceOptions::new(NetSettings::default(), 1);
    let joiner = Joiner { path: "/run/netns/x".into(), options };
    joiner.check(link, std::slice::from_ref(link)).map_err(|error| error.to_string())
}

#[test]
fn what_engines_make_is_passed_on() {
    for kind in SUPPORTED {
        assert_eq!(check(&link("eth0", kind)), Ok(()), "{kind}");
    }
}

#[test]
fn what_cannot_be_passed_on_is_named() {
    assert_eq!(
        check(&link("eth1", "")).unwrap_err(),
        "cannot pass on the interface eth1 of the network namespace /run/netns/x: it is a device of the host; possible are \
         veth, macvlan, ipvlan, vlan, dummy, tun"
    );
    assert!(
        check(&link("wg0", "wireguard"))
            .unwrap_err()
            .contains("wg0 of the network namespace /run/netns/x: it is wireguard")
    );
    let error = check(&Link { hardware: libc::ARPHRD_NONE, ..link("tun0", "tun") }).unwrap_err();
    assert!(
        error.contains("tun0 of the network namespace /run/netns/x: it is tun without Ethernet frames;"),
        "{error}"
    );
    assert!(check(&Link { mtu: 60, ..link("eth0", "veth") }).unwrap_err().ends_with("its MTU of 60 is too small"));
}

#[test]
fn an_ipvlan_whose_packets_the_host_routes_is_refused() {
    let error = check(&Link { routed: Some("l3s"), ..link("eth0", "ipvlan") }).unwrap_err();
    assert!(error.contains("it is ipvlan in mode l3s, in which the host routes"), "{error}");
}

#[test]
fn what_lies_on_another_interface_of_the_namespace_is_refused() {
    let upper = Link { index: 5, lower: Some(2), ..link("eth0.7", "vlan") };
    let joiner = Joiner { path: "/run/netns/x".into(), options: DeviceOptions::new(NetSettings::default(), 1) };

    let error = joiner.check(&upper, &[link("eth0", "veth"), upper.clone()]).unwrap_err().to_string();

    assert!(error.contains("eth0.7 of the network namespace /run/netns/x: it lies on eth0 there"), "{error}");
    // Below is an interface of another namespace.
    assert!(joiner.check(&upper, std::slice::from_ref(&upper)).is_ok());
}

#[test]
fn a_namespace_is_not_shared() {
    let error = check(&link("bh-2", "tun")).unwrap_err();
    assert!(error.starts_with("the network namespace /run/netns/x is another virtual machine's"), "{error}");
}

#[test]
fn tunnels_that_nobody_made_are_passed_over() {
    let idle = Link { up: false, ..link("gretap0", "gretap") };
    assert!(is_idle(&idle));
    assert!(!is_idle(&Link { up: true, ..idle }));
    assert!(!is_idle(&Link { up: false, ..link("eth0", "veth") }));
    assert!(!is_idle(&Link { up: false, ..link("eth1", "") }));
}

#[test]
fn what_was_written_down_is_undone_in_the_same_namespace_only() {
    let namespace = NetworkNamespace::open(Path::new("/proc/self/ns/net")).unwrap();
    let (sender, records) = std::sync::mpsc::channel();
    let recorder = Recorder::new(move |record| sender.send(serde_json::to_string(record)?).map_err(io::Error::other));
    Junctions::new(namespace, Vec::new(), recorder).note().unwrap();
    let mut text = records.recv().unwrap();

    assert!(Network::reopen(serde_json::from_str(&text).unwrap()).is_some());
    text = text.replace("\"inode\":", "\"inode\":1");
    assert!(Network::reopen(serde_json::from_str(&text).unwrap()).is_none());
}

#[test]
fn what_cannot_be_undone_stays_noted() {
    let namespace = NetworkNamespace::open(Path::new("/proc/self/ns/net")).unwrap();
    let (sender, records) = std::sync::mpsc::channel();
    let recorder = Recorder::new(move |record| sender.send(serde_json::to_string(record)?).map_err(io::Error::other));
    // To the kernel that is no interface, but a block of filters (`TCM_IFINDEX_MAGIC_BLOCK`), which is not there: an error for
    // those, too, who may enter the namespace and change filters.
    let joined = Joined { link: -1, tap: 7, is_prepared: false, is_answered: false };
    let junctions = Junctions::new(namespace, vec![joined], recorder);

    junctions.undo(|joined| joined.link == -1);

    assert!(records.recv().unwrap().contains(r#""links":[{"index":-1,"tap":7,"prepared":false}]"#));
    assert_eq!(*junctions.joined(), [Joined { is_answered: true, ..joined }]);
}
