/// Text that somebody else wrote, made fit for a log line, a message and a terminal: on one line, without anything that a
/// terminal would obey, and of at most `longest` bytes. Where more would follow, there is an ellipsis behind these.
pub fn printable(text: &str, longest: usize) -> String {
    let mut out = String::with_capacity(text.len().min(longest) + '…'.len_utf8());
    for c in text.chars() {
        let c = match c {
            '\n' | '\r' | '\t' => ' ',
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        };
        if out.len() + c.len_utf8() > longest {
            out.push('…');
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_stays_and_what_does_not_ends_at_a_character() {
        assert_eq!(printable("permission denied", 17), "permission denied");
        assert_eq!(printable("permission denied", 10), "permission…");
        assert_eq!(printable("über", 1), "…");
        assert_eq!(printable("", 0), "");
    }

    #[test]
    fn a_terminal_obeys_nothing_in_it_and_it_is_on_one_line() {
        assert_eq!(printable("no\nERROR \u{1b}[31m\u{9b}x", 100), "no ERROR \u{fffd}[31m\u{fffd}x");
        let long = printable(&"\u{7}".repeat(10_000), 100);
        assert!(long.len() <= 100 + '…'.len_utf8(), "{}", long.len());
    }
}
