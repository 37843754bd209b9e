//! `prism tune`.

use super::bench::{lines, time_of};
use super::model::ModelArgs;
use super::{DeviceArgs, Failure, number, print, say, warn};
use crate::bench::{CudaCeilings, choice_keys, launches_of, time_variants, training_launches};
use crate::device::Device;
use crate::model::Model;
use clap::Args;
use std::sync::Arc;

/// Select the fastest kernel variants for this GPU
///
/// If a kernel has several variants (other tiles, other numbers of blocks that share a sum), a rule
/// selects one. This command times all of them on the GPU for the shapes of a model, a few seconds
/// at each precision, and saves those that are clearly faster in a table beside the compiled
/// kernels. Programs started afterwards use it, on GPUs of this kind, with this driver and these
/// kernels. No other command creates or changes a table.
///
/// Variants sum in another order, so results differ from those of the rule by rounding; with the
/// same table they are the same bits each time. PRISM_TUNE=0 ignores the table, --forget removes
/// the entries of this model. 'prism info --device cuda' reports whether a table is used.
#[derive(Args)]
pub struct Tune {
    #[command(flatten)]
    model: ModelArgs,
    /// Numbers of prompt voxels of a click to tune for
    #[arg(
        long,
        default_value = "1,60,500",
        value_delimiter = ',',
        value_name = "N,..",
        value_parser = number(0, 10_000)
    )]
    points: Vec<usize>,
    /// Also tune for training this model, with steps of one item
    #[arg(long)]
    training: bool,
    /// Print the fastest variants without saving them
    #[arg(long, conflicts_with = "forget")]
    dry_run: bool,
    /// Remove this model's entries from the table, so that the rule selects again
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
            return Err(Failure::Usage(
                "the emulator has no meaningful times: use --device cuda".into(),
            ));
        }
        let weights = self.model.choose()?.open()?;
        let model = Arc::new(Model::new(&device, &weights)?);
        let mut work = vec![launches_of(model.clone(), None)];
        work.extend(self.points.iter().map(|points| launches_of(model.clone(), Some(*points))));
        if self.training {
            work.push(training_launches(cuda, weights.config.clone(), 1)?);
        }
        if self.forget {
            let keys = choice_keys(cuda, &mut work)?.into_iter();
            let path = cuda.keep_variants(&keys.map(|key| (key, None)).collect::<Vec<_>>())?;
            return say(&format!("returned to the rule: {}\n", path.display()));
        }
        let ceilings = CudaCeilings::measure(cuda, device.products())?;
        let choices = time_variants(cuda, &ceilings, &mut work)?;
        say(&format!("{}\n\n{}\n", device.describe(), lines(&choices)))?;
        let keys = choices.iter().map(|choice| choice.key.clone());
        let chosen: Vec<(String, Option<String>)> =
            keys.zip(choices.iter().map(|c| c.chosen().map(String::from))).collect();
        let others = choices.iter().filter(|choice| choice.best > 0).count();
        let gain: f64 = choices.iter().map(|choice| choice.gain()).sum();
        print(&format!(
            "{others} of {} choices differ from the rule; the timed work takes {} less\n",
            choices.len(),
            time_of(gain)
        ))?;
        if self.dry_run {
            return Ok(());
        }
        let path = cuda.keep_variants(&chosen)?;
        if cuda.ignores_tables() {
            warn("PRISM_TUNE is off: with it, programs follow the rule");
        }
        say(&format!("saved in {}\n", path.display()))
    }
}
