//! The words and signs of Rust, with their lines.

/// A word or a sign, and its line.
pub type Token<'t> = (&'t str, usize);

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

pub fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// The length of the comment in `/*` that a text begins with; there may be others in it.
fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while let Some(c) = text[at..].chars().next() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
        } else {
            at += c.len_utf8();
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The length of the string or character that a text begins with, if it does. A prefix of its
/// quotes other than `r` counts as a word.
fn literal(text: &str) -> Option<usize> {
    for prefix in ["r", "br", "cr"] {
        let Some(raw) = text.strip_prefix(prefix) else { continue };
        let marks = raw.len() - raw.trim_start_matches('#').len();
        if raw[marks..].starts_with('"') {
            let (start, end) = (prefix.len() + marks + 1, format!("\"{}", "#".repeat(marks)));
            return text[start..].find(&end).map(|at| start + at + end.len());
        }
    }
    if let Some(inner) = text.strip_prefix('"') {
        let mut escaped = false;
        for (at, c) in inner.char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => return Some(at + 2),
                _ => {}
            }
        }
    }
    let inner = text.strip_prefix('\'')?;
    let first = inner.chars().next()?;
    if first == '\\' {
        return inner[2..].find('\'').map(|at| at + 4);
    }
    // Otherwise a lifetime.
    inner[first.len_utf8()..].starts_with('\'').then(|| first.len_utf8() + 2)
}

/// What a piece of a text is.
#[derive(Clone, Copy, PartialEq)]
pub enum Piece {
    Blank,
    Comment,
    /// A string or a character.
    Literal,
    /// A word or a sign.
    Token,
}

/// All pieces of a text in order, each with the line that it begins in.
pub fn pieces(text: &str) -> Vec<(Piece, Token<'_>)> {
    let (mut found, mut rest, mut line) = (vec![], text, 1);
    while let Some(first) = rest.chars().next() {
        let (piece, len) = if rest.starts_with("//") {
            (Piece::Comment, rest.find('\n').unwrap_or(rest.len()))
        } else if rest.starts_with("/*") {
            (Piece::Comment, comment(rest))
        } else if let Some(len) = literal(rest) {
            (Piece::Literal, len)
        } else if first.is_whitespace() {
            (Piece::Blank, rest.find(|c: char| !c.is_whitespace()).unwrap_or(rest.len()))
        } else if is_word(first) {
            (Piece::Token, rest.find(|c: char| !is_word(c)).unwrap_or(rest.len()))
        } else if rest.starts_with("::") {
            (Piece::Token, 2)
        } else {
            (Piece::Token, first.len_utf8())
        };
        found.push((piece, (&rest[..len], line)));
        line += rest[..len].matches('\n').count();
        rest = &rest[len..];
    }
    found
}

/// The words and signs of a text, without comments, strings and characters.
pub fn tokens(text: &str) -> Vec<Token<'_>> {
    pieces(text).into_iter().filter(|(piece, _)| *piece == Piece::Token).map(|(_, t)| t).collect()
}
