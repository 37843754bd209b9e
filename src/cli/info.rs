//! `prism info`.

use super::{DeviceArgs, Failure, print, warn};
use crate::device::Device;
use crate::input::{Input, Kind, recognise};
use crate::model::{Model, Weights};
#[cfg(feature = "dicom")]
use crate::volume::dicom;
use crate::volume::{Modality, Orientation, Volume};
use clap::Args;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Describe a model, an image or a device
///
/// Prints the network of a model file, or the size, geometry and values of an image. With --device,
/// prints the properties of that device.
#[derive(Args)]
pub struct Info {
    /// Model (.safetensors), image (NIfTI, NRRD, MetaImage), or a folder or zip of DICOM series
    #[arg(required_unless_present = "device")]
    file: Option<PathBuf>,
    /// Device to describe: cpu, cuda or cuda:N; with a model, also the memory that the model takes
    /// there
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Element type of feature maps on that device, if it is a CUDA device: it decides how much
    /// memory a model takes
    #[arg(long, default_value = "f32", value_name = "TYPE", requires = "device")]
    precision: super::Precision,
    /// Volume to read if the image has several, from 0
    #[arg(long, alias = "channel", value_name = "N")]
    volume: Option<usize>,
    /// DICOM series to read if there are several: its number (3.2 for a part of it), its UID, or a
    /// part of its description
    #[arg(long, value_name = "N|UID|TEXT")]
    series: Option<String>,
}

impl Info {
    pub fn run(&self) -> Result<(), Failure> {
        // A pipe can be read only once.
        let is_model = |file: &Path| {
            let by_content =
                || Input::open(file).is_ok_and(|f| recognise(f.head()) == Some(Kind::Safetensors));
            file.extension().is_some_and(|e| e == "safetensors") || file.is_file() && by_content()
        };
        if let Some(file) = &self.file {
            let text = match self.listed(file)? {
                Some(list) => list,
                None if is_model(file) => self.model(file)?,
                None => self.image(file)?,
            };
            print(&text)?;
        }
        if let Some(name) = &self.device {
            let device = DeviceArgs {
                device: Some(name.clone()),
                precision: Some(self.precision),
                threads: None,
            }
            .open()?;
            let mut text = format!("device       {name}\n");
            for (name, value) in device.details() {
                writeln!(text, "{name:<12} {value}")?;
            }
            if let Some(file) = self.file.as_deref().filter(|f| is_model(f))
                && let Device::Cuda(cuda) = &device
            {
                let weights = Weights::open(file)?;
                let model = Model::new(&device, &weights)?;
                model.warm_up()?;
                let [held, most] = cuda.held().map(|b| b as f64 / 1e6);
                let working = model.planned_bytes() as f64 / 1e6;
                writeln!(
                    text,
                    "{:<12} {held:.0} MB with one scan encoded, {working:.0} of it working memory; {most:.0} MB while loading",
                    "taken"
                )?;
            }
            print(&text)?;
        }
        Ok(())
    }

    fn model(&self, file: &Path) -> Result<String, Failure> {
        let weights = Weights::open(file)?;
        let config = &weights.config;
        let mut text = format!("model        {}\n", file.display());
        let mut line = |name: &str, value: String| writeln!(text, "{name:<12} {value}");
        line("parameters", format!("{} ({})", weights.parameters(), weights.dtype.to_lowercase()))?;
        line("patch", format!("{0} x {0} x {0} voxels at {1} mm", config.patch, config.spacing))?;
        line("encoder", format!("{:?}", config.encoder).to_lowercase())?;
        line("channels", format!("{:?}", config.channels))?;
        if config.has_vit() {
            line(
                "transformer",
                format!(
                    "{} blocks of width {}, {} heads, windows of {}",
                    config.vit_depth, config.vit_width, config.vit_heads, config.window
                ),
            )?;
        }
        let choice = if config.confidence {
            "the best score is chosen"
        } else {
            "without confidence, the single mask is used"
        };
        line("candidates", format!("{}, {choice}", config.candidates))?;
        line(
            "refiner",
            if config.corrective {
                format!("width {}", config.refine_width)
            } else {
                "none".into()
            },
        )?;
        let intensity = config
            .intensity
            .map(|i| format!("clip {} to {}, mean {}, sd {}", i.clip[0], i.clip[1], i.mean, i.sd));
        line(
            "intensity",
            intensity
                .unwrap_or("not recorded: give --preset or --clip, or use --percentiles".into()),
        )?;
        Ok(text)
    }

    /// The series of a folder or a zip archive, if none was selected and there are several.
    #[cfg(feature = "dicom")]
    fn listed(&self, path: &Path) -> Result<Option<String>, Failure> {
        let is_archive = || {
            let zip = |f: Input| f.head().starts_with(b"PK\x03\x04");
            path.is_file() && Input::open(path).is_ok_and(zip)
        };
        let checkpoint = || path.extension().is_some_and(|e| e != "zip");
        if self.series.is_some() || !path.is_dir() && (checkpoint() || !is_archive()) {
            return Ok(None);
        }
        let (series, warnings) = dicom::list(path)?;
        if series.len() < 2 {
            return Ok(None);
        }
        warnings.iter().for_each(|w| warn(w));
        let mut text = format!("folder       {}\n", path.display());
        writeln!(text, "{:<12} {}; --series describes one", "series", series.len())?;
        for one in series {
            writeln!(text, "  {one}")?;
        }
        Ok(Some(text))
    }

    /// This build does not read DICOM.
    #[cfg(not(feature = "dicom"))]
    fn listed(&self, _path: &Path) -> Result<Option<String>, Failure> {
        Ok(None)
    }

    fn image(&self, file: &Path) -> Result<String, Failure> {
        let image = Volume::read_series(file, self.series.as_deref(), self.volume)?;
        image.warnings.iter().for_each(|w| warn(w));
        let (grid, d) = (&image.grid, &image.description);
        let mut text = format!("image        {}\n", file.display());
        let mut line = |name: &str, value: String| writeln!(text, "{name:<12} {value}");
        line("format", format!("{}, {}, {} volume(s)", d.format, d.element, d.volumes))?;
        line("size", format!("{} x {} x {} voxels", grid.size[0], grid.size[1], grid.size[2]))?;
        let s = grid.spacing();
        line("spacing", format!("{:.4} x {:.4} x {:.4} mm", s[0], s[1], s[2]))?;
        let hand = if grid.affine.determinant() < 0.0 { ", left-handed" } else { "" };
        line(
            "axes",
            format!(
                "{}{hand}, affine from {}",
                Orientation::of(&grid.affine).letters(),
                d.affine_from
            ),
        )?;
        for (r, row) in grid.affine.0.iter().enumerate() {
            let name = if r == 0 { "affine" } else { "" };
            line(
                name,
                format!("{:>11.5} {:>11.5} {:>11.5} {:>11.4}", row[0], row[1], row[2], row[3]),
            )?;
        }
        let (mut sum, [low, high]) = (0.0, image.range());
        image.array().each(|v| sum += v as f64);
        let mean = sum / grid.voxels() as f64;
        line("values", format!("{low} to {high}, mean {mean:.4}"))?;
        match d.modality {
            Some(modality) => line("modality", format!("{}, from the file", modality.name()))?,
            None => {
                let (modality, why) = Modality::of(&image);
                line("modality", format!("looks like {}: {why}", modality.name()))?;
            }
        }
        Ok(text)
    }
}
