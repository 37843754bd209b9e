//! Pictures of a run's log: the loss over steps, the validation Dice over epochs.

use crate::chart::{Chart, Series};
use serde_json::Value;
use std::path::Path;

/// Draws the curves of a run: reads `log.jsonl` in the folder `out`, and writes `loss.svg` and
/// `validation.svg` beside it.
///
/// # Errors
/// A file cannot be read or written; the message names it.
pub fn draw(out: &Path) -> Result<(), String> {
    let path = out.join("log.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let lines: Vec<Value> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let losses: Vec<[f64; 3]> = lines
        .iter()
        .filter_map(|l| {
            Some([
                l["step"].as_f64()?,
                l["loss"].as_f64()?,
                l["dice"].as_array()?.last()?.as_f64()?,
            ])
        })
        .collect();
    // Steps differ in difficulty more than the network changes: a mean over neighbours shows the
    // trend, if there are as many.
    let window = (losses.len() / 60).max(1);
    let smooth = |column: usize| -> Vec<[f64; 2]> {
        losses
            .chunks_exact(window)
            .map(|c| [c[c.len() - 1][0], c.iter().map(|l| l[column]).sum::<f64>() / c.len() as f64])
            .collect()
    };
    let series = |name: &str, points| Series { name: name.into(), points, band: vec![] };
    let loss = Chart {
        title: "Training loss".into(),
        across: format!("step (mean of {window})"),
        series: vec![
            series("loss", smooth(1)),
            series(
                "1 - Dice of the last answer",
                smooth(2).into_iter().map(|[x, y]| [x, 1.0 - y]).collect(),
            ),
        ],
        range: None,
    };
    loss.write(&out.join("loss.svg"))?;
    let validations: Vec<(f64, Vec<f64>)> = lines
        .iter()
        .filter_map(|l| {
            Some((
                l["epoch"].as_f64()?,
                l["validation"].as_array()?.iter().filter_map(Value::as_f64).collect(),
            ))
        })
        .collect();
    let iterations = validations.first().map_or(0, |v| v.1.len());
    let shown: Vec<usize> =
        if iterations > 1 { vec![0, iterations - 1] } else { (0..iterations).collect() };
    let line = |t: usize| {
        series(
            &format!("after {} interactions", t + 1),
            validations.iter().filter_map(|(e, d)| Some([*e, *d.get(t)?])).collect(),
        )
    };
    let validation = Chart {
        title: "Validation Dice".into(),
        across: "epoch".into(),
        series: shown.into_iter().map(line).collect(),
        range: Some([0.0, 1.0]),
    };
    validation.write(&out.join("validation.svg"))
}
