//! Voxels in files beside a header: in one, in a numbered sequence of them, or in a list.

use super::VOXELS;
use crate::input::Input;
use crate::memory;
use std::path::{Component, Path, PathBuf};

/// The most files that one image is spread over.
const MOST: i64 = 1 << 16;

/// The `bytes` bytes of all voxels, from the files that a header names (see [`files`]), which hold
/// the same number each: `part` reads that many from one.
pub fn voxels<'a>(
    header: &Path,
    named: &str,
    list: impl Iterator<Item = &'a str>,
    bytes: usize,
    part: impl Fn(Input, usize) -> Result<Vec<u8>, String>,
) -> Result<Vec<u8>, String> {
    let files = files(header, named, list)?;
    if !bytes.is_multiple_of(files.len()) {
        return Err(format!(
            "{bytes} bytes of voxels cannot be divided evenly among {} files",
            files.len()
        ));
    }
    let mut all = if files.len() > 1 { memory::list(VOXELS, bytes) } else { vec![] };
    for file in &files {
        let one = Input::plain(file)
            .map_err(|e| e.to_string())
            .and_then(|opened| part(opened, bytes / files.len()));
        let one = one.map_err(|e| format!("its voxels are in {}: {e}", file.display()))?;
        if files.len() == 1 {
            return Ok(one);
        }
        all.extend(one);
    }
    Ok(all)
}

/// The files that a header names: `file`, `pattern first last step` with one `%d` in the pattern,
/// or `LIST`, then `list` line by line. All must be in the header's folder or below it.
fn files<'a>(
    header: &Path,
    named: &str,
    list: impl Iterator<Item = &'a str>,
) -> Result<Vec<PathBuf>, String> {
    let names: Vec<String> = if named.split_whitespace().next() == Some("LIST") {
        list.map(str::trim).filter(|l| !l.is_empty()).map(str::to_string).collect()
    } else if let Some((pattern, numbers)) = sequence(named) {
        let [first, last, step] = numbers;
        if step == 0 || (last - first) / step < 0 || (last - first) / step >= MOST {
            return Err(format!("the sequence '{named}' does not end within {MOST} files"));
        }
        (0..=(last - first) / step)
            .map(|n| numbered(pattern, first + n * step))
            .collect::<Option<_>>()
            .ok_or_else(|| {
                format!(
                    "'{named}' is not a file name pattern: expected one number format, such as %03d"
                )
            })?
    } else {
        vec![named.to_string()]
    };
    if names.is_empty() || names.len() as i64 > MOST {
        return Err(format!("it lists {} files of voxels, expected 1 to {MOST}", names.len()));
    }
    let inside = |name: &str| {
        Path::new(name).components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir))
    };
    if let Some(name) = names.iter().find(|n| !inside(n)) {
        return Err(format!(
            "its header places the voxels in '{name}': only files in the header's folder or below it are read"
        ));
    }
    Ok(names.iter().map(|n| header.with_file_name(n)).collect())
}

/// A pattern with the first and last number and the step.
fn sequence(named: &str) -> Option<(&str, [i64; 3])> {
    let mut words = named.split_whitespace();
    let pattern = words.next().filter(|p| p.contains('%'))?;
    let mut number = || words.next()?.parse::<i32>().ok().map(i64::from);
    Some((pattern, [number()?, number()?, number().unwrap_or(1)]))
}

/// The pattern with a number in place of `%d`, `%3d` or `%03d`.
fn numbered(pattern: &str, number: i64) -> Option<String> {
    let (before, rest) = pattern.split_once('%')?;
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    let (width, after) = (&rest[..end], rest[end..].strip_prefix(['d', 'i', 'u'])?);
    let wide: usize = if width.is_empty() { 0 } else { width.parse().ok().filter(|w| *w < 64)? };
    let text =
        if width.starts_with('0') { format!("{number:0wide$}") } else { format!("{number:wide$}") };
    (!after.contains('%')).then(|| format!("{before}{text}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_sequence_or_a_list() {
        let header = Path::new("/data/a.nhdr");
        let names = |named: &str| -> Result<Vec<String>, String> {
            let list = ["b_2.raw", "", "b_1.raw"];
            files(header, named, list.into_iter())
                .map(|f| f.iter().map(|p| p.display().to_string()).collect())
        };
        assert_eq!(names("a b.raw").unwrap(), ["/data/a b.raw"]);
        assert_eq!(
            names("s%03d.raw 9 11 1").unwrap(),
            ["/data/s009.raw", "/data/s010.raw", "/data/s011.raw"]
        );
        assert_eq!(names("s%d.raw 3 1 -2").unwrap(), ["/data/s3.raw", "/data/s1.raw"]);
        assert_eq!(names("LIST 2").unwrap(), ["/data/b_2.raw", "/data/b_1.raw"]);
        for (named, words) in [
            ("../../etc/passwd", "header's folder"),
            ("/etc/passwd", "header's folder"),
            ("s%d.raw 1 5 0", "does not end"),
            ("s%d.raw 5 1 1", "does not end"),
            ("s%d.raw 0 2000000000 1", "does not end"),
            ("s%n.raw 1 2 1", "not a file name pattern"),
            ("s%d%d.raw 1 2 1", "not a file name pattern"),
        ] {
            assert!(names(named).unwrap_err().contains(words), "{named}");
        }
    }
}
