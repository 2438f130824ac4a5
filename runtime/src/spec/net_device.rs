// SPDX-License-Identifier: Apache-2.0
//! How a network device is to be served: the annotations `io.bulkhead.net.…`.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::ops::RangeInclusive;

use bulkhead_vmm::config::{Limits, Rate};

use super::error::FieldError;

const VHOST: &str = "io.bulkhead.net.vhost";
const RX_BYTES: &str = "io.bulkhead.net.rx_bytes_per_second";
const TX_BYTES: &str = "io.bulkhead.net.tx_bytes_per_second";
const RX_PACKETS: &str = "io.bulkhead.net.rx_packets_per_second";
const TX_PACKETS: &str = "io.bulkhead.net.tx_packets_per_second";
/// All of them.
pub(super) const ANNOTATIONS: [&str; 5] = [VHOST, RX_BYTES, TX_BYTES, RX_PACKETS, TX_PACKETS];

/// What a rate may be: below, an exchange of one frame takes too long for anything; above, it is none.
const BYTES: RangeInclusive<u64> = 1_000..=1_000_000_000_000;
const PACKETS: RangeInclusive<u64> = 1..=1_000_000_000;

/// What the annotations say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct NetSettings {
    /// Whether the host's kernel is to move the frames; `None` where it can.
    pub(crate) vhost: Option<bool>,
    /// How much may go.
    pub(crate) limits: Limits,
}

impl NetSettings {
    pub(super) fn translate(annotations: &HashMap<String, String>) -> Result<Self, FieldError> {
        let vhost = flag(annotations, VHOST)?;
        let rate = |bytes, packets| {
            Ok(Rate {
                bytes_per_second: number(annotations, bytes, BYTES)?,
                packets_per_second: number(annotations, packets, PACKETS)?,
            })
        };
        let limits = Limits { rx: rate(RX_BYTES, RX_PACKETS)?, tx: rate(TX_BYTES, TX_PACKETS)? };
        if vhost == Some(true) && limits.are_set() {
            let expected = "false where a rate is limited: the host's kernel keeps to none";
            return Err(FieldError::invalid(format!("annotations[{VHOST:?}]"), "true", expected));
        }
        Ok(Self { vhost, limits })
    }
}

/// A value that is true or false.
pub(super) fn flag(annotations: &HashMap<String, String>, key: &str) -> Result<Option<bool>, FieldError> {
    match annotations.get(key).map(String::as_str) {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(text) => Err(FieldError::invalid(format!("annotations[{key:?}]"), text, "true or false")),
    }
}

fn number(
    annotations: &HashMap<String, String>,
    key: &str,
    range: RangeInclusive<u64>,
) -> Result<Option<NonZeroU64>, FieldError> {
    let Some(text) = annotations.get(key) else { return Ok(None) };
    match text.parse().ok().filter(|value: &NonZeroU64| range.contains(&value.get())) {
        Some(value) => Ok(Some(value)),
        None => {
            let expected = format!("a number from {} to {}", range.start(), range.end());
            Err(FieldError::invalid(format!("annotations[{key:?}]"), text, expected))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(key: &str, value: &str) -> Result<NetSettings, String> {
        NetSettings::translate(&HashMap::from([(key.to_owned(), value.to_owned())])).map_err(|error| error.to_string())
    }

    #[test]
    fn vhost_is_wanted_or_not() {
        assert_eq!(NetSettings::translate(&HashMap::new()).unwrap().vhost, None);
        assert_eq!(settings(VHOST, "true").unwrap().vhost, Some(true));
        assert_eq!(settings(VHOST, "false").unwrap().vhost, Some(false));
        let error = settings(VHOST, "yes").unwrap_err();
        assert_eq!(error, "annotations[\"io.bulkhead.net.vhost\"]: \"yes\" is not true or false");
    }

    #[test]
    fn rates_are_within_bounds_and_without_vhost() {
        let limits = settings(RX_BYTES, "125000").unwrap().limits;
        assert_eq!((limits.rx.bytes_per_second.map(NonZeroU64::get), limits.tx), (Some(125_000), Rate::default()));
        assert_eq!(settings(TX_PACKETS, "1").unwrap().limits.tx.packets_per_second.map(NonZeroU64::get), Some(1));
        for (key, value) in
            [(RX_BYTES, "999"), (TX_BYTES, "0"), (TX_BYTES, "1e6"), (RX_PACKETS, "-1"), (TX_PACKETS, "")]
        {
            let error = settings(key, value).unwrap_err();
            assert!(error.starts_with(&format!("annotations[{key:?}]: {value:?} is not a number from 1")), "{error}");
        }
        let both = HashMap::from([(VHOST.to_owned(), "true".to_owned()), (RX_PACKETS.to_owned(), "9".to_owned())]);
        assert!(NetSettings::translate(&both).is_err());
    }
}
