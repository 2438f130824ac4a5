// SPDX-License-Identifier: Apache-2.0
//! The next hops of a route that has several, of which the guest has one.

use bulkhead_netlink::Attributes;

use super::link::Link;

/// `RTNH_F_DEAD` and `RTNH_F_LINKDOWN` (linux/rtnetlink.h): the host's kernel does not use it; its interface has no carrier.
const RTNH_F_DEAD: u32 = 1;
const RTNH_F_LINKDOWN: u32 = 16;

/// Attributes of a route, or of a next hop, that are not passed on (linux/rtnetlink.h): a gateway of another family, and
/// encapsulation.
const REFUSED: [(u16, &str); 2] =
    [(18, "which is via a gateway of another family"), (22, "which is with encapsulation")];

/// Bytes of a next hop in front of its attributes: length, flags, weight, and interface (`struct rtnexthop`).
const HEADER_LEN: usize = 8;

/// Why a route is not passed on that leads through none of the guest's interfaces.
pub(super) const NOT_PASSED_ON: &str = "which leads through an interface that is not passed on";

/// One of the ways of a route.
#[derive(Debug, Clone, Copy)]
pub(super) struct NextHop<'a> {
    /// The number of the interface.
    pub(super) interface: u32,
    /// `RTNH_F_*`.
    pub(super) flags: u32,
    pub(super) attributes: Attributes<'a>,
}

impl NextHop<'_> {
    /// The interface, if it is one of `links`.
    pub(super) fn link<'l>(&self, links: &[&'l Link]) -> Option<&'l Link> {
        links.iter().copied().find(|link| link.index.cast_unsigned() == self.interface)
    }
}

/// Those that `RTA_MULTIPATH` has; ends at the first that is not whole.
pub(super) fn read(mut bytes: &[u8]) -> Vec<NextHop<'_>> {
    let mut hops = Vec::new();
    while let Some(([l0, l1, flags, _, i0, i1, i2, i3], _)) = bytes.split_first_chunk::<HEADER_LEN>() {
        let len = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let Some(attributes) = bytes.get(HEADER_LEN..len).map(Attributes::new) else {
            break;
        };
        hops.push(NextHop { interface: u32::from_ne_bytes([*i0, *i1, *i2, *i3]), flags: (*flags).into(), attributes });
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

/// The first by which the host's kernel sends, and the guest's can: one whose interface is among `links`, and best with a
/// carrier; or why there is none.
pub(super) fn choose<'a>(hops: &[NextHop<'a>], links: &[&Link]) -> Result<NextHop<'a>, String> {
    let passed: Vec<_> = hops.iter().filter_map(|hop| Some((hop, hop.link(links)?))).collect();
    if passed.is_empty() {
        return Err(NOT_PASSED_ON.to_owned());
    }
    let is_alive = |hop: &NextHop<'_>, link: &Link| link.up && hop.flags & RTNH_F_DEAD == 0;
    let alive: Vec<_> = passed.into_iter().filter(|(hop, link)| is_alive(hop, link)).map(|(hop, _)| *hop).collect();
    let Some(first) = alive.first() else {
        return Err("of which no next hop is alive".to_owned());
    };
    let sound = || alive.iter().filter(|hop| refuse(hop.attributes).is_ok());
    match sound().find(|hop| hop.flags & RTNH_F_LINKDOWN == 0).or_else(|| sound().next()) {
        Some(hop) => Ok(*hop),
        None => refuse(first.attributes).map(|()| *first),
    }
}

/// Fails if there is something that is not passed on.
pub(super) fn refuse(attributes: Attributes<'_>) -> Result<(), String> {
    match REFUSED.iter().find(|(kind, _)| attributes.find_kind(*kind).is_some()) {
        Some((_, why)) => Err((*why).to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An attribute as it is written.
    pub(in super::super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(value.len() + 4).unwrap();
        [&len.to_ne_bytes(), &kind.to_ne_bytes(), value].concat()
    }

    /// A next hop as it is written.
    pub(in super::super) fn hop(interface: u32, flags: u8, attributes: &[u8]) -> Vec<u8> {
        let len = u16::try_from(HEADER_LEN + attributes.len()).unwrap();
        [&len.to_ne_bytes()[..], &[flags, 0], &interface.to_ne_bytes(), attributes].concat()
    }

    /// The interface of the one that is chosen.
    fn chosen(hops: &[Vec<u8>]) -> Result<u32, String> {
        let link = |index, up| Link { index, name: format!("eth{index}"), up, ..Link::default() };
        let links = [link(3, true), link(4, true), link(5, false)];
        choose(&read(&hops.concat()), &links.each_ref()).map(|hop| hop.interface)
    }

    #[test]
    fn the_first_that_is_alive_is_taken() {
        const DEAD: u8 = RTNH_F_DEAD as u8;
        assert_eq!(chosen(&[hop(3, 0, &[]), hop(4, 0, &[])]), Ok(3));
        // 9 is not the guest's, and 5 is off.
        assert_eq!(chosen(&[hop(9, 0, &[]), hop(5, 0, &[]), hop(3, DEAD, &[]), hop(4, 0, &[])]), Ok(4));
        assert_eq!(chosen(&[hop(5, 0, &[]), hop(3, DEAD, &[])]), Err("of which no next hop is alive".to_owned()));
        assert_eq!(chosen(&[hop(9, 0, &[])]), Err(NOT_PASSED_ON.to_owned()));
    }

    #[test]
    fn one_without_a_carrier_is_taken_where_there_is_no_other() {
        const LINKDOWN: u8 = RTNH_F_LINKDOWN as u8;
        assert_eq!(chosen(&[hop(3, LINKDOWN, &[]), hop(4, 0, &[])]), Ok(4));
        assert_eq!(chosen(&[hop(3, LINKDOWN, &[]), hop(5, 0, &[])]), Ok(3));
    }

    #[test]
    fn one_that_the_guest_cannot_have_is_taken_for_none() {
        for (kind, why) in REFUSED {
            let refused = hop(3, 0, &attribute(kind, &[0; 4]));
            assert_eq!(chosen(&[refused.clone(), hop(4, 0, &[])]), Ok(4));
            assert_eq!(chosen(&[refused]), Err(why.to_owned()));
        }
    }

    #[test]
    fn what_is_not_whole_ends_the_list() {
        let cut = &hop(4, 0, &[0; 8])[..12];
        assert_eq!(read(&[&hop(3, 0, &[]), cut].concat()).len(), 1);
    }
}
