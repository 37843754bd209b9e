//! `prism eval`: the paper's protocol over a dataset; `prism metrics`: two masks.

use super::model::{Chosen, ModelArgs};
use super::{DeviceArgs, Failure, note, number, on_interrupt, pretty, print, progress, warn};
use crate::checksum;
use crate::data::cases::{Case, Loaded, Split, TargetLabel, list};
use crate::device::Device;
use crate::eval::kept::{Kept, KeptError, Record, Settings, Source};
use crate::eval::metrics::{Surfaces, TOLERANCE, dice};
use crate::eval::protocol::{NAMES, Place, Plan, Protocol, Way, run, sides};
use crate::eval::report::{Results, csv, curve, file_names, json, markdown};
use crate::input::read_text;
use crate::model::Model;
use crate::output::{check, lock, make_folder, spelled_out, write_text};
use crate::session::intensities;
use crate::sync::locked;
use crate::train::run::{SETTINGS, SPLIT};
use crate::train::settings::Given;
use crate::volume::labels::{Labels, on_shared_grid};
use crate::volume::write_mask;
use clap::Args;
use indicatif::ProgressStyle;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// Evaluate a model with simulated users
///
/// Reports metrics per case, tables, and the curve over iterations, as in the paper.
///
/// Protocols: plain (points alone), plain-b-1 and plain-b-50 (a box and 1 or 50 points), basic (a
/// box and 1 to 50 points), erode and dilate (basic, with the box moved by 5 voxels), ultra (basic
/// and centreline scribbles) and ultra+ (also lines and outlines) run the network alone, as in the
/// paper. click (a box, then one click at a time in the middle of the largest error, as in the CVPR
/// 2025 challenge), click-point and click-mask (the same after a point or a coarse mask) and
/// scribble-one (a box, then one stroke at a time) run sessions as a person steers them; they also
/// report clicks obeyed and held, the number of clicks to reach a Dice, and time. The model
/// determines which parts the network has (CNN, ViT or both, confidence and corrective learning).
///
/// Each result is written as soon as it is computed: to resume a run that was stopped, give the
/// same command with the same folder. A case whose files have changed is computed again. Results of
/// other settings, another model or another build of the program are never mixed: give another
/// --output, or --fresh.
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    /// Dataset: a CSV with image,label[,name][,modality], or a folder (MSD, nnU-Net, LiTS, KiTS, or
    /// one folder per case)
    #[arg(short, long, value_name = "PATH")]
    data: PathBuf,
    /// Folder for results: cases.jsonl (during the run), and at the end cases.csv, results.json,
    /// results.md and iterations.svg
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Start over and discard the results in the folder
    #[arg(long)]
    fresh: bool,
    /// JSON file with a split of the cases
    #[arg(long, value_name = "FILE", requires = "part")]
    split: Option<PathBuf>,
    /// Part of the split to evaluate [default without --split and --cases: every case]
    #[arg(long, value_name = "PART", value_parser = ["train", "validation", "test"], requires = "split")]
    part: Option<String>,
    /// Evaluate only these cases, comma-separated
    #[arg(long, value_name = "NAMES", value_delimiter = ',', conflicts_with = "split")]
    cases: Vec<String>,
    /// Object: a label value, a structure's name, or 'any' [default: that of the model's training
    /// run if its folder records it, else any]
    #[arg(long, value_name = "any|N|NAME")]
    target: Option<TargetLabel>,
    /// Channel of scans that have several, from 0: a volume of the file, or nnU-Net's CASE_0000
    /// [default: that of the training run, else the only one]
    #[arg(long, alias = "volume", value_name = "N")]
    channel: Option<usize>,
    /// Protocols, comma-separated
    #[arg(long, default_value = "basic", value_name = "NAMES", value_delimiter = ',', value_parser = NAMES)]
    protocol: Vec<String>,
    /// Points per iteration, instead of the protocol's (the paper: 1, 10, 50, 100)
    #[arg(long, value_name = "N", value_parser = number(1, 10_000))]
    points: Option<usize>,
    /// Iterations
    #[arg(long, default_value_t = 11, value_name = "N", value_parser = number(1, 1000))]
    iterations: usize,
    /// Seed of the simulated users
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Where masks are judged and corrected: on the scan's own grid, or on the resampled patch
    /// (sliding windows where it is too small)
    #[arg(long, default_value = "scan", value_name = "PLACE")]
    on: Place,
    /// Judge the left and right parts of the object separately (kidneys)
    #[arg(long)]
    sides: bool,
    /// Also write the final masks to this folder, as CASE_PROTOCOL.nii.gz; names that would be
    /// equal are made distinct
    #[arg(long, value_name = "DIR")]
    masks: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Eval {
    pub fn run(&self) -> Result<(), Failure> {
        if self.masks.is_some() && self.on == Place::Patch {
            return Err(Failure::Usage(
                "--masks needs --on scan: masks on the patch are not on the grid of any file"
                    .into(),
            ));
        }
        let steers = |name: &String| {
            matches!(Protocol::named(name, None), Some(Protocol { way: Way::Steer { .. }, .. }))
        };
        if let (Place::Patch, Some(name)) = (self.on, self.protocol.iter().find(|n| steers(n))) {
            return Err(Failure::Usage(format!(
                "--protocol {name} needs --on scan: it evaluates sessions on the scan's own grid"
            )));
        }
        let chosen = self.model.choose()?;
        let trained = Run::of(chosen.path());
        let target = self
            .target
            .clone()
            .or_else(|| trained.settings.target.clone())
            .unwrap_or(TargetLabel::Any);
        let channel = self.channel.or(trained.settings.channel.flatten());
        let all = list(&self.data, channel)?;
        let cases = self.chosen(&all)?;
        trained.say(self, &target, channel, &cases);
        let masks = self.masks.as_ref().map(|folder| Masks::new(folder, &all)).transpose()?;
        let device = self.device.open()?;
        let weights = chosen.open()?;
        for folder in [Some(&self.output), self.masks.as_ref()].into_iter().flatten() {
            make_folder(folder)
                .map_err(|e| Failure::Failed(format!("{}: {e}", folder.display())))?;
        }
        // Before hours of work: none of them may be an input of it.
        for name in ["cases.jsonl", "cases.csv", "results.json", "results.md", "iterations.svg"] {
            let path = self.output.join(name);
            check(&path).map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))?;
        }
        let Some(locked) = lock(&self.output, "eval.lock").map_err(Failure::Failed)? else {
            return Err(Failure::Failed(format!(
                "another evaluation is writing to {}: give another --output",
                self.output.display()
            )));
        };
        locked.warning().into_iter().for_each(warn);
        let settings = self.settings(&chosen, &device, &target, channel, &cases)?;
        let mut kept = Kept::open(&self.output, &settings, self.fresh).map_err(|e| match e {
            KeptError::Settings { .. } => {
                Failure::Usage(format!("{e}: give another --output, or --fresh to start over"))
            }
            KeptError::File(message) => Failure::Failed(message),
        })?;
        if kept.dropped() > 0 {
            let (file, dropped) = (kept.path().display(), kept.dropped());
            warn(&format!(
                "{file}: truncated or damaged lines: {dropped}; their results are computed again"
            ));
        }
        let protocols: Vec<Protocol> =
            self.protocol.iter().filter_map(|n| Protocol::named(n, self.points)).collect();
        let todo = todo(&cases, &protocols, masks.as_ref(), &kept);
        let missing: usize = todo.iter().map(|(_, protocols)| protocols.len()).sum();
        let known = cases.len() * protocols.len() - missing;
        let done = Arc::new(Done {
            count: Mutex::new(known),
            cases: cases.len(),
            protocols: protocols.len(),
        });
        if known > 0 {
            note(&format!(
                "{}: already done and reused: {}",
                self.output.display(),
                done.text(known)
            ));
        }
        let skipped = if todo.is_empty() {
            vec![]
        } else {
            let model = Arc::new(Model::new(&device, &weights)?);
            self.tell_when_stopped(&done, &kept);
            self.compute(&model, &target, masks.as_ref(), &todo, &mut kept, &done)?
        };
        skipped.iter().for_each(|s| warn(&format!("skipped {s}")));
        if !skipped.is_empty() {
            warn(&format!("{} of {} cases were skipped", skipped.len(), cases.len()));
        }
        let known = |protocol: &str| {
            cases.iter().filter_map(|c| kept.get(&c.name, protocol)).collect::<Vec<&Record>>()
        };
        let results: Vec<Results> = protocols
            .iter()
            .map(|p| Results {
                protocol: p.name.clone(),
                cases: known(&p.name).into_iter().flat_map(|r| r.results.iter().cloned()).collect(),
            })
            .collect();
        if results.iter().all(|r| r.cases.is_empty()) {
            return Err(Failure::Failed("no case could be evaluated".into()));
        }
        let decided: BTreeMap<&str, &str> = protocols
            .iter()
            .flat_map(|p| known(&p.name))
            .map(|r| (r.case.as_str(), r.scan.as_str()))
            .collect();
        let points = self.points.map_or(String::new(), |n| format!(", {n} points an iteration"));
        let place =
            if self.on == Place::Scan { "the scan's own grid" } else { "the resampled patch" };
        let config = weights.config.clone();
        let encoder = match config.encoder {
            crate::model::Encoder::Hybrid => "CNN and ViT",
            crate::model::Encoder::Cnn => "CNN alone",
            crate::model::Encoder::Vit => "ViT alone",
        };
        let learned = |yes: bool, what: &str| {
            format!(", {} {what} learning", if yes { "with" } else { "without" })
        };
        let about = format!(
            "`{chosen}` ({encoder}{}{}) on `{}`: {} iterations{points}, judged on {place}, seed {}.",
            learned(config.confidence, "confidence"),
            learned(config.corrective, "corrective"),
            self.data.display(),
            self.iterations,
            self.seed
        );
        let text = markdown(&results, &about);
        let facts = json!({
            "model": chosen.to_string(), "data": self.data, "iterations": self.iterations, "points": self.points, "seed": self.seed, "judged_on": place, "target": target, "channel": channel, "scans": decided,
            "skipped": skipped, "device": device.describe(), "encoder": config.encoder, "confidence": config.confidence, "corrective": config.corrective,
        });
        let files = [
            ("cases.csv", csv(&results).map_err(Failure::Failed)?),
            ("results.json", format!("{:#}\n", json(&results, facts))),
            ("results.md", text.clone()),
        ];
        for (name, text) in &files {
            write_text(&self.output.join(name), text).map_err(Failure::Failed)?;
        }
        curve(&results).write(&self.output.join("iterations.svg")).map_err(Failure::Failed)?;
        print(&text)
    }

    /// Everything that the numbers depend on, by the names of the flags; the state of the cases'
    /// files is stored with each result.
    fn settings(
        &self,
        model: &Chosen,
        device: &Device,
        target: &TargetLabel,
        channel: Option<usize>,
        cases: &[Case],
    ) -> Result<Settings, Failure> {
        let device = match device {
            // The number of threads does not change any bit.
            Device::Cpu(cpu) => format!("cpu, {}, {}", cpu.isa(), cpu.precision()),
            Device::Cuda(cuda) => cuda.describe(),
        };
        let names: Vec<&str> = cases.iter().map(|c| c.name.as_str()).collect();
        let settings = [
            ("program", json!(program())),
            ("model", json!(model.hash()?)),
            ("data", json!(spelled_out(&self.data).display().to_string())),
            ("cases", json!(names)),
            ("target", json!(target)),
            ("channel", json!(channel)),
            ("protocol", json!(self.protocol)),
            ("points", json!(self.points)),
            ("iterations", json!(self.iterations)),
            ("seed", json!(self.seed)),
            ("on", json!(if self.on == Place::Scan { "scan" } else { "patch" })),
            ("sides", json!(self.sides)),
            ("device", json!(device)),
        ];
        Ok(settings.into_iter().map(|(name, value)| (name.to_string(), value)).collect())
    }

    /// Makes a signal end the process at once, because finished results are on disk, with a line
    /// that says so.
    fn tell_when_stopped(&self, done: &Arc<Done>, kept: &Kept) {
        let (done, file) = (done.clone(), kept.path().display().to_string());
        let command =
            if self.fresh { "the same command without --fresh" } else { "the same command" };
        on_interrupt(move |_| {
            let count = done.count();
            note(&format!(
                "\nstopped: {} done and saved in {file}; to resume, run {command}",
                done.text(*count)
            ));
            // From now on no further write is begun.
            std::mem::forget(count);
            true
        });
    }

    /// Computes what is to do, storing each result before the next is begun. Returns the cases that
    /// could not be read, and why.
    fn compute(
        &self,
        model: &Arc<Model>,
        target: &TargetLabel,
        masks: Option<&Masks>,
        todo: &[(&Case, Vec<&Protocol>)],
        kept: &mut Kept,
        done: &Done,
    ) -> Result<Vec<String>, Failure> {
        let bar = progress(todo.iter().map(|(_, protocols)| protocols.len() as u64).sum());
        bar.set_style(
            ProgressStyle::with_template("{wide_bar} {pos}/{len}  {msg}  {eta} left")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        let plan = Plan { place: self.on, iterations: self.iterations, seed: self.seed };
        let mut skipped = vec![];
        for (case, protocols) in todo {
            // Before they are read: files that change from here on count as changed the next time.
            let source = Source::of(case);
            let (image, label) = match case.read(target) {
                Ok(Loaded { image, mask, warnings }) => {
                    bar.suspend(|| warnings.iter().for_each(|w| warn(w)));
                    (image, mask)
                }
                Err(e) => {
                    skipped.push(format!("{}: {e}", case.name));
                    kept.forget(&case.name);
                    bar.inc(protocols.len() as u64);
                    continue;
                }
            };
            let scan = intensities(&image, model.config().intensity).why();
            let image = Arc::new(image);
            let objects = match self.sides {
                true => sides(&label, &image.grid)
                    .into_iter()
                    .map(|(side, m)| (format!("{}, {side}", case.name), m))
                    .collect(),
                false => vec![(case.name.clone(), label)],
            };
            for protocol in protocols {
                let mut results = vec![];
                for (name, label) in &objects {
                    let at = format!("{name}, {}", protocol.name);
                    bar.set_message(crate::message::shown(&at).into_owned());
                    let fail = |e| Failure::Failed(format!("{name}, {}: {e}", protocol.name));
                    let mut result =
                        run(model, &image, label, name, protocol, plan).map_err(fail)?;
                    let mask = std::mem::take(&mut result.mask);
                    if let Some(masks) = masks {
                        let path = masks.file(&case.name, name, &protocol.name);
                        write_mask(&path, &image, &mask)?
                            .commit()
                            .map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
                    }
                    results.push(result);
                }
                let record = Record {
                    case: case.name.clone(),
                    protocol: protocol.name.clone(),
                    source: source.clone(),
                    scan: scan.clone(),
                    masks: masks.map(Masks::place),
                    results,
                };
                // A signal waits for the line to be complete.
                let mut count = done.count();
                kept.add(record).map_err(Failure::Failed)?;
                *count += 1;
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        Ok(skipped)
    }

    fn chosen(&self, all: &[Case]) -> Result<Vec<Case>, Failure> {
        let names = match (&self.split, self.part.as_deref()) {
            (Some(path), Some(part)) => {
                let split = Split::read(path, all)?;
                match part {
                    "train" => split.train,
                    "validation" => split.validation,
                    _ => split.test,
                }
            }
            _ if !self.cases.is_empty() => {
                if let Some(unknown) =
                    self.cases.iter().find(|n| !all.iter().any(|c| c.name == **n))
                {
                    let known: Vec<&str> = all.iter().map(|c| c.name.as_str()).collect();
                    return Err(Failure::Usage(format!(
                        "--cases: '{unknown}' is not a case of {}: it has {}",
                        self.data.display(),
                        known.join(", ")
                    )));
                }
                self.cases.clone()
            }
            _ => return Ok(all.to_vec()),
        };
        let chosen = Split::select(all, &names);
        if chosen.is_empty() {
            Err(Failure::Failed("this part of the split has no cases".into()))
        } else {
            Ok(chosen)
        }
    }
}

/// The version of this program, and a hash of its bytes: another build may compute other numbers.
fn program() -> String {
    let version = env!("CARGO_PKG_VERSION");
    match std::env::current_exe().and_then(|path| checksum::of_file(&path)) {
        Ok(hash) => format!("{version} {hash}"),
        Err(_) => version.into(),
    }
}

/// The most names of cases that are listed.
const LISTED: usize = 10;

/// The cases with the protocols that are not done. Results for files that have since changed, or
/// whose masks are lost, are computed again, with a message.
fn todo<'a>(
    cases: &'a [Case],
    protocols: &'a [Protocol],
    masks: Option<&Masks>,
    kept: &Kept,
) -> Vec<(&'a Case, Vec<&'a Protocol>)> {
    let (mut todo, mut changed, mut unmasked) = (vec![], vec![], vec![]);
    for case in cases {
        let source = Source::of(case);
        let records: Vec<&Record> =
            protocols.iter().filter_map(|p| kept.get(&case.name, &p.name)).collect();
        let is_same = |r: &Record| r.source == source;
        let is_masked = |r: &Record| masks.is_none_or(|m| m.are_there(r));
        if records.iter().any(|r| !is_same(r)) {
            changed.push(case.name.as_str());
        } else if records.iter().any(|r| !is_masked(r)) {
            unmasked.push(case.name.as_str());
        }
        let is_done = |p: &&Protocol| {
            kept.get(&case.name, &p.name).is_some_and(|r| is_same(r) && is_masked(r))
        };
        let missing: Vec<&Protocol> = protocols.iter().filter(|p| !is_done(p)).collect();
        if !missing.is_empty() {
            todo.push((case, missing));
        }
    }
    for (names, why) in [(changed, "files have changed"), (unmasked, "masks are missing")] {
        if !names.is_empty() {
            let listed = names.len().min(LISTED);
            let more = if names.len() > listed {
                format!(" and {} more", names.len() - listed)
            } else {
                String::new()
            };
            warn(&format!(
                "computed again because their {why}: {}{more}",
                names[..listed].join(", ")
            ));
        }
    }
    todo
}

/// The number of results; locked while one is written.
struct Done {
    count: Mutex<usize>,
    cases: usize,
    protocols: usize,
}

impl Done {
    fn count(&self) -> MutexGuard<'_, usize> {
        locked(&self.count)
    }

    /// A count out of the total, as text.
    fn text(&self, count: usize) -> String {
        match (self.cases, self.protocols) {
            (cases, 1) => format!("{count} of {cases} cases"),
            (cases, protocols) => format!(
                "{count} of {} results ({cases} cases, {protocols} protocols)",
                cases * protocols
            ),
        }
    }
}

/// The destination of the last masks.
struct Masks {
    folder: PathBuf,
    /// The prefix of the files of each case. It depends on the whole data set, not on the cases
    /// that are chosen.
    names: BTreeMap<String, String>,
}

impl Masks {
    fn new(folder: &Path, all: &[Case]) -> Result<Masks, Failure> {
        let names = file_names(all.iter().map(|c| c.name.as_str()))
            .map_err(|e| Failure::Usage(format!("--masks: {e}")))?;
        Ok(Masks { folder: folder.into(), names })
    }

    /// The folder, however it is spelled.
    fn place(&self) -> String {
        spelled_out(&self.folder).display().to_string()
    }

    /// The file for an object, which is a case or one side of it.
    fn file(&self, case: &str, object: &str, protocol: &str) -> PathBuf {
        let name = self.names.get(case).map_or(case, String::as_str);
        let side = object.strip_prefix(case).unwrap_or_default().replace([' ', ','], "_");
        self.folder.join(format!("{name}{side}_{protocol}.nii.gz"))
    }

    fn are_there(&self, record: &Record) -> bool {
        let is_there = |object: &str| self.file(&record.case, object, &record.protocol).is_file();
        record.masks.as_ref() == Some(&self.place())
            && record.results.iter().all(|r| is_there(&r.case))
    }
}

/// The information in the folder of a training run, if the model is in one.
#[derive(Default)]
struct Run {
    folder: PathBuf,
    settings: Given,
    /// One for each list of cases that it learned from.
    splits: Vec<Split>,
}

impl Run {
    fn of(model: Option<&Path>) -> Run {
        let Some(folder) = model.and_then(Path::parent).map(Path::to_path_buf) else {
            return Run::default();
        };
        let text = |name: &str| read_text(&folder.join(name), "text").ok();
        let settings = text(SETTINGS).and_then(|t| toml::from_str(&t).ok()).unwrap_or_default();
        let names =
            std::iter::once(SPLIT.to_string()).chain((2..).map(|n| format!("split-{n}.json")));
        let splits = names
            .map_while(|name| text(&name).and_then(|t| serde_json::from_str(&t).ok()))
            .collect();
        Run { folder, settings, splits }
    }

    /// Reports what was taken from the run, and whether cases are judged that the model has learned
    /// from.
    fn say(&self, eval: &Eval, target: &TargetLabel, channel: Option<usize>, cases: &[Case]) {
        let about = |what: String| {
            warn(&format!(
                "{}: {what}, from the settings of the model's training run",
                self.folder.join(SETTINGS).display()
            ))
        };
        if eval.target.is_none()
            && self.settings.target.as_ref().is_some_and(|t| *t != TargetLabel::Any)
        {
            about(format!("--target {target} is used"));
        }
        if let (None, Some(channel)) = (eval.channel, channel) {
            about(format!("--channel {channel} is used"));
        }
        let seen =
            cases.iter().filter(|c| self.splits.iter().any(|s| s.train.contains(&c.name))).count();
        if seen > 0 {
            let file = self.folder.join(SPLIT);
            warn(&format!(
                "the model was trained on {seen} of these {} cases; use '--split {} --part test' to judge the others",
                cases.len(),
                file.display()
            ));
        }
    }
}

/// Compare a mask with the ground truth
///
/// Prints Dice, surface Dice, the Hausdorff distance at 95 % and mean surface distances.
///
/// Two empty masks agree: Dice and surface Dice are 1, distances 0. If only one is empty, Dice and
/// surface Dice are 0 and distances infinite (null in JSON).
#[derive(Args)]
pub struct Metrics {
    /// Ground-truth label image
    #[arg(short = 'l', long, visible_alias = "label", value_name = "FILE")]
    truth: PathBuf,
    /// Mask to judge, on the same grid
    #[arg(short, long, value_name = "FILE")]
    prediction: PathBuf,
    /// Object: a label value, a structure's name, or 'any'
    #[arg(long, default_value = "any", value_name = "any|N|NAME")]
    target: TargetLabel,
    /// Object in the prediction, if it differs [default: that of --target; a mask with a single
    /// other value is used as a whole]
    #[arg(long, value_name = "any|N|NAME")]
    prediction_target: Option<TargetLabel>,
    /// Tolerances of the surface Dice in mm, comma-separated
    #[arg(long, default_value = "1,2,5", value_name = "MM", value_delimiter = ',')]
    tolerance: Vec<f64>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

impl Metrics {
    pub fn run(&self) -> Result<(), Failure> {
        if let Some(bad) = self.tolerance.iter().find(|t| !(**t >= 0.0 && t.is_finite())) {
            return Err(Failure::Usage(format!(
                "--tolerance {bad}: expected millimetres, 0 or more"
            )));
        }
        let (grid, [truth, prediction]) = on_shared_grid([&self.truth, &self.prediction])?;
        let a = self.mask(&self.truth, truth, false)?;
        let b = self.mask(&self.prediction, prediction, true)?;
        let surfaces = Surfaces::of(&a, &b, &grid);
        let ml = |m: &[u8]| m.iter().filter(|v| **v != 0).count() as f64 * grid.voxel_ml();
        let tolerances: &[f64] =
            if self.tolerance.is_empty() { &[TOLERANCE] } else { &self.tolerance };
        let nsd: Vec<(f64, f64)> = tolerances.iter().map(|t| (*t, surfaces.nsd(*t))).collect();
        let [there, back] = surfaces.average();
        if self.json {
            let nsd: serde_json::Map<String, _> =
                nsd.iter().map(|(t, v)| (format!("{t}"), json!(v))).collect();
            let report = json!({
                "dice": dice(&a, &b), "nsd_mm": nsd, "hausdorff_95_mm": surfaces.hausdorff(95.0), "hausdorff_mm": surfaces.hausdorff(100.0),
                "mean_surface_distance_mm": { "truth_to_prediction": there, "prediction_to_truth": back },
                "ml": { "truth": ml(&a), "prediction": ml(&b) }, "surface_mm2": { "truth": surfaces.areas()[0], "prediction": surfaces.areas()[1] },
            });
            return print(&pretty(&report));
        }
        let mut text = format!("Dice                   {:.4}\n", dice(&a, &b));
        nsd.iter().for_each(|(t, v)| {
            text += &format!("{:<23}{v:.4}\n", format!("surface Dice at {t} mm"))
        });
        text += &format!("Hausdorff 95 %         {:.3} mm\n", surfaces.hausdorff(95.0));
        text += &format!(
            "mean surface distance  {there:.3} mm from truth to prediction, {back:.3} mm back\n"
        );
        text +=
            &format!("volume                 {:.3} ml true, {:.3} ml predicted\n", ml(&a), ml(&b));
        print(&text)
    }

    /// The object of the truth, or of the mask that is judged. Reports what is odd.
    fn mask(&self, path: &Path, labels: Labels, judged: bool) -> Result<Vec<u8>, Failure> {
        let say = |what: &str| warn(&format!("{}: {what}", path.display()));
        labels.warnings.iter().for_each(|w| say(w));
        let values: Vec<u32> = labels.counts().into_keys().collect();
        let mut target = if judged {
            self.prediction_target.as_ref().unwrap_or(&self.target)
        } else {
            &self.target
        };
        let picked = |t: &TargetLabel| match t {
            TargetLabel::Any => false,
            TargetLabel::Value(v) => !values.contains(v),
            TargetLabel::Name(_) => judged && !labels.is_named(),
        };
        match values[..] {
            // A mask of that object made by prism or another program has a value of its own.
            [only] if judged && self.prediction_target.is_none() && picked(target) => {
                say(&format!(
                    "its only label, {only}, is compared with label {target} of the truth"
                ));
                target = &TargetLabel::Any;
            }
            _ if picked(target) => {
                say(&format!("no voxel has label {target}: it holds {values:?}"))
            }
            [] => say("no voxel is marked"),
            _ if *target == TargetLabel::Any => {
                labels.several("--target").iter().for_each(|w| say(w))
            }
            _ => {}
        }
        Ok(labels.mask(target)?)
    }
}
