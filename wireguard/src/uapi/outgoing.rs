//! A buffered writer that leaves no copies of secrets behind, which `BufWriter` would.

use std::io::{self, Write};

use zeroize::{Zeroize, Zeroizing};

const CAPACITY: usize = 64 << 10;

/// Collects what is written and hands it on in large pieces. Its buffer never grows, and is wiped.
pub(super) struct Outgoing<W> {
    stream: W,
    buffer: Zeroizing<Vec<u8>>,
}

impl<W: Write> Outgoing<W> {
    pub(super) fn new(stream: W) -> Self {
        Self { stream, buffer: Zeroizing::new(Vec::with_capacity(CAPACITY)) }
    }
}

impl<W: Write> Write for Outgoing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() == CAPACITY {
            self.flush()?;
        }
        let taken = bytes.len().min(CAPACITY - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        let written = self.stream.write_all(&self.buffer).and_then(|()| self.stream.flush());
        self.buffer.zeroize();
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_written_comes_out_once_and_in_order() {
        let text: Vec<u8> = (0..3 * CAPACITY + 5).map(|i| (i % 251) as u8).collect();
        let mut received = Vec::new();
        let mut out = Outgoing::new(&mut received);
        text.chunks(1000).for_each(|chunk| out.write_all(chunk).unwrap());
        out.flush().unwrap();
        assert_eq!(out.buffer.capacity(), CAPACITY);
        drop(out);
        assert_eq!(received, text);
    }
}
