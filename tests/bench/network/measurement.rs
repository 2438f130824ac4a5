// SPDX-License-Identifier: Apache-2.0
//! What is measured, and the orders by which a peer is told to: a line of words, such as `send 4 3`.

/// One thing that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measurement {
    /// What so many TCP connections carry from the peer to the host together.
    Send { streams: u32 },
    /// The same from the host to the peer.
    Receive { streams: u32 },
    /// How long one byte takes to the host and back.
    RoundTrip,
}

impl Measurement {
    pub(crate) const ALL: [Self; 5] = [
        Self::Send { streams: 1 },
        Self::Send { streams: 4 },
        Self::Receive { streams: 1 },
        Self::Receive { streams: 4 },
        Self::RoundTrip,
    ];

    /// For people.
    pub(crate) fn name(self) -> String {
        let (way, streams) = match self {
            Self::Send { streams } => ("sends", streams),
            Self::Receive { streams } => ("receives", streams),
            Self::RoundTrip => return "round trip of a byte, µs".to_owned(),
        };
        format!("{way}, {streams} stream{}, Mbit/s", if streams == 1 { "" } else { "s" })
    }

    /// The order to measure it for so long, of which [`Self::parse`] makes this again.
    pub(crate) fn order(self, seconds: u32) -> String {
        match self {
            Self::Send { streams } => format!("send {streams} {seconds}"),
            Self::Receive { streams } => format!("receive {streams} {seconds}"),
            Self::RoundTrip => format!("round-trip 1 {seconds}"),
        }
    }

    /// What is to be measured, and for how many seconds.
    pub(crate) fn parse(order: &str) -> Option<(Self, u32)> {
        let mut words = order.split_whitespace();
        let (what, streams, seconds) = (words.next()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let measurement = match what {
            "send" => Self::Send { streams },
            "receive" => Self::Receive { streams },
            "round-trip" => Self::RoundTrip,
            _ => return None,
        };
        Some((measurement, seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_understood() {
        for measurement in Measurement::ALL {
            assert_eq!(Measurement::parse(&measurement.order(3)), Some((measurement, 3)));
        }
        assert_eq!(Measurement::parse("send 4"), None);
        assert_eq!(Measurement::parse("sing 4 3"), None);
    }
}
