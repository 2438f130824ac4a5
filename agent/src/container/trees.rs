// SPDX-License-Identifier: Apache-2.0
//! Which shared trees the containers use: one that several use is let go of with the last of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::storage::SharedTree;

/// How many containers use each tree.
#[derive(Debug, Default)]
pub(super) struct TreeUses(Mutex<BTreeMap<SharedTree, usize>>);

impl TreeUses {
    fn counts(&self) -> MutexGuard<'_, BTreeMap<SharedTree, usize>> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a container uses these, until the result is dropped.
    pub(super) fn begin(self: &Arc<Self>, places: Vec<SharedTree>) -> UsedTrees {
        let mut tops: Vec<SharedTree> = places.iter().map(SharedTree::top).collect();
        tops.sort_unstable();
        tops.dedup();
        let mut counts = self.counts();
        for top in &tops {
            *counts.entry(top.clone()).or_default() += 1;
        }
        drop(counts);
        UsedTrees { uses: Arc::clone(self), tops }
    }
}

/// The trees that a container uses, each once.
#[derive(Debug)]
pub(crate) struct UsedTrees {
    uses: Arc<TreeUses>,
    tops: Vec<SharedTree>,
}

impl UsedTrees {
    /// All of them, by their tops.
    pub(crate) fn all(&self) -> &[SharedTree] {
        &self.tops
    }

    /// Those that no other container uses.
    pub(super) fn own(&self) -> Vec<&SharedTree> {
        let counts = self.uses.counts();
        self.tops.iter().filter(|top| counts.get(top) == Some(&1)).collect()
    }
}

impl Drop for UsedTrees {
    fn drop(&mut self) {
        let mut counts = self.uses.counts();
        for top in &self.tops {
            if let Some(count) = counts.get_mut(top) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(top);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent as wire;

    use super::*;

    fn place(tree: &str, path: &str) -> SharedTree {
        let device = wire::ShareDevice::SHARED.into();
        let (tree, path) = (tree.to_owned(), path.to_owned());
        SharedTree::from_wire(&wire::SharePath { device, tree, path, ..Default::default() }).unwrap()
    }

    #[test]
    fn a_tree_is_its_last_users_own() {
        let uses = Arc::new(TreeUses::default());

        let first = uses.begin(vec![place("a", ""), place("a", "x"), place("b", "")]);
        let second = uses.begin(vec![place("b", "y")]);
        assert_eq!(first.all(), [place("a", ""), place("b", "")]);
        assert_eq!(first.own(), [&place("a", "")]);
        assert!(second.own().is_empty());
        drop(first);

        assert_eq!(second.own(), [&place("b", "")]);
        drop(second);
        assert!(uses.counts().is_empty());
    }
}
