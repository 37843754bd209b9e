//! `prism bench`.

use super::{DeviceArgs, Failure, number, print, warn};
use crate::bench::{
    Ceilings, CudaCeilings, Latency, LaunchCost, Problem, Record, Timing, Variants, Workload,
    compare, measure, peak_memory, suite, table, try_variants,
};
use crate::device::Device;
use crate::input::remember;
use crate::model::weights::Precision;
use crate::model::{Config, Model, Weights};
use crate::output;
use clap::Args;
use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Measure latency, and where the time goes
///
/// Without a problem: measures how long a user waits for loading, encoding a scan, the first click,
/// and later clicks with a given number of prompt voxels. With --report also prints each op's
/// arithmetic, bytes and time beside the two ceilings of this machine, which are measured first.
///
/// With problems, such as conv3d:n1ic32oc32d128k3s1p1 or interact:base,t60: checks each result
/// against a plain float64 implementation, then times it. docs/benchmarking.md lists all kinds and
/// explains the letters. The exit code is 1 if a result is wrong or, with --compare, if a problem
/// became slower. With --variants, checks and times every variant of their kernels instead, on a
/// GPU.
#[derive(Args)]
pub struct Bench {
    /// Problems to check and time
    #[arg(value_name = "PROBLEM", conflicts_with = "report")]
    problems: Vec<Problem>,
    /// File with problems, one per line; benches/problems has examples
    #[arg(long, value_name = "FILE", conflicts_with = "report", help_heading = "Problems")]
    suite: Vec<PathBuf>,
    /// Time to spend on each problem, with at least five runs
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", help_heading = "Problems")]
    long: f64,
    /// Empty the caches before each run
    #[arg(long, help_heading = "Problems")]
    cold: bool,
    /// Write the measurements to a JSON file, for a later --compare
    #[arg(long, alias = "json", value_name = "FILE", help_heading = "Problems")]
    save: Option<PathBuf>,
    /// File written by --save: report what became faster or slower by more than both measurements'
    /// spread
    #[arg(long, value_name = "FILE", help_heading = "Problems")]
    compare: Option<PathBuf>,
    /// Check and time every variant of the problems' kernels instead, beside the predicted time:
    /// other tiles, and other numbers of blocks that share a sum. 'prism tune' chooses among them
    /// for a model (CUDA only)
    #[arg(long, conflicts_with_all = ["compare", "peer", "cold"], help_heading = "Problems")]
    variants: bool,
    /// Also time the same problems in PyTorch
    #[arg(long, help_heading = "Problems")]
    peer: bool,
    /// Python interpreter that has PyTorch
    #[arg(long, default_value = "python3", value_name = "PROGRAM", help_heading = "Problems")]
    python: PathBuf,
    /// Model file, or a preset with hashed weights: base or small
    #[arg(
        short,
        long,
        default_value = "base",
        value_name = "FILE|PRESET",
        help_heading = "Latency"
    )]
    model: String,
    /// Patch edge in voxels, a multiple of 16 [default: the preset's]
    #[arg(long, value_name = "N", help_heading = "Latency")]
    patch: Option<usize>,
    /// Number of prompt voxels of a click; several values are measured one after another
    #[arg(
        long,
        default_value = "1,60,500,5000",
        value_delimiter = ',',
        value_name = "N,..",
        value_parser = number(0, 10_000),
        help_heading = "Latency"
    )]
    points: Vec<usize>,
    /// Clicks per number of prompt voxels
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000), help_heading = "Latency")]
    clicks: u32,
    /// Also print a Markdown report of what each op did (CPU only)
    #[arg(long, help_heading = "Latency")]
    report: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

impl Bench {
    pub fn run(&self) -> Result<(), Failure> {
        let mut problems = self.problems.clone();
        for path in &self.suite {
            let fail =
                |e: &dyn std::fmt::Display| Failure::Failed(format!("{}: {e}", path.display()));
            remember(path);
            problems.extend(
                suite(&std::fs::read_to_string(path).map_err(|e| fail(&e))?)
                    .map_err(|e| fail(&e))?,
            );
        }
        if !problems.is_empty() {
            return if self.variants { self.try_variants(&problems) } else { self.time(&problems) };
        }
        let compares = self.save.is_some() || self.compare.is_some();
        if compares || self.peer || self.cold || self.variants {
            return Err(Failure::Usage(
                "--save, --compare, --peer, --cold and --variants need problems: name some, or give --suite FILE"
                    .into(),
            ));
        }
        let device = self.device.open()?;
        // A preset's weights go through a file, so that they are read like any model.
        let folder = tempfile::tempdir()?;
        let preset = Config::preset(&self.model);
        let path = match &preset {
            None if !Path::new(&self.model).exists() => {
                return Err(Failure::Usage(format!(
                    "--model {}: neither a file nor a preset (base, small)",
                    self.model
                )));
            }
            None => self.model.clone().into(),
            Some(config) => {
                let config = Config { patch: self.patch.unwrap_or(config.patch), ..config.clone() };
                config.check().map_err(|e| Failure::Usage(e.to_string()))?;
                let path = folder.path().join("model.safetensors");
                Weights::hashed(config, "public").save(&path, Precision::F32)?;
                path
            }
        };
        if preset.is_none() && self.patch.is_some() {
            return Err(Failure::Usage(
                "--patch needs a preset: a model file has its own patch size".into(),
            ));
        }
        let start = Instant::now();
        let weights = Weights::open(&path)?;
        let model = Model::new(&device, &weights)?;
        let warning = weights.warning(path.display());
        drop(weights);
        let load = start.elapsed();
        warning.iter().for_each(|w| warn(w));
        let start = Instant::now();
        model.warm_up()?;
        let warm = start.elapsed();
        print(&format!(
            "device       {}\nmodel        {}, patch {}\n",
            device.describe(),
            self.model,
            model.config().patch
        ))?;
        print(&format!("load         {:.0} ms, and {:.0} ms to warm up\n", ms(load), ms(warm)))?;

        let (mut work, first) = Workload::new(&model)?;
        // A user's first click, before anything has run twice.
        let click = work.click(self.points[0], 1)?.clicks[0];
        let encodes = Latency { points: 0, clicks: work.encode(5)? };
        let text = format!(
            "encode       {:.0} ms, the first one {:.0} ms\n",
            ms(encodes.percentile(0.5)),
            ms(first)
        );
        print(&text)?;
        print(&format!("first click  {:.0} ms\n", ms(click)))?;
        for &points in &self.points {
            let l = work.click(points, self.clicks as usize)?;
            let (p50, p99) = (ms(l.percentile(0.5)), ms(l.percentile(0.99)));
            print(&format!(
                "click        {p50:.0} ms p50, {p99:.0} ms p99 of {} with {points} prompt voxels\n",
                self.clicks
            ))?;
        }
        if let Some(peak) = peak_memory() {
            print(&format!("memory       {:.0} MB at most\n", peak as f64 / 1e6))?;
        }
        if self.report {
            print(&self.tables(&device, &mut work)?)?;
        }
        Ok(())
    }

    fn tables(&self, device: &Device, work: &mut Workload) -> Result<String, Failure> {
        let Device::Cpu(cpu) = device else {
            return Err(Failure::Usage(
                "--report covers the CPU's ops; for CUDA kernels use benches/kernels.rs".into(),
            ));
        };
        let ceilings = Ceilings::measure(cpu);
        let points = self.points.iter().copied().find(|p| *p > 1).unwrap_or(self.points[0]);
        let [encode, click] = work.profile(points, 5)?.expect("it is the CPU");
        let mut text = format!(
            "\nCeilings measured here: {:.0} GFLOP/s in float32, {:.1} GB/s.\n\n## Encode\n\n{}\n## Click with {points} prompt voxels\n\n{}",
            ceilings.flops / 1e9,
            ceilings.bytes / 1e9,
            table(&encode, &ceilings),
            table(&click, &ceilings)
        );
        writeln!(text)?;
        Ok(text)
    }

    fn time(&self, problems: &[Problem]) -> Result<(), Failure> {
        if !(self.long > 0.0 && self.long <= 3600.0) {
            return Err(Failure::Usage("--long must be above 0 and at most 3600 seconds".into()));
        }
        let old: Option<Record> =
            self.compare.as_ref().map(|path| read_record(path)).transpose()?;
        if let Some(path) = &self.save {
            output::check(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
        }
        let device = self.device.open()?;
        print(&format!(
            "{}{}\n",
            device.describe(),
            if self.cold { ", caches emptied before each run" } else { "" }
        ))?;
        let emulated = device.is_emulated();
        let ceilings = match &device {
            _ if emulated => None,
            Device::Cpu(cpu) => Some(Ceilings::measure(cpu)),
            Device::Cuda(cuda) => {
                Some(CudaCeilings::measure(cuda, device.products())?.of(device.products()))
            }
        };
        if let Some(c) = ceilings {
            print(&format!(
                "ceilings measured here: {:.0} GFLOP/s, {:.1} GB/s\n",
                c.flops / 1e9,
                c.bytes / 1e9
            ))?;
        }
        let timing =
            Timing { long: Duration::from_secs_f64(self.long), fewest: 5, cold: self.cold };
        let peers = if self.peer && !emulated { self.peers(problems)? } else { HashMap::new() };
        let columns =
            if emulated { "" } else { "    median       p99   GFLOP/s  % peak     GB/s  % peak" };
        let last = if peers.is_empty() { "" } else { "   PyTorch   ratio" };
        print(&format!("\n{:<34}{:>9}{columns}{last}\n", "problem", "error"))?;
        let mut results = vec![];
        for problem in problems {
            let mut o = measure(&device, problem, timing)?;
            o.peer = peers.get(&o.problem).copied().flatten();
            let mut line = format!("{:<34}{:>9.1e}", o.problem, o.error);
            if let Some(c) = &ceilings {
                let [work, memory] = o.shares(c);
                write!(
                    line,
                    "{:>10}{:>10}{:>10.1}{work:>8.0}{:>9.1}{memory:>8.0}",
                    time_of(o.median),
                    time_of(o.p99),
                    o.flops / o.median / 1e9,
                    o.bytes / o.median / 1e9
                )?;
            }
            match o.peer {
                Some(peer) => write!(line, "{:>10}{:>7.1}x", time_of(peer), peer / o.median)?,
                None if !last.is_empty() => line += "         -",
                None => {}
            }
            if !o.is_right() {
                write!(line, "  WRONG: at most {:.0e}", o.tolerance)?;
            }
            print(&(line + "\n"))?;
            results.push(o);
        }
        let wrong = results.iter().filter(|o| !o.is_right()).count();
        let record = Record {
            version: env!("CARGO_PKG_VERSION").into(),
            device: device.describe(),
            precision: device.products().to_string(),
            cold: self.cold,
            flops_per_second: ceilings.map_or(0.0, |c| c.flops),
            bytes_per_second: ceilings.map_or(0.0, |c| c.bytes),
            results,
        };
        if let Some(path) = &self.save {
            output::write_text(path, &(serde_json::to_string_pretty(&record)? + "\n"))
                .map_err(Failure::Failed)?;
        }
        let slower = old.map_or(Ok(0), |old| report(&old, &record))?;
        match (wrong, slower) {
            (0, 0) => Ok(()),
            (0, n) => Err(Failure::Failed(format!("{n} problems are slower than before"))),
            (n, _) => Err(Failure::Failed(format!("{n} of {} results are wrong", problems.len()))),
        }
    }

    /// Judges and times every variant of the problems' kernels.
    fn try_variants(&self, problems: &[Problem]) -> Result<(), Failure> {
        if let Some(path) = &self.save {
            output::check(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
        }
        let device = self.device.open()?;
        let Device::Cuda(cuda) = &device else {
            return Err(Failure::Usage("--variants needs a CUDA device".into()));
        };
        print(&format!("{}\n\n", device.describe()))?;
        let ceilings = match device.is_emulated() {
            true => None,
            false => Some(CudaCeilings::measure(cuda, device.products())?),
        };
        let cost = ceilings.map(|_| LaunchCost::measure(cuda)).transpose()?;
        let mut all = vec![];
        for problem in problems {
            let tried = try_variants(cuda, problem, ceilings.as_ref())?;
            let worst = tried.errors.iter().copied().fold(0.0, f64::max);
            let judged = match (tried.errors.len(), tried.is_right()) {
                (0, _) => "not judged".into(),
                (n, true) => format!("{n} judged, error at most {worst:.1e}"),
                (n, false) => {
                    format!("{n} judged, WRONG: error {worst:.1e}, at most {:.0e}", tried.tolerance)
                }
            };
            print(&format!("{:<34}  {judged}\n{}", tried.problem, lines(&tried.choices)))?;
            all.push(tried);
        }
        if let Some(path) = &self.save {
            let report = serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"),
                "device": device.describe(),
                "precision": device.products().to_string(),
                "bytes_per_second": ceilings.map(|c| c.bytes),
                "flops_per_second": ceilings.map(|c| c.matrix),
                "plain_flops_per_second": ceilings.map(|c| c.plain),
                "empty_launch": cost,
                "problems": all,
            });
            output::write_text(path, &format!("{report:#}\n")).map_err(Failure::Failed)?;
        }
        match all.iter().filter(|tried| !tried.is_right()).count() {
            0 => Ok(()),
            n => Err(Failure::Failed(format!("{n} of {} results are wrong", all.len()))),
        }
    }

    /// PyTorch's times for the problems.
    fn peers(&self, problems: &[Problem]) -> Result<HashMap<String, Option<f64>>, Failure> {
        #[derive(serde::Deserialize)]
        struct Said {
            peer: String,
            seconds: HashMap<String, Option<f64>>,
        }
        let folder = tempfile::tempdir()?;
        for (name, text) in PEER {
            std::fs::write(folder.path().join(name), text)?;
        }
        let threads = Device::open("cpu", self.device.threads())?.cpu().threads();
        let precision = self.device.precision().to_string();
        let mut python = std::process::Command::new(&self.python);
        python.arg(folder.path().join(PEER[0].0)).args([
            self.device.name(),
            &precision,
            &threads.to_string(),
            &self.long.to_string(),
        ]);
        python.args(problems.iter().map(Problem::to_string)).env("PYTHONDONTWRITEBYTECODE", "1");
        let fail =
            |why: String| Failure::Failed(format!("--peer: {} {why}", self.python.display()));
        let done = python
            .stderr(std::process::Stdio::inherit())
            .output()
            .map_err(|e| fail(format!("does not run: {e}")))?;
        if !done.status.success() {
            return Err(fail(
                "exited with an error: it needs PyTorch and NumPy; choose another interpreter with --python".into(),
            ));
        }
        let said: Said = serde_json::from_slice(&done.stdout)
            .map_err(|e| fail(format!("printed something that cannot be parsed: {e}")))?;
        print(&format!("beside {}, {threads} threads\n", said.peer))?;
        Ok(said.seconds)
    }
}

/// The files of PyTorch's side.
const PEER: [(&str, &str); 2] = [
    ("problems.py", include_str!("../../benches/peer/problems.py")),
    ("prism_torch.py", include_str!("../../benches/peer/prism_torch.py")),
];

/// Lines that show the variants of choices: predicted and measured time of a run's launches.
pub(super) fn lines(choices: &[Variants]) -> String {
    let mut text = String::new();
    for choice in choices {
        text += &format!("  {}\n", choice.key);
        for (at, v) in choice.variants.iter().enumerate() {
            let mark = match at {
                _ if at == choice.best => "<- best",
                0 => "   the rule's",
                _ => "",
            };
            text += &format!(
                "    {:<22}{:>4} launches{:>10} predicted{:>10} measured  {mark}\n",
                v.name,
                v.launches,
                time_of(v.predicted),
                time_of(v.seconds)
            );
        }
    }
    text
}

pub(super) fn time_of(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.3} s"),
    }
}

fn read_record(path: &Path) -> Result<Record, Failure> {
    let fail = |e: &dyn std::fmt::Display| Failure::Failed(format!("{}: {e}", path.display()));
    remember(path);
    let text = std::fs::read_to_string(path).map_err(|e| fail(&e))?;
    serde_json::from_str(&text).map_err(|e| fail(&format!("not what --save writes: {e}")))
}

/// Reports what changed; returns the number of problems that became slower.
fn report(old: &Record, new: &Record) -> Result<usize, Failure> {
    let changes = compare(old, new);
    print(&format!("\nbeside prism {} on {}\n", old.version, old.device))?;
    if (&old.device, &old.precision, old.cold) != (&new.device, &new.precision, new.cold) {
        warn("the two measurements differ in device, precision or state of the caches");
    }
    for c in &changes {
        let what = match c.ratio() {
            _ if c.is_regression() => "SLOWER",
            r if r < 1.0 - c.spread => "faster",
            _ => "the same",
        };
        let [was, is] = c.medians.map(time_of);
        print(&format!(
            "{:<34}{was:>10} -> {is:>10}  {:>5.2}x  {what} (spread {:.0} %)\n",
            c.problem,
            c.ratio(),
            100.0 * c.spread
        ))?;
    }
    let missing = new.results.len() - changes.len();
    if missing > 0 {
        print(&format!("{missing} problems were not timed before\n"))?;
    }
    Ok(changes.iter().filter(|c| c.is_regression()).count())
}
