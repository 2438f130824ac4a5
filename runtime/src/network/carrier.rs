// SPDX-License-Identifier: Apache-2.0
//! Whether an interface leads somewhere: the link of the guest's device is up where it does.

use super::Passed;
use super::link::Link;

/// An interface that leads somewhere from now on, or no longer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Carrier {
    pub(crate) id: i32,
    pub(crate) name: String,
    pub(crate) on: bool,
}

/// Which of the machine's interfaces do not lead where they have led, or lead where they have not. They do from then on.
pub(super) fn changes(passed: &mut [Passed], links: &[Link]) -> Vec<Carrier> {
    let mut changed = Vec::new();
    for passed in passed {
        let link = links.iter().find(|link| link.index == passed.index && link.carrier != passed.carrier);
        if let Some(Link { index, name, carrier, .. }) = link {
            passed.carrier = *carrier;
            changed.push(Carrier { id: *index, name: name.clone(), on: *carrier });
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_carrier_is_told_once() {
        let mut passed = [3, 5].map(|index| Passed { index, mac: [2; 6], carrier: true });
        let link = |index, carrier| Link { index, name: format!("eth{index}"), carrier, ..Link::default() };
        let lost = [link(3, true), link(4, false), link(5, false)];

        assert_eq!(changes(&mut passed, &lost), [Carrier { id: 5, name: "eth5".to_owned(), on: false }]);
        assert_eq!(changes(&mut passed, &lost), []);
        assert_eq!(changes(&mut passed, &[link(5, true)]).len(), 1);
    }
}
