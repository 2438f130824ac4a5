// SPDX-License-Identifier: Apache-2.0
//! What is written down of a network, so that it can be undone should its supervisor be killed: the namespace, and the
//! interfaces that were joined.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Joined, Junctions, Network, NetworkNamespace};

/// The record.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetworkRecord {
    path: PathBuf,
    /// Another namespace may be at the path by now.
    inode: u64,
    links: Vec<RecordedLink>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RecordedLink {
    index: i32,
    tap: i32,
    prepared: bool,
}

impl Junctions {
    /// What is to be undone.
    pub(super) fn record(&self) -> NetworkRecord {
        let joined = self.joined();
        let links = joined.iter().map(|joined| RecordedLink {
            index: joined.link,
            tap: joined.tap,
            prepared: joined.is_prepared,
        });
        NetworkRecord { path: self.namespace.path().to_owned(), inode: self.namespace.inode(), links: links.collect() }
    }
}

impl Network {
    /// What is to be undone.
    pub(crate) fn record(&self) -> NetworkRecord {
        self.junctions.record()
    }

    /// The network that was written down; to be dropped, which undoes it. `None` if its namespace is gone.
    pub(crate) fn reopen(record: NetworkRecord) -> Option<Self> {
        let namespace =
            NetworkNamespace::open(&record.path).ok().filter(|namespace| namespace.inode() == record.inode)?;
        let joined =
            record.links.into_iter().map(|link| Joined { link: link.index, tap: link.tap, is_prepared: link.prepared });
        Some(Self { junctions: Junctions::new(namespace, joined.collect()), claim: None })
    }
}
