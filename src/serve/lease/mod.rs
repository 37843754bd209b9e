//! The state of an nnInteractive client: an image, the buffer that mirrors the answer, and the
//! prompts on the object so far. A client of ITK-SNAP has no buffer, and is sent everything each
//! time.
//!
//! Arrays and coordinates are `[k, j, i]` on the wire, `[i, j, k]` here. What the client was shown
//! is remembered, so that an answer carries only what differs from that. It is also remembered
//! whether an answer was delivered: the contents of a lost one are in the next. An undo goes back
//! as far as the session's history does; an initial mask, which begins a new session on the same
//! scan, is one step of it.

mod said;
#[cfg(test)]
mod tests;
mod told;

use super::answer::{Change, Shown, change, whole};
use super::body::Counted;
use super::failure::{Failure, in_turns};
use super::journal::{Journal, Kept, NewScan, Source, Stored, kept};
use super::opened::{Engine, Opened};
use super::turns::Turn;
use super::wire::{Array, Dtype, pack};
use crate::memory::{self, Charge};
use crate::prompt::{Dense, Prompts};
use crate::session::kept::Writer;
use crate::session::{Ahead, Session};
use crate::sync::{if_free, locked};
use crate::volume::{Affine, Description, Grid, Volume, reorder};
use axum::http::StatusCode;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use told::{BUFFER, INITIAL, QUEUED, SAID, UNDONE, put_prompts};

/// The most interactions that wait for a prediction.
const MOST_QUEUED: usize = 256;
/// The most sessions that an undo can lead to, including the one in use.
const MOST_LAYERS: usize = 8;

/// How messages name the memory that queued prompts take.
const WAITING: &str = "prompts that wait for a prediction";

/// Why an image always has a session.
const FIRST: &str = "the first is there from the beginning";

/// The error if there is no image.
const NO_IMAGE: &str = "no image yet: call set_image or upload_raw first";

/// A client's state.
#[derive(Default)]
pub struct Lease {
    state: Mutex<State>,
    /// The turn of the last update that was delivered.
    handed: AtomicU64,
    /// Whether the client wrote to its buffer itself since the state was last examined.
    written: AtomicBool,
    journal: Option<Arc<Journal>>,
}

impl Kept for Lease {
    fn journal(&self) -> Option<&Arc<Journal>> {
        self.journal.as_ref()
    }

    fn renew(&self) -> Result<(), Failure> {
        locked(&self.state).renew()
    }
}

/// The part of the state that a client's calls change.
#[derive(Default)]
pub struct State {
    image: Option<Image>,
    buffer: Option<Buffer>,
    /// The last event that made the buffer's contents uncertain: an update, or a write by the
    /// client.
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
    /// The journal's description of it.
    scan: Option<Stored>,
    /// Sessions, each begun by an initial mask except for the first; the last is in use.
    layers: Vec<Layer>,
    shown: Shown,
    /// Where the client's buffer may differ from what it was shown: an update of that part was not
    /// delivered yet, or the client wrote there.
    doubt: Option<[usize; 6]>,
}

/// A session and the prompts beside it.
struct Layer {
    session: Session,
    /// Interactions that were given and not taken back.
    steps: usize,
    /// Prompts that were given and not predicted yet.
    queued: Vec<Queued>,
}

/// Prompts that wait for a prediction, which are counted.
struct Queued {
    said: Prompts,
    _charge: Charge,
}

impl Queued {
    /// Unwinds if memory is refused.
    fn new(said: Prompts) -> Queued {
        let charge = Charge::of::<([usize; 3], bool)>(WAITING, said.points.capacity());
        Queued { said, _charge: charge.unwrap_or_else(|e| memory::refuse(e)) }
    }
}

/// The answer to an interaction.
pub struct Outcome {
    /// Whether there was a prediction, or something to undo.
    pub ran: bool,
    /// The change of the buffer: the region `[[k0, k1], [j0, j1], [i0, i1]]`, the type of its
    /// elements, and the message that holds them.
    pub update: Option<Update>,
}

/// A part of the buffer.
pub struct Update {
    pub region: [[usize; 2]; 3],
    pub dtype: Dtype,
    pub message: Counted,
    /// The update's number in the lease.
    turn: u64,
}

/// A block of the image, with the buffer's contents there, as it is sent.
struct Part {
    region: [usize; 6],
    dtype: Dtype,
    message: Counted,
}

impl Outcome {
    fn unchanged(ran: bool) -> Outcome {
        Outcome { ran, update: None }
    }
}

impl Lease {
    /// A new lease, whose changes are written if there is a journal.
    pub fn new(journal: Option<Arc<Journal>>) -> Lease {
        let state = State { journal: journal.clone(), ..State::default() };
        Lease { state: Mutex::new(state), journal, ..Lease::default() }
    }

    /// A lease that an earlier server had. It is unknown which of its last answers reached the
    /// client.
    pub fn back(state: State, journal: Arc<Journal>) -> Lease {
        let state = State { journal: Some(journal.clone()), ..state };
        let written = AtomicBool::new(true);
        Lease { state: Mutex::new(state), journal: Some(journal), written, ..Lease::default() }
    }

    /// The state in use. It is consistent after a panic: a session changes only when an interaction
    /// has finished.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.looked_at(locked(&self.state))
    }

    /// The state, if it is not in use.
    pub fn idle(&self) -> Option<MutexGuard<'_, State>> {
        if_free(&self.state).map(|state| self.looked_at(state))
    }

    /// The state with what is known of the client's buffer by now.
    fn looked_at<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let is_handed = self.handed.load(Ordering::Relaxed) == state.turn;
        let is_written = self.written.swap(false, Ordering::Relaxed);
        // Earlier updates do not clear what is uncertain from now on.
        state.turn += u64::from(is_written);
        if let Some(image) = &mut state.image {
            image.doubt = image.doubt.filter(|_| !is_handed);
            if is_written {
                image.doubt = Some(image.whole());
            }
        }
        state
    }

    /// Called when an update is delivered to the client, which waits for it.
    pub fn handed(&self, update: &Update) {
        self.handed.fetch_max(update.turn, Ordering::Relaxed);
    }

    /// Called when the client has written to its buffer itself, whatever happens to its request.
    pub fn written(&self) {
        self.written.store(true, Ordering::Relaxed);
    }
}

/// An array `[c, k, j, i]` as a scan: the first channel if there are several. The message states
/// the distances between voxels and not their directions: they are assumed to run to the left, to
/// the back and to the head, as those of DICOM do.
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
    /// Keeps the bytes that an image was sent as, if there is a journal.
    pub fn keep(&self, bytes: &[u8], source: Source) -> Result<Option<NewScan>, Failure> {
        self.journal.as_ref().map(|journal| journal.scan(bytes, source)).transpose()
    }

    /// Begins with an image: the buffer and all prompts are gone.
    pub fn set_image(
        &mut self,
        engine: Engine,
        image: Volume,
        scan: Option<NewScan>,
    ) -> Result<(), Failure> {
        self.replace(scan, || Opened::new(engine, image))
    }

    /// Begins with the image that `open` makes; without one if that fails.
    fn replace(
        &mut self,
        scan: Option<NewScan>,
        open: impl FnOnce() -> Result<Opened, Failure>,
    ) -> Result<(), Failure> {
        let mut stored = None;
        if let (Some(journal), Some(scan)) = (&self.journal, scan) {
            journal.restart(Some(scan.stored()), |_| Ok(()))?;
            stored = Some(scan.told());
        }
        // Its memory is given back before the next one's is requested.
        let journal = self.journal.take();
        *self = State { turn: self.turn, journal, ..State::default() };
        let opened = catch_unwind(AssertUnwindSafe(|| memory::caught(open)));
        let opened = opened.unwrap_or_else(|_| {
            let what = "internal server error: there is no image now";
            Ok(Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, what)))
        });
        match opened.unwrap_or_else(|refused| Err(refused.into())) {
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

    /// Begins with an image without prompts.
    pub fn begin(&mut self, opened: Opened, scan: Option<Stored>) {
        let layers = vec![Layer::new(Session::new(&opened.scan))];
        self.buffer = None;
        self.image = Some(Image { opened, scan, layers, shown: None, doubt: None });
    }

    /// Where the object will probably be looked at next, or the patch of first clicks.
    pub fn ahead(&mut self) -> Option<Ahead> {
        let image = self.image.as_mut()?;
        image.layer().session.ahead().or_else(|| image.opened.ahead())
    }

    /// Sets the buffer, which is empty. Returns what the client was shown before, which may take a
    /// while to free.
    pub fn set_buffer(&mut self, buffer: Buffer) -> Result<Shown, Failure> {
        self.fits(buffer)?;
        self.note(BUFFER, |out| buffer.put(out))?;
        Ok(self.put_buffer(buffer))
    }

    /// An error unless a buffer has the image's shape.
    fn fits(&self, buffer: Buffer) -> Result<(), Failure> {
        match self.image.as_ref().map(Image::shape) {
            Some(shape) if shape != buffer.shape => Err(Failure::bad(format!(
                "the target buffer has shape {:?}, the image has {shape:?}",
                buffer.shape
            ))),
            _ => Ok(()),
        }
    }

    fn put_buffer(&mut self, buffer: Buffer) -> Shown {
        self.buffer = Some(buffer);
        self.image.as_mut().and_then(|image| {
            image.doubt = None;
            image.shown.take()
        })
    }

    /// Forgets all prompts. Returns the sessions that had them, which may take a while to free.
    pub fn reset(&mut self) -> Result<impl Send + use<>, Failure> {
        let Some(image) = &mut self.image else { return Ok(None) };
        if let (Some(journal), Some(scan)) = (&self.journal, &image.scan) {
            // Forgotten prompts take no room any more.
            let buffer = self.buffer;
            journal.restart(Some(scan), |fresh| {
                buffer.map_or(Ok(()), |buffer| fresh.put(BUFFER, |out| buffer.put(out)))
            })?;
        }
        let fresh = vec![Layer::new(Session::new(&image.opened.scan))];
        let layers = std::mem::replace(&mut image.layers, fresh);
        image.doubt = None;
        Ok(Some((layers, image.shown.take())))
    }

    /// The image that interactions refer to.
    fn image(&mut self) -> Result<&mut Image, Failure> {
        let image = self.image.as_mut().ok_or_else(|| Failure::bad(NO_IMAGE))?;
        match image.opened.image.range() {
            [0.0, 0.0] => Err(Failure::bad(
                "Input image is entirely zero; cannot determine normalization statistics.",
            )),
            _ => Ok(image),
        }
    }

    /// A mask that is the object so far: earlier prompts are forgotten, and can be returned to by
    /// undo.
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
        // The client has already filled its buffer with the mask.
        (image.shown, image.doubt) = (layer.session.prediction().cloned(), None);
        image.push(layer);
        Ok(Outcome::unchanged(run))
    }

    /// Predicts the prompts that were given and not predicted yet.
    pub fn predict(&mut self, turn: &Turn) -> Result<Outcome, Failure> {
        if self.image()?.layer().queued.is_empty() {
            return Ok(Outcome::unchanged(false));
        }
        self.say(Prompts::default(), true, turn)
    }

    /// Takes the last interaction back.
    pub fn undo(&mut self) -> Result<Outcome, Failure> {
        let (journal, buffer) = (self.journal.clone(), self.buffer);
        let image = self.image.as_mut().filter(|image| image.can_go_back());
        let Some(image) = image else { return Ok(Outcome::unchanged(false)) };
        let was_waiting = !image.layer().queued.is_empty();
        let mut part = None;
        if let (Some(buffer), false) = (buffer, was_waiting) {
            let now = image.shown_before();
            part = Some(difference(&image.opened, &image.shown, &now, image.doubt, buffer)?);
        }
        if let Some(journal) = journal {
            journal.note(UNDONE, |_| {})?;
        }
        image.go_back();
        Ok(Outcome { ran: true, update: part.and_then(|part| self.show(part)) })
    }

    /// Gives prompts: predicted now, with those that were not predicted yet, or later.
    fn say(&mut self, fresh: Prompts, run: bool, turn: &Turn) -> Result<Outcome, Failure> {
        let (journal, buffer) = (self.journal.clone(), self.buffer);
        let image = self.image()?;
        let layer = image.layer();
        let nothing = fresh.is_empty() && fresh.drawn.is_none();
        if !run {
            if layer.queued.len() >= MOST_QUEUED {
                return Err(Failure::bad(format!(
                    "{MOST_QUEUED} interactions are waiting for a prediction: call predict first"
                )));
            }
            if !nothing {
                let queued = Queued::new(fresh);
                if let Some(journal) = journal {
                    journal.note(QUEUED, |out| put_prompts(&queued.said, out))?;
                }
                layer.queued.push(queued);
            }
            return Ok(Outcome::unchanged(false));
        }
        let Some(said) = layer.all_said(&fresh)? else { return Ok(Outcome::unchanged(true)) };
        let Image { opened, layers, shown, doubt, .. } = image;
        let layer = layers.last_mut().expect(FIRST);
        let part = layer.predict(journal.as_ref(), &said, turn, |now| {
            buffer.map(|buffer| difference(opened, shown, now, *doubt, buffer)).transpose()
        })?;
        Ok(Outcome { ran: true, update: part.and_then(|part| self.show(part)) })
    }

    /// Gives prompts, which are predicted now, for clients that keep no buffer: they are told what
    /// `pack` makes of the whole answer, one byte per voxel, i fastest. If that fails nothing has
    /// changed.
    pub fn say_for_whole<T>(
        &mut self,
        fresh: &Prompts,
        turn: &Turn,
        pack: impl FnOnce(Vec<u8>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let journal = self.journal.clone();
        let Image { opened, layers, .. } = self.image()?;
        let layer = layers.last_mut().expect(FIRST);
        let tell = |now: &Shown| pack(whole(&opened.image.grid, now));
        match layer.all_said(fresh)? {
            Some(said) => layer.predict(journal.as_ref(), &said, turn, tell),
            None => tell(&layer.session.prediction().cloned()),
        }
    }

    /// Shows the client the present answer; `part` is what is new to it.
    fn show(&mut self, part: Option<Part>) -> Option<Update> {
        let image = self.image.as_mut()?;
        image.shown = image.layers.last()?.session.prediction().cloned();
        let Part { region, dtype, message } = part?;
        image.doubt = Some(region);
        self.turn += 1;
        let [i0, j0, k0, i1, j1, k1] = region;
        let region = [[k0, k1], [j0, j1], [i0, i1]];
        Some(Update { region, dtype, message, turn: self.turn })
    }
}

/// The difference between two answers on a scan, and the part where the client's buffer is in
/// `doubt`, as the second answer has it; none if there is no difference. Memory for it may be
/// refused, so code that changes an answer must call this before the change is kept.
fn difference(
    opened: &Opened,
    before: &Shown,
    now: &Shown,
    doubt: Option<[usize; 6]>,
    buffer: Buffer,
) -> Result<Option<Part>, Failure> {
    let changed = change(&opened.image.grid, before, now);
    let regions = changed.map(|c| c.region).into_iter().chain(doubt);
    let Some(region) = regions.reduce(union) else { return Ok(None) };
    let changed = Change { region, voxels: 0 };
    let [ni, nj, nk] = changed.size();
    let message = pack(buffer.dtype, &[nk, nj, ni], &changed.marks(now));
    Ok(Some(Part { region, dtype: buffer.dtype, message: Counted::new(message)? }))
}

/// The smallest block that contains two others.
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
        self.layers.last_mut().expect(FIRST)
    }

    /// The answer that going back leads to, if nothing waits for a prediction.
    fn shown_before(&mut self) -> Shown {
        let layer = self.layer();
        if layer.steps == 0 {
            let below = self.layers.iter().nth_back(1);
            return below.and_then(|layer| layer.session.prediction().cloned());
        }
        let went = layer.session.undo();
        let before = layer.session.prediction().cloned();
        if went {
            layer.session.redo();
        }
        before
    }

    /// Adds a session on top of the others.
    fn push(&mut self, layer: Layer) {
        self.layers.push(layer);
        if self.layers.len() > MOST_LAYERS {
            self.layers.remove(0);
        }
    }

    /// Whether something can be taken back: the oldest prompts may be forgotten.
    fn can_go_back(&self) -> bool {
        self.layers.last().is_some_and(|layer| match (layer.queued.len(), layer.steps) {
            (0, 0) => self.layers.len() > 1,
            (0, _) => layer.session.depth().0 > 0,
            _ => true,
        })
    }

    /// Takes back the last prompts, if possible.
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

    /// The prompts that wait, and fresh ones; none where all of them say nothing.
    fn all_said(&self, fresh: &Prompts) -> Result<Option<Prompts>, Failure> {
        let mut said = Prompts::default();
        self.queued.iter().try_for_each(|queued| said.join(&queued.said))?;
        said.join(fresh)?;
        Ok((!said.is_empty() || said.drawn.is_some()).then_some(said))
    }

    /// Predicts all that was said. What `tell` makes of the answer is part of the change: if it
    /// fails nothing has changed.
    fn predict<T>(
        &mut self,
        journal: Option<&Arc<Journal>>,
        said: &Prompts,
        turn: &Turn,
        tell: impl FnOnce(&Shown) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let work = |session: &mut Session| {
            in_turns(turn, |o| session.interact_observed(said, o).map(|_| ()))?;
            tell(&session.prediction().cloned())
        };
        let told = kept(journal, &mut self.session, SAID, |_| {}, work)?;
        self.queued.clear();
        self.steps += 1;
        Ok(told)
    }
}
