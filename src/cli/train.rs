//! `prism train`: a network from data, by simulated users.

use super::{DeviceArgs, Failure, Precision, note, on_interrupt, progress, say, warn};
use crate::data::source::Pools;
use crate::device::Device;
use crate::message::shown;
use crate::tensor::caught;
use crate::train::peers::{Peers, Place, Token};
use crate::train::run::{
    Claimed, Ended, RecomputeReport, StepReport, ValidationReport, Watch, begin, claim, run_claimed,
};
use crate::train::settings::{Given, Recompute, Settings};
use crate::train::state::State;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Train a network with simulated users
///
/// Every setting, and --device, --precision and --threads, can be given in the TOML file or as a
/// flag; flags take precedence.
///
/// Several processes train together if torchrun or SLURM starts them: RANK, WORLD_SIZE, LOCAL_RANK,
/// MASTER_ADDR and MASTER_PORT, or SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID with MASTER_ADDR.
/// Each takes its share of every batch; `--device cuda` is then the GPU of the local rank, and NCCL
/// sums the gradients. Processes that meet over a network prove to each other that they know the
/// same token: PRISM_TOKEN or `--token-file`.
#[derive(Args)]
#[command(
    mut_arg("out", |out| out.short('o').visible_alias("output")),
    mut_arg("data", |data| data.short('d')),
    mut_arg("model", |model| model.visible_alias("network")),
    mut_arg("channel", |channel| channel.alias("volume"))
)]
pub struct Train {
    /// TOML file with settings; their names are those of the flags below, with underscores
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Resume the run in --out, bit for bit; it keeps its own settings, except that --epochs may be
    /// raised, and --recompute changed
    #[arg(long)]
    resume: bool,
    /// File with the token of a run of several processes, the same secret for all; not needed
    /// within one machine [default: the variable PRISM_TOKEN]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Settings")]
    given: Given,
    #[command(flatten)]
    device: DeviceArgs,
}

impl DeviceArgs {
    /// These if given, otherwise those of a file of settings.
    fn over(&self, file: &Given) -> Result<DeviceArgs, String> {
        let named = |name: &String| {
            Precision::from_str(name, true).map_err(|_| {
                format!("precision is '{name}', expected f32, tf32, ieee, f16 or bf16")
            })
        };
        let precision =
            self.precision.map(Ok).or_else(|| file.precision.as_ref().map(named)).transpose()?;
        Ok(DeviceArgs {
            device: self.device.clone().or_else(|| file.device.clone()),
            precision,
            threads: self.threads.or(file.threads),
        })
    }
}

/// The most warnings of files that are printed.
const WARNINGS: usize = 10;

struct Bar {
    bar: ProgressBar,
    /// Whether standard error is a terminal; otherwise each epoch is printed on a line.
    live: bool,
    loss: f64,
    /// The number of this process.
    rank: usize,
}

impl Watch for Bar {
    fn step(&mut self, report: &StepReport, total: usize) {
        self.loss =
            if self.loss == 0.0 { report.loss } else { 0.95 * self.loss + 0.05 * report.loss };
        self.bar.set_length(total as u64);
        self.bar.set_position(report.step as u64);
        self.bar.set_message(format!(
            "loss {:.4}  Dice {:.3}",
            self.loss,
            report.dice.last().copied().unwrap_or(0.0)
        ));
    }

    fn case(&mut self, number: usize, of: usize) {
        self.bar.set_message(format!("validation, case {number} of {of}"));
    }

    fn validation(&mut self, report: &ValidationReport) {
        let dice: Vec<String> = report.validation.iter().map(|d| format!("{d:.3}")).collect();
        let best = if report.best { "  best" } else { "" };
        let line = format!(
            "epoch {}: loss {:.4}, validation Dice {}{best}",
            report.epoch,
            self.loss,
            dice.join(" ")
        );
        self.say(&line);
    }

    fn recompute(&mut self, report: &RecomputeReport) {
        let process = match self.rank {
            0 => String::new(),
            rank => format!("process {rank}: "),
        };
        self.say(&format!("{process}{}", report.why));
    }

    fn warning(&mut self, text: &str) {
        self.bar.suspend(|| warn(text));
    }
}

impl Bar {
    /// Prints a line above the bar, if there is one. It may name a case, whose name comes from a
    /// file.
    fn say(&self, line: &str) {
        if self.live {
            self.bar.println(shown(line));
        } else {
            note(line);
        }
    }
}

/// What a run begins with: its state, its data, and in the process that leads its folder.
type Begun = (State, Pools, Option<Claimed>);

/// A new run. Nothing is made before all processes have found its data and its network.
fn new(settings: Settings, device: &Device, peers: &Peers) -> Result<Begun, Failure> {
    let state = begin(settings).map_err(Failure::Failed)?;
    let pools = data(&state, device)?;
    agree(&state, peers)?;
    let settings = &state.progress.settings;
    // One of several processes says so for all.
    let leads = peers.rank() == 0;
    if let Some(path) = settings.init.as_ref().filter(|_| leads) {
        state.weights.warning(path.display()).iter().for_each(|w| warn(w));
    }
    let claimed = leads.then(|| claim(&settings.out)).transpose().map_err(Failure::Failed)?;
    let finished = settings.out.join("last.state.safetensors");
    if leads && finished.exists() {
        return Err(Failure::Usage(format!(
            "{} exists: give --resume to continue that run, or another --out",
            finished.display()
        )));
    }
    // The others hear whether the first process has the folder.
    peers.sum(&mut [0.0f64]).map_err(Failure::Failed)?;
    Ok((state, pools, claimed))
}

/// A run that goes on from what its folder has, with more epochs and another choice if they are
/// given.
fn resumed(
    settings: Settings,
    (epochs, recompute): (Option<usize>, Option<Recompute>),
    device: &Device,
    peers: &Peers,
) -> Result<Begun, Failure> {
    let out = settings.out;
    if !out.is_dir() {
        // It is not made, as claiming it would.
        return Err(Failure::Usage(format!(
            "{}: no such folder, expected that of the run to resume",
            out.display()
        )));
    }
    // The first process has the folder for itself from before any reads anything in it until the
    // run has ended. Another training may be ending there: what it saves last would be lost.
    let leads = peers.rank() == 0;
    let claimed = leads.then(|| claim(&out)).transpose().map_err(Failure::Failed)?;
    peers.sum(&mut [0.0f64]).map_err(Failure::Failed)?;
    let path = out.join("last.state.safetensors");
    let mut state = State::open(&path).map_err(Failure::Failed)?;
    // The folder may have been moved; more epochs may be wanted; memory may have been too little.
    let settings = &mut state.progress.settings;
    settings.out = out;
    settings.epochs = epochs.unwrap_or(settings.epochs);
    settings.recompute = recompute.unwrap_or(settings.recompute);
    settings.check().map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
    let pools = data(&state, device)?;
    agree(&state, peers)?;
    Ok((state, pools, claimed))
}

/// Checks that all processes begin with the same settings, at the same position.
fn agree(state: &State, peers: &Peers) -> Result<(), Failure> {
    peers.agree(&json!(state.progress).to_string()).map_err(Failure::Failed)
}

/// The data of a run, which suits its network and the device.
fn data(state: &State, device: &Device) -> Result<Pools, Failure> {
    let (s, config) = (&state.progress.settings, &state.progress.config);
    if s.cache.is_some() && config.fit.is_some() {
        return Err(Failure::Usage(
            "--cache needs a model with a fixed spacing: this one fits its patch to the object"
                .into(),
        ));
    }
    if let (Device::Cpu(_), true) = (device, device.is_half()) {
        return Err(Failure::Usage(
            "--precision: training on the CPU needs float32 (f32 or ieee)".into(),
        ));
    }
    let disk = s.cache.as_deref().map(|folder| (folder, config.spacing as f64));
    let split = s.split.as_deref();
    Ok(Pools::open(&s.data, &s.shares, &s.target, s.channel, split, disk, s.seed)?)
}

/// A failure of this process, which the others are told of; or that of another process, from which
/// it follows.
fn told(peers: &Peers, failure: Failure) -> Failure {
    match failure {
        Failure::Usage(why) => Failure::Usage(peers.ended(why)),
        Failure::Failed(why) => Failure::Failed(peers.ended(why)),
        Failure::ClosedOutput => failure,
    }
}

impl Train {
    pub fn run(self) -> Result<(), Failure> {
        let variable = |name: &str| std::env::var(name).ok();
        let place = Place::from_variables(variable).map_err(Failure::Usage)?;
        let mut token = None;
        if let Some(place) = &place {
            token = Token::given(self.token_file.as_deref(), variable).map_err(Failure::Usage)?;
            place.check(token.as_ref()).map_err(Failure::Usage)?;
        }
        let mut given = self.given;
        if let Some(path) = &self.config {
            given = given.over(Given::read(path).map_err(Failure::Usage)?);
        }
        let device = self.device.over(&given).map_err(Failure::Usage)?;
        let (epochs, recompute) = (given.epochs, given.recompute);
        let settings = given.settings();
        if !self.resume {
            settings.check().map_err(Failure::Usage)?;
        }
        // Whatever fails from here on, in one process, is told to the others: those of a run meet
        // first, one that has no device too.
        let opened = device.of(place.as_ref().map_or(0, |p| p.local)).open();
        let mut peers = Peers::alone();
        if let Some(place) = &place {
            // A run that goes on keeps its other settings, whatever is given.
            let run = match self.resume {
                true => json!([settings.out, epochs, recompute]),
                false => json!(settings),
            };
            let run = format!("{} {run}", self.resume);
            peers = match Peers::meet(place, &run, token.as_ref()) {
                Ok(peers) => peers,
                // What failed here is said, whatever became of the others.
                Err(why) => return Err(opened.err().unwrap_or(Failure::Failed(why))),
            };
        }
        let start = |device: Device| -> Result<_, Failure> {
            if place.is_some() {
                peers.join(&device).map_err(Failure::Failed)?;
            }
            let (state, pools, claimed) = if self.resume {
                resumed(settings, (epochs, recompute), &device, &peers)?
            } else {
                new(settings, &device, &peers)?
            };
            Ok((device, state, pools, claimed))
        };
        // Memory that is refused is a failure that the others are told of, too.
        let begun = caught(|| Ok(opened.and_then(start))).unwrap_or_else(|e| Err(e.into()));
        let (device, state, pools, claimed) = begun.map_err(|failure| told(&peers, failure))?;
        let s = state.progress.settings.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        on_interrupt(move |again| {
            if !asked.swap(true, Ordering::Relaxed) {
                note(
                    "\nfinishing the step or the validation case, then saving; a second Ctrl-C stops at once",
                );
            }
            again
        });
        let bar = if peers.rank() == 0 {
            progress(s.total_steps() as u64)
        } else {
            ProgressBar::hidden()
        };
        let style = ProgressStyle::with_template(
            "{wide_bar} {pos}/{len}  {msg}  {elapsed} elapsed, {eta} left",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let live = !bar.is_hidden();
        let mut watch = Bar { bar, live, loss: 0.0, rank: peers.rank() };
        let ended = run_claimed(claimed, &device, state, &pools, &peers, &stop, &mut watch);
        watch.bar.finish_and_clear();
        let odd: BTreeSet<String> =
            pools.train.warnings().into_iter().chain(pools.validation.warnings()).collect();
        odd.iter().take(WARNINGS).for_each(|w| warn(w));
        if odd.len() > WARNINGS {
            warn(&format!("and {} more such warnings", odd.len() - WARNINGS));
        }
        let taken: Vec<String> =
            pools.train.modalities().iter().map(|(name, n)| format!("{n} for {name}")).collect();
        if !taken.is_empty() && peers.rank() == 0 {
            note(&format!("modality of scans: {}", taken.join(", ")));
        }
        let skipped = pools.train.skipped();
        skipped.iter().for_each(|(name, why)| warn(&format!("skipped {name}: {why}")));
        if !skipped.is_empty() {
            warn(&format!("{} cases were skipped", skipped.len()));
        }
        match ended.map_err(Failure::Failed)? {
            _ if peers.rank() > 0 => Ok(()),
            Ended::Finished => say(&format!("{}: finished\n", s.out.display())),
            Ended::Stopped => {
                say(&format!("{}: stopped; continue with --resume\n", s.out.display()))
            }
        }
    }
}
