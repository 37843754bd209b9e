//! `prism tune`.

use super::bench::{lines, time_of};
use super::model::ModelArgs;
use super::{DeviceArgs, Failure, number, print, say, warn};
use crate::bench::{CudaCeilings, launches_of, time_variants, training_launches};
use crate::device::Device;
use crate::model::Model;
use clap::Args;
use std::sync::Arc;

/// Choose the variants of kernels that are fastest on this GPU
///
/// Where a kernel has several variants (other tiles, other numbers of blocks that share a sum), a
/// rule chooses among them. This command times all of them on the GPU for the shapes of a model, a
/// few seconds at each precision, and keeps those that are faster beyond doubt in a table beside
/// the compiled kernels. Every program that is started afterwards uses them, on GPUs of this kind,
/// with this driver and these kernels. Nothing else ever makes or changes a table.
///
/// Variants add up in another order, so results differ by rounding from those of the rule. With a
/// table they are the same each time. PRISM_TUNE=0 ignores it, --forget removes what is in it for
/// this model. 'prism info --device cuda' tells whether one is used.
#[derive(Args)]
pub struct Tune {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt voxels of clicks to be fast for
    #[arg(
        long,
        default_value = "1,60,500",
        value_delimiter = ',',
        value_name = "N,..",
        value_parser = number(0, 10_000)
    )]
    points: Vec<usize>,
    /// Also choose for training this model: a step of one item
    #[arg(long)]
    training: bool,
    /// Show what is fastest, and keep nothing
    #[arg(long, conflicts_with = "forget")]
    dry_run: bool,
    /// Follow the rule again in everything that would be timed
    #[arg(long)]
    forget: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Tune {
    pub fn run(&self) -> Result<(), Failure> {
        let device = self.device.open()?;
        let Device::Cuda(cuda) = &device else {
            return Err(Failure::Usage("tune needs a GPU: --device cuda".into()));
        };
        if device.is_emulated() {
            return Err(Failure::Usage("the emulator's times mean nothing: --device cuda".into()));
        }
        let weights = self.model.choose()?.open()?;
        let model = Arc::new(Model::new(&device, &weights)?);
        let mut work = vec![launches_of(model.clone(), None)];
        work.extend(self.points.iter().map(|points| launches_of(model.clone(), Some(*points))));
        if self.training {
            work.push(training_launches(cuda, weights.config.clone(), 1)?);
        }
        let ceilings = CudaCeilings::measure(cuda, device.products())?;
        let choices = time_variants(cuda, &ceilings, &mut work)?;
        say(&format!("{}\n\n{}\n", device.describe(), lines(&choices)))?;
        let keys = choices.iter().map(|choice| choice.key.clone());
        let chosen: Vec<(String, Option<String>)> = match self.forget {
            true => keys.map(|key| (key, None)).collect(),
            false => keys.zip(choices.iter().map(|c| c.chosen().map(String::from))).collect(),
        };
        let others = choices.iter().filter(|choice| choice.best > 0).count();
        let gain: f64 = choices.iter().map(|choice| choice.gain()).sum();
        print(&format!(
            "{others} of {} choices are not the rule's; all work timed here takes {} less\n",
            choices.len(),
            time_of(gain)
        ))?;
        if self.dry_run {
            return Ok(());
        }
        let path = cuda.keep_variants(&chosen)?;
        if self.forget {
            return say(&format!("all of them follow the rule again: {}\n", path.display()));
        }
        if cuda.ignores_tables() {
            warn("PRISM_TUNE is off: programs that have it so follow the rule");
        }
        say(&format!("kept in {}\n", path.display()))
    }
}
