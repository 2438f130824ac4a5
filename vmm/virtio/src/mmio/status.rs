// SPDX-License-Identifier: Apache-2.0
//! The device status (virtio 1.2, section 2.1) and which steps a driver may take in it.

/// The driver has seen the device.
pub const ACKNOWLEDGE: u32 = 1;
/// The driver knows how to drive the device.
pub const DRIVER: u32 = 2;
/// The driver has set the device up: it runs.
pub const DRIVER_OK: u32 = 4;
/// The accepted features are settled.
pub const FEATURES_OK: u32 = 8;
/// The device cannot go on before it is reset. Only the device sets it.
pub const DEVICE_NEEDS_RESET: u32 = 64;
/// The driver has given the device up.
pub const FAILED: u32 = 128;

/// A step that a driver takes by setting a bit of the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing hangs on it.
    Note(u32),
    /// The driver wants its features accepted.
    AcceptFeatures,
    /// The driver wants the device to run.
    Start,
}

/// The steps that lead from `current` to `wanted`, in the order in which a driver has to take them; empty when the driver
/// may not go there: it would take a bit back, or skip a step.
pub(super) fn steps(current: u32, wanted: u32) -> Vec<Step> {
    // The driver writes back what it has read, so the device's own bit may be among the bits.
    let current = current & !DEVICE_NEEDS_RESET;
    let wanted = wanted & !DEVICE_NEEDS_RESET;
    if wanted & current != current {
        return Vec::new();
    }
    let mut reached = current;
    let mut steps = Vec::new();
    for (bit, needs, step) in [
        (ACKNOWLEDGE, 0, Step::Note(ACKNOWLEDGE)),
        (DRIVER, ACKNOWLEDGE, Step::Note(DRIVER)),
        (FEATURES_OK, ACKNOWLEDGE | DRIVER, Step::AcceptFeatures),
        (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK, Step::Start),
        (FAILED, 0, Step::Note(FAILED)),
    ] {
        if wanted & !current & bit == 0 {
            continue;
        }
        if reached & needs != needs || reached & FAILED != 0 {
            return Vec::new();
        }
        reached |= bit;
        steps.push(step);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_goes_step_by_step() {
        assert_eq!(steps(0, ACKNOWLEDGE), [Step::Note(ACKNOWLEDGE)]);
        assert_eq!(steps(1, 3), [Step::Note(DRIVER)]);
        assert_eq!(steps(3, 11), [Step::AcceptFeatures]);
        assert_eq!(steps(11, 15), [Step::Start]);
    }

    #[test]
    fn several_bits_at_once_are_taken_in_order() {
        assert_eq!(steps(0, 15), [Step::Note(ACKNOWLEDGE), Step::Note(DRIVER), Step::AcceptFeatures, Step::Start]);
    }

    #[test]
    fn skipped_steps_and_bits_taken_back_are_refused() {
        assert_eq!(steps(0, DRIVER_OK), []);
        assert_eq!(steps(3, 3 | DRIVER_OK), []);
        assert_eq!(steps(15, 11), []);
        assert_eq!(steps(ACKNOWLEDGE | FAILED, ACKNOWLEDGE | FAILED | DRIVER), []);
    }

    #[test]
    fn unknown_bits_and_the_devices_own_lead_nowhere() {
        assert_eq!(steps(15, 15 | DEVICE_NEEDS_RESET), []);
        assert_eq!(steps(0, 0xffff_ff00), []);
    }
}
