//! Messages as they are shown to people.

use std::borrow::Cow;
use std::fmt::{Display, LowerExp};

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

/// The most characters of a number without an exponent, where one would make it shorter.
const PLAIN: usize = 12;

/// A number, as a message shows it: all of its digits, with an exponent if it has many zeros.
pub(crate) fn number(value: impl Display + LowerExp) -> String {
    let (plain, exponential) = (value.to_string(), format!("{value:e}"));
    if plain.len() > PLAIN && exponential.len() < plain.len() { exponential } else { plain }
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

    #[test]
    fn numbers_of_many_zeros_have_an_exponent() {
        for (value, shown) in [
            (0.0, "0"),
            (-1.0, "-1"),
            (4e-5, "0.00004"),
            (1e6, "1000000"),
            (0.1 + 0.2, "0.30000000000000004"),
            (1e300, "1e300"),
            (-2.5e-300, "-2.5e-300"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(number(value), shown);
        }
        assert_eq!((number(8.1f32), number(f32::MAX)), ("8.1".into(), "3.4028235e38".into()));
    }

    #[cfg(feature = "serve")]
    #[test]
    fn of_what_strangers_sent_a_line_is_quoted() {
        assert_eq!(quoted("it's 'ä'\n\u{1b}"), r"it's 'ä'\n\u{1b}");
        let long = format!("{}{}", "é".repeat(40), "x".repeat(1 << 20));
        assert_eq!(quoted(&long), "é".repeat(40) + "...");
    }
}
