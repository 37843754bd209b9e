//! Checkpoint cases: files as PyTorch writes them, beside the tensors they hold; and files that
//! must be refused.

use super::{Archive, Check, VerifyError};
use crate::model::checkpoint::read;
use crate::tensor::extent;
use std::path::Path;

/// The tensors that the good files hold.
pub const EXPECTED: &str = "checkpoint_expected.safetensors";

/// Names of files that must be refused.
const BAD: [&str; 3] = ["truncated", "not_a_checkpoint", "malicious"];

pub fn run(path: &Path) -> Result<Vec<Check>, VerifyError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let result = read(path);
    if BAD.iter().any(|b| name.contains(b)) {
        let refused = result.is_err();
        return Ok(vec![Check::exact("refused", refused)]);
    }
    let state = result.map_err(|e| VerifyError::new(path, e.to_string()))?;
    let expected = Archive::open(&path.with_file_name(EXPECTED))?;
    let mut checks = vec![];
    for (name, entry) in &state {
        let got = entry.values().map_err(|e| VerifyError::new(path, format!("{name}: {e}")))?;
        match expected.maybe(name) {
            Some(want) => checks.push(Check::exact(
                name.clone(),
                entry.shape == want.shape && got.as_ref() == Some(&want.values),
            )),
            // A file about one feature may hold its own tensor: it must at least be intact.
            None if state.len() == 1 => {
                let whole = got.is_some_and(|v| {
                    extent(&entry.shape) == Some(v.len()) && v.iter().all(|v| v.is_finite())
                });
                checks.push(Check::exact(name.clone(), whole));
            }
            None => checks.push(Check::exact(format!("unexpected {name}"), false)),
        }
    }
    if state.len() > 1 {
        for name in expected.names().filter(|n| !state.contains_key(*n)) {
            checks.push(Check::exact(format!("missing {name}"), false));
        }
    }
    Ok(checks)
}
