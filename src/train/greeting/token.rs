//! The token of a run: text that all its processes know.

use std::io::{self, Read};
use std::path::Path;

/// The variable with the token.
const VARIABLE: &str = "PRISM_TOKEN";
/// How to give a token.
pub(in crate::train) const WAYS: &str = "PRISM_TOKEN or --token-file";
/// The longest token.
const MOST_TOKEN: u64 = 4096;
/// The purpose of a token's key, which is used for nothing else.
const PURPOSE: &str = "prism training: processes of one run, version 2";

/// A secret that all processes of a run know: only processes that know it may take part. It is kept
/// as a key derived from it, and never sent.
#[derive(Clone)]
pub struct Token(pub(super) [u8; 32]);

impl Token {
    /// A token from text; surrounding white space does not count.
    ///
    /// # Errors
    /// The text is empty.
    pub fn new(text: &str) -> Result<Token, String> {
        match text.trim() {
            "" => Err("the token is empty: expected text that is hard to guess".into()),
            text => Ok(Token::of(text)),
        }
    }

    /// The token of processes without one.
    pub(in crate::train) fn none() -> Token {
        Token::of("")
    }

    fn of(text: &str) -> Token {
        Token(blake3::derive_key(PURPOSE, text.as_bytes()))
    }

    /// The token in a file, if one is given, otherwise in the environment variable `PRISM_TOKEN`,
    /// which `get` reads; none without both.
    ///
    /// # Errors
    /// The file cannot be read or has more than 4096 bytes, or the token is empty.
    pub fn given(
        file: Option<&Path>,
        get: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Token>, String> {
        let (from, text) = match file {
            Some(path) => {
                let fail = |e: io::Error| format!("{}: cannot read a token: {e}", path.display());
                let mut text = String::new();
                std::fs::File::open(path)
                    .and_then(|f| f.take(MOST_TOKEN + 1).read_to_string(&mut text))
                    .map_err(fail)?;
                if text.len() as u64 > MOST_TOKEN {
                    return Err(format!(
                        "{}: longer than {MOST_TOKEN} bytes, expected a token",
                        path.display()
                    ));
                }
                (path.display().to_string(), text)
            }
            None => match get(VARIABLE) {
                Some(text) => (VARIABLE.into(), text),
                None => return Ok(None),
            },
        };
        Token::new(&text).map(Some).map_err(|e| format!("{from}: {e}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_from_a_file_or_the_variable() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let variable = |value: &'static str| {
            move |name: &str| (name == "PRISM_TOKEN").then(|| value.to_string())
        };
        let given = |file: Option<&Path>, value: &'static str| {
            Token::given(file, variable(value)).map(|token| token.unwrap().0)
        };
        std::fs::write(&file, "  one\n").unwrap();
        let one = Token::new("one").unwrap().0;
        assert_eq!(given(None, "one\n"), Ok(one));
        assert_eq!(given(Some(&file), "two"), Ok(one));
        assert_ne!(given(None, "two"), Ok(one));
        assert_ne!(Token::none().0, one);
        assert!(Token::given(None, |_| None).unwrap().is_none());
        assert!(given(None, " ").unwrap_err().contains("PRISM_TOKEN: the token is empty"));
        for (bytes, said) in [
            (vec![b'\n'], "the token is empty"),
            (vec![b'a'; 5000], "longer than 4096 bytes"),
            (vec![0xff], "cannot read a token"),
        ] {
            std::fs::write(&file, bytes).unwrap();
            let error = given(Some(&file), "one").unwrap_err();
            assert!(error.contains(&file.display().to_string()) && error.contains(said), "{error}");
        }
        assert!(
            given(Some(&folder.path().join("none")), "one")
                .unwrap_err()
                .contains("cannot read a token")
        );
    }
}
