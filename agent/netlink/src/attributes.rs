// SPDX-License-Identifier: Apache-2.0
//! The attributes that follow a message's header, and those within attributes.

/// Padding unit.
const ALIGN: usize = 4;
/// Bytes in front of an attribute's value: length and kind.
const HEADER_LEN: usize = 4;
/// The bits of a kind that say how the value is coded.
const KIND_MASK: u16 = 0x3fff;

/// An attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Its kind.
    pub kind: u16,
    /// Its value.
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// The value as a number; `None` when it has another length.
    #[must_use]
    pub fn number(&self) -> Option<u32> {
        self.value.try_into().ok().map(u32::from_ne_bytes)
    }

    /// The value as text, up to its NUL; what is not UTF-8 is no text.
    #[must_use]
    pub fn text(&self) -> Option<&'a str> {
        let end = self.value.iter().position(|byte| *byte == 0).unwrap_or(self.value.len());
        std::str::from_utf8(self.value.get(..end)?).ok()
    }

    /// The attributes within.
    #[must_use]
    pub fn nested(&self) -> Attributes<'a> {
        Attributes::new(self.value)
    }
}

/// Attributes one after the other; ends at the first that is not whole.
#[derive(Debug, Clone, Copy)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Those in `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Them all, as they are written.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// The first of a kind.
    #[must_use]
    pub fn find_kind(mut self, kind: u16) -> Option<Attribute<'a>> {
        self.find(|attribute| attribute.kind == kind)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let ([l0, l1, k0, k1], _) = self.0.split_first_chunk::<HEADER_LEN>()?;
        let len = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let value = self.0.get(HEADER_LEN..len)?;
        self.0 = self.0.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some(Attribute { kind: u16::from_ne_bytes([*k0, *k1]) & KIND_MASK, value })
    }
}

/// Adds an attribute to `bytes`, whose value `fill` adds.
pub(crate) fn put(bytes: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.extend([0; 2]);
    bytes.extend(kind.to_ne_bytes());
    fill(bytes);
    // Callers' values are names, addresses and small tables; one of 64 KiB would be refused by the kernel as malformed.
    let len = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
    if let Some(place) = bytes.get_mut(start..start + 2) {
        place.copy_from_slice(&len.to_ne_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back() {
        let mut bytes = Vec::new();
        put(&mut bytes, 3, |value| value.extend(b"eth0\0"));
        put(&mut bytes, 0x8012, |value| put(value, 1, |inner| inner.extend(7_u32.to_ne_bytes())));

        let found: Vec<_> = Attributes::new(&bytes).collect();

        assert_eq!(bytes.len() % ALIGN, 0);
        assert_eq!(found.iter().map(|attribute| attribute.kind).collect::<Vec<_>>(), [3, 0x12]);
        assert_eq!(found[0].text(), Some("eth0"));
        assert_eq!(found[1].nested().find_kind(1).unwrap().number(), Some(7));
    }

    #[test]
    fn what_is_not_whole_ends_the_list() {
        for bytes in [&[8, 0, 1, 0, 1][..], &[3, 0, 1, 0], &[0, 0, 0, 0], &[4, 0]] {
            assert!(Attributes::new(bytes).next().is_none(), "{bytes:?}");
        }
    }
}
