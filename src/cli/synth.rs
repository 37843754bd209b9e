//! `prism synth`: synthetic scans with tumours, as files.

use super::{Failure, say};
use crate::data::synth::{generate, generate_as};
use crate::output::{make_folder, write_text};
use crate::prompt::simulate::generator;
use crate::volume::Modality;
use crate::volume::{write_mask, write_scan};
use clap::Args;
use rayon::prelude::*;
use serde_json::json;
use std::path::PathBuf;

/// Write synthetic scans with tumours and their labels
///
/// Uses the layout of the Medical Segmentation Decathlon. The same seed gives the same scans.
/// 'prism train --data synth:SEED' generates such scans without files.
#[derive(Args)]
pub struct Synth {
    /// Folder to write: imagesTr, labelsTr and dataset.json
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Number of scans
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    count: u64,
    /// Seed of the series
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Modality to imitate [default: all]
    #[arg(long, value_name = "NAME")]
    modality: Option<Modality>,
}

impl Synth {
    pub fn run(&self) -> Result<(), Failure> {
        let json = self.output.join("dataset.json");
        if json.exists() {
            return Err(Failure::Usage(format!(
                "{} exists: give another --output",
                json.display()
            )));
        }
        for folder in ["imagesTr", "labelsTr"] {
            let path = self.output.join(folder);
            make_folder(&path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
        }
        let write = |index: u64| -> Result<serde_json::Value, String> {
            let scan = match self.modality {
                Some(modality) => generate_as(&mut generator(self.seed, &[index]), modality),
                None => generate(self.seed, index),
            };
            let name = format!("synth_{index:04}.nii.gz");
            let (image, label) = (format!("imagesTr/{name}"), format!("labelsTr/{name}"));
            let pending = [
                write_scan(&self.output.join(&image), &scan.image).map_err(|e| e.to_string())?,
                write_mask(&self.output.join(&label), &scan.image, &scan.label)
                    .map_err(|e| e.to_string())?,
            ];
            for file in pending {
                let path = file.destination().display().to_string();
                file.commit().map_err(|e| format!("{path}: {e}"))?;
            }
            Ok(json!({ "image": format!("./{image}"), "label": format!("./{label}") }))
        };
        let entries: Vec<_> = (0..self.count)
            .into_par_iter()
            .map(write)
            .collect::<Result<_, _>>()
            .map_err(Failure::Failed)?;
        let about = json!({
            "name": format!("prism synthetic scans, seed {}", self.seed),
            "labels": { "0": "background", "1": "tumour" },
            "numTraining": entries.len(),
            "training": entries,
        });
        write_text(&json, &format!("{about:#}\n")).map_err(Failure::Failed)?;
        say(&format!("{}: {} scans\n", self.output.display(), self.count))
    }
}
