// SPDX-License-Identifier: Apache-2.0
//! What is not passed on is warned of once, for as long as it is so.

use std::path::Path;

use crate::logging;

/// How much is named. A namespace may have thousands of routes.
const MOST: usize = 64;

/// What has been warned of and still is so.
#[derive(Debug, Default)]
pub(super) struct Warned {
    texts: Vec<String>,
    /// Whether it has been said that there is more.
    is_cut: bool,
}

impl Warned {
    /// Warns of what there is now of a namespace, as far as that has not been done.
    pub(super) fn warn(&mut self, namespace: &Path, now: &[String]) {
        for what in self.news(now) {
            logging::warn(format_args!("of the network namespace {}, {what}", namespace.display()));
        }
    }

    fn news(&mut self, now: &[String]) -> Vec<String> {
        self.texts.retain(|text| now.contains(text));
        self.is_cut &= now.len() > MOST;
        let mut news = Vec::new();
        for text in now {
            if self.texts.contains(text) {
                continue;
            }
            if self.texts.len() < MOST {
                self.texts.push(text.clone());
                news.push(text.clone());
            } else if !self.is_cut {
                self.is_cut = true;
                news.push("more is not passed on, or not as it is, than is told here".to_owned());
            }
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(numbers: std::ops::Range<usize>) -> Vec<String> {
        numbers.map(|number| number.to_string()).collect()
    }

    #[test]
    fn each_thing_is_told_once_while_it_is_so() {
        let mut warned = Warned::default();
        assert_eq!(warned.news(&texts(0..2)), texts(0..2));
        assert_eq!(warned.news(&texts(0..3)), texts(2..3));
        assert_eq!(warned.news(&texts(2..3)), [""; 0]);
        assert_eq!(warned.news(&texts(0..3)), texts(0..2));
    }

    #[test]
    fn however_much_there_is_little_is_kept_and_told() {
        let mut warned = Warned::default();
        assert_eq!(warned.news(&texts(0..1000)).len(), MOST + 1);
        assert_eq!(warned.news(&texts(0..1000)), [""; 0]);
        assert_eq!(warned.news(&texts(1000..3000)).len(), MOST);
        assert_eq!(warned.texts.len(), MOST);
    }
}
