//! `prism segment`: from a scan and prompts to a mask on the scan's own grid, or for several
//! objects a label image.

mod ahead;
mod answer;
mod asked;
mod stages;

use super::model::{Chosen, ModelArgs};
use super::objects::Painted;
use super::{DeviceArgs, Failure, pretty, print, quiet, say, warn};
use crate::device::Device;
use crate::memory;
use crate::model::{Intensity, Model};
use crate::output::{self, Pending};
use crate::preview::{self, Marks};
use crate::prompt::{Iteration, PromptedObject, RawBox, RawOutline, RawPoint, Space, read_prompts};
use crate::session::{Intensities, Options, Prediction, Scan, intensities, working_spacing};
use crate::volume::intensity::Normalization;
use crate::volume::labels::TargetLabel;
use crate::volume::patch::Extent;
use crate::volume::{
    Element, LabelValues, Modality, Volume, Voxels, check_output, check_output_on, data_file,
    numbered, write_labels, write_mask, write_some_probability,
};
use ahead::{Giver, parts};
use answer::Answered;
use asked::{Asked, UNNAMED};
use clap::{ArgGroup, Args};
use serde_json::{Value, json};
use stages::Stages;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;

/// Segment objects in a scan from points, boxes, scribbles or masks
///
/// Writes the mask on the scan's own grid.
///
/// At least one prompt is needed: --point, --box, --line, --lasso, --scribble, --mask or --prompts.
/// A --prompts file may describe several objects: they are written as one label image with the
/// values 1, 2, ... in the order of the file. Where objects overlap, the later one wins.
#[derive(Args)]
#[command(group = ArgGroup::new("said").args(["point", "bounds", "scribble", "mask", "others", "line", "lasso"]).multiple(true).conflicts_with("prompts"))]
pub struct Segment {
    #[command(flatten)]
    model: ModelArgs,
    /// Scan: a file (NIfTI, NRRD or MetaImage), or a DICOM series: its folder, a zip of it, or one
    /// of its files
    #[arg(short, long, value_name = "FILE|FOLDER")]
    image: PathBuf,
    /// Mask to write: .nii.gz, .nii, .nrrd, .seg.nrrd (a 3D Slicer segmentation), .mha, .mhd (with
    /// the voxels in a .zraw file beside it), or .dcm (DICOM SEG, if the scan is a DICOM series)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Point on the object (+, the default) or off it (-); repeatable
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
    /// Label image, aligned with the scan by its geometry: 1 on the object, 2 off it
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    scribble: Option<PathBuf>,
    /// Mask to correct, aligned with the scan by its geometry: a label image, or a DICOM
    /// segmentation or structure set
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    mask: Option<PathBuf>,
    /// Label of --mask that is the object: a value, or the name of a structure in a segmentation
    #[arg(
        long,
        value_name = "any|N|NAME",
        default_value = "any",
        hide_default_value = true,
        requires = "mask",
        help_heading = "Prompts"
    )]
    mask_label: TargetLabel,
    /// Label image of other objects, which the mask never enters
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    others: Option<PathBuf>,
    /// Line across the object, from border to border, as in RECIST; repeatable
    #[arg(
        long,
        value_name = "I0,J0,K0,I1,J1,K1",
        allow_hyphen_values = true,
        help_heading = "Prompts"
    )]
    line: Vec<RawBox>,
    /// Closed outline around the object on one slice, with at least three corners
    #[arg(
        long,
        value_name = "I,J,K;I,J,K;...",
        allow_hyphen_values = true,
        help_heading = "Prompts"
    )]
    lasso: Vec<RawOutline>,
    /// JSON list of iterations: [{"points": [{"position": [i,j,k], "positive": true}], "box": [..],
    /// "line": [[..]], "lasso": [[i,j,k], ..], "scribble": FILE, "mask": FILE, "others": FILE}]; or
    /// several objects: {"objects": [{"name": "tumour", "colour": [r,g,b], "iterations": [..]}]}
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    prompts: Option<PathBuf>,
    /// Coordinates of prompts: voxel indices of the file, or world millimetres
    #[arg(long, default_value = "ijk", value_name = "SPACE", help_heading = "Prompts")]
    space: Space,

    /// Volume to read if the scan has several, from 0
    #[arg(long, alias = "channel", value_name = "N", help_heading = "Scan")]
    volume: Option<usize>,
    /// DICOM series to read if there are several: its number (3.2 for a part of it), its UID, or a
    /// part of its description
    #[arg(long, value_name = "N|UID|TEXT", help_heading = "Scan")]
    series: Option<String>,
    /// Modality of the scan [default: from DICOM, else guessed from the distribution of its values]
    #[arg(long, value_name = "NAME", help_heading = "Scan")]
    modality: Option<Modality>,
    /// Spacing to work at, in mm [default: that of the model, or fitted to the box if the model
    /// does that]
    #[arg(long, value_name = "MM", help_heading = "Scan")]
    spacing: Option<f64>,
    /// Intensity statistics of a dataset: colon, pancreas, liver or kidney [default: the model's]
    #[arg(long, value_name = "NAME", value_parser = ["colon", "pancreas", "liver", "kidney"], conflicts_with_all = ["clip", "percentiles"], help_heading = "Scan")]
    preset: Option<String>,
    /// Intensity range to clip to
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
    /// Use intensity statistics of the scan itself, between its 0.5 and 99.5 percentiles
    #[arg(long, conflicts_with = "clip", help_heading = "Scan")]
    percentiles: bool,

    /// Run the network as in the paper: one patch, without the guarantee that prompts are obeyed
    #[arg(long, help_heading = "Output")]
    released: bool,
    /// Also write the object's probability at every voxel: .nii.gz, .nii, .nrrd, .mha, .mhd, or
    /// .dcm for a DICOM series; with several objects, one file per object, numbered -1, -2, ...
    /// before the extension
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    probability: Option<PathBuf>,
    /// Also write a PNG picture with contours and prompts on three planes through the last click,
    /// else through the middle of the box or the object; with several objects, one numbered file
    /// per object
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    preview: Option<PathBuf>,
    /// Print the result, warnings included, as a single JSON object on standard output
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

/// The file of object `at`, from 0, of `all`: the named one, or one for each object.
fn file_of(path: &Path, at: usize, all: usize) -> PathBuf {
    if all > 1 { numbered(path, at + 1) } else { path.to_path_buf() }
}

/// An error if a file could not be put at one of these places.
fn can_be_written(outputs: &[PathBuf]) -> Result<(), Failure> {
    for path in outputs {
        output::check(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
    }
    Ok(())
}

/// A network, and a warning about its file.
type Loaded = (Arc<Model>, Option<String>);

fn load(device: &Device, chosen: &Chosen) -> Result<Loaded, Failure> {
    let weights = chosen.read()?;
    let (model, warning) = (Arc::new(Model::new(device, &weights)?), weights.warning(chosen));
    drop(weights);
    // On the CPU a single scan would wait twice.
    if let Device::Cuda(_) = device {
        model.warm_up()?;
    }
    Ok((model, warning))
}

impl Segment {
    pub fn run(&self) -> Result<(), Failure> {
        let model = self.model.choose()?;
        let objects = self.check_usage(&model)?;
        let device = self.device.open()?;
        let mut stages = Stages::new();
        let result = self.segment(&device, &model, objects, &mut stages);
        stages.bar.finish_and_clear();
        if self.json { print(&result?) } else { say(&result?) }
    }

    /// Checks what can be found wrong before the scan is opened. Returns the parsed prompts: a
    /// prompts file may be a pipe, which can be read only once.
    fn check_usage(&self, model: &Chosen) -> Result<Vec<PromptedObject>, Failure> {
        let usage = |m: &str| Err(Failure::Usage(m.to_string()));
        let files = [&self.scribble, &self.mask, &self.prompts].into_iter().any(Option::is_some);
        if self.point.is_empty()
            && self.bounds.is_none()
            && self.line.is_empty()
            && self.lasso.is_empty()
            && !files
        {
            return usage(
                "no prompt: give --point, --box, --line, --lasso, --scribble, --mask or --prompts",
            );
        }
        if self.released && self.others.is_some() {
            return usage("--others cannot be used with --released");
        }
        if self.spacing.is_some_and(|s| !(s > 0.0 && s < 100.0)) {
            return usage("--spacing must be above 0 and below 100 mm");
        }
        if self.sd.is_some_and(|s| !(s > 0.0 && s.is_finite()))
            || self.mean.is_some_and(|m| !m.is_finite())
        {
            return usage("--mean must be a finite number, and --sd a number above 0");
        }
        for (path, element) in self.images() {
            check_output(path, element).map_err(|e| Failure::Usage(e.to_string()))?;
        }
        if self
            .preview
            .as_ref()
            .is_some_and(|p| p.extension().is_none_or(|e| !e.eq_ignore_ascii_case("png")))
        {
            return usage("--preview must be a .png file");
        }
        let objects = match &self.prompts {
            Some(path) => read_prompts(path)?,
            None => vec![PromptedObject {
                name: None,
                colour: None,
                iterations: vec![Iteration {
                    scribble: self.scribble.clone(),
                    mask: self.mask.clone(),
                    mask_label: self.mask_label.clone(),
                    others: self.others.clone(),
                    ..Default::default()
                }],
            }],
        };
        if self.released && objects.len() > 1 {
            return usage(
                "--released handles a single object: run each object of --prompts separately",
            );
        }
        let outputs = self.outputs(objects.len());
        can_be_written(&outputs)?;
        output::all_differ(&outputs).map_err(Failure::Usage)?;
        let places: Vec<PathBuf> = outputs.iter().map(|p| output::spelled_out(p)).collect();
        let named = objects
            .iter()
            .flat_map(|object| &object.iterations)
            .flat_map(|i| [&i.scribble, &i.mask, &i.others])
            .flatten()
            .map(PathBuf::as_path);
        for input in [Some(self.image.as_path()), model.path(), self.prompts.as_deref()]
            .into_iter()
            .flatten()
            .chain(named)
        {
            if let Some(at) = places.iter().position(|p| *p == output::spelled_out(input)) {
                return usage(&format!(
                    "{} is an input: the output would overwrite it",
                    outputs[at].display()
                ));
            }
        }
        Ok(objects)
    }

    /// All files that are written for this number of objects.
    fn outputs(&self, objects: usize) -> Vec<PathBuf> {
        let mut outputs = vec![self.output.clone()];
        for path in [&self.probability, &self.preview].into_iter().flatten() {
            outputs.extend((0..objects).map(|at| file_of(path, at, objects)));
        }
        // Headers whose voxels are in separate files.
        let apart: Vec<PathBuf> = outputs.iter().filter_map(|path| data_file(path)).collect();
        outputs.extend(apart);
        outputs
    }

    /// The images that are to be written.
    fn images(&self) -> impl Iterator<Item = (&Path, Element)> {
        let probability = self.probability.as_deref().map(|path| (path, Element::Float32));
        std::iter::once((self.output.as_path(), Element::Uint8)).chain(probability)
    }

    /// The scan, its prompts, and what was odd about them.
    fn read(
        &self,
        objects: Vec<PromptedObject>,
        mut parts: Giver,
        stages: &mut Stages,
    ) -> Result<(Volume, Vec<Asked>, Vec<String>), Failure> {
        let (file, series) = (&self.image, self.series.as_deref());
        let read = Volume::read_watched(file, series, self.volume, &mut |begun| parts.see(begun));
        drop(parts);
        let mut image = read?;
        image.description.modality = self.modality.or(image.description.modality);
        // What only the scan shows about the outputs, before minutes are spent on it: whether a
        // DICOM segmentation can refer to it, and whether one of its files would be overwritten.
        for (path, element) in self.images() {
            check_output_on(path, element, &image.description)?;
        }
        can_be_written(&self.outputs(objects.len()))?;
        let mut warnings: Vec<String> =
            image.warnings.iter().map(|w| format!("{}: {w}", self.image.display())).collect();
        let asked = self.asked(objects, &image, &mut warnings)?;
        stages.end("read");
        Ok((image, asked, warnings))
    }

    fn segment(
        &self,
        device: &Device,
        chosen: &Chosen,
        objects: Vec<PromptedObject>,
        stages: &mut Stages,
    ) -> Result<String, Failure> {
        let about = |path: &Path, verb: &str| format!("{verb} {}", path.display());
        stages.begin(about(&self.image, "reading"));
        // Reading keeps one core busy most of the time, so the network is loaded on another. Not if
        // a budget was set, because what is left of it would then depend on which thread comes
        // first, nor if loading takes so long that an error of the scan would wait for it. Once it
        // is loaded, it is shown the parts already read of the places where it looks first.
        let at_once = matches!(device, Device::Cpu(_)) && !memory::is_set();
        let first = objects.first().and_then(|object| object.iterations.first()).cloned();
        let (ended, (giver, taker)) = (AtomicBool::new(false), parts());
        let (read, loaded) = std::thread::scope(|scope| {
            let (first, ended) = (&first, &ended);
            let work = move || -> Result<(Loaded, Option<Scan>), Failure> {
                let (model, warning) = load(device, chosen)?;
                let look = |first| self.look_ahead(&model, first, &taker, ended);
                // Memory that is refused here is requested again when the scan is read.
                let ahead = memory::caught(|| first.as_ref().and_then(look)).ok().flatten();
                Ok(((model, warning), ahead))
            };
            // If no other thread can be started it is loaded after the scan.
            let beside = || Builder::new().spawn_scoped(scope, work).ok();
            let loading = at_once.then(beside).flatten();
            let read = self.read(objects, giver, stages);
            ended.store(read.is_err(), Ordering::Relaxed);
            if read.is_ok() {
                stages.begin(format!("loading {chosen}"));
            }
            let loaded =
                loading.map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
            (read, loaded)
        });
        let (image, asked, mut warnings) = read?;
        let ((model, warning), ahead) = match loaded {
            Some(loaded) => loaded?,
            None => (load(device, chosen)?, None),
        };
        warnings.extend(warning);
        stages.end("load");

        let intensities = self.intensities(&image, model.config().intensity);
        warnings
            .extend(intensities.warning.iter().map(|w| format!("{}: {w}", self.image.display())));
        let normalization = intensities.normalization;
        let mut prompts = asked.iter().flat_map(|object| &object.prompts);
        let bounds = prompts.find_map(|p| p.bounds).map(Extent::of_box);
        // The paper's patch is the same for all iterations: centred on the first that marks
        // anything, at the spacing of the first box.
        let spacing = match self.released {
            true => {
                self.spacing.or(Some(working_spacing(model.config(), &image.grid, bounds.as_ref())))
            }
            false => self.spacing,
        };
        let image = Arc::new(image);
        let options = Options { spacing, released: self.released, ..Default::default() };
        let scan = ahead
            .filter(|scan| *scan.options() == options)
            .and_then(|scan| scan.showing(image.clone(), &normalization))
            .unwrap_or_else(|| Scan::new(&model, image.clone(), normalization, options));
        let scan = Arc::new(scan);
        let mut painted = Painted::new(&image.grid, asked.len());
        let (mut answered, mut outputs) = (vec![], vec![]);
        for (at, object) in asked.iter().enumerate() {
            let answer = self.answer(&scan, object, stages, &mut warnings)?;
            if answer.last.patch.coarsened {
                let (edge, asked, at) = (
                    model.config().patch,
                    spacing.unwrap_or(model.config().spacing as f64),
                    answer.last.patch.spacing,
                );
                let text = format!(
                    "the object does not fit {edge} voxels of {asked} mm: it was processed at {at:.3} mm"
                );
                warnings.insert(0, object.about(&text));
            }
            stages.begin(object.about("pasting back"));
            painted.add(&answer.last.field, at as u16 + 1);
            stages.end("paste");
            if let Some(path) = &self.probability {
                let path = file_of(path, at, asked.len());
                stages.begin(about(&path, "writing"));
                let last = &answer.last;
                let map = write_some_probability(&path, &image, |put| last.each_probability(put));
                outputs.push(map?);
                stages.end("write");
            }
            if let Some(path) = &self.preview {
                let path = file_of(path, at, asked.len());
                stages.begin(about(&path, "drawing"));
                let fields: Vec<_> = answer.all.iter().map(|p| &p.field).collect();
                let picture = preview::draw(&image, &fields, &Marks::of(&object.prompts));
                let fail = |e: String| Failure::Failed(format!("{}: {e}", path.display()));
                let pending = Pending::new(&path, ".png").map_err(|e| fail(e.to_string()))?;
                picture.put(&pending).map_err(fail)?;
                outputs.push(pending);
                stages.end("write");
            }
            // Answers before the last were only for the picture.
            answered.push(Answered { all: vec![], ..answer });
        }
        stages.begin(about(&self.output, "writing"));
        let named: Vec<_> = asked.iter().map(Asked::labelled).collect();
        let labels = match (painted.labels(), asked.iter().all(|object| object.name.is_none())) {
            (LabelValues::Bytes(mask), true) => write_mask(&self.output, &image, mask)?,
            (labels, _) => write_labels(&self.output, &image, labels, &named)?,
        };
        for pending in std::iter::once(labels).chain(outputs) {
            let path = pending.destination().display().to_string();
            pending.commit().map_err(|e| Failure::Failed(format!("{path}: {e}")))?;
        }
        stages.end("write");

        let name = |number: u16| asked[number as usize - 1].name.as_deref().unwrap_or(UNNAMED);
        for ([earlier, later], n) in painted.taken() {
            warnings.push(format!(
                "'{}' takes {n} voxels from '{}': where objects overlap, the later one wins",
                name(*later),
                name(*earlier)
            ));
        }
        let parts = painted.parts();
        for (object, part) in asked.iter().zip(&parts) {
            if part.voxels == 0 {
                warnings.push(object.about("the mask is empty"));
            }
        }
        let rounded = |s: f64| (s * 1e4).round() / 1e4;
        let ml = |voxels: usize| voxels as f64 * image.grid.voxel_ml();
        let voxels: usize = parts.iter().map(|p| p.voxels).sum();
        if !(self.json && quiet()) {
            stages.bar.suspend(|| warnings.iter().for_each(|w| warn(w)));
        }
        if self.json {
            let seconds: serde_json::Map<String, Value> =
                stages.done.iter().map(|(n, s)| (n.to_string(), json!(rounded(*s)))).collect();
            let patch = |p: &Prediction| json!({ "edge": p.patch.grid.size[0], "spacing_mm": p.patch.spacing, "coarsened": p.patch.coarsened });
            let objects = asked.iter().zip(&answered).zip(&parts).enumerate();
            let objects: Vec<Value> = objects
                .map(|(at, ((object, answer), part))| {
                    json!({
                        "name": object.name.as_deref().unwrap_or(UNNAMED), "label": at + 1, "colour": object.colour,
                        "voxels": part.voxels, "volume_ml": ml(part.voxels), "extent_mm": part.extent(image.grid.spacing()),
                        "score": answer.last.score, "notes": answer.notes, "seconds": rounded(answer.seconds),
                        "iterations": answer.steps, "patch": patch(&answer.last),
                    })
                })
                .collect();
            let overlaps: Vec<Value> = painted
                .taken()
                .iter()
                .map(|([earlier, later], n)| {
                    json!({ "object": name(*later), "takes_from": name(*earlier), "voxels": n })
                })
                .collect();
            let text = |path: &Path| path.display().to_string();
            let files = |path: &Option<PathBuf>| -> Vec<String> {
                let all = asked.len();
                let of =
                    |path: &PathBuf| (0..all).map(|at| text(&file_of(path, at, all))).collect();
                path.as_ref().map(of).unwrap_or_default()
            };
            let mut report = json!({
                "output": text(&self.output), "model": chosen.to_string(), "voxels": voxels, "volume_ml": ml(voxels), "seconds": seconds, "device": device.describe(),
                "scan": { "file": text(&self.image), "shape": image.grid.size, "spacing_mm": image.grid.spacing() },
                "outputs": { "mask": text(&self.output), "probability": files(&self.probability), "preview": files(&self.preview) },
                "objects": objects, "overlaps": overlaps,
                "intensity": {
                    "modality": intensities.modality, "decided": intensities.why(), "clip": normalization.clip, "mean": normalization.mean,
                    "sd": normalization.sd,
                },
                "bytes": { "packed_weights": model.packed_bytes(), "encoded_scan": scan.bytes() },
                "warnings": warnings,
            });
            // For a single object, the same messages as before several were supported.
            if let [answer] = &answered[..] {
                report["iterations"] = json!(answer.steps);
                report["patch"] = patch(&answer.last);
            }
            return Ok(pretty(&report));
        }
        let expected = |answer: &Answered| {
            answer.last.score.map_or(String::new(), |s| format!(", expected Dice {s:.2}"))
        };
        let times: Vec<String> = stages.done.iter().map(|(n, s)| format!("{n} {s:.2}")).collect();
        let held = format!("{voxels} voxels, {:.3} ml", ml(voxels));
        let mut text = match (&asked[..], &answered[..]) {
            ([Asked { name: None, .. }], [answer]) => {
                format!("{}: {held}{}\n", self.output.display(), expected(answer))
            }
            _ => format!("{}: {} objects, {held}\n", self.output.display(), asked.len()),
        };
        for (at, ((object, answer), part)) in asked
            .iter()
            .zip(&answered)
            .zip(&parts)
            .enumerate()
            .filter(|(_, ((o, ..), _))| o.name.is_some())
        {
            let size = part
                .extent(image.grid.spacing())
                .map_or(String::new(), |[i, j, k]| format!(", {i:.1} x {j:.1} x {k:.1} mm"));
            text += &format!(
                "{} {}: {} voxels, {:.3} ml{size}{}\n",
                at + 1,
                object.name.as_deref().unwrap_or(UNNAMED),
                part.voxels,
                ml(part.voxels),
                expected(answer)
            );
        }
        text += &format!("scan: {}\n", intensities.why());
        Ok(text + &format!("seconds: {} ({})\n", times.join(", "), device.describe()))
    }

    fn intensities(&self, image: &impl Voxels, model: Option<Intensity>) -> Intensities {
        let mut intensities = intensities(image, model);
        let given = match (self.clip, self.mean, self.sd) {
            (Some(clip), Some(mean), Some(sd)) => {
                Some((Normalization { clip, mean, sd }, "the given numbers".to_string()))
            }
            _ if self.percentiles => Some((
                Normalization::of_percentiles(image),
                "its own percentiles, as requested".to_string(),
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
