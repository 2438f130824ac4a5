// SPDX-License-Identifier: Apache-2.0
//! The layout of a device's register window (virtio 1.2, section 4.2.2). All registers are 4 bytes wide, little endian.

/// Reads "virt".
pub(super) const MAGIC: u64 = 0x000;
/// Reads 2, the version that virtio 1.x names.
pub(super) const VERSION: u64 = 0x004;
/// The device's kind.
pub(super) const DEVICE_ID: u64 = 0x008;
/// Who makes the device; drivers do not look.
pub(super) const VENDOR_ID: u64 = 0x00c;
/// 32 of the offered features, those that `DEVICE_FEATURES_SEL` selects.
pub(super) const DEVICE_FEATURES: u64 = 0x010;
/// Which 32 features `DEVICE_FEATURES` shows.
pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
/// 32 of the accepted features.
pub(super) const DRIVER_FEATURES: u64 = 0x020;
/// Which 32 features `DRIVER_FEATURES` sets.
pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
/// Which queue the queue registers mean.
pub(super) const QUEUE_SEL: u64 = 0x030;
/// The largest size of the queue; 0 if there is no such queue.
pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
/// The queue's size.
pub(super) const QUEUE_NUM: u64 = 0x038;
/// Whether the queue may be used.
pub(super) const QUEUE_READY: u64 = 0x044;
/// The driver's notification of the queue whose index is written.
pub(super) const QUEUE_NOTIFY: u64 = 0x050;
/// Why there was an interrupt.
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
/// Clears bits of `INTERRUPT_STATUS`.
pub(super) const INTERRUPT_ACK: u64 = 0x064;
/// The device's status.
pub(super) const STATUS: u64 = 0x070;
/// Address of the descriptor table.
pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
/// Upper half of the above.
pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
/// Address of the available ring.
pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
/// Upper half of the above.
pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
/// Address of the used ring.
pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
/// Upper half of the above.
pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
/// Length of the selected shared memory region: all ones says that there is none.
pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
/// Upper half of the above.
pub(super) const SHM_LEN_HIGH: u64 = 0x0b4;
/// Address of the selected shared memory region.
pub(super) const SHM_BASE_LOW: u64 = 0x0b8;
/// Upper half of the above.
pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
/// Changes when the configuration space does.
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
/// Start of the device's own configuration space, which goes to the window's end.
pub(super) const CONFIG: u64 = 0x100;

/// What `MAGIC` reads as.
pub(super) const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"virt");
/// What `VERSION` reads as.
pub(super) const VERSION_VALUE: u32 = 2;
/// What `VENDOR_ID` reads as.
pub(super) const VENDOR_VALUE: u32 = u32::from_le_bytes(*b"bulk");
