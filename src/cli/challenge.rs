//! `prism challenge`: a challenge's own input files, answered the way its containers are run.

use super::model::ModelArgs;
use super::{DeviceArgs, Failure, say, warn};
use crate::challenge::{Outcome, autopet, cvpr};
use crate::device::Device;
use crate::model::Model;
use crate::output::make_folder;
use crate::volume::VolumeError;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Segment the input files of a challenge
///
/// Uses the folders and file names of the challenge's containers.
///
/// cvpr25 is the CVPR 2025 challenge on interactive 3D segmentation: for each .npz file of the
/// input folder, a file of the same name is written. autopet is autoPET V: images/pet/ID.mha and
/// lesion-clicks.json of the input folder give images/tumor-lesion-segmentation/ID.mha; the network
/// has one channel and sees the PET, the CT is not read. A case that fails is reported, and the
/// others are still processed.
#[derive(Args)]
pub struct Challenge {
    #[command(flatten)]
    model: ModelArgs,
    /// Challenge
    #[arg(long, default_value = "cvpr25", value_name = "NAME")]
    kind: Kind,
    /// Input folder [default: /workspace/inputs for cvpr25, /input for autopet]
    #[arg(short, long, value_name = "DIR")]
    input: Option<PathBuf>,
    /// Output folder [default: /workspace/outputs for cvpr25, /output for autopet]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// CVPR 2025: Foundation Models for Interactive 3D Biomedical Image Segmentation
    Cvpr25,
    /// autoPET V
    Autopet,
}

impl Kind {
    /// Where a container of this challenge finds its input, and where it writes its answers.
    fn folders(self) -> [&'static str; 2] {
        match self {
            Kind::Cvpr25 => ["/workspace/inputs", "/workspace/outputs"],
            Kind::Autopet => ["/input", "/output"],
        }
    }

    /// The cases of an input folder.
    fn cases(self, input: &Path) -> Result<Vec<PathBuf>, VolumeError> {
        match self {
            Kind::Cvpr25 => cvpr::cases(input),
            Kind::Autopet => Ok(vec![input.into()]),
        }
    }

    fn run(self, model: &Arc<Model>, case: &Path, output: &Path) -> Result<Outcome, VolumeError> {
        match self {
            Kind::Cvpr25 => cvpr::run(model, case, output),
            Kind::Autopet => autopet::run(model, case, output),
        }
    }
}

impl Challenge {
    pub fn run(&self) -> Result<(), Failure> {
        let [input, output] = self.kind.folders();
        let input = self.input.as_deref().unwrap_or(Path::new(input));
        let output = self.output.as_deref().unwrap_or(Path::new(output));
        let same =
            input.canonicalize().ok().zip(output.canonicalize().ok()).is_some_and(|(a, b)| a == b);
        if same {
            return Err(Failure::Usage(
                "--input and --output are the same folder: the results would overwrite the cases"
                    .into(),
            ));
        }
        let chosen = self.model.choose()?;
        let cases = self.kind.cases(input)?;
        let device = self.device.open()?;
        let model = Arc::new(Model::new(&device, &chosen.open()?)?);
        // On the CPU a single case would wait twice.
        if let Device::Cuda(_) = device {
            model.warm_up()?;
        }
        make_folder(output).map_err(|e| Failure::Failed(format!("{}: {e}", output.display())))?;
        let mut failed = 0;
        for case in &cases {
            match self.kind.run(&model, case, output) {
                Ok(outcome) => report(&outcome)?,
                Err(e) => {
                    warn(&format!("failed: {e}"));
                    failed += 1;
                }
            }
        }
        match failed {
            0 => Ok(()),
            n => Err(Failure::Failed(format!("{n} of {} cases failed", cases.len()))),
        }
    }
}

fn report(outcome: &Outcome) -> Result<(), Failure> {
    outcome.warnings.iter().for_each(|w| warn(w));
    let objects = if outcome.objects == 1 { "object" } else { "objects" };
    say(&format!(
        "{}: {} {objects}, {} voxels; the scan was {}\n",
        outcome.output.display(),
        outcome.objects,
        outcome.voxels,
        outcome.scan
    ))
}
