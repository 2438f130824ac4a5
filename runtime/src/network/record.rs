// SPDX-License-Identifier: Apache-2.0
//! What is written down of a network, so that it can be undone should its supervisor be killed: the namespace, and the
//! interfaces that were joined.

use std::fmt;
use std::io;
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

/// How the record is written, each time whole, before what it tells of is done.
pub(crate) struct Recorder(Box<Write>);

type Write = dyn Fn(&NetworkRecord) -> io::Result<()> + Send + Sync;

impl Recorder {
    /// One that writes by `write`.
    pub(crate) fn new(write: impl Fn(&NetworkRecord) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Box::new(write))
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Recorder").finish_non_exhaustive()
    }
}

impl Junctions {
    /// An interface is about to be joined: written down first, since who is killed meanwhile takes nothing back.
    pub(super) fn begin(&self, joined: Joined) -> io::Result<()> {
        self.joined().push(joined);
        self.note()
    }

    /// Writes down what is to be undone by now.
    pub(super) fn note(&self) -> io::Result<()> {
        (self.recorder.0)(&self.record())
    }

    /// What is to be undone.
    fn record(&self) -> NetworkRecord {
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
    /// The network that was written down; to be dropped, which undoes it. `None` if its namespace is gone.
    pub(crate) fn reopen(record: NetworkRecord) -> Option<Self> {
        let namespace =
            NetworkNamespace::open(&record.path).ok().filter(|namespace| namespace.inode() == record.inode)?;
        let joined = record.links.into_iter().map(|link| Joined {
            link: link.index,
            tap: link.tap,
            is_prepared: link.prepared,
            is_answered: false,
        });
        // The record goes with the folder that it is in.
        let recorder = Recorder::new(|_| Ok(()));
        Some(Self { junctions: Junctions::new(namespace, joined.collect(), recorder), claim: None })
    }
}
