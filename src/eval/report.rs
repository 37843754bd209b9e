//! The reports of an evaluation: a table with a row per case, the paper's table, and the curve over
//! iterations.

use super::metrics::mean_interval;
use super::result::{CaseResult, Steered};
use crate::chart::{Chart, Series};
use crate::output::uncased;
use serde_json::json;
use std::collections::BTreeMap;

/// The results of all cases under one protocol.
pub struct Results {
    /// The protocol's name.
    pub protocol: String,
    /// One result per case.
    pub cases: Vec<CaseResult>,
}

/// The name for the files of each case: that of the case, without characters that are awkward in a
/// file's name. If several would be the same (ignoring case, which some file systems do not
/// distinguish), all but one get a hash of their name added.
///
/// # Errors
/// An error that names two cases whose files would still have the same name.
pub fn file_names<'a>(
    cases: impl IntoIterator<Item = &'a str>,
) -> Result<BTreeMap<String, String>, String> {
    let plain = |case: &str| case.replace([' ', ',', '/'], "_");
    let mut alike: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    cases.into_iter().for_each(|case| alike.entry(uncased(&plain(case))).or_default().push(case));
    let mut files = BTreeMap::new();
    for group in alike.values() {
        // A case that has this very name keeps it.
        let keeps = group.iter().position(|case| group.len() == 1 || plain(case) == **case);
        for (at, case) in group.iter().enumerate() {
            let hash = blake3::hash(case.as_bytes()).to_string();
            let file = if keeps == Some(at) {
                plain(case)
            } else {
                format!("{}-{}", plain(case), &hash[..8])
            };
            files.insert((*case).to_string(), file);
        }
    }
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    for (case, file) in &files {
        if let Some(other) = owners.insert(uncased(file), case) {
            return Err(format!(
                "the files of the cases '{other}' and '{case}' would both be called {file}: rename one of the cases"
            ));
        }
    }
    Ok(files)
}

/// `mean ± half` in percent, or a dash.
fn percent(values: &[f64]) -> String {
    match mean_interval(values) {
        (mean, _) if mean.is_nan() => "-".into(),
        (mean, Some(half)) => format!("{:.2} ± {:.2}", mean * 100.0, half * 100.0),
        (mean, None) => format!("{:.2}", mean * 100.0),
    }
}

impl Results {
    fn column(&self, f: impl Fn(&CaseResult) -> f64) -> Vec<f64> {
        self.cases.iter().map(f).filter(|v| !v.is_nan()).collect()
    }

    /// The Dice of every case after iteration `t`, from 0; NaN for a case with fewer iterations.
    pub fn dice_after(&self, t: usize) -> Vec<f64> {
        self.column(|c| c.dice.get(t).copied().unwrap_or(f64::NAN))
    }

    /// Iterations of the longest case.
    fn iterations(&self) -> usize {
        self.cases.iter().map(|c| c.dice.len()).max().unwrap_or(0)
    }
}

/// The results as Markdown: the paper's table, with one row per protocol, Dice and surface Dice in
/// percent with their 95 % intervals, after the first and the last iteration; then a table of the
/// cases of each protocol. `about` is the text above.
pub fn markdown(results: &[Results], about: &str) -> String {
    let mut text = format!(
        "{about}\n\n| configuration | cases | Dice, first | Dice, last | NSD (5 mm), first | NSD (5 mm), last | HD95 mm, last |\n"
    );
    text += "|---|---|---|---|---|---|---|\n";
    for r in results {
        let hd = r.column(|c| c.last.hausdorff_95);
        let hd = hd.iter().sum::<f64>() / hd.len().max(1) as f64;
        text += &format!(
            "| {} | {} | {} | {} | {} | {} | {hd:.2} |\n",
            r.protocol,
            r.cases.len(),
            percent(&r.column(|c| c.first.dice)),
            percent(&r.column(|c| c.last.dice)),
            percent(&r.column(|c| c.first.nsd)),
            percent(&r.column(|c| c.last.nsd)),
        );
    }
    text += "\nMean and 95 % interval (Student's t) in percent.\n";
    text += &steered(results);
    for r in results {
        text += &format!(
            "\n### {}\n\n| case | ml | Dice, first | Dice, last | NSD, first | NSD, last | HD95 mm |\n|---|---|---|---|---|---|---|\n",
            r.protocol
        );
        for c in &r.cases {
            text += &format!(
                "| {} | {:.2} | {:.3} | {:.3} | {:.3} | {:.3} | {:.2} |\n",
                c.case,
                c.ml,
                c.first.dice,
                c.last.dice,
                c.first.nsd,
                c.last.nsd,
                c.last.hausdorff_95
            );
        }
    }
    text
}

/// The table of protocols that steer; empty if there are none.
fn steered(results: &[Results]) -> String {
    let all: Vec<&Results> =
        results.iter().filter(|r| r.cases.iter().any(|c| c.steered.is_some())).collect();
    if all.is_empty() {
        return String::new();
    }
    let mut text = "\n| configuration | Dice, first | after 1 | 3 | 5 | 10 | NSD 2 mm, first | after 5 | 10 | AUC Dice | AUC NSD | clicks to 0.80 | 0.85 | 0.90 | obeyed | held | steps that lose more than 0.01 | s per click, median | most |\n".to_string();
    text += "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for r in &all {
        let mean = |v: Vec<f64>| {
            if v.is_empty() { f64::NAN } else { v.iter().sum::<f64>() / v.len() as f64 }
        };
        let of = |f: &dyn Fn(&Steered) -> f64| {
            mean(
                r.cases
                    .iter()
                    .filter_map(|c| c.steered.as_ref())
                    .map(f)
                    .filter(|v| !v.is_nan())
                    .collect(),
            )
        };
        let dice = |t: usize| mean(r.dice_after(t));
        let nsd = |t: usize| of(&|s| s.nsd_2.get(t).copied().unwrap_or(f64::NAN));
        let share = |part: &dyn Fn(&Steered) -> usize, whole: &dyn Fn(&Steered) -> usize| {
            let sum = |f: &dyn Fn(&Steered) -> usize| {
                r.cases.iter().filter_map(|c| c.steered.as_ref()).map(f).sum::<usize>()
            };
            100.0 * sum(part) as f64 / sum(whole).max(1) as f64
        };
        let mut times: Vec<f64> = r
            .cases
            .iter()
            .filter_map(|c| c.steered.as_ref())
            .flat_map(|s| s.seconds.iter().skip(1).copied())
            .collect();
        times.sort_by(f64::total_cmp);
        text += &format!("| {} ", r.protocol);
        [0, 1, 3, 5, 10].into_iter().for_each(|t| text += &format!("| {:.3} ", dice(t)));
        [0, 5, 10].into_iter().for_each(|t| text += &format!("| {:.3} ", nsd(t)));
        text += &format!("| {:.3} | {:.3} ", of(&|s| s.auc[0]), of(&|s| s.auc[1]));
        (0..3).for_each(|n| text += &format!("| {:.1} ", of(&|s| s.clicks_to[n] as f64)));
        text += &format!(
            "| {:.1} % | {:.1} % ",
            share(&|s| s.obeyed, &|s| s.said),
            share(&|s| s.held, &|s| s.said)
        );
        text += &format!("| {:.1} % ", share(&|s| s.losses, &|s| s.steps));
        let at = |q: f64| {
            times.get(((times.len().max(1) - 1) as f64 * q) as usize).copied().unwrap_or(f64::NAN)
        };
        text += &format!("| {:.3} | {:.3} |\n", at(0.5), at(1.0));
    }
    text += &format!(
        "\nAUC by trapezoid over the answers after 1 to 5 corrections, at most 4. A Dice that is not reached counts as {} clicks. NSD counts as 0 where Dice is at most 0.2.\n",
        all.iter().map(|r| r.iterations()).max().unwrap_or(0)
    );
    text
}

/// The results as CSV: one row per case and protocol, with Dice after every iteration.
///
/// # Errors
/// The writer's, as text.
pub fn csv(results: &[Results]) -> Result<String, String> {
    let iterations = results.iter().map(Results::iterations).max().unwrap_or(0);
    let mut writer = csv::Writer::from_writer(vec![]);
    let mut head: Vec<String> =
        ["protocol", "case", "ml", "windows", "nsd_first", "nsd", "hausdorff_95"]
            .map(String::from)
            .to_vec();
    head.extend((1..=iterations).map(|t| format!("dice_{t}")));
    writer.write_record(&head).map_err(|e| e.to_string())?;
    for (r, c) in results.iter().flat_map(|r| r.cases.iter().map(move |c| (r, c))) {
        let mut row =
            vec![r.protocol.clone(), c.case.clone(), format!("{:.4}", c.ml), c.windows.to_string()];
        row.extend([c.first.nsd, c.last.nsd, c.last.hausdorff_95].map(|v| format!("{v:.6}")));
        row.extend(
            (0..iterations).map(|t| c.dice.get(t).map_or(String::new(), |d| format!("{d:.6}"))),
        );
        writer.write_record(&row).map_err(|e| e.to_string())?;
    }
    let bytes = writer.into_inner().map_err(|e| e.to_string())?;
    String::from_utf8(bytes).map_err(|e| e.to_string())
}

/// The results as JSON, for programs, with `about` beside them.
pub fn json(results: &[Results], about: serde_json::Value) -> serde_json::Value {
    let one = |r: &Results| {
        let summary = |v: Vec<f64>| {
            let (mean, half) = mean_interval(&v);
            json!({ "mean": mean, "interval_95": half })
        };
        let over: Vec<_> = (0..r.iterations()).map(|t| summary(r.dice_after(t))).collect();
        json!({ "protocol": r.protocol, "dice": over, "nsd": summary(r.column(|c| c.last.nsd)), "cases": r.cases })
    };
    json!({ "about": about, "results": results.iter().map(one).collect::<Vec<_>>() })
}

/// A chart of Dice over iterations: for each protocol the mean, with its 95 % interval as a band.
pub fn curve(results: &[Results]) -> Chart {
    let series = |r: &Results| {
        let each: Vec<(f64, Option<f64>)> =
            (0..r.iterations()).map(|t| mean_interval(&r.dice_after(t))).collect();
        Series {
            name: r.protocol.clone(),
            points: each.iter().enumerate().map(|(t, v)| [t as f64 + 1.0, v.0]).collect(),
            band: each.iter().map(|v| v.1.unwrap_or(0.0)).collect(),
        }
    };
    Chart {
        title: "Dice over iterations".into(),
        across: "iteration".into(),
        series: results.iter().map(series).collect(),
        range: Some([0.0, 1.0]),
    }
}
