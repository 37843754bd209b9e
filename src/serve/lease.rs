//! What a client of nnInteractive works on: an image, the buffer that mirrors the answer, and what
//! was said of the object so far. One of ITK-SNAP's has no buffer, and is shown all each time.
//!
//! Arrays and coordinates are `[k, j, i]` on the wire, `[i, j, k]` here. What the client was shown
//! is remembered, so that an answer carries what differs from that and no more. Whether an answer
//! was handed over is remembered too: what a lost one held is in the next. An undo goes back as far
//! as the session's history does; an initial mask, which begins a new session on the same scan, is
//! one step of it.

use super::answer::{Change, Shown, change, whole};
use super::failure::{Failure, in_turns};
use super::journal::{IMAGE, Journal, Kept, NewScan, Source, Stored, kept, session_anew};
use super::opened::{Engine, Opened};
use super::turns::Turn;
use super::wire::{Array, Dtype, pack};
use crate::prompt::{Area, Dense, Prompts};
use crate::session::kept::{Reader, Writer};
use crate::session::{Ahead, Session};
use crate::volume::{Affine, Description, Grid, Volume, reorder};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// What a lease's journal tells, beside its image.
const BUFFER: u8 = 2;
const QUEUED: u8 = 3;
const SAID: u8 = 4;
const INITIAL: u8 = 5;
const UNDONE: u8 = 6;
/// A session that is told of anew, and a step of it.
const LAYER: u8 = 7;
const STEP: u8 = 8;

/// A client's work.
#[derive(Default)]
pub struct Lease {
    state: Mutex<State>,
    /// The turn of the last update that was handed over.
    handed: AtomicU64,
    /// Whether the client wrote to its buffer by itself since the state was looked at.
    written: AtomicBool,
    journal: Option<Arc<Journal>>,
}

impl Kept for Lease {
    fn journal(&self) -> Option<&Arc<Journal>> {
        self.journal.as_ref()
    }

    fn renew(&self) -> Result<(), Failure> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).renew()
    }
}

/// What a client's calls change.
#[derive(Default)]
pub struct State {
    image: Option<Image>,
    buffer: Option<Buffer>,
    /// The last time that something came to be in doubt: an update, or what the client wrote.
    turn: u64,
    journal: Option<Arc<Journal>>,
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
    /// What the journal tells of it.
    scan: Option<Stored>,
    /// Sessions, each begun by an initial mask but for the first; the last is at work.
    layers: Vec<Layer>,
    shown: Shown,
    /// Where the client's buffer may be another than what it was shown: an update went there that
    /// was not handed over yet, or the client wrote there.
    doubt: Option<[usize; 6]>,
}

/// A session and what was said beside it.
struct Layer {
    session: Session,
    /// Interactions that were said and not taken back.
    steps: usize,
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
    /// Which of the lease's updates it is.
    turn: u64,
}

impl Outcome {
    fn unchanged(ran: bool) -> Outcome {
        Outcome { ran, update: None }
    }
}

impl Lease {
    /// A new one, of which all that happens is written where there is a journal.
    pub fn new(journal: Option<Arc<Journal>>) -> Lease {
        let state = State { journal: journal.clone(), ..State::default() };
        Lease { state: Mutex::new(state), journal, ..Lease::default() }
    }

    /// One that an earlier server had. What of its last answers came to the client nobody knows.
    pub fn back(state: State, journal: Arc<Journal>) -> Lease {
        let state = State { journal: Some(journal.clone()), ..state };
        let written = AtomicBool::new(true);
        Lease { state: Mutex::new(state), journal: Some(journal), written, ..Lease::default() }
    }

    /// What is worked on. What a panic left is whole: a session changes when an interaction has
    /// come to its end.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.looked_at(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is worked on, where nobody is at work with it.
    pub fn idle(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(self.looked_at(state)),
            Err(TryLockError::Poisoned(state)) => Some(self.looked_at(state.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The state with what is known of the client's buffer by now.
    fn looked_at<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let is_handed = self.handed.load(Ordering::Relaxed) == state.turn;
        let is_written = self.written.swap(false, Ordering::Relaxed);
        // What is in doubt from now on no earlier update clears.
        state.turn += u64::from(is_written);
        if let Some(image) = &mut state.image {
            image.doubt = image.doubt.filter(|_| !is_handed);
            if is_written {
                image.doubt = Some(image.whole());
            }
        }
        state
    }

    /// An update goes to the client, which waits for it.
    pub fn handed(&self, update: &Update) {
        self.handed.fetch_max(update.turn, Ordering::Relaxed);
    }

    /// The client has written to its buffer by itself, whatever becomes of what it sends.
    pub fn written(&self) {
        self.written.store(true, Ordering::Relaxed);
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
    /// Has the bytes that an image comes as kept, where there is a journal.
    pub fn keep(&self, bytes: &[u8], source: Source) -> Result<Option<NewScan>, Failure> {
        self.journal.as_ref().map(|journal| journal.scan(bytes, source)).transpose()
    }

    /// Begins with an image: the buffer and all that was said are gone.
    pub fn set_image(
        &mut self,
        engine: Engine,
        image: Volume,
        scan: Option<NewScan>,
    ) -> Result<(), Failure> {
        let mut stored = None;
        if let (Some(journal), Some(scan)) = (&self.journal, scan) {
            journal.restart(Some(scan.stored()), |_| Ok(()))?;
            stored = Some(scan.told());
        }
        // Its memory is given back before the next one's is asked for.
        let journal = self.journal.take();
        *self = State { turn: self.turn, journal, ..State::default() };
        match Opened::new(engine, image) {
            Ok(opened) => self.begin(opened, stored),
            Err(e) => {
                // There is none, on disk either.
                if let Some(journal) = &self.journal {
                    let _ = journal.restart(None, |_| Ok(()));
                }
                return Err(e);
            }
        }
        Ok(())
    }

    /// Begins with an image, of which nothing was said.
    pub fn begin(&mut self, opened: Opened, scan: Option<Stored>) {
        let layers = vec![Layer::new(Session::new(&opened.scan))];
        self.buffer = None;
        self.image = Some(Image { opened, scan, layers, shown: None, doubt: None });
    }

    /// Writes the journal anew, where it is long.
    fn renew(&self) -> Result<(), Failure> {
        let Some(journal) = &self.journal else { return Ok(()) };
        let image = self.image.as_ref().and_then(|image| Some((image, image.scan.as_ref()?)));
        if image.is_some() != self.image.is_some() {
            return Ok(());
        }
        journal.renew(|fresh| {
            // Without one there is a buffer at most.
            if let Some((_, scan)) = image {
                fresh.put(IMAGE, |out| scan.put(out))?;
            }
            if let Some(buffer) = self.buffer {
                fresh.put(BUFFER, |out| buffer.put(out))?;
            }
            let layers = image.map(|(image, _)| &image.layers[..]).unwrap_or_default();
            for (at, layer) in layers.iter().enumerate() {
                // What was undone is never done again.
                let last = layer.session.depth().0;
                let head = |n: usize, out: &mut Writer| {
                    if n == 0 {
                        out.flag(at == 0);
                        out.size(layer.steps);
                    }
                };
                session_anew(fresh, &layer.session, [LAYER, STEP], last, head)?;
                for queued in &layer.queued {
                    fresh.put(QUEUED, |out| put_prompts(queued, out))?;
                }
            }
            Ok(())
        })
    }

    /// Has something written, where there is a journal.
    fn note(&self, kind: u8, tell: impl FnOnce(&mut Writer)) -> Result<(), Failure> {
        self.journal.as_ref().map_or(Ok(()), |journal| journal.note(kind, tell))
    }

    /// Does again what the journal tells.
    pub fn follow(&mut self, kind: u8, from: &mut Reader) -> Result<(), String> {
        let odd = || format!("a record of kind {kind} cannot be followed");
        if kind == BUFFER {
            let shape = [from.size()?, from.size()?, from.size()?];
            let dtype = Dtype::named(&from.text()?).ok_or_else(odd)?;
            let buffer = Buffer { shape, dtype };
            self.fits(buffer).map_err(|_| odd())?;
            self.put_buffer(buffer);
            return Ok(());
        }
        let image = self.image.as_mut().ok_or_else(odd)?;
        match kind {
            QUEUED => {
                let said = prompts_of(image.size(), from)?;
                image.layer().queued.push(said);
            }
            SAID => image.layer().followed(from)?,
            INITIAL => {
                let mut layer = Layer::new(Session::new(&image.opened.scan));
                if from.flag()? {
                    layer.session.follow(from)?;
                }
                image.push(layer);
            }
            UNDONE if image.can_go_back() => image.go_back(),
            LAYER => {
                let is_first = from.flag()?;
                let mut layer = Layer::new(Session::new(&image.opened.scan));
                layer.steps = from.size()?;
                layer.session.follow_first(from)?;
                if is_first {
                    image.layers.clear();
                }
                image.push(layer);
            }
            STEP => image.layer().session.follow(from)?,
            _ => return Err(odd()),
        }
        Ok(())
    }

    /// All of the journal was followed.
    pub fn followed(&mut self) {
        for layer in self.image.iter_mut().flat_map(|image| &mut image.layers) {
            layer.session.look_anew();
        }
    }

    /// Where the object will be looked at next.
    pub fn ahead(&mut self) -> Option<Ahead> {
        self.image.as_mut()?.layer().session.ahead()
    }

    /// Sets the buffer, which is empty.
    pub fn set_buffer(&mut self, buffer: Buffer) -> Result<(), Failure> {
        self.fits(buffer)?;
        self.note(BUFFER, |out| buffer.put(out))?;
        self.put_buffer(buffer);
        Ok(())
    }

    /// An error unless a buffer has the image's shape.
    fn fits(&self, buffer: Buffer) -> Result<(), Failure> {
        match self.image.as_ref().map(Image::shape) {
            Some(shape) if shape != buffer.shape => Err(Failure::bad(format!(
                "a target buffer of shape {:?}: the image has {shape:?}",
                buffer.shape
            ))),
            _ => Ok(()),
        }
    }

    fn put_buffer(&mut self, buffer: Buffer) {
        if let Some(image) = &mut self.image {
            (image.shown, image.doubt) = (None, None);
        }
        self.buffer = Some(buffer);
    }

    /// Forgets what was said.
    pub fn reset(&mut self) -> Result<(), Failure> {
        let Some(image) = &mut self.image else { return Ok(()) };
        if let (Some(journal), Some(scan)) = (&self.journal, &image.scan) {
            // What was said takes no room any more.
            let buffer = self.buffer;
            journal.restart(Some(scan), |fresh| {
                buffer.map_or(Ok(()), |buffer| fresh.put(BUFFER, |out| buffer.put(out)))
            })?;
        }
        image.layers = vec![Layer::new(Session::new(&image.opened.scan))];
        (image.shown, image.doubt) = (None, None);
        Ok(())
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
        turn: &Turn,
    ) -> Result<Outcome, Failure> {
        let mut prompts = Prompts::default();
        if let Some(voxel) = self.image()?.opened.voxel([at[2], at[1], at[0]]) {
            prompts.points.push((voxel, positive));
        }
        self.say(prompts, run, turn)
    }

    /// A box, its ends exclusive, cut off at the image's faces; one beyond them counts for nothing.
    pub fn bounds(
        &mut self,
        bounds: [[f64; 2]; 3],
        positive: bool,
        run: bool,
        turn: &Turn,
    ) -> Result<Outcome, Failure> {
        if bounds.iter().any(|[low, high]| low == high) {
            return Err(Failure::bad(format!(
                "Given bounding box size is zero in at least one dimension: {bounds:?}"
            )));
        }
        let size = self.image()?.size();
        let beyond = |a: usize| {
            let [low, high] = bounds[2 - a];
            low.max(high) <= 0.0 || low.min(high) >= size[a] as f64
        };
        if (0..3).any(beyond) {
            return self.say(Prompts::default(), run, turn);
        }
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
        self.say(prompts, run, turn)
    }

    /// Voxels that were painted, all of them on the object or off it.
    pub fn scribble(
        &mut self,
        mask: &Array,
        place: Option<[[f64; 2]; 3]>,
        positive: bool,
        run: bool,
        turn: &Turn,
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
        self.say(prompts, run, turn)
    }

    /// An area that was outlined.
    pub fn lasso(
        &mut self,
        mask: &Array,
        place: Option<[[f64; 2]; 3]>,
        positive: bool,
        run: bool,
        turn: &Turn,
    ) -> Result<Outcome, Failure> {
        let area = self.area(mask, place)?;
        let mut prompts = Prompts::default();
        if area.marked.iter().any(|m| *m != 0) {
            prompts.add_area(&area, positive).map_err(|e| Failure::bad(e.to_string()))?;
        }
        self.say(prompts, run, turn)
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
    pub fn initial(&mut self, mask: &Array, run: bool, turn: &Turn) -> Result<Outcome, Failure> {
        let journal = self.journal.clone();
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
            let head = |out: &mut Writer| out.flag(true);
            kept(journal.as_ref(), &mut layer.session, INITIAL, head, |session| {
                in_turns(turn, |o| session.interact_observed(&prompts, o).map(|_| ()))
            })?;
        } else if let Some(journal) = &journal {
            journal.note(INITIAL, |out| out.flag(false))?;
        }
        // The client has filled its buffer with the mask already.
        (image.shown, image.doubt) = (layer.session.prediction().cloned(), None);
        image.push(layer);
        Ok(Outcome::unchanged(run))
    }

    /// Predicts what was said and not predicted yet.
    pub fn predict(&mut self, turn: &Turn) -> Result<Outcome, Failure> {
        if self.image()?.layer().queued.is_empty() {
            return Ok(Outcome::unchanged(false));
        }
        self.say(Prompts::default(), true, turn)
    }

    /// Takes the last interaction back.
    pub fn undo(&mut self) -> Result<Outcome, Failure> {
        let journal = self.journal.clone();
        let image = self.image.as_mut().filter(|image| image.can_go_back());
        let Some(image) = image else { return Ok(Outcome::unchanged(false)) };
        if let Some(journal) = journal {
            journal.note(UNDONE, |_| {})?;
        }
        let was_waiting = !image.layer().queued.is_empty();
        image.go_back();
        match was_waiting {
            true => Ok(Outcome::unchanged(true)),
            false => Ok(Outcome { ran: true, update: self.update() }),
        }
    }

    /// Says something: now, with what was said and not predicted yet, or later.
    fn say(&mut self, fresh: Prompts, run: bool, turn: &Turn) -> Result<Outcome, Failure> {
        let journal = self.journal.clone();
        let layer = self.image()?.layer();
        let nothing = fresh.is_empty() && fresh.drawn.is_none();
        if !run {
            if layer.queued.len() >= MOST_QUEUED {
                return Err(Failure::bad(format!(
                    "{MOST_QUEUED} interactions wait for a prediction: predict comes first"
                )));
            }
            if !nothing {
                if let Some(journal) = journal {
                    journal.note(QUEUED, |out| put_prompts(&fresh, out))?;
                }
                layer.queued.push(fresh);
            }
            return Ok(Outcome::unchanged(false));
        }
        let mut said = Prompts::default();
        layer.queued.iter().for_each(|queued| said.join(queued));
        said.join(&fresh);
        if said.is_empty() && said.drawn.is_none() {
            return Ok(Outcome::unchanged(true));
        }
        kept(
            journal.as_ref(),
            &mut layer.session,
            SAID,
            |_| {},
            |session| in_turns(turn, |o| session.interact_observed(&said, o).map(|_| ())),
        )?;
        layer.queued.clear();
        layer.steps += 1;
        Ok(Outcome { ran: true, update: self.update() })
    }

    /// The whole answer, for clients that keep no buffer: a byte a voxel, i fastest.
    pub fn whole(&mut self) -> Result<Vec<u8>, Failure> {
        let image = self.image()?;
        let shown = image.layer().session.prediction().cloned();
        Ok(whole(&image.opened.image.grid, &shown))
    }

    /// What differs from what the client was shown, or may differ, which it is shown now.
    fn update(&mut self) -> Option<Update> {
        let (image, buffer) = (self.image.as_mut()?, self.buffer?);
        let now = image.layers.last()?.session.prediction().cloned();
        let changed = change(&image.opened.image.grid, &image.shown, &now);
        let regions = changed.map(|c| c.region).into_iter().chain(image.doubt);
        let changed = regions.reduce(union).map(|region| Change { region, voxels: 0 });
        let Some(changed) = changed else {
            image.shown = now;
            return None;
        };
        let [i0, j0, k0, i1, j1, k1] = changed.region;
        let [ni, nj, nk] = changed.size();
        // Memory for it may be refused: the client has then been shown nothing.
        let message = pack(buffer.dtype, &[nk, nj, ni], &changed.marks(&now));
        (image.shown, image.doubt) = (now, Some(changed.region));
        self.turn += 1;
        let region = [[k0, k1], [j0, j1], [i0, i1]];
        Some(Update { region, dtype: buffer.dtype, message, turn: self.turn })
    }
}

/// The smallest block that holds two.
fn union(a: [usize; 6], b: [usize; 6]) -> [usize; 6] {
    std::array::from_fn(|f| if f < 3 { a[f].min(b[f]) } else { a[f].max(b[f]) })
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

    /// The block that is all of it.
    fn whole(&self) -> [usize; 6] {
        let [ni, nj, nk] = self.size();
        [0, 0, 0, ni, nj, nk]
    }

    fn layer(&mut self) -> &mut Layer {
        self.layers.last_mut().expect("the first is there from the beginning")
    }

    /// Puts a session on the others.
    fn push(&mut self, layer: Layer) {
        self.layers.push(layer);
        if self.layers.len() > MOST_LAYERS {
            self.layers.remove(0);
        }
    }

    /// Whether something can be taken back: what was said longest ago may be forgotten.
    fn can_go_back(&self) -> bool {
        self.layers.last().is_some_and(|layer| match (layer.queued.len(), layer.steps) {
            (0, 0) => self.layers.len() > 1,
            (0, _) => layer.session.depth().0 > 0,
            _ => true,
        })
    }

    /// Takes back what was said last, where something can be.
    fn go_back(&mut self) {
        let layer = self.layer();
        if layer.queued.pop().is_some() {
            return;
        }
        if layer.steps > 0 {
            layer.steps -= usize::from(layer.session.undo());
        } else if self.layers.len() > 1 {
            self.layers.pop();
        }
    }
}

impl Layer {
    fn new(session: Session) -> Layer {
        Layer { session, steps: 0, queued: vec![] }
    }

    /// Follows a journal through one prediction.
    fn followed(&mut self, from: &mut Reader) -> Result<(), String> {
        self.session.follow(from)?;
        self.queued.clear();
        self.steps += 1;
        Ok(())
    }
}

impl Buffer {
    fn put(&self, out: &mut Writer) {
        self.shape.iter().for_each(|n| out.size(*n));
        out.text(self.dtype.name());
    }
}

/// Writes what was said: never a mask or other objects, which do not wait for a prediction.
fn put_prompts(said: &Prompts, out: &mut Writer) {
    out.size(said.points.len());
    for (voxel, positive) in &said.points {
        out.voxel(*voxel);
        out.flag(*positive);
    }
    out.bounds(said.bounds);
    out.bounds(said.drawn);
    out.flag(said.clipped);
}

/// What was said on a scan of some size, as it was written.
fn prompts_of(size: [usize; 3], from: &mut Reader) -> Result<Prompts, String> {
    let mut said = Prompts::default();
    // A voxel's three numbers, and its side.
    for _ in 0..from.count(13)? {
        said.points.push((from.voxel(size)?, from.flag()?));
    }
    (said.bounds, said.drawn) = (from.bounds(size)?, from.bounds(size)?);
    said.clipped = from.flag()?;
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::super::turns::Turns;
    use super::super::wire::unpack;
    use super::super::work::Work;
    use super::*;
    use crate::device::{Cpu, Device};
    use crate::model::{Model, Weights};
    use crate::session::Encodings;
    use crate::session::Options;
    use crate::volume::Element;
    use std::path::Path;

    /// `[k, j, i]`.
    const SHAPE: [usize; 3] = [20, 24, 28];
    const VOXELS: usize = SHAPE[0] * SHAPE[1] * SHAPE[2];
    const CLICK: [f64; 3] = [10.0, 12.0, 14.0];

    /// The turn of somebody who has come alone.
    fn turn() -> Turn {
        Arc::<Turns>::default().enter(&Arc::default())
    }

    /// A client with an image of noise.
    fn begun(options: Options) -> Lease {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/small.safetensors");
        let weights = Weights::open(Path::new(path)).unwrap();
        let model = Arc::new(Model::new(&Device::Cpu(Cpu::new(2).unwrap()), &weights).unwrap());
        let [nk, nj, ni] = SHAPE;
        let image = Array {
            dtype: Dtype::Other(Element::Uint8),
            shape: vec![1, nk, nj, ni],
            bytes: (0..VOXELS).map(|at| (at * at % 251) as u8).collect(),
        };
        let lease = Lease::default();
        let image = scan_of(image, [1.0; 3]).unwrap();
        let encodings = Arc::new(Encodings::new(options.memory));
        let work = Work::start(1).unwrap();
        let engine = Engine { model: &model, options, encodings: &encodings, work: &work };
        lease.state().set_image(engine, image, None).unwrap();
        lease.state().set_buffer(Buffer { shape: SHAPE, dtype: Dtype::Bool }).unwrap();
        lease
    }

    fn click(lease: &Lease, positive: bool) -> Outcome {
        lease.state().point(CLICK, positive, true, &turn()).unwrap()
    }

    /// Writes an update into a buffer, as a client does.
    fn take(buffer: &mut [u8], update: &Update) {
        let marks = unpack(&update.message, VOXELS).unwrap().marks();
        let [_, nj, ni] = update.region.map(|[low, high]| high - low);
        let low = update.region.map(|[low, _]| low);
        for (at, mark) in marks.iter().enumerate() {
            let [k, j, i] = [low[0] + at / ni / nj, low[1] + at / ni % nj, low[2] + at % ni];
            buffer[(k * SHAPE[1] + j) * SHAPE[2] + i] = *mark;
        }
    }

    /// The answer as it stands, as a client orders it.
    fn answer(lease: &Lease) -> Vec<u8> {
        let state = lease.state.lock().unwrap();
        let mask = state.image.as_ref().unwrap().layers.last().unwrap().session.mask();
        let [nk, nj, ni] = SHAPE;
        let place = |at: usize| (at % ni * nj + at / ni % nj) * nk + at / ni / nj;
        (0..VOXELS).map(|at| mask[place(at)]).collect()
    }

    #[test]
    fn what_a_lost_answer_held_is_in_the_next() {
        let lease = begun(Options::default());
        let mut buffer = vec![0u8; VOXELS];
        let lost = click(&lease, true).update.unwrap();
        let again = click(&lease, true).update.unwrap();
        assert_eq!(again.region, lost.region);
        take(&mut buffer, &again);
        assert!(buffer.contains(&1) && buffer == answer(&lease));
        // Where it was handed over it is not sent again.
        lease.handed(&again);
        assert!(click(&lease, true).update.is_none());
        assert!((0..2).all(|_| lease.state().undo().unwrap().update.is_none()));
        let back = lease.state().undo().unwrap().update.unwrap();
        take(&mut buffer, &back);
        lease.handed(&back);
        assert!(buffer.iter().all(|v| *v == 0));
        // A mask that the client began with, and that never came.
        buffer.fill(1);
        lease.written();
        assert!(lease.state().point(CLICK, true, false, &turn()).unwrap().update.is_none());
        let whole = lease.state().predict(&turn()).unwrap().update.unwrap();
        assert_eq!(whole.region, SHAPE.map(|n| [0, n]));
        take(&mut buffer, &whole);
        assert!(buffer.contains(&1) && buffer == answer(&lease));
    }

    #[test]
    fn an_undo_ends_where_history_does() {
        let lease = begun(Options { undo_steps: 2, ..Options::default() });
        click(&lease, true);
        let mask = Array {
            dtype: Dtype::Bool,
            shape: SHAPE.to_vec(),
            bytes: (0..VOXELS).map(|at| u8::from(at < 1000)).collect(),
        };
        lease.state().initial(&mask, false, &turn()).unwrap();
        (0..4).for_each(|n| drop(click(&lease, n % 2 == 0)));
        let undo = || lease.state().undo().unwrap().ran;
        assert!(undo() && undo());
        // The other two are forgotten: the mask stays, and so does what was there before it.
        assert!(!undo());
        let layers = || lease.state.lock().unwrap().image.as_ref().unwrap().layers.len();
        assert_eq!(layers(), 2);
        // Where nothing is forgotten the mask is a step.
        lease.state().initial(&mask, false, &turn()).unwrap();
        click(&lease, true);
        assert!(undo() && undo());
        assert_eq!(layers(), 2);
    }

    #[test]
    fn a_box_beyond_the_image_counts_for_nothing() {
        let lease = begun(Options::default());
        for k in [[-9.0, -3.0], [20.0, 21.0], [-3.0, 0.0]] {
            let bounds = [k, [3.0, 20.0], [3.0, 20.0]];
            for positive in [true, false] {
                let outcome = lease.state().bounds(bounds, positive, true, &turn()).unwrap();
                assert!(outcome.ran && outcome.update.is_none(), "{k:?}");
            }
        }
        let last = [[19.0, 20.0], [3.0, 20.0], [3.0, 20.0]];
        lease.state().bounds(last, true, true, &turn()).unwrap();
        let state = lease.state.lock().unwrap();
        assert!(state.image.as_ref().unwrap().layers[0].session.prediction().is_some());
    }
}
