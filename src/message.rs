//! Messages as they are shown to people.

use std::borrow::Cow;

/// A message whose control characters are written out, as `\0`, `\r` or `\u{1b}`. Names and fields
/// of files stand in messages as they are, and a terminal would obey what is in them. Line feeds
/// and tabs stay: messages have lines.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    let is_odd = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(is_odd) {
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
}
