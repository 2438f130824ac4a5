// SPDX-License-Identifier: Apache-2.0
//! Unix sockets of the host that are bound into a container.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use super::user_namespace;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(question_and_answer),
    case!(ten_mebibytes_each_way),
    case!(more_at_once_than_there_is_room_for),
    case!(last_words),
    case!(server_that_goes_away),
    case!(client_that_goes_away),
    case!(server_that_is_started_again),
    case!(owner_mode_and_read_only),
    case!(created_container_and_exec),
    case!(user_namespace),
    case!(sockets_in_a_folder),
];

/// How long a server waits for what is to come.
const LIMIT: Duration = Duration::from_secs(100);

/// Where the container has the socket.
const PLACE: &str = "/run/host.sock";

/// Runs a Python program, which has a way to the socket.
fn python(env: &Env, socket: &Path, program: &str) -> Result<Bundle> {
    let mut bundle = Bundle::debian(env)?;
    let lines = "import os, socket, sys, threading\n\
                 def connected():\n    s = socket.socket(socket.AF_UNIX)\n    s.connect('/run/host.sock')\n    return s\n\
                 def rest(s):\n    return b''.join(iter(lambda: s.recv(65536), b''))\n";
    bundle.bind(socket, PLACE, &[]).args(&["python3", "-c", &format!("{lines}{program}")]);
    Ok(bundle)
}

/// A listener in the case's folder, and its path.
fn listener(env: &Env) -> Result<(UnixListener, PathBuf)> {
    let path = env.work.join("s");
    let listener = UnixListener::bind(&path).context(|| format!("listening at {}", path.display()))?;
    Ok((listener, path))
}

/// Serves each connection in a thread, as long as the case runs; what `serve` returns is received.
fn serve<T: Send + 'static>(
    listener: UnixListener,
    serve: impl Fn(UnixStream) -> io::Result<T> + Clone + Send + 'static,
) -> Receiver<io::Result<T>> {
    let (sender, receiver): (Sender<_>, _) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (serve, sender) = (serve.clone(), sender.clone());
            // The case may not want to know.
            thread::spawn(move || drop(sender.send(stream.and_then(serve))));
        }
    });
    receiver
}

/// What came on the next connection that has ended.
fn told<T>(receiver: &Receiver<io::Result<T>>) -> Result<T> {
    Ok(receiver.recv_timeout(LIMIT).context(|| "waiting for the end of a connection".to_owned())??)
}

fn read_all(mut stream: UnixStream) -> io::Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Answers when the other side has sent all that it will.
fn answer(mut stream: UnixStream) -> io::Result<String> {
    let question = read_all(stream.try_clone()?)?;
    write!(stream, "you said {question}")?;
    Ok(question)
}

fn echo(stream: UnixStream) -> io::Result<u64> {
    let count = io::copy(&mut &stream, &mut &stream)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(count)
}

fn question_and_answer(env: &Env) -> Result {
    let (listener, socket) = listener(env)?;
    let questions = serve(listener, answer);
    let program = "s = connected()\ns.sendall(b'hello')\ns.shutdown(socket.SHUT_WR)\nprint(rest(s).decode())";
    let bundle = python(env, &socket, program)?;

    env.run(&bundle)?.output()?.expect_stdout("you said hello\n")?;

    ensure_eq!(told(&questions)?, "hello", "what came");
    Ok(())
}

fn ten_mebibytes_each_way(env: &Env) -> Result {
    const LENGTH: u64 = 10 << 20;
    let (listener, socket) = listener(env)?;
    let counts = serve(listener, echo);
    let program = "data = b''.join(bytes((i * i + j) % 251 for j in range(256)) * 256 for i in range(160))\n\
                   s = connected()\n\
                   def send():\n    s.sendall(data)\n    s.shutdown(socket.SHUT_WR)\n\
                   threading.Thread(target=send).start()\nprint(len(data), rest(s) == data)";
    let bundle = python(env, &socket, program)?;

    env.run(&bundle)?.output()?.expect_stdout(&format!("{LENGTH} True\n"))?;

    ensure_eq!(told(&counts)?, LENGTH, "bytes that the server has seen");
    Ok(())
}

/// All are connected at once, and each is served once those before it are gone.
fn more_at_once_than_there_is_room_for(env: &Env) -> Result {
    const COUNT: usize = 150;
    let (listener, socket) = listener(env)?;
    let counts = serve(listener, echo);
    let program = format!(
        "all = [connected() for _ in range({COUNT})]\n\
         for i, s in enumerate(all): s.sendall(b'%d' % i)\n\
         right = 0\n\
         for i, s in enumerate(all):\n    s.shutdown(socket.SHUT_WR)\n    right += rest(s) == b'%d' % i\n    s.close()\n\
         print(right)"
    );
    let bundle = python(env, &socket, &program)?;

    env.run(&bundle)?.output()?.expect_stdout(&format!("{COUNT}\n"))?;

    for _ in 0..COUNT {
        told(&counts)?;
    }
    Ok(())
}

/// What the container sends right before its end arrives, though nobody there has seen the connection made.
fn last_words(env: &Env) -> Result {
    let (listener, socket) = listener(env)?;
    let words = serve(listener, read_all);
    let bundle = python(env, &socket, "connected().sendall(b'x' * 100000)\nconnected().sendall(b'y')\nos._exit(7)")?;

    env.run(&bundle)?.output()?.expect_code(7)?;

    let mut lengths = [told(&words)?.len(), told(&words)?.len()];
    lengths.sort_unstable();
    ensure_eq!(lengths, [1, 100_000], "bytes that came");
    Ok(())
}

fn server_that_goes_away(env: &Env) -> Result {
    let (listener, socket) = listener(env)?;
    let server = thread::spawn(move || -> io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        // From here on there is no server: but for this one, all connections have ended.
        drop(listener);
        stream.write_all(b"going")
    });
    let program = "s = connected()\nprint(rest(s).decode())\n\
                   try:\n    while True: s.sendall(b'x' * 1000)\n\
                   except OSError: print('nobody listens')\n\
                   try: print('gone' if connected().recv(1) == b'' else 'what?')\n\
                   except OSError: print('gone')";
    let bundle = python(env, &socket, program)?;

    env.run(&bundle)?.output()?.expect_stdout("going\nnobody listens\ngone\n")?;

    match server.join() {
        Ok(served) => Ok(served?),
        Err(_) => fail!("the server panicked"),
    }
}

/// A server that only sends sees that nobody is there any more.
fn client_that_goes_away(env: &Env) -> Result {
    let (listener, socket) = listener(env)?;
    let ends = serve(listener, |mut stream| {
        loop {
            if let Err(error) = stream.write_all(b"tick") {
                return Ok(error.kind());
            }
        }
    });
    let bundle = python(env, &socket, "s = connected()\ns.recv(4, socket.MSG_WAITALL)\ns.close()\ninput()")?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;

    // The second where it has left something unread.
    let end = told(&ends)?;
    let is_gone = matches!(end, io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
    ensure!(is_gone, "what ended the server's sending: {end:?}");
    running.write(b"\n")?;
    running.finish()?.expect_code(0)
}

/// The name in the folder counts: with a file bind it would be the old socket.
fn server_that_is_started_again(env: &Env) -> Result {
    env.only_bulkhead()?;
    let (first, socket) = listener(env)?;
    let program = "while True:\n    line = sys.stdin.readline()\n    if not line: break\n    s = connected()\n\
                   \x20   s.shutdown(socket.SHUT_WR)\n    print(rest(s).decode(), flush=True)";
    let bundle = python(env, &socket, program)?;
    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    let first = thread::spawn(move || -> io::Result<()> { first.accept()?.0.write_all(b"the first") });
    running.write(b"\n")?;
    running.wait_for("the first\n")?;
    ensure_eq!(matches!(first.join(), Ok(Ok(()))), true, "whether the first server has served");

    fs::remove_file(&socket)?;
    let second = UnixListener::bind(&socket)?;
    let _answers = serve(second, |mut stream| stream.write_all(b"the second"));
    running.write(b"\n")?;
    running.wait_for("the second\n")?;
    running.close_stdin();

    running.finish()?.expect_code(0)
}

fn owner_mode_and_read_only(env: &Env) -> Result {
    let (listener, socket) = listener(env)?;
    fs::set_permissions(&socket, Permissions::from_mode(0o620))?;
    chown(&socket, Some(7), Some(8))?;
    let _answers = serve(listener, answer);
    let program = "st = os.stat('/run/host.sock')\nprint(oct(st.st_mode), st.st_uid, st.st_gid)\n\
                   s = connected()\ns.shutdown(socket.SHUT_WR)\nprint(rest(s).decode())\n\
                   os.setgroups([])\nos.setgid(8)\nos.setuid(9)\nconnected()\nprint('group')\n";
    let mut bundle = python(env, &socket, program)?;
    bundle.bind(&socket, "/run/read-only.sock", &["ro"]);
    let other = "import socket\ntry: socket.socket(socket.AF_UNIX).connect('/run/read-only.sock')\n\
                 except PermissionError: print('others not')";
    bundle.add_file("other.py", other, 0o644)?;
    bundle.add_file(
        "all.sh",
        "python3 -c \"$1\" && setpriv --reuid 9 --regid 9 --clear-groups python3 /other.py && \
         setpriv --reuid 7 --regid 9 --clear-groups python3 /other.py && echo owner",
        0o755,
    )?;
    let program = bundle.spec["process"]["args"][2].as_str().unwrap_or_default().to_owned();
    bundle.args(&["sh", "/all.sh", &program]);

    let expected = "0o140620 7 8\nyou said \ngroup\nothers not\nowner\n";
    env.run(&bundle)?.output()?.expect_stdout(expected)
}

fn created_container_and_exec(env: &Env) -> Result {
    let (listener, socket) = listener(env)?;
    let questions = serve(listener, answer);
    let mut bundle = python(env, &socket, "s = connected()\ns.sendall(b'exec')\ns.shutdown(socket.SHUT_WR)\nrest(s)")?;
    let program = bundle.spec["process"]["args"][2].as_str().unwrap_or_default().to_owned();
    bundle.add_file("client.py", program.replace("exec", "init"), 0o644)?;
    bundle.add_file("exec.py", program, 0o644)?;
    bundle.sh("python3 /client.py; sleep 1000");

    let container = Detached::create(env, &bundle)?;
    container.exec("python3 /exec.py").output()?.expect_code(0)?;
    ensure_eq!(told(&questions)?, "exec", "what came before the start");
    container.must(&["start"])?;
    ensure_eq!(told(&questions)?, "init", "what came after the start");
    container.exec("python3 /exec.py").output()?.expect_code(0)?;
    ensure_eq!(told(&questions)?, "exec", "what came from a further process");
    container.must(&["delete", "--force"]).map(drop)
}

/// logger(1) finds a stream socket, and writes there.
fn user_namespace(env: &Env) -> Result {
    let (listener, socket) = listener(env)?;
    fs::set_permissions(&socket, Permissions::from_mode(0o666))?;
    let lines = serve(listener, read_all);
    let mut bundle = user_namespace::bundle(env)?;
    bundle.bind(&socket, "/dev/log", &[]).sh("logger -t bulkhead from a user namespace");

    env.run(&bundle)?.output()?.expect_stdout("")?;

    let line = told(&lines)?;
    ensure_eq!(line.contains("bulkhead: from a user namespace"), true, "whether {line:?} is what was sent");
    Ok(())
}

/// They are seen, and nobody is behind them: a folder is one of files.
fn sockets_in_a_folder(env: &Env) -> Result {
    env.only_bulkhead()?;
    let (_listener, socket) = listener(env)?;
    let folder = env.folder("folder")?;
    let _inside = UnixListener::bind(folder.join("inside"))?;
    let program = "print(oct(os.stat('/folder/inside').st_mode >> 12))\n\
                   try: socket.socket(socket.AF_UNIX).connect('/folder/inside')\n\
                   except ConnectionRefusedError: print('refused')";
    let mut bundle = python(env, &socket, program)?;
    bundle.bind(&folder, "/folder", &[]);

    env.run(&bundle)?.output()?.expect_stdout("0o14\nrefused\n")
}
