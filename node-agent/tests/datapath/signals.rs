//! Signals while the programs are loaded.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::sandbox::sandbox;

/// The verifier stops at a pending signal: without more ado hardly a program would get through this.
#[test]
fn a_rain_of_signals_does_not_keep_the_programs_from_being_loaded() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _entered = runtime.enter();
    // One that nothing handles would not be pending but end the process.
    let _handler = signal(SignalKind::user_defined1()).expect("a handler");
    sandbox(|sandbox| {
        let loader = pthread_self();
        let sent = AtomicUsize::new(0);
        let loaded = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !loaded.load(Ordering::Relaxed) {
                    pthread_kill(loader, Signal::SIGUSR1).expect("a signal to the thread that loads");
                    sent.fetch_add(1, Ordering::Relaxed);
                    thread::yield_now();
                }
            });
            let _end = End(&loaded);
            drop(sandbox.datapath());
        });
        assert!(sent.into_inner() > 1, "it must have rained");
    });
}

/// Ends the rain, also when the test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
