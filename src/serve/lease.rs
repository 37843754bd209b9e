//! What a client of nnInteractive works on: an image, the buffer that mirrors the answer, and what
//! was said of the object so far. One of ITK-SNAP's has no buffer, and is shown all each time.
//!
//! Arrays and coordinates are `[k, j, i]` on the wire, `[i, j, k]` here. What the client was shown
//! is remembered, so that an answer carries what differs from that and no more. An undo goes back
//! as far as the session's history does; an initial mask, which begins a new session on the same
//! scan, is one step of it.

use super::answer::{Shown, change, whole};
use super::failure::{Failure, unless_left};
use super::opened::Opened;
use super::wire::{Array, Dtype, pack};
use crate::model::Model;
use crate::prompt::{Area, Dense, Prompts};
use crate::session::{Options, Session};
use crate::volume::{Affine, Description, Grid, Volume, reorder};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Points that a box off the object becomes, along an axis.
const LATTICE: usize = 10;
/// Voxels of a scribble, at most.
const MOST_PAINTED: usize = 200_000;
/// Interactions that wait for a prediction, at most.
const MOST_QUEUED: usize = 256;
/// Initial masks that can be undone, at most.
const MOST_LAYERS: usize = 8;

/// What is said where there is nothing to say anything of.
const NO_IMAGE: &str = "no image was sent yet: set_image, or upload_raw, comes first";

/// A client's work.
#[derive(Default)]
pub struct Lease(Mutex<State>);

/// What a client's calls change.
#[derive(Default)]
pub struct State {
    image: Option<Image>,
    buffer: Option<Buffer>,
}

/// The buffer that a client keeps the answer in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// `[k, j, i]`.
    pub shape: [usize; 3],
    pub dtype: Dtype,
}

struct Image {
    opened: Opened,
    /// Sessions, each begun by an initial mask but for the first; the last is at work.
    layers: Vec<Layer>,
    shown: Shown,
}

/// A session and what was said beside it.
struct Layer {
    session: Session,
    /// Interactions that began it, which are undone with it.
    base: usize,
    /// What was said and not predicted yet.
    queued: Vec<Prompts>,
}

/// What is answered to an interaction.
pub struct Outcome {
    /// Whether there was a prediction, or something to undo.
    pub ran: bool,
    /// What changed in the buffer: the region `[[k0, k1], [j0, j1], [i0, i1]]`, the type of its
    /// elements, and the message that holds them.
    pub update: Option<Update>,
}

/// A part of the buffer.
pub struct Update {
    pub region: [[usize; 2]; 3],
    pub dtype: Dtype,
    pub message: Vec<u8>,
}

impl Outcome {
    fn unchanged(ran: bool) -> Outcome {
        Outcome { ran, update: None }
    }
}

impl Lease {
    /// What is worked on. What a panic left is whole: a session changes when an interaction has
    /// come to its end.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same where nobody is at work with it.
    pub fn idle(&self) -> Option<MutexGuard<'_, State>> {
        match self.0.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(state)) => Some(state.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// An array `[c, k, j, i]` as a scan: of several channels the first. The message says how far apart
/// voxels are and not where they lie: they are taken to run to the left, to the back and to the
/// head, as those of DICOM do.
pub fn scan_of(mut array: Array, spacing: [f64; 3]) -> Result<Volume, Failure> {
    let [_, nk, nj, ni] = array.shape[..] else {
        return Err(Failure::bad(format!(
            "expected a 4d image as input, got {}d. Shape {:?}",
            array.shape.len(),
            array.shape
        )));
    };
    array.bytes.truncate(nk * nj * ni * array.dtype.size());
    let [dk, dj, di] = spacing;
    let affine = Affine([[-di, 0.0, 0.0, 0.0], [0.0, -dj, 0.0, 0.0], [0.0, 0.0, dk, 0.0]]);
    let grid = Grid { size: [ni, nj, nk], affine };
    let (element, bytes) = array.into_scan();
    Volume::of_elements(grid, element, bytes, Description::of_new(&grid, element.name()))
        .map_err(Failure::bad)
}

impl State {
    /// Begins with an image: the buffer and all that was said are gone.
    pub fn set_image(
        &mut self,
        model: &Arc<Model>,
        image: Volume,
        options: Options,
    ) -> Result<(), Failure> {
        // Its memory is given back before the next one's is asked for.
        *self = State::default();
        let opened = Opened::new(model, image, options)?;
        let layers = vec![Layer::new(Session::new(&opened.scan))];
        self.image = Some(Image { opened, layers, shown: None });
        Ok(())
    }

    /// Sets the buffer, which is empty.
    pub fn set_buffer(&mut self, buffer: Buffer) -> Result<(), Failure> {
        if let Some(image) = &mut self.image {
            let shape = image.shape();
            if shape != buffer.shape {
                return Err(Failure::bad(format!(
                    "a target buffer of shape {:?}: the image has {shape:?}",
                    buffer.shape
                )));
            }
            image.shown = None;
        }
        self.buffer = Some(buffer);
        Ok(())
    }

    /// Forgets what was said.
    pub fn reset(&mut self) {
        if let Some(image) = &mut self.image {
            image.layers = vec![Layer::new(Session::new(&image.opened.scan))];
            image.shown = None;
        }
    }

    /// The image that interactions speak of.
    fn image(&mut self) -> Result<&mut Image, Failure> {
        let image = self.image.as_mut().ok_or_else(|| Failure::bad(NO_IMAGE))?;
        match image.opened.image.range() {
            [0.0, 0.0] => Err(Failure::bad(
                "Input image is entirely zero; cannot determine normalization statistics.",
            )),
            _ => Ok(image),
        }
    }

    /// A point, which counts for the voxel that it means, if any.
    pub fn point(
        &mut self,
        at: [f64; 3],
        positive: bool,
        run: bool,
        left: &AtomicBool,
    ) -> Result<Outcome, Failure> {
        let mut prompts = Prompts::default();
        if let Some(voxel) = self.image()?.opened.voxel([at[2], at[1], at[0]]) {
            prompts.points.push((voxel, positive));
        }
        self.say(prompts, run, left)
    }

    /// A box, its ends exclusive, cut off at the image's faces.
    pub fn bounds(
        &mut self,
        bounds: [[f64; 2]; 3],
        positive: bool,
        run: bool,
        left: &AtomicBool,
    ) -> Result<Outcome, Failure> {
        if bounds.iter().any(|[low, high]| low == high) {
            return Err(Failure::bad(format!(
                "Given bounding box size is zero in at least one dimension: {bounds:?}"
            )));
        }
        let size = self.image()?.size();
        let side = |a: usize| {
            let [low, high] = bounds[2 - a].map(f64::round_ties_even);
            let (low, high) = (low.min(high), low.max(high));
            let low = low.clamp(0.0, size[a] as f64 - 1.0) as usize;
            (low, (high.clamp(0.0, size[a] as f64) as usize).max(low + 1))
        };
        let [(i0, i1), (j0, j1), (k0, k1)] = [side(0), side(1), side(2)];
        let mut prompts = Prompts::default();
        match positive {
            true => prompts.bounds = Some([i0, j0, k0, i1, j1, k1]),
            // There is no box off the object: what lies in it does not lie on it.
            false => {
                let along = |low: usize, high: usize| {
                    let count = (high - low).min(LATTICE);
                    (0..count).map(move |n| low + (2 * n + 1) * (high - low) / (2 * count))
                };
                for (i, j) in along(i0, i1).flat_map(|i| along(j0, j1).map(move |j| (i, j))) {
                    prompts.points.extend(along(k0, k1).map(|k| ([i, j, k], false)));
                }
            }
        }
        self.say(prompts, run, left)
    }

    /// Voxels that were painted, all of them on the object or off it.
    pub fn scribble(
        &mut self,
        mask: &Array,
        place: Option<[[f64; 2]; 3]>,
        positive: bool,
        run: bool,
        left: &AtomicBool,
    ) -> Result<Outcome, Failure> {
        let area = self.area(mask, place)?;
        let painted = area.marked.iter().filter(|m| **m != 0).count();
        if painted > MOST_PAINTED {
            return Err(Failure::bad(format!(
                "a scribble of {painted} voxels: at most {MOST_PAINTED} are taken"
            )));
        }
        let mut prompts = Prompts::default();
        let [_, nj, nk] = area.size;
        for (at, _) in area.marked.iter().enumerate().filter(|(_, m)| **m != 0) {
            let within = [at / nk / nj, at / nk % nj, at % nk];
            let voxel = std::array::from_fn(|a| area.low[a] + within[a]);
            prompts.points.push((voxel, positive));
        }
        self.say(prompts, run, left)
    }

    /// An area that was outlined.
    pub fn lasso(
        &mut self,
        mask: &Array,
        place: Option<[[f64; 2]; 3]>,
        positive: bool,
        run: bool,
        left: &AtomicBool,
    ) -> Result<Outcome, Failure> {
        let area = self.area(mask, place)?;
        let mut prompts = Prompts::default();
        if area.marked.iter().any(|m| *m != 0) {
            prompts.add_area(&area, positive).map_err(|e| Failure::bad(e.to_string()))?;
        }
        self.say(prompts, run, left)
    }

    /// A painted crop of the image, or all of it.
    fn area(&mut self, mask: &Array, place: Option<[[f64; 2]; 3]>) -> Result<Area, Failure> {
        let size = self.image()?.size();
        let whole = [2, 1, 0].map(|a| [0.0, size[a] as f64]);
        let place = place.unwrap_or(whole);
        if place.iter().any(|[low, high]| low >= high) {
            return Err(Failure::bad("each dimension of interaction_bbox must have positive size"));
        }
        let inside = |a: usize| {
            let [low, high] = place[2 - a];
            low >= 0.0 && high <= size[a] as f64 && low.fract() == 0.0 && high.fract() == 0.0
        };
        if !(0..3).all(inside) {
            return Err(Failure::bad(format!(
                "interaction_bbox {place:?} exceeds original image bounds {:?}",
                [size[2], size[1], size[0]]
            )));
        }
        let low = [0, 1, 2].map(|a| place[2 - a][0] as usize);
        let extent = [0, 1, 2].map(|a| place[2 - a][1] as usize - low[a]);
        let expected = [extent[2], extent[1], extent[0]];
        if mask.shape != expected {
            return Err(Failure::bad(format!(
                "image shape {:?} must match interaction_bbox size {expected:?}",
                mask.shape
            )));
        }
        Ok(Area { low, size: extent, marked: reorder(&mask.marks(), extent) })
    }

    /// A mask that is the object so far: what was said before is forgotten, and can be undone to.
    pub fn initial(
        &mut self,
        mask: &Array,
        run: bool,
        left: &AtomicBool,
    ) -> Result<Outcome, Failure> {
        let image = self.image()?;
        let shape = image.shape();
        if mask.shape != shape {
            return Err(Failure::bad(format!(
                "Given initial seg must match input image shape. Input image was: {shape:?}, given: {:?}",
                mask.shape
            )));
        }
        let marked = reorder(&mask.marks(), image.size());
        let mut layer = Layer::new(Session::new(&image.opened.scan));
        if marked.iter().any(|m| *m != 0) {
            let prompts = Prompts { dense: Some(Dense::Mask(marked)), ..Prompts::default() };
            unless_left(left, |o| layer.session.interact_observed(&prompts, o).map(|_| ()))?;
            layer.base = 1;
        }
        // The client has filled its buffer with the mask already.
        image.shown = layer.session.prediction().cloned();
        image.layers.push(layer);
        if image.layers.len() > MOST_LAYERS {
            image.layers.remove(0);
        }
        Ok(Outcome::unchanged(run))
    }

    /// Predicts what was said and not predicted yet.
    pub fn predict(&mut self, left: &AtomicBool) -> Result<Outcome, Failure> {
        if self.image()?.layer().queued.is_empty() {
            return Ok(Outcome::unchanged(false));
        }
        self.say(Prompts::default(), true, left)
    }

    /// Takes the last interaction back.
    pub fn undo(&mut self) -> Result<Outcome, Failure> {
        let Some(image) = &mut self.image else { return Ok(Outcome::unchanged(false)) };
        let layer = image.layer();
        if layer.queued.pop().is_some() {
            return Ok(Outcome::unchanged(true));
        }
        let undone = layer.session.depth().0 > layer.base && layer.session.undo();
        if !undone && (image.layers.len() < 2 || image.layers.pop().is_none()) {
            return Ok(Outcome::unchanged(false));
        }
        Ok(Outcome { ran: true, update: self.update() })
    }

    /// Says something: now, with what was said and not predicted yet, or later.
    fn say(&mut self, fresh: Prompts, run: bool, left: &AtomicBool) -> Result<Outcome, Failure> {
        let layer = self.image()?.layer();
        let nothing = fresh.is_empty() && fresh.drawn.is_none();
        if !run {
            if layer.queued.len() >= MOST_QUEUED {
                return Err(Failure::bad(format!(
                    "{MOST_QUEUED} interactions wait for a prediction: predict comes first"
                )));
            }
            layer.queued.extend((!nothing).then_some(fresh));
            return Ok(Outcome::unchanged(false));
        }
        let mut said = Prompts::default();
        layer.queued.iter().for_each(|queued| said.join(queued));
        said.join(&fresh);
        if said.is_empty() && said.drawn.is_none() {
            return Ok(Outcome::unchanged(true));
        }
        unless_left(left, |o| layer.session.interact_observed(&said, o).map(|_| ()))?;
        layer.queued.clear();
        Ok(Outcome { ran: true, update: self.update() })
    }

    /// The whole answer, for clients that keep no buffer: a byte a voxel, i fastest.
    pub fn whole(&mut self) -> Result<Vec<u8>, Failure> {
        let image = self.image()?;
        let shown = image.layer().session.prediction().cloned();
        Ok(whole(&image.opened.image.grid, &shown))
    }

    /// What differs from what the client was shown, which it is shown now.
    fn update(&mut self) -> Option<Update> {
        let (image, buffer) = (self.image.as_mut()?, self.buffer?);
        let now = image.layers.last()?.session.prediction().cloned();
        let before = std::mem::replace(&mut image.shown, now);
        let changed = change(&image.opened.image.grid, &before, &image.shown)?;
        let [i0, j0, k0, i1, j1, k1] = changed.region;
        let [ni, nj, nk] = changed.size();
        let marks = changed.marks(&image.shown);
        Some(Update {
            region: [[k0, k1], [j0, j1], [i0, i1]],
            dtype: buffer.dtype,
            message: pack(buffer.dtype, &[nk, nj, ni], &marks),
        })
    }
}

impl Image {
    fn size(&self) -> [usize; 3] {
        self.opened.image.grid.size
    }

    /// `[k, j, i]`.
    fn shape(&self) -> [usize; 3] {
        let [ni, nj, nk] = self.size();
        [nk, nj, ni]
    }

    fn layer(&mut self) -> &mut Layer {
        self.layers.last_mut().expect("the first is there from the beginning")
    }
}

impl Layer {
    fn new(session: Session) -> Layer {
        Layer { session, base: 0, queued: vec![] }
    }
}
