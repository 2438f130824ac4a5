// SPDX-License-Identifier: Apache-2.0
//! The URIs by which containerd names streams, taken apart by the rules of Go's `net/url`, as its own shim does it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// What comes after `SCHEME://`, decoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Uri {
    pub(super) path: PathBuf,
    /// In the order of their keys' first appearance; of one that comes again, the first value.
    pub(super) query: Vec<(OsString, OsString)>,
}

impl Uri {
    /// Takes it apart; `None` if it is none, or has no path. The name of a host before the path is passed over.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.split('#').next().unwrap_or_default();
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        let path = decode(&place[place.find('/')?..], false)?;
        Some(Self { path: path.into(), query: pairs(query) })
    }
}

/// The pairs of a query; one that is malformed is none.
fn pairs(query: &str) -> Vec<(OsString, OsString)> {
    let mut pairs: Vec<(OsString, OsString)> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty() && !pair.contains(';')) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if let (Some(key), Some(value)) = (decode(key, true), decode(value, true))
            && pairs.iter().all(|(known, _)| *known != key)
        {
            pairs.push((key, value));
        }
    }
    pairs
}

/// Replaces `%XX`, and in a query `+`; `None` if a `%` begins nothing of the kind.
fn decode(text: &str, in_query: bool) -> Option<OsString> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => hex(bytes.next()?)? << 4 | hex(bytes.next()?)?,
            b'+' if in_query => b' ',
            byte => byte,
        });
    }
    Some(OsString::from_vec(decoded))
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> (String, Vec<(String, String)>) {
        let uri = Uri::parse(text).unwrap();
        let text = |text: OsString| text.into_string().unwrap();
        (text(uri.path.into()), uri.query.into_iter().map(|(key, value)| (text(key), text(value))).collect())
    }

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn paths_and_queries_are_decoded() {
        let nerdctl = "/usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2fnerdctl";
        let expected = owned(&[("_NERDCTL_INTERNAL_LOGGING", "/var/lib/nerdctl")]);
        assert_eq!(parts(nerdctl), ("/usr/bin/nerdctl".to_owned(), expected));
        assert_eq!(parts("/a%20b+c?k+1=v%26w+x"), ("/a b+c".to_owned(), owned(&[("k 1", "v&w x")])));
        assert_eq!(parts("host/a#fragment?x=y"), ("/a".to_owned(), Vec::new()));
        assert_eq!(Uri::parse("/%ff").unwrap().path.into_os_string().into_vec(), b"/\xff");
    }

    #[test]
    fn each_key_comes_once_and_has_a_value() {
        let query = owned(&[("b", "1"), ("flag", ""), ("a", "x=y")]);
        assert_eq!(parts("/p?b=1&&flag&a=x=y&b=2&bad=%zz&c;d=1").1, query);
    }

    #[test]
    fn what_has_no_path_or_a_bad_one_is_none() {
        for text in ["", "host", "?a=b", "/a%", "/a%4", "/a%zz"] {
            assert_eq!(Uri::parse(text), None, "{text:?}");
        }
    }
}
