//! One pinned map: changes in batches, each entry with its own result, and dumps.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::error::{DatapathError, OpError};
use super::sys;

/// Entries per system call: enough to make the call's cost vanish, few enough to bound the kernel's copy.
const BATCH: usize = 4096;

/// An open map with keys `K` and values `V`, which are plain old data of just its key and value size.
#[derive(Debug)]
pub(super) struct Map<K, V> {
    fd: OwnedFd,
    name: &'static str,
    flag: &'static str,
    capacity: u32,
    types: PhantomData<fn(K) -> V>,
}

impl<K: aya::Pod, V: aya::Pod> Map<K, V> {
    /// Opens the map pinned at `path`. `flag` is the agent's flag that sets its size.
    pub(super) fn open(path: &Path, name: &'static str, flag: &'static str) -> Result<Self, DatapathError> {
        let kernel =
            |source| DatapathError::Kernel { what: format!("opening map {}", path.display()), source };
        let fd = sys::pinned(path).map_err(kernel)?;
        let info = sys::map_info(fd.as_fd()).map_err(kernel)?;
        if info.key_size as usize != size_of::<K>() || info.value_size as usize != size_of::<V>() {
            return Err(DatapathError::Foreign { path: path.to_owned() });
        }
        Ok(Self::new(fd, name, flag, info.max_entries))
    }

    /// A map that was just opened or made.
    pub(super) fn new(fd: OwnedFd, name: &'static str, flag: &'static str, capacity: u32) -> Self {
        Self { fd, name, flag, capacity, types: PhantomData }
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// How many entries it has room for.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Creates or replaces entries. One result per entry, in order.
    pub(super) fn put(&self, keys: &[K], values: &[V]) -> Vec<Result<(), OpError>> {
        self.in_batches(
            keys.len(),
            |from, to| sys::update_batch(self.fd.as_fd(), &keys[from..to], &values[from..to]),
            |index| sys::update(self.fd.as_fd(), &keys[index], &values[index]),
        )
    }

    /// Deletes entries; those that are not there count as deleted. One result per entry, in order.
    pub(super) fn delete(&self, keys: &[K]) -> Vec<Result<(), OpError>> {
        self.in_batches(
            keys.len(),
            |from, to| sys::delete_batch(self.fd.as_fd(), &keys[from..to]),
            |index| sys::delete(self.fd.as_fd(), &keys[index]),
        )
    }

    /// Creates or replaces one entry.
    pub(super) fn set(&self, key: &K, value: &V) -> Result<(), DatapathError> {
        sys::update(self.fd.as_fd(), key, value)
            .map_err(|source| DatapathError::Kernel { what: format!("writing map {}", self.name), source })
    }

    /// One entry.
    pub(super) fn value(&self, key: &K) -> Result<Option<V>, DatapathError> {
        sys::lookup(self.fd.as_fd(), key).map_err(|source| self.reading(source))
    }

    /// All entries. Entries that change meanwhile are seen before or after; those that do not are seen once.
    pub(super) fn entries(&self) -> Result<Vec<(K, V)>, DatapathError> {
        match self.entries_in_batches() {
            Err(error) if is_unsupported(&error) => self.entries_one_by_one(),
            result => result,
        }
        .map_err(|source| self.reading(source))
    }

    fn entries_in_batches(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut room = BATCH.min(self.capacity.max(1) as usize);
        let mut keys = Vec::with_capacity(room);
        let mut values = Vec::with_capacity(room);
        let mut cursor = None;
        loop {
            match sys::lookup_batch(self.fd.as_fd(), cursor.as_ref(), &mut keys, &mut values) {
                Ok(next) => {
                    entries.extend(keys.iter().copied().zip(values.iter().copied()));
                    match next {
                        Some(next) => cursor = Some(next),
                        None => return Ok(entries),
                    }
                }
                // One bucket holds more than there is room for.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    room *= 2;
                    keys = Vec::with_capacity(room);
                    values = Vec::with_capacity(room);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn entries_one_by_one(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut key = sys::next_key::<K>(self.fd.as_fd(), None)?;
        while let Some(found) = key {
            if let Some(value) = sys::lookup(self.fd.as_fd(), &found)? {
                entries.push((found, value));
            }
            key = sys::next_key(self.fd.as_fd(), Some(&found))?;
        }
        Ok(entries)
    }

    /// Runs `batch` over ranges and takes up behind what fails. Where the kernel knows no batches for this type of
    /// map, `single` does all.
    fn in_batches(
        &self,
        len: usize,
        batch: impl Fn(usize, usize) -> Result<(), (usize, io::Error)>,
        single: impl Fn(usize) -> io::Result<()>,
    ) -> Vec<Result<(), OpError>> {
        let mut results = Vec::with_capacity(len);
        let mut batches = len > 1;
        while results.len() < len {
            let from = results.len();
            if !batches {
                results.push(self.result(single(from)));
                continue;
            }
            let to = len.min(from + BATCH);
            match batch(from, to) {
                Ok(()) => results.resize_with(to, || Ok(())),
                Err((0, error)) if from == 0 && is_unsupported(&error) => batches = false,
                Err((done, error)) => {
                    results.resize_with(from + done.min(to - from - 1), || Ok(()));
                    results.push(self.result(Err(error)));
                }
            }
        }
        results
    }

    fn result(&self, result: io::Result<()>) -> Result<(), OpError> {
        let Err(error) = result else { return Ok(()) };
        match error.raw_os_error().unwrap_or(libc::EIO) {
            libc::ENOENT => Ok(()),
            // ENOSPC is the LPM trie's word for it.
            libc::E2BIG | libc::ENOSPC => {
                Err(OpError::Full { map: self.name, capacity: self.capacity, flag: self.flag })
            }
            errno => Err(OpError::Refused { map: self.name, errno }),
        }
    }

    fn reading(&self, source: io::Error) -> DatapathError {
        DatapathError::Kernel { what: format!("reading map {}", self.name), source }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS | sys::ENOTSUPP))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn map() -> Map<u32, u32> {
        let fd = std::fs::File::open("/dev/null").expect("a descriptor").into();
        Map { fd, name: "slots", flag: "--bpf-map-backends", capacity: 7, types: PhantomData }
    }

    fn errno(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }

    #[test]
    fn where_the_kernel_knows_no_batches_every_entry_is_changed_alone() {
        let changed = RefCell::new(Vec::new());
        let results = map().in_batches(
            5,
            |_, _| Err((0, errno(sys::ENOTSUPP))),
            |index| {
                changed.borrow_mut().push(index);
                if index == 3 { Err(errno(libc::E2BIG)) } else { Ok(()) }
            },
        );
        assert_eq!(changed.into_inner(), [0, 1, 2, 3, 4]);
        let full = OpError::Full { map: "slots", capacity: 7, flag: "--bpf-map-backends" };
        assert_eq!(results, [Ok(()), Ok(()), Ok(()), Err(full), Ok(())]);
    }

    #[test]
    fn a_batch_goes_on_behind_the_entry_that_failed() {
        let calls = RefCell::new(Vec::new());
        let results = map().in_batches(
            6,
            |from, to| {
                calls.borrow_mut().push((from, to));
                // The kernel stops at entry 2, and knows nothing of entry 4.
                match from {
                    0 => Err((2, errno(libc::EPERM))),
                    3 => Err((1, errno(libc::ENOENT))),
                    _ => Ok(()),
                }
            },
            |_| panic!("batches work"),
        );
        assert_eq!(calls.into_inner(), [(0, 6), (3, 6), (5, 6)]);
        let refused = OpError::Refused { map: "slots", errno: libc::EPERM };
        // That there was nothing to delete is no failure.
        assert_eq!(results, [Ok(()), Ok(()), Err(refused), Ok(()), Ok(()), Ok(())]);
    }
}
