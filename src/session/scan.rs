//! A scan and what was encoded of it: patches, kept within a given memory, shared by all objects on
//! it.

use super::SessionError;
use super::encodings::{Coming, EncodedPatch, Encodings};
use crate::device::CudaError;
use crate::memory::{self, Charge};
use crate::model::{Config, Intensity, Model, Observer, Part};
use crate::tensor::{OpError, Tensor};
use crate::volume::intensity::Normalization;
use crate::volume::patch::{Beyond, Extent, Patch};
use crate::volume::{Grid, Modality, Voxels};
use std::sync::Arc;
use std::time::Instant;

/// Bytes of encoded patches that a scan keeps by default: a dozen of the released network's,
/// hundreds of the small one's.
pub const MEMORY: usize = 2 << 30;

/// The default number of interactions that can be undone.
pub const UNDO_STEPS: usize = 1000;
/// Bytes of undo history by default: about a hundred interactions of the released network, a
/// thousand of the small one's.
pub const UNDO_BYTES: usize = 1 << 30;

/// An image that patches are cut from, wherever its voxels are.
///
/// Everything that implements [`Voxels`] and is `Send` is one: a [`Volume`](crate::Volume), a
/// [`View`](crate::volume::View) of the caller's array, a [`Part`](crate::volume::begun::Part) of a
/// scan that is being read.
pub trait Image: Send + Sync {
    /// The image's grid: its size and its place in the world.
    fn place(&self) -> &Grid;
    /// The image on the patch's grid, `[i][j][k]`, normalised: the network's input. `beyond` says
    /// what is beyond the image's border. See [`Patch::extract`].
    fn cut(&self, patch: &Patch, normalization: &Normalization, beyond: Beyond) -> Vec<f32>;
}

impl<V: Voxels + Send> Image for V {
    fn place(&self) -> &Grid {
        self.grid()
    }
    fn cut(&self, patch: &Patch, normalization: &Normalization, beyond: Beyond) -> Vec<f32> {
        patch.extract(self, normalization, beyond)
    }
}

/// The spacing in mm at which a patch of `edge` voxels is `fit` times as long as the longest side
/// of an extent.
pub fn fitted_spacing(extent: &Extent, grid: &Grid, edge: usize, fit: f64) -> f64 {
    let step = grid.spacing();
    let longest = (0..3).map(|a| (extent.high[a] - extent.low[a]) * step[a]).fold(0.0, f64::max);
    longest * fit / edge as f64
}

/// The spacing in mm at which a model looks at a scan: fitted to a box if there is one and the
/// model fits objects ([`Config::fit`]), otherwise the model's own.
pub fn working_spacing(config: &Config, grid: &Grid, bounds: Option<&Extent>) -> f64 {
    match (config.fit, bounds) {
        (Some(fit), Some(bounds)) => fitted_spacing(bounds, grid, config.patch, fit as f64),
        _ => config.spacing as f64,
    }
}

/// How a scan's values become the network's input, and how that was decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Intensities {
    /// The clip range, mean and standard deviation.
    pub normalization: Normalization,
    /// What kind of scan it is taken to be.
    pub modality: Modality,
    /// The reason, as text for people.
    pub seen: String,
    /// Where the numbers are from, as text for people.
    pub by: String,
    /// What is wrong with the values, as text for people, if anything is.
    pub warning: Option<String>,
}

/// Decides how a scan's values are normalised for a model, with the reasons.
///
/// `intensity` is the model's ([`Config::intensity`]): the statistics of its training data are used
/// if they [apply](Intensity::applies_to) to a scan of that modality, otherwise the scan's own
/// percentiles ([`Normalization::of_percentiles`]). The modality is the scan's
/// ([`Voxels::modality`]) or, if that is unknown, what the distribution of its values suggests
/// ([`Modality::of`]). Reads the values a few times.
pub fn intensities(image: &impl Voxels, intensity: Option<Intensity>) -> Intensities {
    intensities_of(image, image.modality(), intensity)
}

/// Decides as [`intensities`] does, for a scan of the given modality. If it is None, the
/// distribution of the scan's values determines it, whatever the scan's file said.
pub fn intensities_of(
    image: &impl Voxels,
    modality: Option<Modality>,
    intensity: Option<Intensity>,
) -> Intensities {
    let (modality, seen) = match modality {
        Some(modality) => (modality, "as given".to_string()),
        None => Modality::of(image),
    };
    let (normalization, by) = match intensity {
        Some(i) if i.applies_to(modality) => {
            (Normalization { clip: i.clip, mean: i.mean, sd: i.sd }, "the model's statistics")
        }
        Some(_) => (
            Normalization::of_percentiles(image),
            "its own percentiles, because its values are not Hounsfield units",
        ),
        None => (
            Normalization::of_percentiles(image),
            "its own percentiles, because the model records no statistics",
        ),
    };
    let range = image.array().range().filter(|[low, high]| low == high);
    let warning = range.map(|[low, _]| format!("every voxel is {low}: the scan is empty"));
    Intensities { normalization, modality, seen, by: by.into(), warning }
}

impl Intensities {
    /// The decision, as a sentence.
    pub fn why(&self) -> String {
        format!("treated as {} ({}), normalised by {}", self.modality.name(), self.seen, self.by)
    }
}

/// The normalisation of a scan's values for a model, as [`intensities`] decides it, without the
/// reasons. `intensity` is [`Config::intensity`] of the model. For [`Scan::new`].
pub fn normalization(image: &impl Voxels, intensity: Option<Intensity>) -> Normalization {
    intensities(image, intensity).normalization
}

/// Options of the sessions on a scan. The default is right for most programs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// The spacing in mm at which the network looks first. None, the default: the model's own
    /// choice.
    pub spacing: Option<f64>,
    /// Whether answers are the network's alone, as the paper runs it: one patch, the prompts of the
    /// last interaction, and no promise that they are obeyed. By default the session keeps its
    /// [contract](crate::session#the-contract).
    pub released: bool,
    /// The most bytes of encoded patches that are kept, and never more than half of the memory
    /// budget; [`MEMORY`] by default. Ignored if scans [share](Scan::sharing) the cache.
    pub memory: usize,
    /// The most interactions that can be undone, [`UNDO_STEPS`] by default; the oldest are
    /// forgotten.
    pub undo_steps: usize,
    /// The most bytes that the undo histories of all sessions on the scan may take, and never more
    /// than a quarter of the memory budget; [`UNDO_BYTES`] by default. Each session has an equal
    /// share. The last interaction can be undone whatever it takes.
    pub undo_bytes: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            spacing: None,
            released: false,
            memory: MEMORY,
            undo_steps: UNDO_STEPS,
            undo_bytes: UNDO_BYTES,
        }
    }
}

/// A scan to work on: an image, the network, and the patches of it that were encoded.
///
/// Any number of sessions and threads may share one. Its encoded patches are dropped with it.
pub struct Scan {
    model: Arc<Model>,
    image: Arc<dyn Image>,
    normalization: Normalization,
    options: Options,
    /// The store of its encoded patches, and its number there.
    encodings: Arc<Encodings>,
    number: u64,
    /// A handle that each session on it has a copy of, so that they can be counted.
    sessions: Arc<()>,
}

impl Scan {
    /// A scan of which nothing is encoded yet.
    ///
    /// `normalization` turns the image's values into the network's input. The function
    /// [`normalization`] gives the one that fits the model.
    pub fn new(
        model: &Arc<Model>,
        image: Arc<dyn Image>,
        normalization: Normalization,
        options: Options,
    ) -> Scan {
        let encodings = Arc::new(Encodings::new(options.memory));
        Scan::sharing(model, image, normalization, options, &encodings)
    }

    /// A scan whose encoded patches are kept in a cache that several scans share, in place of one
    /// of [`Options::memory`] bytes.
    pub fn sharing(
        model: &Arc<Model>,
        image: Arc<dyn Image>,
        normalization: Normalization,
        options: Options,
        encodings: &Arc<Encodings>,
    ) -> Scan {
        let (model, encodings, number) = (model.clone(), encodings.clone(), encodings.next());
        Scan { model, image, normalization, options, encodings, number, sessions: Arc::new(()) }
    }

    /// The scan with its image replaced, for example by the whole of which it was a
    /// [part](crate::volume::begun::Part) so far. What was encoded stays, so the values must be the
    /// same where both images have them. None if the image has another grid or `normalization` is
    /// not the scan's.
    pub fn showing(mut self, image: Arc<dyn Image>, normalization: &Normalization) -> Option<Scan> {
        let alike = image.place() == self.grid() && *normalization == self.normalization;
        self.image = image;
        alike.then_some(self)
    }

    /// The network.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The scan's own grid.
    pub fn grid(&self) -> &Grid {
        self.image.place()
    }

    /// The options that it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// A handle of a session on it, which the session keeps.
    pub(super) fn joined(&self) -> Arc<()> {
        self.sessions.clone()
    }

    /// The number of sessions on it.
    pub(super) fn sessions(&self) -> usize {
        Arc::strong_count(&self.sessions) - 1
    }

    /// Bytes of its encoded patches that are kept.
    pub fn bytes(&self) -> usize {
        self.encodings.bytes(self.number)
    }

    /// Drops encoded patches because memory was refused that they take: half of them the first
    /// time, all the second. False if they would not help, and after that: then the refusal stands.
    pub(super) fn makes_room(&self, refusal: &SessionError, attempt: usize) -> bool {
        let would_help = match refusal {
            SessionError::Memory(refused) => refused.fits_with(self.encodings.held()),
            // A device's, where they are: what its driver keeps of what was freed is not known.
            _ => true,
        };
        let went = would_help
            && match attempt {
                0 => self.encodings.halve(),
                1 => self.encodings.clear(),
                _ => false,
            };
        if went {
            memory::give_back_spare();
        }
        went
    }

    /// The network's input on a patch.
    pub(super) fn input(&self, patch: &Patch) -> Vec<f32> {
        let beyond = if self.options.released { Beyond::Zero } else { Beyond::Edge };
        self.model.device().cpu().run(|| self.image.cut(patch, &self.normalization, beyond))
    }

    /// A patch, encoded now or taken from the cache, and whether it was encoded now. The time that
    /// encoding took is in [`EncodedPatch::seconds`] in either case.
    ///
    /// # Errors
    /// Memory is refused, the device fails, or the observer cancels it.
    pub fn encoded(
        &self,
        patch: &Patch,
        observer: &mut Observer,
    ) -> Result<(Arc<EncodedPatch>, bool), SessionError> {
        // Wait for a patch that is half done: starting over would take longer.
        while let Some(coming) = self.encodings.awaited(self.number, patch)
            && observer.elsewhere(&|| coming.is_over())?
        {}
        match self.encodings.get(self.number, patch) {
            Some(found) => {
                observer.skip(self.model.steps()[0]);
                Ok((found, false))
            }
            None => {
                let encoded = self.encode(patch, true, observer)?;
                self.encodings.keep(self.number, &encoded, true);
                observer.keep(self.model.steps()[0]);
                Ok((encoded, true))
            }
        }
    }

    /// Encodes a patch that has not been asked for; false if that is not useful.
    pub(super) fn encode_ahead(
        &self,
        patch: &Patch,
        coming: &Arc<Coming>,
        observer: &mut Observer,
    ) -> Result<bool, SessionError> {
        observer.begin(Part::Encoding)?;
        let Some(_announced) = self.encodings.announce(self.number, patch, coming) else {
            return Ok(false);
        };
        let encoded = self.encode(patch, false, observer)?;
        self.encodings.keep(self.number, &encoded, coming.is_awaited());
        Ok(true)
    }

    /// Encodes a patch; others may be dropped for it if a device has too little memory.
    fn encode(
        &self,
        patch: &Patch,
        may_drop: bool,
        observer: &mut Observer,
    ) -> Result<Arc<EncodedPatch>, SessionError> {
        observer.begin(Part::Encoding)?;
        let start = Instant::now();
        let edge = self.model.config().patch;
        let values = self.input(patch);
        let cut = Instant::now();
        let charge = Charge::of::<f32>("a patch", values.len())?;
        let input = Tensor::new([edge; 3], values);
        let done = observer.done();
        let features = match self.model.encode(&input, observer) {
            // Kept patches are on the device, which others use, too: some of them make room.
            Err(OpError::Cuda(CudaError::Memory { .. })) if may_drop && self.encodings.halve() => {
                observer.again(done);
                self.model.encode(&input, observer)
            }
            encoded => encoded,
        }?;
        let seconds = [cut - start, cut.elapsed()];
        Ok(Arc::new(EncodedPatch {
            patch: patch.clone(),
            input,
            features,
            _charge: charge,
            seconds,
        }))
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        self.encodings.forget(self.number);
    }
}
