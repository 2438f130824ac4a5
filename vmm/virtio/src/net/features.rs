// SPDX-License-Identifier: Apache-2.0
//! What the device can do for the guest, and what the tap is told of what the guest can do.

use libc::c_uint;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Every tap of the kernels that Bulkhead runs on has these offloads.
const OFFERED: [u32; 13] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
];

/// What the guest takes as it is, and the name that a tap has for it (linux/if_tun.h).
const TAKEN: [(u32, c_uint); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// The device's feature bits.
pub(super) fn offered() -> u64 {
    OFFERED.iter().fold(0, |features, bit| features | 1 << bit)
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
        assert_eq!(tap_offloads(offered()), 0xf);
    }
}
