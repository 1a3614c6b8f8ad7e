//! Loading programs, and running them for a test, in spite of signals.
//!
//! The verifier looks for a pending signal at every instruction and gives up with EAGAIN when it finds one, which means
//! to load again (Linux commit c3494801cd17). A signal to the process may pick any thread that does not block it, also
//! one that nothing acts on: a child's end, while the thread that started it is about to start another. Aya does not
//! load again.

use std::io;

use aya::programs::ProgramError;
use nix::sys::signal::{SigSet, SigmaskHow};

/// Loads of one program until its last refusal is believed. libbpf makes five; it blocks no signals.
const ATTEMPTS: usize = 10;

/// Runs `work` with all signals to the calling thread held back: other threads take those to the process, those to
/// the thread alone come when `work` has returned.
pub(super) fn with_signals_blocked<T>(work: impl FnOnce() -> T) -> T {
    let former = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
    // Nothing in here panics but by a fault of ours, and then the process is at its end.
    let result = work();
    if let Ok(former) = former {
        // The kernel refuses no set that it has given.
        let _ = former.thread_set_mask();
    }
    result
}

/// Loads a program, again when the kernel was interrupted by what cannot be blocked: the freezer, a debugger.
pub(super) fn load(mut attempt: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    for _ in 1..ATTEMPTS {
        match attempt() {
            Err(error) if was_interrupted(&error) => {}
            result => return result,
        }
    }
    attempt()
}

fn was_interrupted(error: &ProgramError) -> bool {
    // EAGAIN
    matches!(error, ProgramError::LoadError { io_error, .. } if io_error.kind() == io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use aya_obj::VerifierLog;
    use nix::errno::Errno;

    use super::*;

    fn refusal(errno: Errno) -> ProgramError {
        ProgramError::LoadError { io_error: errno.into(), verifier_log: VerifierLog::new(String::new()) }
    }

    /// How often a program is loaded that is refused this many times.
    fn attempts(errno: Errno, refusals: usize) -> (usize, Result<(), ProgramError>) {
        let mut attempts = 0;
        let result = load(|| {
            attempts += 1;
            if attempts <= refusals { Err(refusal(errno)) } else { Ok(()) }
        });
        (attempts, result)
    }

    #[test]
    fn an_interrupted_load_is_made_again_within_bounds() {
        assert!(matches!(attempts(Errno::EAGAIN, 0), (1, Ok(()))));
        assert!(matches!(attempts(Errno::EAGAIN, 3), (4, Ok(()))));
        assert!(matches!(
            attempts(Errno::EAGAIN, usize::MAX),
            (ATTEMPTS, Err(ProgramError::LoadError { .. }))
        ));
    }

    #[test]
    fn another_refusal_is_believed_at_once() {
        assert!(matches!(attempts(Errno::EACCES, 1), (1, Err(ProgramError::LoadError { .. }))));
    }

    #[test]
    fn the_thread_has_its_mask_back() {
        let before = SigSet::thread_get_mask().expect("the mask");
        let within = with_signals_blocked(|| SigSet::thread_get_mask().expect("the mask"));
        assert!(within.contains(nix::sys::signal::SIGCHLD));
        assert_eq!(SigSet::thread_get_mask().expect("the mask"), before);
    }
}
