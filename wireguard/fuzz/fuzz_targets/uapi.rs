//! A UAPI connection's bytes, as a device reads requests and as a client reads answers: what is understood says the same
//! when it is written and read again.
#![no_main]

use isthmus_wireguard::uapi::{Lines, Request, read_answer, read_request, write_request, write_state};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    requests(bytes);
    answer(bytes);
});

/// All requests of the connection, which a wrong one does not end unless its end cannot be found.
fn requests(bytes: &[u8]) {
    let mut lines = Lines::new(bytes);
    loop {
        match read_request(&mut lines) {
            Ok(None) => return,
            Ok(Some(request)) => {
                let text = written(&request);
                let again = read_request(&mut Lines::new(&text[..])).expect("what we write can be read");
                assert_eq!(written(&again.expect("one request")), text);
            }
            Err(error) if error.is_fatal() => return,
            Err(error) => assert!(error.errno() > 0, "{error}"),
        }
    }
}

fn written(request: &Request) -> Vec<u8> {
    let mut text = Vec::new();
    write_request(request, true, &mut text).expect("memory takes it");
    text
}

fn answer(bytes: &[u8]) {
    let Ok(answer) = read_answer(&mut Lines::new(bytes)) else { return };
    assert!(answer.errno >= 0);
    let mut text = Vec::new();
    write_state(&answer.state, None, &mut text).expect("memory takes it");
    text.extend_from_slice(b"errno=0\n\n");
    let again = read_answer(&mut Lines::new(&text[..])).expect("what we write can be read");
    let mut rewritten = Vec::new();
    write_state(&again.state, None, &mut rewritten).expect("memory takes it");
    rewritten.extend_from_slice(b"errno=0\n\n");
    assert_eq!(rewritten, text);
}
