//! A slow line: a loopback port before a server, with a round-trip time and a speed. All its connections share the
//! speed, in each direction.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

/// Bytes that travel together: a tenth of a millisecond at 1 Gbit/s.
const CHUNK_BYTES: usize = 16 << 10;

/// Chunks on their way in one direction of a connection; a sender waits where it is full.
const MAX_CHUNKS: usize = 512;

/// What a line is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speed {
    /// There and back.
    pub round_trip: Duration,
    /// In each direction; `None` for no limit.
    pub megabits_per_second: Option<u32>,
}

/// A port that passes everything on, slowly. Its threads end with their connections.
#[derive(Debug)]
pub struct SlowLine {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    up: Queue,
    down: Queue,
}

/// One direction's queue.
type Queue = Arc<Mutex<Direction>>;

#[derive(Debug)]
struct Direction {
    /// When the line is free again.
    free: Instant,
    sent_bytes: u64,
}

impl SlowLine {
    /// Opens a line to a server's URL.
    ///
    /// # Errors
    /// Where no port can be had.
    pub fn open(server: &str, speed: Speed) -> anyhow::Result<Self> {
        let target = server.strip_prefix("http://").context("a plain server")?.to_owned();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let url = format!("http://{}", listener.local_addr()?);
        let (up, down) = (Direction::queue(), Direction::queue());
        let line = Self { url, up: Arc::clone(&up), down: Arc::clone(&down) };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&target) else { continue };
                let (Ok(back), Ok(forth)) = (server.try_clone(), client.try_clone()) else { continue };
                // The connection itself was made without delay; its first bytes make up for that.
                carry(client, server, Arc::clone(&up), speed, speed.round_trip);
                carry(back, forth, Arc::clone(&down), speed, Duration::ZERO);
            }
        });
        Ok(line)
    }

    /// Bytes that went to the server and back so far.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        let count = |queue: &Queue| queue.lock().unwrap_or_else(PoisonError::into_inner).sent_bytes;
        (count(&self.up), count(&self.down))
    }
}

impl Direction {
    fn queue() -> Queue {
        Arc::new(Mutex::new(Self { free: Instant::now(), sent_bytes: 0 }))
    }
}

/// Carries one direction of a connection, in two threads: what is on its way does not hold up what follows.
fn carry(mut from: TcpStream, mut to: TcpStream, queue: Queue, speed: Speed, late: Duration) {
    let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(MAX_CHUNKS);
    let _ = to.set_nodelay(true);
    let opened = Instant::now();
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Ok(count) = from.read(&mut buffer) {
            let sent = send(&queue, count, speed).max(opened + late);
            let arrives = sent + speed.round_trip / 2;
            if count == 0 || sender.send((arrives, buffer[..count].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (arrives, bytes) in receiver {
            thread::sleep(arrives.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// When the last of some bytes leaves, behind all that waits.
fn send(queue: &Queue, bytes: usize, speed: Speed) -> Instant {
    let bits = bytes as u64 * 8;
    let takes = speed
        .megabits_per_second
        .map_or(Duration::ZERO, |rate| Duration::from_nanos(bits * 1000 / u64::from(rate.max(1))));
    let mut direction = queue.lock().unwrap_or_else(PoisonError::into_inner);
    direction.sent_bytes += bytes as u64;
    direction.free = direction.free.max(Instant::now()) + takes;
    direction.free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_wait_for_those_before_them_and_for_the_way() {
        let speed = Speed { round_trip: Duration::ZERO, megabits_per_second: Some(8) };
        let queue = Direction::queue();
        let first = send(&queue, 1000, speed);
        assert_eq!(send(&queue, 2000, speed) - first, Duration::from_millis(2));
    }

    #[test]
    fn what_is_sent_arrives() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("http://{}", server.local_addr().unwrap());
        let speed = Speed { round_trip: Duration::from_millis(10), megabits_per_second: Some(1000) };
        let line = SlowLine::open(&url, speed).unwrap();
        let started = Instant::now();
        let mut client = TcpStream::connect(line.url.strip_prefix("http://").unwrap()).unwrap();
        let (mut accepted, _) = server.accept().unwrap();
        client.write_all(b"question").unwrap();
        let mut buffer = [0; 8];
        accepted.read_exact(&mut buffer).unwrap();
        accepted.write_all(&buffer).unwrap();
        client.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"question");
        assert_eq!(line.bytes(), (8, 8));
        // A connection and a question: two round trips.
        assert!(started.elapsed() >= Duration::from_millis(20));
    }
}
