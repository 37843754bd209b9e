//! A scan that somebody sent, ready to be worked on.

use super::failure::Failure;
use crate::memory::Charge;
use crate::model::Model;
use crate::session::{Options, Scan, intensities};
use crate::volume::{Modality, Volume};
use std::sync::Arc;

/// A scan with the network.
pub struct Opened {
    pub image: Arc<Volume>,
    pub scan: Arc<Scan>,
    pub modality: Modality,
    /// What was odd about it, and what it was taken for.
    pub notes: Vec<String>,
    _charge: Charge,
}

impl Opened {
    /// Decides how its values are understood. The network looks at it when something is said of it.
    pub fn new(model: &Arc<Model>, image: Volume, options: Options) -> Result<Opened, Failure> {
        let charge = Charge::of::<u8>("a scan", image.array().bytes())?;
        let decided = intensities(&image, model.config().intensity);
        let mut notes = image.warnings.clone();
        notes.extend(decided.warning.iter().cloned());
        notes.push(decided.why());
        let image = Arc::new(image);
        let scan = Scan::new(model, image.clone(), decided.normalization, options);
        Ok(Opened {
            image,
            scan: Arc::new(scan),
            modality: decided.modality,
            notes,
            _charge: charge,
        })
    }
}
