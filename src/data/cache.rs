//! Cases resampled once and kept on disk, so that a large dataset is not decoded and resampled
//! every time it is drawn from.
//!
//! An entry is one safetensors file: the scan on the canonical grid at the model's spacing, its
//! label on the same grid, the grid, and what was odd about the case's files. Its name contains a
//! hash of these files (path, size, time of change), of the spacing and of the target label: a
//! changed case is another entry.

use super::cases::{Case, DataError, Loaded, TargetLabel};
use super::sample::label_on;
use crate::checksum;
use crate::input::{MOST_HEADER, room_for_header};
use crate::memory;
use crate::output::write_tensors;
use crate::volume::resample::{linear, resample, respaced};
use crate::volume::{Affine, Description, Grid, Modality, Volume};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

/// A folder of resampled cases.
pub struct Cache {
    folder: PathBuf,
    spacing: f64,
    target: TargetLabel,
}

const KEY: &str = "prism.case";
/// The name of an entry in refusals of memory.
const ENTRY: &str = "a case in the cache";

/// The metadata of an entry. One that lacks a part, of an earlier version, is made again.
#[derive(Serialize, Deserialize)]
struct About {
    affine: [[f64; 4]; 3],
    whole: bool,
    modality: Option<Modality>,
    warnings: Vec<String>,
}

impl Cache {
    /// A cache of entries in `folder`, at `spacing` mm, with labels of `target`.
    pub fn new(folder: &Path, spacing: f64, target: TargetLabel) -> Cache {
        Cache { folder: folder.into(), spacing, target }
    }

    fn entry(&self, case: &Case) -> Option<PathBuf> {
        let mut hasher = DefaultHasher::new();
        (
            self.spacing.to_bits(),
            format!("{:?}", self.target),
            case.volume,
            format!("{:?}", case.modality),
        )
            .hash(&mut hasher);
        for file in [&case.image, &case.label] {
            let meta = std::fs::metadata(file).ok()?;
            (file.canonicalize().ok()?, meta.len(), meta.modified().ok()?).hash(&mut hasher);
        }
        let plain: String = case
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' })
            .collect();
        Some(self.folder.join(format!("{plain}-{:016x}.safetensors", hasher.finish())))
    }

    /// The entry of a case, if it exists and is intact.
    pub fn get(&self, case: &Case) -> Option<Loaded> {
        let bytes = memory::read_file(ENTRY, &self.entry(case)?).ok()?;
        room_for_header(ENTRY, &bytes, MOST_HEADER).ok()?.ok()?;
        let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
        let (text, hash) = checksum::opened(header.metadata().as_ref()?.get(KEY)?);
        let About { affine: rows, whole, modality, warnings } = serde_json::from_str(&text).ok()?;
        let file = SafeTensors::deserialize(&bytes).ok()?;
        checksum::check(&text, hash?, checksum::of_tensors(&file)).ok()?;
        let (image, label) = (file.tensor("image").ok()?, file.tensor("label").ok()?);
        let size = <[usize; 3]>::try_from(image.shape())
            .ok()
            .filter(|_| image.dtype() == Dtype::F32 && label.shape() == image.shape())?;
        let grid = Grid { size, affine: Affine(rows) };
        let description =
            Description::of_new(&grid, if whole { "int16" } else { "float32" }).made_by(modality);
        let mut data = memory::zeroed::<f32>(ENTRY, image.data().len() / 4);
        bytemuck::cast_slice_mut(&mut data).copy_from_slice(image.data());
        let image = Volume::new(grid, data, description).ok()?;
        Some(Loaded { image, mask: memory::copied(ENTRY, label.data()), warnings })
    }

    /// Resamples a case and keeps it. An entry that cannot be written is only not kept.
    ///
    /// # Errors
    /// There is no memory for the case at this spacing, or it is too large a grid for a scan; the
    /// error names its scan.
    pub fn put(&self, case: &Case, loaded: Loaded) -> Result<Loaded, DataError> {
        let Loaded { image, mask, warnings } = loaded;
        let fail = |e: &dyn std::fmt::Display| {
            DataError::new(&case.image, format!("resampled at {} mm: {e}", self.spacing))
        };
        let resampled = memory::caught(|| self.resampled(&image, &mask));
        let resampled = resampled.map_err(|e| fail(&e).for_lack_of_memory(true))?;
        let (volume, mask) = resampled.map_err(|e| fail(&e))?;
        let resampled = Loaded { image: volume, mask, warnings };
        if let Some(path) = self.entry(case) {
            let whole = image.description.whole;
            let _ = memory::caught(|| self.write(&path, &resampled, whole));
        }
        Ok(resampled)
    }

    /// A case at this spacing.
    fn resampled(&self, image: &Volume, label: &[u8]) -> Result<(Volume, Vec<u8>), String> {
        let grid = respaced(&image.grid.canonical(), self.spacing);
        let whole = image.description.whole;
        let data = resample(&image.values(), &image.grid, &grid, linear(whole), image.range()[0]);
        let label = label_on(&grid, label, &image.grid);
        let modality = image.description.modality;
        let description =
            Description::of_new(&grid, if whole { "int16" } else { "float32" }).made_by(modality);
        Ok((Volume::new(grid, data, description)?, label))
    }

    fn write(&self, path: &Path, case: &Loaded, whole: bool) -> std::io::Result<()> {
        let Loaded { image, mask, warnings } = case;
        std::fs::create_dir_all(&self.folder)?;
        let other = |e: safetensors::SafeTensorError| std::io::Error::other(e.to_string());
        let shape = image.grid.size.to_vec();
        let values = image.values();
        let views = vec![
            (
                "image".to_string(),
                TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(&values))
                    .map_err(other)?,
            ),
            ("label".to_string(), TensorView::new(Dtype::U8, shape, mask).map_err(other)?),
        ];
        let about = About {
            affine: image.grid.affine.0,
            whole,
            modality: image.description.modality,
            warnings: warnings.clone(),
        };
        let hashes =
            views.iter().map(|(name, view)| (name.as_str(), checksum::of_bytes(view.data())));
        let about = checksum::sealed(&serde_json::to_string(&about)?, hashes);
        write_tensors(path, KEY, about, views)
    }
}
