//! Every setting of a training run: from flags, a TOML file and defaults, in this order of
//! precedence.
//!
//! ```
//! use prism::train::settings::Given;
//!
//! let given = Given { epochs: Some(2), batch: Some(4), ..Given::default() };
//! let settings = given.settings();
//! assert_eq!((settings.batch, settings.steps, settings.total_steps()), (4, 100, 200));
//! assert!(settings.check().is_ok());
//! ```

use super::step::LossWeights;
use crate::data::cases::TargetLabel;
use crate::data::sample::Augmentation;
use crate::input::read_text;
use crate::message::number;
use crate::ops::optimizer::AdamWConfig;
use crate::prompt::simulate::User;
use rand::{Rng, RngExt};
use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};

/// How the learning rate decreases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// By a fixed amount (`lr_fall`) after every epoch, as in the paper.
    Paper,
    /// Linearly, to `lr_end` times the first rate, step by step.
    Linear,
    /// By a constant factor per step, to `lr_end` times the first rate.
    Exponential,
    /// Not at all.
    Constant,
}

/// Whether iterations are computed again in the backward pass. In files it is `true`, `false` or
/// `"auto"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Recompute {
    /// Where memory is too little to keep them; on a GPU the results are those of 'false', to the
    /// last bit.
    Auto,
    /// Always; on a GPU the last bits are other ones than those of 'false'.
    #[cfg_attr(feature = "cli", value(name = "true"))]
    Always,
    /// Never.
    #[cfg_attr(feature = "cli", value(name = "false"))]
    Never,
}

impl From<bool> for Recompute {
    fn from(always: bool) -> Recompute {
        if always { Recompute::Always } else { Recompute::Never }
    }
}

impl Serialize for Recompute {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Recompute::Auto => serializer.serialize_str("auto"),
            Recompute::Always => serializer.serialize_bool(true),
            Recompute::Never => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for Recompute {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Recompute, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Recompute;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("true, false or \"auto\"")
            }
            fn visit_bool<E: de::Error>(self, always: bool) -> Result<Recompute, E> {
                Ok(always.into())
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<Recompute, E> {
                match name {
                    "auto" => Ok(Recompute::Auto),
                    _ => Err(E::invalid_value(Unexpected::Str(name), &self)),
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $default:expr, $value:literal;)*) => {
        /// Settings as given; what is absent has its default.
        #[derive(Clone, Debug, Default, Deserialize)]
        #[cfg_attr(feature = "cli", derive(clap::Args))]
        #[serde(default, deny_unknown_fields)]
        pub struct Given {
            $(
                $(#[$doc])*
                #[cfg_attr(feature = "cli", arg(long, value_name = $value, num_args = 1))]
                pub $name: Option<$type>,
            )*
            /// Device to compute on. This and the two below may stand in a file; as flags they are
            /// every command's. They are no settings of a run, which may go on on another device.
            #[cfg_attr(feature = "cli", arg(skip))]
            pub device: Option<String>,
            /// Type in which the device keeps maps.
            #[cfg_attr(feature = "cli", arg(skip))]
            pub precision: Option<String>,
            /// Threads to compute with.
            #[cfg_attr(feature = "cli", arg(skip))]
            pub threads: Option<usize>,
        }

        /// All settings of a run. [`Given`] has their defaults.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        pub struct Settings {
            $($(#[$doc])* pub $name: $type,)*
        }

        impl Given {
            /// These settings if they are given, otherwise `below`'s.
            pub fn over(self, below: Given) -> Given {
                Given {
                    $($name: self.$name.or(below.$name),)*
                    device: self.device.or(below.device),
                    precision: self.precision.or(below.precision),
                    threads: self.threads.or(below.threads),
                }
            }

            /// All settings, with defaults for those that are not given; they are not checked yet.
            pub fn settings(self) -> Settings {
                Settings { $($name: self.$name.unwrap_or_else(|| $default),)* }
            }
        }
    };
}

settings! {
    /// Network: small, base, or a JSON file with a configuration [default: small]
    model: String = "small".into(), "NAME|FILE";
    /// Model file to start from (fine-tuning); its configuration replaces --model
    init: Option<PathBuf> = None, "FILE";
    /// Training data, comma-separated: synth:SEED, a CSV (columns image, label, name, modality), or
    /// a folder (MSD, nnU-Net, LiTS, KiTS, or one folder per case) [default: synth:1]
    data: String = "synth:1".into(), "LIST";
    /// Relative frequency with which each of them is sampled, comma-separated [default: equal]
    shares: String = String::new(), "LIST";
    /// Object: a label value, a structure's name, or 'any' [default: any]
    target: TargetLabel = TargetLabel::Any, "any|N|NAME";
    /// Channel of scans that have several, from 0: a volume of the file, or nnU-Net's CASE_0000
    /// [default: the only one]
    channel: Option<usize> = None, "N";
    /// JSON file with the cases for training, validation and test [default: 0.7/0.1/0.2 by seed]
    split: Option<PathBuf> = None, "FILE";
    /// Folder to cache resampled cases in, for models with a fixed spacing [default: no cache]
    cache: Option<PathBuf> = None, "DIR";
    /// Folder for checkpoints, log and curves [default: run]
    out: PathBuf = "run".into(), "DIR";
    /// Seed of all random numbers [default: 0]
    seed: u64 = 0, "N";
    /// Number of epochs [default: 200]
    epochs: usize = 200, "N";
    /// Steps per epoch [default: 100]
    steps: usize = 100, "N";
    /// Items per step [default: 2]
    batch: usize = 2, "N";
    /// Iterations per item [default: 11]
    iterations: usize = 11, "N";
    /// Learning rate [default: 4e-5]
    lr: f64 = 4e-5, "X";
    /// Learning rate schedule [default: paper]
    schedule: Schedule = Schedule::Paper, "NAME";
    /// Decrease of the learning rate after each epoch, for the schedule 'paper' [default: 2e-6]
    lr_fall: f64 = 2e-6, "X";
    /// Final fraction of the learning rate for 'linear' and 'exponential', and lower bound for
    /// 'paper' [default: 0.01]
    lr_end: f64 = 0.01, "X";
    /// Warm-up steps, over which the learning rate rises from 0 [default: 0]
    warmup: usize = 0, "N";
    /// Weight decay of AdamW [default: 0.01]
    weight_decay: f64 = 0.01, "X";
    /// Global norm to clip gradients to [default: 1]
    clip_norm: f64 = 1.0, "X";
    /// Decay of the moving average of the weights, which is validated and saved; 0 for no average
    /// [default: 0]
    ema: f64 = 0.0, "X";
    /// Weight of the candidates' boundary loss [default: 10]
    boundary: f64 = 10.0, "X";
    /// Weight of the refined mask's boundary loss; 0 in the released code [default: 10]
    corrective_boundary: f64 = 10.0, "X";
    /// Recompute iterations in the backward pass instead of keeping them in memory; auto: where
    /// memory is too little for that [default: auto]
    recompute: Recompute = Recompute::Auto, "auto|BOOL";
    /// Minimum number of simulated points per iteration [default: 1]
    points_min: usize = 1, "N";
    /// Maximum number of simulated points per iteration [default: 50]
    points_max: usize = 50, "N";
    /// Probability of a box [default: 0.5]
    boxed: f64 = 0.5, "P";
    /// Maximum number of voxels by which each side of the box grows, at random [default: 10]
    box_growth: usize = 10, "N";
    /// Probability of scribbles in an iteration [default: 0.5]
    scribbles: f64 = 0.5, "P";
    /// Maximum number of scribble voxels per iteration [default: 500]
    scribble_limit: usize = 500, "N";
    /// Probability that an item's user is sparing: the fewest points per iteration, no scribbles
    /// [default: 0]
    sparing: f64 = 0.0, "P";
    /// Probability that an item's user steers: first a box, a point or a mask, then one click or
    /// stroke at a time, with every prompt kept [default: 0]
    clicking: f64 = 0.0, "P";
    /// Weight of the cross entropy around the clicks of such a user [default: 0.5]
    click_weight: f64 = 0.5, "X";
    /// Radius of a click in the refiner's maps, in voxels; recorded in the model [default: the
    /// model's, 0 for a new one]
    click_radius: Option<f32> = None, "VOXELS";
    /// Augment by flips, zoom and intensity shifts [default: true]
    augment: bool = true, "BOOL";
    /// Validation cases per epoch [default: 16]
    validation_cases: usize = 16, "N";
    /// Iterations per validation case [default: 6]
    validation_iterations: usize = 6, "N";
    /// Epochs between validations [default: 1]
    validate_every: usize = 1, "N";
}

impl Given {
    /// Reads a TOML file of settings.
    ///
    /// # Errors
    /// The file cannot be read, or has a setting that is unknown or of another type; the message
    /// names the file.
    pub fn read(path: &Path) -> Result<Given, String> {
        let fail = |e: String| format!("{}: {e}", path.display());
        let text = read_text(path, "TOML").map_err(fail)?;
        toml::from_str(&text).map_err(|e| fail(e.to_string()))
    }
}

impl Settings {
    /// The paper's simulated user with these settings.
    pub fn user(&self) -> User {
        User {
            points: [self.points_min, self.points_max],
            boxed: self.boxed,
            box_growth: self.box_growth,
            box_shift: 0,
            scribbles: self.scribbles,
            scribble_limit: self.scribble_limit,
            all_kinds: true,
        }
    }

    /// The user of one item: the paper's, or with the probability `sparing` one who gives the
    /// fewest points and no scribbles.
    ///
    /// # Panics
    /// If `sparing` is no probability, which [`Settings::check`] finds.
    pub fn item_user(&self, rng: &mut impl Rng) -> User {
        let user = self.user();
        if rng.random_bool(self.sparing) {
            User { points: [self.points_min; 2], scribbles: 0.0, ..user }
        } else {
            user
        }
    }

    /// The random changes to samples.
    pub fn augmentation(&self) -> Augmentation {
        let all = Augmentation::default();
        // Sessions, in which users steer, continue scans by their border values.
        let all = if self.clicking > 0.0 {
            Augmentation { edge: 0.75, close: 0.25, fit_range: [1.1, 4.5], ..all }
        } else {
            all
        };
        if self.augment {
            all
        } else {
            Augmentation {
                flip: 0.0,
                zoom: 0.0,
                shift: 0.0,
                wander: 0.0,
                edge: 0.0,
                close: 0.0,
                fit_range: [1.75, 1.75],
                ..all
            }
        }
    }

    /// The weights of the parts of the loss.
    pub fn weights(&self) -> LossWeights {
        LossWeights { boundary: self.boundary, corrective_boundary: self.corrective_boundary }
    }

    /// The settings of the optimiser.
    pub fn optimizer(&self) -> AdamWConfig {
        AdamWConfig {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: self.weight_decay,
            max_norm: self.clip_norm,
        }
    }

    /// The number of steps of the whole run.
    pub fn total_steps(&self) -> usize {
        self.epochs * self.steps
    }

    /// The learning rate of step `step`, from 0: the schedule's, times the rise of the warmup.
    pub fn rate(&self, step: usize) -> f64 {
        let way = step as f64 / self.total_steps().max(1) as f64;
        let falling = match self.schedule {
            Schedule::Paper => (self.lr - self.lr_fall * (step / self.steps.max(1)) as f64)
                .max(self.lr * self.lr_end),
            Schedule::Linear => self.lr * (1.0 + (self.lr_end - 1.0) * way),
            Schedule::Exponential => self.lr * self.lr_end.powf(way),
            Schedule::Constant => self.lr,
        };
        let rising = if step < self.warmup { (step + 1) as f64 / self.warmup as f64 } else { 1.0 };
        falling * rising
    }

    /// Checks all settings.
    ///
    /// # Errors
    /// One is out of its range; the message names it and what was expected.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("epochs", self.epochs),
            ("steps", self.steps),
            ("batch", self.batch),
            ("iterations", self.iterations),
            ("validation_iterations", self.validation_iterations),
            ("validate_every", self.validate_every),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, v)| *v == 0) {
            return Err(format!("{name} is 0, expected at least 1"));
        }
        // Far beyond any useful value, and far below what overflows, fills the memory or never
        // ends.
        let most = [
            ("epochs", self.epochs, 1_000_000),
            ("steps", self.steps, 1_000_000),
            ("batch", self.batch, 4096),
            ("iterations", self.iterations, 1000),
            ("warmup", self.warmup, 1_000_000_000),
            ("points_max", self.points_max, 10_000),
            ("box_growth", self.box_growth, 10_000),
            ("scribble_limit", self.scribble_limit, 10_000_000),
            ("validation_cases", self.validation_cases, 100_000),
            ("validation_iterations", self.validation_iterations, 1000),
            ("validate_every", self.validate_every, 1_000_000),
        ];
        if let Some((name, v, most)) = most.iter().find(|(_, v, most)| v > most) {
            return Err(format!("{name} is {v}, expected at most {most}"));
        }
        for (name, v) in [
            ("boxed", self.boxed),
            ("scribbles", self.scribbles),
            ("sparing", self.sparing),
            ("clicking", self.clicking),
            ("ema", self.ema),
        ] {
            if !(0.0..=1.0).contains(&v) {
                return Err(format!("{name} is {}, expected 0 to 1", number(v)));
            }
        }
        let amounts = [("lr", self.lr), ("clip_norm", self.clip_norm)];
        if let Some((name, v)) = amounts.iter().find(|(_, v)| !(*v > 0.0 && v.is_finite())) {
            return Err(format!("{name} is {}, expected a number above 0", number(v)));
        }
        if self.ema == 1.0 {
            return Err("ema is 1, expected below 1: at 1 the average never changes".into());
        }
        // Far beyond any useful value, and small enough that a step stays finite.
        for (name, v, most) in [
            ("lr", self.lr, 1.0),
            ("lr_fall", self.lr_fall, 1.0),
            // A way to ask for no clipping.
            ("clip_norm", self.clip_norm, 1e30),
            ("weight_decay", self.weight_decay, 10.0),
            ("lr_end", self.lr_end, 1.0),
            ("boundary", self.boundary, 1e6),
            ("corrective_boundary", self.corrective_boundary, 1e6),
            ("click_weight", self.click_weight, 1e6),
        ] {
            if v > most {
                return Err(format!("{name} is {}, expected at most {}", number(v), number(most)));
            }
        }
        let weights = [
            ("weight_decay", self.weight_decay),
            ("boundary", self.boundary),
            ("corrective_boundary", self.corrective_boundary),
            ("lr_fall", self.lr_fall),
            ("lr_end", self.lr_end),
            ("click_weight", self.click_weight),
        ];
        if let Some((name, v)) = weights.iter().find(|(_, v)| !(*v >= 0.0 && v.is_finite())) {
            return Err(format!("{name} is {}, expected 0 or more", number(v)));
        }
        if let Some(r) = self.click_radius.filter(|r| !(0.0..=8.0).contains(r)) {
            return Err(format!("click_radius is {}, expected 0 to 8 voxels", number(r)));
        }
        if self.points_min > self.points_max {
            return Err(format!(
                "points_min is {}, above points_max {}",
                self.points_min, self.points_max
            ));
        }
        Ok(())
    }
}
