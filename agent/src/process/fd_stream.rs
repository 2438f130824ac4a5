// SPDX-License-Identifier: Apache-2.0
//! A pipe end, socket or terminal as an asynchronous byte stream.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use crate::sys;
use bulkhead_protocol::splice::Socket;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// An owned descriptor that is read and written without blocking.
#[derive(Debug)]
pub struct FdStream {
    descriptor: AsyncFd<OwnedFd>,
}

impl FdStream {
    /// Takes a pipe end, socket or terminal. It is made non-blocking, and with it every other descriptor of the same
    /// open file.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&descriptor)?;
        rustix::fs::fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        // Which directions are used is not known here; a pipe end reports only its own.
        let descriptor = sys::watch_descriptor(descriptor, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { descriptor })
    }

    /// Reads some bytes; 0 at the end.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.descriptor.readable().await?;
            if let Ok(result) = ready.try_io(|descriptor| Ok(rustix::io::read(descriptor, &mut *buffer)?)) {
                return result;
            }
        }
    }

    /// Reads what is there, without waiting: `None` if there is nothing, 0 at the end.
    pub fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        // By the runtime's knowledge first, so that it learns when there is nothing more; that can be behind the times.
        let known =
            self.descriptor.try_io(Interest::READABLE, |descriptor| Ok(rustix::io::read(descriptor, &mut *buffer)?));
        match known {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result.map(Some),
        }
        match rustix::io::read(self.descriptor.get_ref(), buffer) {
            Ok(len) => Ok(Some(len)),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// How much a pipe or a socket holds. `None` for anything else: a terminal may hold more than it tells.
    pub fn held(&self) -> Option<u64> {
        let status = rustix::fs::fstat(&self.descriptor).ok()?;
        if !matches!(FileType::from_raw_mode(status.st_mode), FileType::Fifo | FileType::Socket) {
            return None;
        }
        rustix::io::ioctl_fionread(&self.descriptor).ok()
    }

    /// Waits until there is something to read, or the end.
    pub async fn readable(&self) -> io::Result<()> {
        self.descriptor.readable().await.map(drop)
    }

    /// Waits until something can be written, or has failed.
    pub async fn writable(&self) -> io::Result<()> {
        self.descriptor.writable().await.map(drop)
    }

    /// Writes all of `bytes`.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.descriptor.writable().await?;
            if let Ok(result) = ready.try_io(|descriptor| Ok(rustix::io::write(descriptor, bytes)?)) {
                bytes = &bytes[result?..];
            }
        }
        Ok(())
    }

    /// For a socket: tells the other side that it will get no more bytes.
    pub fn shutdown_write(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.descriptor, Shutdown::Write)?)
    }
}

impl AsFd for FdStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.get_ref().as_fd()
    }
}

impl Socket for FdStream {
    async fn readable(&self) -> io::Result<()> {
        Self::readable(self).await
    }

    fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        Self::read_now(self, buffer)
    }

    async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        Self::write_all(self, bytes).await
    }
}

impl AsyncRead for FdStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.descriptor.poll_read_ready(context))?;
            let result = ready.try_io(|descriptor| Ok(rustix::io::read(descriptor, out.initialize_unfilled())?));
            if let Ok(result) = result {
                out.advance(result?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for FdStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.descriptor.poll_write_ready(context))?;
            if let Ok(result) = ready.try_io(|descriptor| Ok(rustix::io::write(descriptor, bytes)?)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shutdown_write())
    }
}
