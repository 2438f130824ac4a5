// SPDX-License-Identifier: Apache-2.0
//! A resolver of the host's that containers find at a loopback address, which in the guest is nobody's: the agent takes the
//! questions there, and the host asks them and brings the answers. Neither looks into them (RFC 1035, section 4.2).

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Where questions are taken.
const PLACE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11)), 53);

/// How many questions can be under way, and how many connections there can be.
const QUESTIONS: usize = 64;
const CONNECTIONS: usize = 32;

/// How long an answer may take, and how long a connection is kept on which nothing is asked.
const LIMIT: Duration = Duration::from_secs(20);

/// How long nothing is taken after that has failed.
const RETRY: Duration = Duration::from_millis(100);

/// A question.
#[derive(Debug)]
pub(crate) struct Question {
    /// By which its answer is known.
    pub(crate) id: u64,
    pub(crate) message: Vec<u8>,
    /// It came over TCP, and so may its answer be longer than a datagram.
    pub(crate) over_tcp: bool,
}

/// Takes questions while it is on.
#[derive(Debug, Default)]
pub(crate) struct Resolver {
    questions: Arc<Questions>,
    /// Those that take them; none while it is off.
    takers: Mutex<JoinSet<()>>,
}

impl Resolver {
    /// Turns it on or off.
    ///
    /// # Errors
    ///
    /// Its place is taken.
    pub(super) fn turn(&self, on: bool) -> io::Result<()> {
        // Nothing panics while the lock is held.
        let mut takers = self.takers.lock().unwrap_or_else(PoisonError::into_inner);
        if on != takers.is_empty() {
            return Ok(());
        }
        *takers = if on { take(&self.questions, PLACE)?.0 } else { JoinSet::new() };
        Ok(())
    }

    /// The next question; none is lost when this is cancelled.
    pub(crate) async fn next(&self) -> Question {
        loop {
            // The other end is held by the same value.
            if let Some(question) = self.questions.receiver.lock().await.recv().await {
                return question;
            }
        }
    }

    /// Brings the answer to a question; an empty one is none. Whoever asked may be gone.
    pub(crate) fn answer(&self, id: u64, message: Vec<u8>) {
        if let Some(asker) = self.questions.asked().askers.remove(&id) {
            let _ = asker.send(message);
        }
    }
}

/// What is asked, and who waits for answers.
#[derive(Debug)]
struct Questions {
    sender: mpsc::Sender<Question>,
    receiver: tokio::sync::Mutex<mpsc::Receiver<Question>>,
    asked: Mutex<Asked>,
    room: Semaphore,
}

#[derive(Debug, Default)]
struct Asked {
    last_id: u64,
    askers: HashMap<u64, oneshot::Sender<Vec<u8>>>,
}

impl Default for Questions {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(QUESTIONS);
        Self { sender, receiver: receiver.into(), asked: Mutex::default(), room: Semaphore::new(QUESTIONS) }
    }
}

impl Questions {
    fn asked(&self) -> MutexGuard<'_, Asked> {
        // Nothing panics while the lock is held.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to a question, if one comes in time.
    async fn ask(&self, message: Vec<u8>, over_tcp: bool) -> Option<Vec<u8>> {
        let _place = self.room.acquire().await.ok()?;
        let (asker, answer) = oneshot::channel();
        let id = {
            let mut asked = self.asked();
            asked.last_id += 1;
            let id = asked.last_id;
            asked.askers.insert(id, asker);
            id
        };
        let answered = timeout(LIMIT, async {
            self.sender.send(Question { id, message, over_tcp }).await.ok()?;
            answer.await.ok()
        });
        let answer = answered.await.ok().flatten();
        self.asked().askers.remove(&id);
        answer.filter(|message| !message.is_empty())
    }
}

/// Starts to take what is asked at `place`, and tells where that is.
fn take(questions: &Arc<Questions>, place: SocketAddr) -> io::Result<(JoinSet<()>, SocketAddr)> {
    let socket = UdpSocket::bind(place)?;
    let place = socket.local_addr()?;
    let listener = TcpListener::bind(place)?;
    socket.set_nonblocking(true)?;
    listener.set_nonblocking(true)?;
    let (socket, listener) = (tokio::net::UdpSocket::from_std(socket)?, tokio::net::TcpListener::from_std(listener)?);
    let mut takers = JoinSet::new();
    takers.spawn(take_datagrams(Arc::clone(questions), socket));
    takers.spawn(take_connections(Arc::clone(questions), listener));
    Ok((takers, place))
}

async fn take_datagrams(questions: Arc<Questions>, socket: tokio::net::UdpSocket) {
    let socket = Arc::new(socket);
    let room = Arc::new(Semaphore::new(QUESTIONS));
    let mut asking = JoinSet::new();
    let mut buffer = vec![0; usize::from(u16::MAX)];
    // What there is no room for waits in the socket, which the kernel bounds. The semaphore is never closed.
    while let Ok(place) = Arc::clone(&room).acquire_owned().await {
        while asking.try_join_next().is_some() {}
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            sleep(RETRY).await;
            continue;
        };
        let (questions, socket, message) = (Arc::clone(&questions), Arc::clone(&socket), buffer[..len].to_vec());
        asking.spawn(async move {
            if let Some(answer) = questions.ask(message, false).await {
                // Whoever asked may be gone.
                let _ = socket.send_to(&answer, from).await;
            }
            drop(place);
        });
    }
}

async fn take_connections(questions: Arc<Questions>, listener: tokio::net::TcpListener) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    while let Ok(place) = Arc::clone(&room).acquire_owned().await {
        while connections.try_join_next().is_some() {}
        let Ok((connection, _)) = listener.accept().await else {
            sleep(RETRY).await;
            continue;
        };
        let questions = Arc::clone(&questions);
        connections.spawn(async move {
            // An error is how one shows that has gone.
            let _ = serve(&questions, connection).await;
            drop(place);
        });
    }
}

/// Answers what is asked on a connection, until no more is.
async fn serve(questions: &Questions, mut connection: TcpStream) -> io::Result<()> {
    loop {
        let len = timeout(LIMIT, connection.read_u16()).await??;
        let mut message = vec![0; usize::from(len)];
        timeout(LIMIT, connection.read_exact(&mut message)).await??;
        let answer = questions.ask(message, true).await.ok_or(io::ErrorKind::TimedOut)?;
        let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let framed = [&len.to_be_bytes()[..], &answer].concat();
        timeout(LIMIT, connection.write_all(&framed)).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A resolver at a place that nobody has.
    fn on() -> (Resolver, SocketAddr) {
        let resolver = Resolver::default();
        let (takers, place) = take(&resolver.questions, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        *resolver.takers.lock().unwrap() = takers;
        (resolver, place)
    }

    /// Answers the next question with itself and one more byte.
    async fn answer_one(resolver: &Resolver) -> bool {
        let Question { id, mut message, over_tcp } = resolver.next().await;
        message.push(b'!');
        resolver.answer(id, message);
        over_tcp
    }

    #[tokio::test(flavor = "current_thread")]
    async fn questions_come_with_their_kind_and_answers_go_to_who_asked() {
        let (resolver, place) = on();
        let datagrams = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        datagrams.connect(place).await.unwrap();
        datagrams.send(b"small").await.unwrap();
        assert!(!answer_one(&resolver).await);
        let mut buffer = [0; 100];
        let len = datagrams.recv(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..len], b"small!");

        let mut connection = TcpStream::connect(place).await.unwrap();
        for _ in 0..2 {
            connection.write_all(b"\0\x05large").await.unwrap();
            assert!(answer_one(&resolver).await);
            let mut answer = [0; 8];
            connection.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"\0\x06large!");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn without_an_answer_a_connection_is_closed() {
        let (resolver, place) = on();
        let mut connection = TcpStream::connect(place).await.unwrap();
        connection.write_all(b"\0\x01?").await.unwrap();
        let question = resolver.next().await;
        // Nobody has asked that.
        resolver.answer(question.id + 1, vec![1]);
        resolver.answer(question.id, Vec::new());

        assert_eq!(connection.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(resolver.questions.asked().askers.is_empty());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn it_can_be_turned_off() {
        let (resolver, place) = on();
        resolver.turn(true).unwrap();
        resolver.turn(false).unwrap();
        tokio::task::yield_now().await;

        assert!(TcpStream::connect(place).await.is_err());
    }
}
