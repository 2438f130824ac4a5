// SPDX-License-Identifier: Apache-2.0
//! What the device can do for the guest, and what the tap is told of what the guest can do.

use libc::c_uint;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::backend::LinkKind;

/// What a device has on whatever it hangs.
const ALWAYS: [u32; 8] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
];

/// What is left to the receiver of a frame, which its header says. Every tap of the kernels that Bulkhead runs on has these; a
/// stream socket has no headers.
const OFFLOADS: [u32; 8] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
];

/// What the guest takes as it is, and the name that a tap has for it (linux/if_tun.h).
const TAKEN: [(u32, c_uint); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// Each feature, and the one that it cannot be without (virtio 1.2, section 5.1.3.1).
const NEEDS: [(u32, u32); 9] = [
    (VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ),
    (VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_VQ),
    (VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ),
    (VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_CSUM),
];

/// The feature bits of a device with `pairs` queue pairs on a link of that kind. An MTU is not told: Linux takes it for the
/// largest that there will ever be, and that of the interface on the host may grow.
pub(super) fn offered(link: LinkKind, pairs: u16) -> u64 {
    let offloads = if link == LinkKind::Tap { OFFLOADS.as_slice() } else { &[] };
    let mut features = ALWAYS.iter().chain(offloads).fold(0, |features, bit| features | 1 << bit);
    if pairs > 1 {
        features |= 1 << VIRTIO_NET_F_MQ;
    }
    features
}

/// Whether a device with `pairs` queue pairs runs with these features. Where the control queue is depends on whether the
/// driver knows of more than one pair: one that does not has to do without control here, which no driver known does.
pub(super) fn go_together(features: u64, pairs: u16) -> bool {
    let is_control_found = pairs == 1 || !has(features, VIRTIO_NET_F_CTRL_VQ) || has(features, VIRTIO_NET_F_MQ);
    is_control_found && NEEDS.iter().all(|(feature, other)| !has(features, *feature) || has(features, *other))
}

/// Whether `features` has the bit with the number `bit`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// What the tap may leave to a guest that has accepted `features`; for `TUNSETOFFLOAD`.
pub(super) fn tap_offloads(features: u64) -> c_uint {
    TAKEN.iter().filter(|(bit, _)| has(features, *bit)).fold(0, |offloads, (_, offload)| offloads | offload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_leaves_to_the_guest_what_the_guest_accepted() {
        assert_eq!(tap_offloads(0), 0);
        assert_eq!(tap_offloads(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4), libc::TUN_F_CSUM);
        assert_eq!(tap_offloads(offered(LinkKind::Tap, 1)), 0xf);
    }

    #[test]
    fn features_come_with_what_they_need() {
        let all = offered(LinkKind::Tap, 4);
        assert!(go_together(all, 4) && go_together(0, 4));
        assert!(!go_together(all & !(1 << VIRTIO_NET_F_GUEST_CSUM), 4));
        assert!(!go_together(all & !(1 << VIRTIO_NET_F_CTRL_VQ), 4));
        assert!(!go_together(all & !(1 << VIRTIO_NET_F_MQ), 4));
        let one = offered(LinkKind::Tap, 1);
        assert!(!has(one, VIRTIO_NET_F_MQ) && go_together(one, 1));
    }

    #[test]
    fn nothing_is_left_to_who_knows_no_headers() {
        let features = offered(LinkKind::Stream, 1);
        assert!(go_together(features, 1) && has(features, VIRTIO_NET_F_MRG_RXBUF) && tap_offloads(features) == 0);
        assert!(!has(features, VIRTIO_NET_F_CSUM) && !has(features, VIRTIO_NET_F_HOST_TSO4));
    }
}
