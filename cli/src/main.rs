//! The command line: lab, status.

fn main() {}
