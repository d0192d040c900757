//! A bad line: a loopback port that answers in a way no server should.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// How it misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Accepts, and never says a word.
    Hang,
    /// Closes every connection at once.
    Reset,
    /// Answers bytes that are no HTTP.
    Garbage,
    /// Answers 200 with a page, as some web server would.
    ForeignServer,
    /// Answers 200 and speaks protocol version 99.
    OtherVersion,
    /// Answers 500.
    ServerError,
    /// Answers 200 with a body that ends early.
    Truncated,
}

/// A misbehaving port; closed when dropped.
#[derive(Debug)]
pub struct BadLine {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    connections: Arc<AtomicUsize>,
    closed: Arc<AtomicBool>,
}

impl BadLine {
    /// Opens the port.
    ///
    /// # Errors
    /// Where no port can be had.
    pub fn open(fault: Fault) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let url = format!("http://{}", listener.local_addr()?);
        let connections = Arc::new(AtomicUsize::new(0));
        let closed = Arc::new(AtomicBool::new(false));
        let (counted, ended) = (Arc::clone(&connections), Arc::clone(&closed));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                counted.fetch_add(1, Ordering::Relaxed);
                let ended = Arc::clone(&ended);
                thread::spawn(move || misbehave(stream, fault, &ended));
            }
        });
        Ok(Self { url, connections, closed })
    }

    /// Connections so far: a test that made none has tested nothing.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for BadLine {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        if let Some(address) = self.url.strip_prefix("http://") {
            let _ = TcpStream::connect(address);
        }
    }
}

fn misbehave(mut stream: TcpStream, fault: Fault, closed: &AtomicBool) {
    let answer: &[u8] = match fault {
        Fault::Reset => return,
        Fault::Hang => {
            while !closed.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(20));
            }
            return;
        }
        Fault::Garbage => b"\x00\x01\x02 no protocol that anybody speaks\r\n\r\n",
        Fault::ForeignServer => b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        Fault::OtherVersion => b"HTTP/1.1 200 OK\r\ncachec-protocol: 99\r\nContent-Length: 5\r\n\r\nhello",
        Fault::ServerError => b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        Fault::Truncated => b"HTTP/1.1 200 OK\r\ncachec-protocol: 1\r\nContent-Length: 500\r\n\r\nhello",
    };
    let mut buffer = [0; 64 << 10];
    while let Ok(count) = stream.read(&mut buffer) {
        if count == 0 || stream.write_all(answer).is_err() || fault == Fault::Truncated {
            return;
        }
    }
}
