//! Metric cases: pairs of masks and the results of DeepMind's surface-distance and plain Dice for
//! them; and thinning cases.

use super::{Archive, Check, VerifyError};
use crate::eval::metrics::{Surfaces, dice};
use crate::prompt::simulate::thinning::thin;
use crate::volume::{Affine, Grid};
use serde_json::Value;
use std::path::Path;

const BOUND: f64 = 1e-9;

pub fn run(path: &Path) -> Result<Vec<Check>, VerifyError> {
    let archive = Archive::open(path)?;
    let list = archive.json("cases")?;
    let cases = list.as_array().ok_or_else(|| archive.error("metadata 'cases' is not a list"))?;
    let mut checks = vec![];
    for (at, case) in cases.iter().enumerate() {
        let number = case["case"].as_u64().unwrap_or(at as u64);
        let mask = |name: &str| -> Result<(Vec<u8>, [usize; 3]), VerifyError> {
            let entry = archive.get(&format!("{name}.{number}"))?;
            let size = <[usize; 3]>::try_from(&entry.shape[..]);
            let size = size.map_err(|_| {
                archive.error(format!("{name}.{number} is {:?}, expected three axes", entry.shape))
            })?;
            Ok((entry.values.iter().map(|v| u8::from(*v != 0.0)).collect(), size))
        };
        let ((truth, size), (prediction, other)) = (mask("truth")?, mask("prediction")?);
        let spacing: Option<Vec<f64>> =
            case["spacing_mm"].as_array().map(|l| l.iter().filter_map(Value::as_f64).collect());
        let spacing = spacing.and_then(|s| <[f64; 3]>::try_from(s).ok()).filter(|_| size == other);
        let spacing = spacing.ok_or_else(|| {
            archive.error(format!(
                "case {number}: no spacing_mm of three numbers, or masks of different sizes"
            ))
        })?;
        let surfaces = Surfaces::of(
            &truth,
            &prediction,
            &Grid { size, affine: Affine::from_spacing(spacing) },
        );
        let fields = case
            .as_object()
            .ok_or_else(|| archive.error(format!("case {number} is not an object")))?;
        for (key, want) in fields {
            let got = match key.as_str() {
                "case" | "spacing_mm" => continue,
                "dice" => vec![dice(&truth, &prediction)],
                "hausdorff_95" => vec![surfaces.hausdorff(95.0)],
                "average_surface_distance" => surfaces.average().to_vec(),
                _ => {
                    let tolerance = key
                        .strip_prefix("surface_dice_")
                        .and_then(|k| k.strip_suffix("mm")?.parse().ok());
                    let tolerance = tolerance.ok_or_else(|| {
                        archive.error(format!("case {number}: unknown metric '{key}'"))
                    })?;
                    vec![surfaces.nsd(tolerance)]
                }
            };
            let want: Vec<f64> = match want {
                Value::Array(list) => list.iter().filter_map(number_of).collect(),
                one => number_of(one).into_iter().collect(),
            };
            let same = got.iter().zip(&want).all(|(g, w)| g == w || (g.is_nan() && w.is_nan()))
                && got.len() == want.len();
            let name = format!("{key}.{number}");
            checks.push(if same {
                Check::exact(name, true)
            } else {
                Check::relative(name, got.into_iter(), &want, BOUND, 0.0)
            });
        }
    }
    Ok(checks)
}

/// A number, also if JSON has to spell it as text.
fn number_of(value: &Value) -> Option<f64> {
    match value {
        Value::String(s) => s.parse().ok(),
        other => other.as_f64(),
    }
}

pub fn thinning(path: &Path) -> Result<Vec<Check>, VerifyError> {
    let archive = Archive::open(path)?;
    let numbers: Vec<&str> = archive.names().filter_map(|n| n.strip_prefix("mask.")).collect();
    let check = |n: &&str| -> Result<Check, VerifyError> {
        let (mask, want) =
            (archive.get(&format!("mask.{n}"))?, archive.get(&format!("skeleton.{n}"))?);
        let &[rows, columns] = &mask.shape[..] else {
            return Err(
                archive.error(format!("mask.{n} is {:?}, expected [rows, columns]", mask.shape))
            );
        };
        let mut thinned: Vec<u8> = mask.values.iter().map(|v| u8::from(*v != 0.0)).collect();
        thin(&mut thinned, rows, columns);
        let equal = want.values.len() == thinned.len()
            && thinned.iter().zip(&want.values).all(|(t, w)| (*t != 0) == (*w != 0.0));
        Ok(Check::exact(format!("skeleton.{n}"), equal))
    };
    numbers.iter().map(check).collect()
}
