//! `prism verify`.

use super::{DeviceArgs, Failure, print};
use crate::model::Weights;
use crate::output::write_text;
use crate::verify::{CaseReport, Kind, run};
use clap::Args;
use std::path::PathBuf;

/// Check this installation or a model file
///
/// Runs every reference case below a folder and compares the results with the outputs of the
/// reference network. For a model file, checks that its content matches the hash that it carries
/// and that every weight is finite; flags for cases are then refused.
///
/// Prints one line per case: the quantity that came nearest to its tolerance, its relative error,
/// the tolerance, the verdict, and how many voxels of a mask were nearer to 0 than float32 can
/// resolve and were counted as in the reference.
#[derive(Args)]
pub struct Verify {
    /// Folder with reference cases, or a model (.safetensors)
    #[arg(value_name = "FOLDER|MODEL")]
    folder: PathBuf,
    /// Run only these kinds of case; without this flag, an unknown kind is an error
    #[arg(long, value_delimiter = ',', value_name = "KINDS")]
    only: Vec<Kind>,
    /// Write all compared quantities to a JSON file
    #[arg(long, alias = "json", value_name = "FILE")]
    save: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Verify {
    /// A flag that was given and says how cases are run.
    fn of_cases(&self) -> Option<&'static str> {
        let DeviceArgs { device, precision, threads } = &self.device;
        let given = [
            ("--only", !self.only.is_empty()),
            ("--save", self.save.is_some()),
            ("--device", device.is_some()),
            ("--precision", precision.is_some()),
            ("--threads", threads.is_some()),
        ];
        given.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag)
    }

    /// Holds a model file against its hash.
    fn model(&self) -> Result<(), Failure> {
        let weights = Weights::open(&self.folder)?;
        let hash = match weights.sealed {
            true => "it matches the hash that it carries",
            false => {
                "it carries no hash (it was written by another program): 'prism convert' writes one"
            }
        };
        let (file, n) = (self.folder.display(), weights.parameters());
        print(&format!("{file}: {n} parameters of {}, all finite; {hash}\n", weights.dtype))
    }

    pub fn run(&self) -> Result<(), Failure> {
        if self.folder.is_file() {
            if let Some(flag) = self.of_cases() {
                return Err(Failure::Usage(format!(
                    "{flag} needs a folder of reference cases, but {} is a file",
                    self.folder.display()
                )));
            }
            return self.model();
        }
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
        if let Some(path) = &self.save {
            let report = serde_json::json!({ "device": device.describe(), "passed": passed, "cases": reports });
            write_text(path, &format!("{report:#}\n")).map_err(Failure::Failed)?;
        }
        print(&format!(
            "{good} passed, {} failed, on {}\n",
            reports.len() - good,
            device.describe()
        ))?;
        match (passed, reports.is_empty()) {
            (true, _) => Ok(()),
            (false, true) => {
                Err(Failure::Failed(format!("{}: no reference case found", self.folder.display())))
            }
            (false, false) => Err(Failure::Failed(String::new())),
        }
    }
}

fn line(case: &CaseReport) -> String {
    let verdict = if case.passed() { "ok  " } else { "FAIL" };
    let mut text = match (case.worst(), &case.failure) {
        (_, Some(failure)) => format!("{verdict} {:<48} {failure}\n", case.case),
        (Some(c), None) => {
            // A failed quantity's note is printed with it, below.
            let notes = case.checks.iter().filter(|c| c.passed()).filter_map(|c| c.note.as_ref());
            let note: String = notes.map(|note| format!(", {note}")).collect();
            let of = format!("{} ({} compared{note})", c.quantity, case.checks.len());
            format!(
                "{verdict} {:<48} {of:<40} error {:.2e}  tolerance {:.1e}  {:.2} s\n",
                case.case, c.error, c.tolerance, case.seconds
            )
        }
        (None, None) => format!("{verdict} {:<48} nothing was compared\n", case.case),
    };
    for c in case.checks.iter().filter(|c| !c.passed()) {
        let note = c.note.as_ref().map_or(String::new(), |note| format!("  ({note})"));
        text += &format!(
            "       {:<48} error {:.2e}  tolerance {:.1e}{note}\n",
            c.quantity, c.error, c.tolerance
        );
    }
    text
}
