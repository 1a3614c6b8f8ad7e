//! Lines of `key=value` out of a stream, within bounds and without leaving copies of secrets behind.

use std::io::{self, Read};

use zeroize::Zeroizing;

use super::{MAX_LINE, MAX_MESSAGE};

const BUFFER: usize = 8 * MAX_LINE;

/// Reads messages line by line. What it has read is wiped when it is dropped.
pub struct Lines<R> {
    stream: R,
    buffer: Zeroizing<Vec<u8>>,
    /// The part of `buffer` that has been read from the stream and not been given out.
    unread: std::ops::Range<usize>,
    /// Bytes that this message may still have.
    left: u64,
}

/// Why there is no next line.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The stream failed, or ended in the middle of a message.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The message is longer than any that is meant well.
    #[error("the message has more than {MAX_MESSAGE} bytes")]
    MessageTooLong,
    /// The line is longer than any that is meant well.
    #[error("a line has more than {MAX_LINE} bytes")]
    LineTooLong,
    /// The line is not text.
    #[error("a line is not UTF-8 text")]
    NotText,
    /// The line has no equals sign.
    #[error("a line is not of the form key=value")]
    NoValue,
}

impl LineError {
    /// Whether the lines that follow can be told apart still.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Io(_) | Self::MessageTooLong | Self::LineTooLong)
    }
}

impl<R: Read> Lines<R> {
    /// Reads from this stream.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: Zeroizing::new(vec![0; BUFFER]), unread: 0..0, left: MAX_MESSAGE }
    }

    /// Whether another message begins: `false` when the stream ended after the last.
    ///
    /// # Errors
    /// When the stream fails.
    pub fn begin_message(&mut self) -> io::Result<bool> {
        self.left = MAX_MESSAGE;
        Ok(!self.unread.is_empty() || self.fill()? > 0)
    }

    /// The next line of the message as key and value; `None` at the empty line that ends it.
    ///
    /// # Errors
    /// When the stream ends or fails, a bound is passed, or the line is not `key=value`.
    pub fn next_pair(&mut self) -> Result<Option<(&str, &str)>, LineError> {
        let line = self.next_line()?;
        if self.buffer[line.clone()].is_empty() {
            return Ok(None);
        }
        let text = std::str::from_utf8(&self.buffer[line]).map_err(|_| LineError::NotText)?;
        text.split_once('=').map(Some).ok_or(LineError::NoValue)
    }

    /// Reads over the rest of the message.
    ///
    /// # Errors
    /// When its end cannot be found.
    pub fn skip_message(&mut self) -> Result<(), LineError> {
        while !self.next_line()?.is_empty() {}
        Ok(())
    }

    /// The stream, to answer on.
    pub fn stream(&mut self) -> &mut R {
        &mut self.stream
    }

    fn next_line(&mut self) -> Result<std::ops::Range<usize>, LineError> {
        let mut searched = 0;
        loop {
            let unread = &self.buffer[self.unread.clone()];
            if let Some(end) = unread[searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.unread.start..self.unread.start + searched + end;
                if line.len() > MAX_LINE {
                    return Err(LineError::LineTooLong);
                }
                let taken = line.len() as u64 + 1;
                self.left = self.left.checked_sub(taken).ok_or(LineError::MessageTooLong)?;
                self.unread.start = line.end + 1;
                return Ok(line);
            }
            searched = unread.len();
            if searched > MAX_LINE {
                return Err(LineError::LineTooLong);
            }
            if self.fill()? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        if self.unread.is_empty() {
            self.unread = 0..0;
        } else if self.unread.end == self.buffer.len() {
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        loop {
            match self.stream.read(&mut self.buffer[self.unread.end..]) {
                Ok(count) => {
                    self.unread.end += count;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives its bytes one at a time, as a stream may.
    struct Trickle<'a>(&'a [u8]);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.len().min(buffer.len()).min(1);
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn pairs(stream: impl Read) -> Vec<(String, String)> {
        let mut lines = Lines::new(stream);
        let mut pairs = Vec::new();
        while lines.begin_message().unwrap() {
            while let Some((key, value)) = lines.next_pair().unwrap() {
                pairs.push((key.to_owned(), value.to_owned()));
            }
        }
        pairs
    }

    #[test]
    fn however_the_bytes_arrive_the_lines_are_the_same() {
        let text = format!("get=1\n\n{}\n", "a=b=c\n".repeat(3 * BUFFER / 6));
        assert_eq!(pairs(text.as_bytes()), pairs(Trickle(text.as_bytes())));
        assert_eq!(pairs(text.as_bytes()).len(), 1 + 3 * BUFFER / 6);
        assert_eq!(pairs(text.as_bytes())[1], ("a".to_owned(), "b=c".to_owned()));
    }

    #[test]
    fn a_line_without_an_end_is_not_waited_for() {
        let longest = format!("a={}\n\n", "b".repeat(MAX_LINE - 2));
        assert_eq!(pairs(longest.as_bytes())[0].1.len(), MAX_LINE - 2);
        for endless in [format!("a{longest}"), "a".repeat(10 * BUFFER)] {
            let mut lines = Lines::new(endless.as_bytes());
            assert!(matches!(lines.next_pair(), Err(LineError::LineTooLong)));
        }
    }

    #[test]
    fn a_message_without_an_end_is_not_waited_for() {
        let mut lines = Lines::new(b"a=b\n".chunks(4).cycle().next().map(|_| Endless).unwrap());
        assert!(matches!(lines.skip_message(), Err(LineError::MessageTooLong)));
    }

    /// `a=b` for ever.
    struct Endless;

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len() / 4 * 4;
            buffer[..count].chunks_exact_mut(4).for_each(|line| line.copy_from_slice(b"a=b\n"));
            Ok(count)
        }
    }

    #[test]
    fn a_bad_line_does_not_hide_the_next_message() {
        let mut lines = Lines::new(&b"\xff\xff=1\nrest=1\n\nget=1\n\n"[..]);
        let error = lines.next_pair().unwrap_err();
        assert!(matches!(error, LineError::NotText) && !error.is_fatal());
        lines.skip_message().unwrap();
        assert!(lines.begin_message().unwrap());
        assert_eq!(lines.next_pair().unwrap(), Some(("get", "1")));
    }

    #[test]
    fn a_stream_that_ends_within_a_message_is_an_error() {
        let mut lines = Lines::new(&b"get=1\n"[..]);
        lines.next_pair().unwrap();
        assert!(matches!(lines.next_pair(), Err(LineError::Io(_))));
    }
}
