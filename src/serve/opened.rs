//! A scan that a client sent, ready to be worked on.

use super::failure::Failure;
use crate::memory::Charge;
use crate::model::Model;
use crate::session::{Ahead, Encodings, Interest, Options, Scan, intensities};
use crate::volume::{Modality, Volume};
use std::sync::Arc;

/// Voxels around a click that its mark covers: a click this far outside the image still counts.
const BALL: f64 = 4.0;

/// What scans are worked on with.
#[derive(Clone, Copy)]
pub struct Engine<'a> {
    pub model: &'a Arc<Model>,
    pub options: Options,
    /// The store of all their encodings.
    pub encodings: &'a Arc<Encodings>,
}

/// A scan with the network.
pub struct Opened {
    pub image: Arc<Volume>,
    pub scan: Arc<Scan>,
    pub modality: Modality,
    /// What was odd about it, and what it was taken to be.
    pub notes: Vec<String>,
    /// The interest in what is encoded ahead.
    interest: Option<Interest>,
    _charge: Charge,
}

impl Opened {
    /// Decides how its values are interpreted. The network looks at it when a prompt is given, or
    /// as [`Opened::ahead`] says.
    pub fn new(engine: Engine, image: Volume) -> Result<Opened, Failure> {
        let Engine { model, options, encodings } = engine;
        let charge = Charge::of::<u8>("a scan", image.array().bytes())?;
        let decided = intensities(&image, model.config().intensity);
        let mut notes = image.warnings.clone();
        notes.extend(decided.warning.iter().cloned());
        notes.push(decided.why());
        let image = Arc::new(image);
        let scan = Scan::sharing(model, image.clone(), decided.normalization, options, encodings);
        Ok(Opened {
            image,
            scan: Arc::new(scan),
            modality: decided.modality,
            notes,
            interest: None,
            _charge: charge,
        })
    }

    /// The patch with which first clicks are looked at wherever they are: to be encoded when the
    /// scan has arrived, before any prompt is given.
    pub fn ahead(&mut self) -> Option<Ahead> {
        let (ahead, interest) = self.scan.ahead()?;
        self.interest = Some(interest);
        Some(ahead)
    }

    /// The voxel that a position means, `[i, j, k]`: rounded, halves to even. A position just
    /// outside the image means the nearest voxel in it, one further off none.
    pub fn voxel(&self, at: [f64; 3]) -> Option<[usize; 3]> {
        let (at, size) = (at.map(f64::round_ties_even), self.image.grid.size);
        let near = |a: usize| at[a] >= -BALL && at[a] <= size[a] as f64 - 1.0 + BALL;
        let voxel = |a: usize| at[a].clamp(0.0, size[a] as f64 - 1.0) as usize;
        (0..3).all(near).then(|| std::array::from_fn(voxel))
    }
}
