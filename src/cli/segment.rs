//! `prism segment`: a scan and prompts in, a mask on the scan's own grid out.

use super::model::{Chosen, ModelArgs};
use super::preview::{self, Marks};
use super::{DeviceArgs, Failure, print, quiet, say, warn};
use crate::device::Device;
use crate::model::{Intensity, Model, Observer};
use crate::output::{self, Pending};
use crate::prompt::{
    Dense, Iteration, Prompts, RawBox, RawOutline, RawPoint, Space, read_iterations,
};
use crate::session::{
    Intensities, Options, Prediction, Scan, Session, intensities, working_spacing,
};
use crate::volume::intensity::Normalization;
use crate::volume::labels::{Labels, TargetLabel};
use crate::volume::patch::Extent;
use crate::volume::{
    Element, Modality, Volume, check_output, check_output_on, write_mask, write_probability,
};
use clap::{ArgGroup, Args};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Segments one object of a scan and writes its mask on the scan's own grid.
///
/// At least one prompt is needed: --point, --box, --line, --lasso, --scribble, --mask or --prompts.
#[derive(Args)]
#[command(group = ArgGroup::new("said").args(["point", "bounds", "scribble", "mask", "others", "line", "lasso"]).multiple(true).conflicts_with("prompts"))]
pub struct Segment {
    #[command(flatten)]
    model: ModelArgs,
    /// Scan: a file (NIfTI, NRRD or MetaImage), or a DICOM series: its folder, a zip of it, or one
    /// of its files
    #[arg(short, long, value_name = "FILE|FOLDER")]
    image: PathBuf,
    /// Mask to write: .nii.gz, .nii, .nrrd, .seg.nrrd (3D Slicer opens it as a segmentation), .mha,
    /// or, of a DICOM series, .dcm (DICOM-SEG)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Point on the object (+, the default) or off it (-); may be repeated
    #[arg(long, value_name = "I,J,K[,+|-]", allow_hyphen_values = true, help_heading = "Prompts")]
    point: Vec<RawPoint>,
    /// Box around the object, ends exclusive
    #[arg(
        long = "box",
        id = "bounds",
        value_name = "I0,J0,K0,I1,J1,K1",
        allow_hyphen_values = true,
        help_heading = "Prompts"
    )]
    bounds: Option<RawBox>,
    /// Label image, placed on the scan by its geometry: 1 on the object, 2 off it
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    scribble: Option<PathBuf>,
    /// Mask to correct, placed on the scan by its geometry: a label image, or a DICOM segmentation
    /// or structure set
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    mask: Option<PathBuf>,
    /// Which label of --mask is the object: a value, or the name of a structure in a segmentation
    #[arg(
        long,
        value_name = "any|N|NAME",
        default_value = "any",
        hide_default_value = true,
        requires = "mask",
        help_heading = "Prompts"
    )]
    mask_label: TargetLabel,
    /// Label image of other objects, which the answer never enters
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    others: Option<PathBuf>,
    /// Line across the object, from border to border, as RECIST measures it; may be repeated
    #[arg(
        long,
        value_name = "I0,J0,K0,I1,J1,K1",
        allow_hyphen_values = true,
        help_heading = "Prompts"
    )]
    line: Vec<RawBox>,
    /// Closed outline around the object on one slice: three corners or more
    #[arg(
        long,
        value_name = "I,J,K;I,J,K;...",
        allow_hyphen_values = true,
        help_heading = "Prompts"
    )]
    lasso: Vec<RawOutline>,
    /// JSON list of iterations: [{"points": [{"position": [i,j,k], "positive": true}], "box": [..],
    /// "line": [[..]], "lasso": [[i,j,k], ..], "scribble": FILE, "mask": FILE, "others": FILE}]
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    prompts: Option<PathBuf>,
    /// Coordinates of points and boxes: voxels of the file, or world millimetres
    #[arg(long, default_value = "ijk", value_name = "SPACE", help_heading = "Prompts")]
    space: Space,

    /// Which volume of a scan that holds several, from 0
    #[arg(long, alias = "channel", value_name = "N", help_heading = "Scan")]
    volume: Option<usize>,
    /// Which of several DICOM series: its number (of a part of it, as 3.2), its UID, or a part of
    /// its description
    #[arg(long, value_name = "N|UID|TEXT", help_heading = "Scan")]
    series: Option<String>,
    /// What the scan was made by [default: as DICOM says, else told by the distribution of its
    /// values]
    #[arg(long, value_name = "NAME", help_heading = "Scan")]
    modality: Option<Modality>,
    /// Spacing to work at, in mm [default: the model's, or fitted to the box by models that do
    /// that]
    #[arg(long, value_name = "MM", help_heading = "Scan")]
    spacing: Option<f64>,
    /// Intensity statistics of a dataset: colon, pancreas, liver or kidney [default: the model's]
    #[arg(long, value_name = "NAME", value_parser = ["colon", "pancreas", "liver", "kidney"], conflicts_with_all = ["clip", "percentiles"], help_heading = "Scan")]
    preset: Option<String>,
    /// Intensities to clip to
    #[arg(long, value_name = "LO,HI", value_parser = clip, allow_hyphen_values = true, requires = "mean", requires = "sd", help_heading = "Scan")]
    clip: Option<[f32; 2]>,
    /// Mean of the clipped intensities
    #[arg(
        long,
        value_name = "X",
        requires = "clip",
        allow_hyphen_values = true,
        help_heading = "Scan"
    )]
    mean: Option<f32>,
    /// Standard deviation of the clipped intensities
    #[arg(long, value_name = "X", requires = "clip", help_heading = "Scan")]
    sd: Option<f32>,
    /// Take intensity statistics from the scan itself, between its 0.5 and 99.5 percentiles
    #[arg(long, conflicts_with = "clip", help_heading = "Scan")]
    percentiles: bool,

    /// Answer as the paper runs the network: one patch, no promise that prompts are obeyed
    #[arg(long, help_heading = "Output")]
    released: bool,
    /// Also write the object's probability at every voxel: .nii.gz, .nii, .nrrd, .mha, or, of a
    /// DICOM series, .dcm
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    probability: Option<PathBuf>,
    /// Also write a picture: three planes through the last click, else the middle of the box or the
    /// object; contours and prompts (.png)
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    preview: Option<PathBuf>,
    /// Print the result as JSON, warnings in it
    #[arg(long, help_heading = "Output")]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

/// Reads `LO,HI`.
fn clip(text: &str) -> Result<[f32; 2], String> {
    let values: Option<Vec<f32>> = text.split(',').map(|v| v.trim().parse().ok()).collect();
    match values.as_deref() {
        Some([low, high]) if low < high && low.is_finite() && high.is_finite() => Ok([*low, *high]),
        _ => Err("expected LO,HI: two numbers, LO below HI".into()),
    }
}

/// Shows on a terminal what is being done, and remembers how long each stage took.
struct Stages {
    bar: ProgressBar,
    done: Vec<(&'static str, f64)>,
    start: Instant,
}

impl Stages {
    fn new() -> Stages {
        let bar = if quiet() { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        bar.set_style(
            ProgressStyle::with_template("{spinner} {msg} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner()),
        );
        // It takes a thread, which is for nothing where nobody sees it.
        if std::io::stderr().is_terminal() && !quiet() {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Stages { bar, done: vec![], start: Instant::now() }
    }

    fn begin(&mut self, what: String) {
        self.bar.set_message(what);
        self.start = Instant::now();
    }

    fn end(&mut self, name: &'static str) {
        self.done.push((name, self.start.elapsed().as_secs_f64()));
    }

    fn add(&mut self, name: &'static str, time: Duration) {
        match self.done.iter_mut().find(|(n, _)| *n == name) {
            Some((_, sum)) => *sum += time.as_secs_f64(),
            None => self.done.push((name, time.as_secs_f64())),
        }
    }
}

impl Segment {
    pub fn run(&self) -> Result<(), Failure> {
        let model = self.model.choose()?;
        self.check_usage(&model)?;
        let device = self.device.open()?;
        let mut stages = Stages::new();
        let result = self.segment(&device, &model, &mut stages);
        stages.bar.finish_and_clear();
        if self.json { print(&result?) } else { say(&result?) }
    }

    /// What can be found wrong before any file is opened.
    fn check_usage(&self, model: &Chosen) -> Result<(), Failure> {
        let usage = |m: &str| Err(Failure::Usage(m.to_string()));
        let files = [&self.scribble, &self.mask, &self.prompts].into_iter().any(Option::is_some);
        if self.point.is_empty()
            && self.bounds.is_none()
            && self.line.is_empty()
            && self.lasso.is_empty()
            && !files
        {
            return usage(
                "a prompt is needed: --point, --box, --line, --lasso, --scribble, --mask or --prompts",
            );
        }
        if self.released && self.others.is_some() {
            return usage(
                "--others needs a session that keeps its promises: it does not go with --released",
            );
        }
        if self.spacing.is_some_and(|s| !(s > 0.0 && s < 100.0)) {
            return usage("--spacing must be above 0 and below 100 mm");
        }
        if self.sd.is_some_and(|s| !(s > 0.0 && s.is_finite()))
            || self.mean.is_some_and(|m| !m.is_finite())
        {
            return usage("--mean must be a number, and --sd one above 0");
        }
        for (path, element) in self.images() {
            check_output(path, element).map_err(|e| Failure::Usage(e.to_string()))?;
        }
        if self
            .preview
            .as_ref()
            .is_some_and(|p| p.extension().is_none_or(|e| !e.eq_ignore_ascii_case("png")))
        {
            return usage("--preview must be named .png");
        }
        let outputs: Vec<&PathBuf> =
            [Some(&self.output), self.probability.as_ref(), self.preview.as_ref()]
                .into_iter()
                .flatten()
                .collect();
        for path in &outputs {
            output::check(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
        }
        let places: Vec<PathBuf> = outputs.iter().map(|p| output::spelled_out(p)).collect();
        if (1..places.len()).any(|i| places[..i].contains(&places[i])) {
            return usage("two outputs are the same file");
        }
        let named = self
            .prompts
            .as_ref()
            .map(|path| read_iterations(path))
            .transpose()?
            .unwrap_or_default();
        let named = named
            .iter()
            .flat_map(|i| [&i.scribble, &i.mask, &i.others])
            .flatten()
            .map(PathBuf::as_path);
        let given = [&self.scribble, &self.mask, &self.others, &self.prompts]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path);
        for input in [Some(self.image.as_path()), model.path()]
            .into_iter()
            .flatten()
            .chain(given)
            .chain(named)
        {
            if let Some(at) = places.iter().position(|p| *p == output::spelled_out(input)) {
                return usage(&format!(
                    "{} is an input: the output would overwrite it",
                    outputs[at].display()
                ));
            }
        }
        Ok(())
    }

    /// The images that are to be written.
    fn images(&self) -> impl Iterator<Item = (&Path, Element)> {
        let probability = self.probability.as_deref().map(|path| (path, Element::Float32));
        std::iter::once((self.output.as_path(), Element::Uint8)).chain(probability)
    }

    fn segment(
        &self,
        device: &Device,
        chosen: &Chosen,
        stages: &mut Stages,
    ) -> Result<String, Failure> {
        let about = |path: &Path, verb: &str| format!("{verb} {}", path.display());
        stages.begin(about(&self.image, "reading"));
        let mut image = Volume::read_series(&self.image, self.series.as_deref(), self.volume)?;
        image.description.modality = self.modality.or(image.description.modality);
        // What only the scan tells of the outputs, before minutes are spent on it: whether a DICOM
        // segmentation can refer to it, and whether one of its files would be written over.
        for (path, element) in self.images() {
            check_output_on(path, element, &image.description)?;
            output::check(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
        }
        let mut warnings: Vec<String> =
            image.warnings.iter().map(|w| format!("{}: {w}", self.image.display())).collect();
        let iterations = self.iterations(&image, &mut warnings)?;
        stages.end("read");

        stages.begin(format!("loading {chosen}"));
        let weights = chosen.open()?;
        let model = Arc::new(Model::new(device, &weights)?);
        drop(weights);
        // On the CPU a single scan would wait twice.
        if let Device::Cuda(_) = device {
            model.warm_up()?;
        }
        stages.end("load");

        let intensities = self.intensities(&image, model.config().intensity);
        warnings
            .extend(intensities.warning.iter().map(|w| format!("{}: {w}", self.image.display())));
        let normalization = intensities.normalization;
        let bounds = iterations.iter().find_map(|p| p.bounds).map(Extent::of_box);
        // The paper's patch is one for all iterations: centred on the first that marks anything, at
        // the spacing of the first box.
        let spacing = match self.released {
            true => {
                self.spacing.or(Some(working_spacing(model.config(), &image.grid, bounds.as_ref())))
            }
            false => self.spacing,
        };
        let image = Arc::new(image);
        let options = Options { spacing, released: self.released, ..Default::default() };
        let scan = Arc::new(Scan::new(&model, image.clone(), normalization, options));
        let mut session = Session::new(&scan);
        if self.released {
            let marks = iterations.iter().find(|p| p.extent(&image.grid).is_some());
            let marks = marks.ok_or_else(|| {
                Failure::Failed(
                    "the prompts mark no voxel: an empty scribble or mask says nothing".into(),
                )
            })?;
            stages.begin("encoding".into());
            let seconds = session.prepare(marks, &mut Observer::none())?;
            seconds.into_iter().zip(["patch", "encode"]).for_each(|(t, name)| stages.add(name, t));
        }
        let mut steps = vec![];
        let mut answers: Vec<Arc<Prediction>> = vec![];
        for (i, prompts) in iterations.iter().enumerate() {
            stages.begin(format!("interaction {} of {}", i + 1, iterations.len()));
            let p = session.interact(prompts)?;
            if !self.released {
                p.encoding
                    .into_iter()
                    .zip(["patch", "encode"])
                    .for_each(|(t, name)| stages.add(name, t));
            }
            p.seconds
                .into_iter()
                .zip(["prompts", "decode", "refine"])
                .for_each(|(t, name)| stages.add(name, t));
            if p.left_out > 0 {
                warnings.push(format!(
                    "{} points of iteration {} lie outside the patch and were left out",
                    p.left_out,
                    i + 1
                ));
            }
            if p.thinned > 0 {
                warnings.push(format!(
                    "iteration {} has more points than the prompt encoder takes: {} of them went to the refiner only",
                    i + 1,
                    p.thinned
                ));
            }
            let which =
                if iterations.len() > 1 { format!("iteration {}: ", i + 1) } else { String::new() };
            warnings.extend(p.notes.iter().map(|n| format!("{which}{n}")));
            let scores: Vec<f32> = p.candidates.iter().map(|c| c.score).collect();
            let notes: Vec<String> = p.notes.iter().map(|n| n.to_string()).collect();
            steps.push(json!({
                "scores": scores, "selected": p.selected, "expected_dice": p.score, "looks": p.looks, "changed_voxels": p.changed,
                "spacing_mm": p.patch.spacing, "notes": notes,
            }));
            answers.push(p.clone());
        }
        let patch = session
            .patch()
            .cloned()
            .ok_or_else(|| Failure::Failed("the prompts say nothing".into()))?;
        if patch.coarsened {
            let (edge, asked, at) = (
                model.config().patch,
                spacing.unwrap_or(model.config().spacing as f64),
                patch.spacing,
            );
            warnings.insert(0, format!("the object does not fit {edge} voxels of {asked} mm: it was processed at {at:.3} mm"));
        }

        stages.begin("pasting back".into());
        let mask = session.mask();
        stages.end("paste");
        stages.begin(about(&self.output, "writing"));
        let mut outputs: Vec<Pending> = vec![write_mask(&self.output, &image, &mask)?];
        if let Some(path) = &self.probability {
            outputs.push(write_probability(path, &image, &session.probability())?);
        }
        if let Some(path) = &self.preview {
            let fields: Vec<_> = answers.iter().map(|p| &p.field).collect();
            let picture = preview::draw(&image, &fields, &Marks::of(&iterations));
            let fail = |e: String| Failure::Failed(format!("{}: {e}", path.display()));
            let pending = Pending::new(path, ".png").map_err(|e| fail(e.to_string()))?;
            picture.save(pending.path()).map_err(fail)?;
            outputs.push(pending);
        }
        for pending in outputs {
            let path = pending.destination().display().to_string();
            pending.commit().map_err(|e| Failure::Failed(format!("{path}: {e}")))?;
        }
        stages.end("write");

        let voxels = mask.iter().filter(|v| **v != 0).count();
        let ml = voxels as f64 * image.grid.voxel_ml();
        if voxels == 0 {
            warnings.push("the mask is empty".into());
        }
        let seconds: serde_json::Map<String, serde_json::Value> = stages
            .done
            .iter()
            .map(|(n, s)| (n.to_string(), json!((s * 1e4).round() / 1e4)))
            .collect();
        if self.json {
            let report = json!({
                "output": self.output, "model": chosen.to_string(), "voxels": voxels, "volume_ml": ml, "iterations": steps, "seconds": seconds, "device": device.describe(),
                "intensity": {
                    "modality": intensities.modality, "decided": intensities.why(), "clip": normalization.clip, "mean": normalization.mean,
                    "sd": normalization.sd,
                },
                "patch": { "edge": patch.grid.size[0], "spacing_mm": patch.spacing, "coarsened": patch.coarsened },
                "bytes": { "packed_weights": model.packed_bytes(), "encoded_scan": scan.bytes() },
                "warnings": warnings,
            });
            return Ok(format!("{report:#}\n"));
        }
        stages.bar.suspend(|| warnings.iter().for_each(|w| warn(w)));
        let expected = session
            .prediction()
            .and_then(|p| p.score)
            .map_or(String::new(), |s| format!(", expected Dice {s:.2}"));
        let times: Vec<String> = stages.done.iter().map(|(n, s)| format!("{n} {s:.2}")).collect();
        let text = format!("{}: {voxels} voxels, {ml:.3} ml{expected}\n", self.output.display());
        let text = text + &format!("scan: {}\n", intensities.why());
        Ok(text + &format!("seconds: {} ({})\n", times.join(", "), device.describe()))
    }

    /// The prompts of every iteration, on the image.
    fn iterations(
        &self,
        image: &Volume,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Prompts>, Failure> {
        let list = match &self.prompts {
            Some(path) => read_iterations(path)?,
            None => vec![Iteration {
                scribble: self.scribble.clone(),
                mask: self.mask.clone(),
                mask_label: self.mask_label.clone(),
                others: self.others.clone(),
                ..Default::default()
            }],
        };
        let mut read = |path: &Path| -> Result<Labels, Failure> {
            let labels = Labels::beside(path, image)?;
            warnings.extend(labels.warnings.iter().map(|w| format!("{}: {w}", path.display())));
            Ok(labels)
        };
        let mut joined = vec![];
        let mut one = |i: &Iteration| -> Result<Prompts, Failure> {
            let mut prompts = Prompts::default();
            for point in self.point.iter().copied().chain(i.raw_points()) {
                prompts.add_point(&image.grid, point, self.space)?;
            }
            if let Some(b) = self.bounds.or(i.raw_box()) {
                prompts.set_box(&image.grid, b, self.space)?;
            }
            for line in self.line.iter().copied().chain(i.raw_lines()) {
                prompts.add_line(&image.grid, line, self.space)?;
            }
            for outline in self.lasso.iter().cloned().chain(i.raw_outlines()) {
                prompts.add_lasso(&image.grid, &outline, self.space)?;
            }
            if let Some(path) = &i.others {
                prompts.others =
                    Some(read(path)?.joined().iter().map(|l| u8::from(*l != 0)).collect());
            }
            if let Some(path) = &i.scribble {
                let labels = read(path)?.joined();
                let fail = |e| Failure::Failed(format!("{}: {e}", path.display()));
                prompts.add_scribble(&image.grid, &labels).map_err(fail)?;
            }
            if let Some(path) = &i.mask {
                let labels = read(path)?;
                let mask = labels.mask(&i.mask_label)?;
                match (&i.mask_label, labels.several("--mask-label")) {
                    (TargetLabel::Any, several) => {
                        joined.extend(several.map(|w| format!("{}: {w}", path.display())))
                    }
                    (label, _) if mask.iter().all(|v| *v == 0) => {
                        let values: Vec<u32> = labels.counts().into_keys().collect();
                        let message = format!(
                            "{}: no voxel has label {label}: it holds {values:?}",
                            path.display()
                        );
                        return Err(Failure::Failed(message));
                    }
                    _ => {}
                }
                prompts.dense = Some(Dense::Mask(mask));
            }
            Ok(prompts)
        };
        let several = self.prompts.is_some();
        let named = |(at, e): (usize, Failure)| match (e, several) {
            (Failure::Failed(m), true) => Failure::Failed(format!("iteration {}: {m}", at + 1)),
            (e, _) => e,
        };
        let prompts = list
            .iter()
            .enumerate()
            .map(|(at, i)| one(i).map_err(|e| named((at, e))))
            .collect::<Result<Vec<_>, _>>()?;
        warnings.extend(joined);
        match prompts.iter().position(Prompts::is_empty) {
            Some(at) if at == 0 || self.prompts.is_none() => Err(Failure::Failed(format!(
                "iteration {} says nothing: no voxel of its prompts is marked",
                at + 1
            ))),
            _ => Ok(prompts),
        }
    }

    fn intensities(&self, image: &Volume, model: Option<Intensity>) -> Intensities {
        let mut intensities = intensities(image, model);
        let given = match (self.clip, self.mean, self.sd) {
            (Some(clip), Some(mean), Some(sd)) => {
                Some((Normalization { clip, mean, sd }, "the numbers given".to_string()))
            }
            _ if self.percentiles => Some((
                Normalization::of_percentiles(image),
                "its own percentiles, as asked for".to_string(),
            )),
            _ => self.preset.as_deref().and_then(|name| {
                let of = |i: Intensity| Normalization { clip: i.clip, mean: i.mean, sd: i.sd };
                Intensity::preset(name).map(|i| (of(i), format!("the preset {name}")))
            }),
        };
        if let Some((normalization, by)) = given {
            intensities.normalization = normalization;
            intensities.by = by;
        }
        intensities
    }
}
