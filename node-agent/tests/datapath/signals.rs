//! Signals while programs are loaded, and while they run for a test.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use isthmus_node_agent::datapath::PacketProgram;
use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::sandbox::{Sandbox, sandbox};

/// The verifier stops at a pending signal: without more ado hardly a program would get through this.
#[test]
fn a_rain_of_signals_does_not_keep_the_programs_from_being_loaded() {
    with_a_handler(|sandbox| in_the_rain(|| drop(sandbox.datapath())));
}

/// So does a test run that is repeated.
#[test]
fn a_rain_of_signals_does_not_cut_a_test_run_short() {
    with_a_handler(|sandbox| {
        let datapath = sandbox.datapath();
        in_the_rain(|| {
            datapath.test_run(PacketProgram::Empty, &[0; 64], 5_000_000).expect("all the runs");
        });
    });
}

/// A signal that nothing handles would not be pending but end the process.
fn with_a_handler(test: impl FnOnce(&Sandbox) + Send) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _entered = runtime.enter();
    let _handler = signal(SignalKind::user_defined1()).expect("a handler");
    sandbox(test);
}

/// Does something while signals come down on the calling thread.
fn in_the_rain(work: impl FnOnce()) {
    let this = pthread_self();
    let sent = AtomicUsize::new(0);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                pthread_kill(this, Signal::SIGUSR1).expect("a signal to the thread that works");
                sent.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        let _end = End(&done);
        work();
    });
    assert!(sent.into_inner() > 1, "it must have rained");
}

/// Ends the rain, also when the test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
