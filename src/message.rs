//! Messages as they are shown to people.

use std::borrow::Cow;

/// A message whose control characters are written out, as `\0`, `\r` or `\u{1b}`. Names and fields
/// of files are copied into messages unchanged, and a terminal would obey control characters in
/// them. Line feeds and tabs stay: messages have lines.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    written_out(text, |c| c.is_control() && !matches!(c, '\n' | '\t'))
}

/// The most characters of a client's input that a message quotes.
#[cfg(feature = "serve")]
const QUOTED: usize = 40;

/// A client's input, as a message quotes it: its beginning, on one line, with control characters
/// written out.
#[cfg(feature = "serve")]
pub(crate) fn quoted(text: &str) -> String {
    written_out(&shortened(text, QUOTED), char::is_control).into_owned()
}

/// A text, or its first `most` characters and dots if it has more.
pub(crate) fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.into(),
    }
}

/// A text with some of its characters escaped.
fn written_out(text: &str, is_odd: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_odd) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_odd(c) { shown.extend(c.escape_debug()) } else { shown.push(c) }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_written_out() {
        let message = "größe 'a\0b': \u{1b}[2J\r\u{9b}1m\n\tline two";
        assert_eq!(
            shown(message),
            r"größe 'a\0b': \u{1b}[2J\r\u{9b}1m".to_string() + "\n\tline two"
        );
        assert!(matches!(shown("plain, \\ and 'quoted'\n"), Cow::Borrowed(_)));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(shortened("größe", 5), "größe");
        assert_eq!(shortened("größe", 3), "grö...");
        assert_eq!(shortened("", 0), "");
    }

    #[cfg(feature = "serve")]
    #[test]
    fn of_what_strangers_sent_a_line_is_quoted() {
        assert_eq!(quoted("it's 'ä'\n\u{1b}"), r"it's 'ä'\n\u{1b}");
        let long = format!("{}{}", "é".repeat(40), "x".repeat(1 << 20));
        assert_eq!(quoted(&long), "é".repeat(40) + "...");
    }
}
