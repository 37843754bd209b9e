//! `prism verify`.

use super::{DeviceArgs, Failure, print};
use crate::verify::{CaseReport, Kind, run};
use clap::Args;
use std::path::PathBuf;

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Arithmetic {
    F32,
}

/// Runs every reference case below a folder and compares with the reference network's outputs.
///
/// Prints a line a case: the quantity that came nearest to its tolerance, its relative error, the tolerance, the verdict.
#[derive(Args)]
pub struct Verify {
    /// Folder of reference cases
    folder: PathBuf,
    /// Run only these kinds of case; without this, a kind that is not known here fails
    #[arg(long, value_delimiter = ',', value_name = "KINDS")]
    only: Vec<Kind>,
    /// Arithmetic to verify
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    precision: Arithmetic,
    /// Write every compared quantity to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Verify {
    pub fn run(&self) -> Result<(), Failure> {
        let Arithmetic::F32 = self.precision;
        let device = self.device.open()?;
        let mut reports: Vec<CaseReport> = vec![];
        let mut outcome = Ok(());
        let passed = run(&device, &self.folder, &self.only, |case| {
            if outcome.is_ok() {
                outcome = print(&line(case));
            }
            reports.push(case.clone());
        })?;
        outcome?;
        let good = reports.iter().filter(|r| r.passed()).count();
        if let Some(path) = &self.json {
            let report = serde_json::json!({ "device": device.describe(), "passed": passed, "cases": reports });
            super::segment::write_text(path, &format!("{report:#}\n"))?;
        }
        print(&format!("{good} passed, {} failed, on {}\n", reports.len() - good, device.describe()))?;
        match (passed, reports.is_empty()) {
            (true, _) => Ok(()),
            (false, true) => Err(Failure::Failed(format!("{}: no case to run", self.folder.display()))),
            (false, false) => Err(Failure::Failed(String::new())),
        }
    }
}

fn line(case: &CaseReport) -> String {
    let verdict = if case.passed() { "ok  " } else { "FAIL" };
    let mut text = match (case.worst(), &case.failure) {
        (_, Some(failure)) => format!("{verdict} {:<48} {failure}\n", case.case),
        (Some(c), None) => {
            // Said of the worst quantity anyway; of another one it would go unseen.
            let moved = case.checks.iter().find_map(|c| c.quantity.split_once(" (").map(|(_, note)| note.trim_end_matches(')')));
            let moved = moved.map_or(String::new(), |note| format!(", {note}"));
            let name = c.quantity.split(" (").next().unwrap_or_default();
            let of = format!("{name} ({} compared{moved})", case.checks.len());
            format!("{verdict} {:<48} {of:<40} error {:.2e}  tolerance {:.1e}  {:.2} s\n", case.case, c.error, c.tolerance, case.seconds)
        }
        (None, None) => format!("{verdict} {:<48} nothing was compared\n", case.case),
    };
    for c in case.checks.iter().filter(|c| !c.passed()) {
        text += &format!("       {:<48} error {:.2e}  tolerance {:.1e}\n", c.quantity, c.error, c.tolerance);
    }
    text
}
