// SPDX-License-Identifier: Apache-2.0
//! The numbers of virtio 1.2, section 5.2.

/// The unit of all positions and lengths, whatever the size of the device's blocks.
pub(super) const SECTOR: u64 = 512;

/// Feature bits.
pub(super) const F_SIZE_MAX: u32 = 1;
pub(super) const F_SEG_MAX: u32 = 2;
pub(super) const F_RO: u32 = 5;
pub(super) const F_BLK_SIZE: u32 = 6;
pub(super) const F_FLUSH: u32 = 9;
pub(super) const F_DISCARD: u32 = 13;
pub(super) const F_WRITE_ZEROES: u32 = 14;

/// Request types.
pub(super) const T_IN: u32 = 0;
pub(super) const T_OUT: u32 = 1;
pub(super) const T_FLUSH: u32 = 4;
pub(super) const T_GET_ID: u32 = 8;
pub(super) const T_DISCARD: u32 = 11;
pub(super) const T_WRITE_ZEROES: u32 = 13;

/// Bytes of a request's header: type, reserved, sector.
pub(super) const HEADER_LEN: usize = 16;
/// Bytes of a serial number, padded with NUL.
pub(super) const ID_LEN: usize = 20;
/// Bytes of a range to discard or to write zeros to: sector, count of sectors, flags.
pub(super) const RANGE_LEN: usize = 16;
/// A range's only flag: what is zero need not be kept allocated.
pub(super) const RANGE_UNMAP: u32 = 1;

/// Bytes of the configuration space, up to `write_zeroes_may_unmap` and its padding.
pub(super) const CONFIG_LEN: usize = 60;
/// Where its fields lie.
pub(super) const CAPACITY_AT: usize = 0;
pub(super) const SIZE_MAX_AT: usize = 8;
pub(super) const SEG_MAX_AT: usize = 12;
pub(super) const BLK_SIZE_AT: usize = 20;
pub(super) const MAX_DISCARD_SECTORS_AT: usize = 36;
pub(super) const MAX_DISCARD_SEG_AT: usize = 40;
pub(super) const DISCARD_SECTOR_ALIGNMENT_AT: usize = 44;
pub(super) const MAX_WRITE_ZEROES_SECTORS_AT: usize = 48;
pub(super) const MAX_WRITE_ZEROES_SEG_AT: usize = 52;
pub(super) const WRITE_ZEROES_MAY_UNMAP_AT: usize = 56;

/// How a request has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// As it was asked for.
    Ok = 0,
    /// It failed, or is none that can be carried out.
    IoError = 1,
    /// The device does not do such things.
    Unsupported = 2,
}
