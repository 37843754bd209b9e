//! Interactive segmentation of one object: prompts in, an answer out, corrections, undo.
//!
//! A [`Scan`] is an image with the network and the patches of it that were encoded; it is shared. A
//! [`Session`] is one object on it: its prompts so far, its answers, its undo history. An answer is
//! a [`Prediction`]: a logit per voxel of the scan, positive on the object. The same prompts in the
//! same order give the same bits, wherever they come from: the program, a program in Rust or in C.
//!
//! ```
//! use prism::{Prompts, Scan, Session, SessionError};
//! use std::sync::Arc;
//!
//! /// A first prompt, a correction that is undone if it changes too much, and the mask.
//! fn segment(scan: &Arc<Scan>, first: &Prompts, then: &Prompts) -> Result<Vec<u8>, SessionError> {
//!     let mut session = Session::new(scan);
//!     let answer = session.interact(first)?;
//!     for note in &answer.notes {
//!         println!("{note}");
//!     }
//!     let answer = session.interact(then)?;
//!     if answer.changed > 10_000 {
//!         session.undo();
//!     }
//!     Ok(session.mask())
//! }
//! ```
//!
//! The network sees a *patch*, a cube of the scan that is resampled to the network's spacing. It
//! encodes a patch once; an interaction on a patch that is encoded takes much less time. To see a
//! patch is called a *look*.
//!
//! # The contract
//!
//! The network proposes; the session keeps these promises, on the scan's own grid, whatever the
//! network answers:
//!
//! 1. **Every click holds** in the answer it leads to: its voxel is on the side that was said, and
//!    stays there until the click is undone, or contradicted by a later click on the same voxel or
//!    a mask that is given later. A scribble is its voxels: all of them hold.
//! 2. **A click that agrees changes nothing.** The same click twice is one.
//! 3. **A first prompt that only denies** (all of its clicks are off the object) gives an empty
//!    answer, and a [`Note`] that says so.
//! 4. **A mask that is given is the answer**, to the voxel, until a click disagrees with it; then
//!    it changes only near that click.
//! 5. **Nothing far from a click is lost**: an answer changes within a distance of a click that
//!    disagrees, which grows with the error that is pointed at and with the object, and where the
//!    object is followed beyond what was looked at. An answer that rests on no more than four
//!    clicks, without box or mask, is a guess, and may change anywhere. A box starts afresh, unless
//!    it was given before or the answer fills it already.
//! 6. **Other objects** that were given are never entered.
//! 7. **Undo brings back the bits**, redo too.
//! 8. **No prompt on the scan is an error** or ignored, except that points on the object that are
//!    within other objects are left out, with a [`Note`]. Where the network has not looked yet, it
//!    looks: at a coarser patch, or at one further on.
//!
//! How: all prompts so far are passed to the network at every interaction. The answer in which the
//! clicks already hold ([`correction`]) is its dense prompt; its result is used near the clicks
//! ([`correction::locality`]), corrected again, and written into the answer ([`field`]); a guess is
//! blended with the answer according to how sure it is. Corrections prefer voxels that look like
//! the clicked one on the scan. If an answer rests on the network alone, as a first one or a guess
//! does, voxels that look like the object rather than like its surroundings are added to it, and
//! the others removed. Last, every click's own voxel is put on its side.
//!
//! With [`Options::released`] none of this is done: a session then runs the network as the paper
//! does.

mod ahead;
mod appearance;
pub mod correction;
pub mod diameters;
mod encodings;
pub mod field;
mod guess;
#[cfg(feature = "serve")]
pub(crate) mod kept;
mod region;
mod released;
mod scan;
mod steer;
pub mod turn;

pub use ahead::{Ahead, Interest};
pub use encodings::{EncodedPatch, Encodings};
pub use scan::{
    Image, Intensities, MEMORY, Options, Scan, UNDO_BYTES, UNDO_STEPS, fitted_spacing, intensities,
    intensities_of, normalization, working_spacing,
};

use crate::device::CudaError;
use crate::memory::{self, Charge, Charged, Refused};
use crate::model::{Answer, Model, Observer};
use crate::prompt::{Dense, Prompts};
use crate::tensor::{OpError, Tensor};
use crate::volume::Grid;
use crate::volume::patch::Patch;
use field::Field;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The most points that the prompt encoder is given at once, the most that the network was
/// evaluated with: its attention grows with their square. Of more, every n-th is used; the refiner
/// sees all of them.
const MOST_POINTS: usize = 10_000;

/// The logit of a voxel of a mask given as dense prompt, negative outside: a probability of 0.9997.
pub const MASK_LOGIT: f32 = 8.0;

/// How messages name the memory that an answer takes.
const ANSWER: &str = "an answer";
/// The name of the voxels of prompts in refusals of memory.
const CLICKS: &str = "the prompts of the object";

/// The points that the prompt encoder is given, and the number left to the refiner alone.
fn thin(points: Vec<([i32; 3], bool)>) -> (Vec<([i32; 3], bool)>, usize) {
    let all = points.len();
    if all <= MOST_POINTS {
        return (points, 0);
    }
    let some = (0..MOST_POINTS).map(|n| points[n * all / MOST_POINTS]);
    (memory::collected(CLICKS, some), all - MOST_POINTS)
}

/// The patches that a first interaction with these prompts looks at, on a scan with that grid, as
/// far as they are known before the network has run. The scan's voxels are not needed: a program
/// can ask while it is still reading them. Not for [released](Options::released) answers.
///
/// # Errors
/// [`SessionError::NoPrompt`]: nothing says where the object is.
pub fn places(
    model: &Model,
    grid: &Grid,
    options: &Options,
    prompts: &Prompts,
) -> Result<Vec<Patch>, SessionError> {
    let sight = region::Sight { config: model.config(), grid, spacing: options.spacing };
    steer::places(&sight, prompts)
}

/// Why an interaction failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Memory was refused: the session is as it was.
    #[error(transparent)]
    Memory(#[from] Refused),
    /// An op of the network failed: on its device, for lack of memory, or because the observer
    /// cancelled it.
    #[error(transparent)]
    Op(#[from] OpError),
    /// Nothing says where the object is: no prompt, and no answer to correct.
    #[error("an interaction needs a point, a box, a scribble or a mask")]
    NoPrompt,
    /// The network's result is not finite.
    #[error(
        "the network's {what} is not finite: its weights do not suit this scan's values, or the precision that it runs in"
    )]
    NotFinite {
        /// `score` or `answer`.
        what: &'static str,
    },
    /// A prompt is not on the image.
    #[error("{what} {voxel:?} lies outside the scan of {size:?} voxels")]
    Outside {
        /// `point` or `box corner`.
        what: &'static str,
        /// The voxel.
        voxel: [usize; 3],
        /// The size of the scan.
        size: [usize; 3],
    },
    /// A dense prompt, or a mask of other objects, does not have one value per voxel of the scan.
    #[error("{what} has {got} voxels, the scan has {expected}")]
    Dense {
        /// `the dense prompt` or `the mask of other objects`.
        what: &'static str,
        /// The number of values given.
        got: usize,
        /// The number of voxels of the scan.
        expected: usize,
    },
    /// A logit of the dense prompt is not finite.
    #[error("the logits are {value} at voxel {voxel:?}, expected finite numbers")]
    Logit {
        /// The first such voxel.
        voxel: [usize; 3],
        /// What it holds.
        value: f32,
    },
}

impl From<CudaError> for SessionError {
    fn from(e: CudaError) -> SessionError {
        SessionError::Op(e.into())
    }
}

/// What a user should know about an answer; displayed, a sentence in English.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// Only clicks off the object were given: the answer is empty.
    OnlyDenied,
    /// No prompt disagreed with the answer: it did not change.
    Agreed,
    /// The mask or logits that were given mark no voxel: they count as not given.
    EmptyMask,
    /// The box was one slice thick: it was taken to be as deep as the mean of its other sides.
    FlatBox,
    /// The box reached beyond the scan: it was cut off at the scan's faces.
    ClippedBox,
    /// At the requested spacing, the object pointed at is no more than a few voxels.
    HardlySeen,
    /// This many points on the object were left out, because they are within other objects.
    InOtherObject(usize),
    /// The object continued beyond the patch: the network looked at more of the scan.
    LookedFurther,
    /// This many clicks were obeyed without running the network around them: they are on too many
    /// parts of the object for one interaction.
    NotLookedAt(usize),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::OnlyDenied => f.write_str("no prompt marks the object: the mask is empty"),
            Note::Agreed => f.write_str("the mask already agrees: nothing changed"),
            Note::EmptyMask => f.write_str("the mask marks no voxel: it is ignored"),
            Note::FlatBox => f.write_str("the box is one slice thick: the object is assumed to be about as deep as the box is wide"),
            Note::ClippedBox => f.write_str("the box reaches beyond the scan: it was cut at the scan's faces"),
            Note::HardlySeen => {
                f.write_str("at this spacing the prompted region has only a few voxels: a finer spacing shows more")
            }
            Note::InOtherObject(n) => {
                write!(f, "{n} points on the object lie in other objects, which the mask never enters: they were ignored")
            }
            Note::NotLookedAt(n) => {
                write!(f, "{n} clicks are too far apart for one interaction: the network did not look at all of them; give some in another interaction")
            }
            Note::LookedFurther => f.write_str("the object extends beyond the patch: the network looked further"),
        }
    }
}

/// A candidate mask that the network proposed for a patch, before refinement.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The network's estimate of the candidate's Dice, 0 to 1; not calibrated.
    pub score: f32,
    /// One bit per voxel of the patch, `[i][j][k]`, set on the object: the first voxel is the
    /// highest bit of the first byte.
    pub bits: Arc<Vec<u8>>,
}

/// The answer of an interaction: a mask of the object on the scan, and how it was found.
///
/// It never changes. Copies are cheap: they share the field's tiles, the logits and the candidates.
#[derive(Clone)]
pub struct Prediction {
    /// The answer's logits on the scan's own grid, positive on the object.
    pub field: Field,
    /// The patch that the network looked at last.
    pub patch: Patch,
    /// The answer's logits on that patch `[s, s, s]`, as they were when it looked.
    pub logits: Tensor,
    /// All candidates of that look; none if the answer is a mask that was given, or empty, and the
    /// network has not run since.
    pub candidates: Vec<Candidate>,
    /// The index in [`Prediction::candidates`] of the one that was refined into the answer.
    pub selected: usize,
    /// The expected Dice of the answer, 0 to 1. None if the model is not calibrated
    /// ([`Config::calibration`](crate::model::Config::calibration)), there are no candidates, or
    /// the answer is empty.
    pub score: Option<f32>,
    /// Time spent on prompts and tokens, decoder, refiner, all looks together. A CUDA device does
    /// the three in one step, which is counted in the last.
    pub seconds: [Duration; 3],
    /// Time spent cutting patches out of the scan, and encoding them, for this answer.
    pub encoding: [Duration; 2],
    /// How many times the network was run on prompts.
    pub looks: usize,
    /// Voxels of the scan that changed from one side to the other.
    pub changed: usize,
    /// What a user should know.
    pub notes: Vec<Note>,
    /// Points of this interaction that were outside the patch and were left out: only in released
    /// answers.
    pub left_out: usize,
    /// Points of this interaction that only the refiner saw, because there were more than the
    /// prompt encoder takes.
    pub thinned: usize,
    /// The charge of its logits and candidates: its field's tiles have their own.
    _charge: Arc<Charge>,
}

/// The charge of an answer's logits and of so many bytes of candidates. Unwinds if that is refused.
fn charge(logits: &Tensor, bits: usize) -> Arc<Charge> {
    let charge = Charge::of::<u8>(ANSWER, logits.uncharged() + bits);
    Arc::new(charge.unwrap_or_else(|e| memory::refuse(e)))
}

/// An error unless all parts of an answer are finite numbers.
fn finite(answer: &Answer) -> Result<(), SessionError> {
    let parts = [
        ("score", answer.candidates.scores.try_data()?),
        ("answer", answer.logits.value().try_data()?),
    ];
    match parts.into_iter().find(|(_, values)| values.iter().any(|v| !v.is_finite())) {
        Some((what, _)) => Err(SessionError::NotFinite { what }),
        None => Ok(()),
    }
}

impl Prediction {
    fn of(
        answer: &Answer,
        field: Field,
        logits: Tensor,
        encoded: &EncodedPatch,
    ) -> Result<Prediction, OpError> {
        let summary = answer.summary()?;
        let each = summary.scores.iter().zip(&summary.bits[1..]);
        let candidate = |(score, bits): (&f32, &Vec<u8>)| Candidate {
            score: *score,
            bits: Arc::new(memory::copied(ANSWER, bits)),
        };
        let candidates: Vec<Candidate> = each.map(candidate).collect();
        let bits = candidates.iter().map(|c| c.bits.len()).sum();
        Ok(Prediction {
            candidates,
            selected: summary.selected,
            seconds: answer.seconds,
            ..Prediction::unasked(field, logits, encoded.patch().clone(), bits)
        })
    }

    /// Bytes that it holds and another answer does not.
    fn bytes_beyond(&self, other: Option<&Prediction>) -> usize {
        let bits: usize = self.candidates.iter().map(|c| c.bits.len()).sum();
        self.logits.len() * 4 + bits + self.field.bytes_beyond(other.map(|o| &o.field))
    }

    /// An answer in which the network has no part, with the charge of so many bytes of candidates.
    fn unasked(field: Field, logits: Tensor, patch: Patch, bits: usize) -> Prediction {
        Prediction {
            _charge: charge(&logits, bits),
            field,
            patch,
            logits,
            candidates: vec![],
            selected: 0,
            score: None,
            seconds: Default::default(),
            encoding: Default::default(),
            looks: 0,
            changed: 0,
            notes: vec![],
            left_out: 0,
            thinned: 0,
        }
    }

    /// The answer's mask on the scan's own grid, `[i][j][k]`: 1 where the logit is positive, 0
    /// elsewhere.
    ///
    /// # Panics
    /// If memory for it is refused, this unwinds to [`memory::caught`].
    pub fn mask(&self) -> Vec<u8> {
        self.field.dense(0, |logit| u8::from(logit > 0.0))
    }

    /// The answer's probabilities on the scan's own grid, `[i][j][k]`: `1 / (1 + exp(-logit))`, and
    /// 0 where the network never looked.
    ///
    /// # Panics
    /// If memory for it is refused, this unwinds to [`memory::caught`].
    pub fn probability(&self) -> Vec<f32> {
        self.field.dense(0.0, probability_of)
    }

    /// Calls `visit(voxel, probability)` for the voxels that have a logit; the probability of all
    /// others is 0.
    pub fn each_probability(&self, mut visit: impl FnMut([usize; 3], f32)) {
        self.field.each_voxel(|voxel, logit| visit(voxel, probability_of(logit)));
    }
}

fn probability_of(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}

/// A voxel of the scan that the user marked as on the object or off it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    /// The voxel `[i, j, k]`.
    pub voxel: [usize; 3],
    /// Whether it is on the object.
    pub positive: bool,
}

/// The state of a session after an interaction.
#[derive(Clone, Default)]
struct State {
    /// The prompts that hold, in the order in which they were given.
    said: Arc<Charged<Said>>,
    bounds: Option<[usize; 6]>,
    /// 1 in other objects, on the scan's grid.
    others: Option<Arc<Charged<u8>>>,
    /// Whether the answer began as a mask that was given.
    drawn: bool,
    /// The patches that the network looked at.
    looked: Arc<Vec<Patch>>,
    prediction: Option<Arc<Prediction>>,
    /// Bytes that the state before it holds and it does not: the cost of being able to undo.
    replaced: usize,
}

impl State {
    /// Bytes that it holds and the state after it does not.
    fn bytes_beyond(&self, after: &State) -> usize {
        let said =
            if Arc::ptr_eq(&self.said, &after.said) { 0 } else { size_of_val(&self.said[..]) };
        let others = match (&self.others, &after.others) {
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => 0,
            (others, _) => others.as_ref().map_or(0, |o| o.len()),
        };
        let answer = match (&self.prediction, &after.prediction) {
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => 0,
            (Some(a), b) => a.bytes_beyond(b.as_deref()),
            (None, _) => 0,
        };
        said + others + answer
    }
}

/// A session: one object on a scan, its prompts so far, its answers and its undo history.
///
/// It may move between threads, and is changed by one at a time. Any number of sessions may work on
/// a [`Scan`] at once; they share its encoded patches and its device's threads. A new session
/// computes nothing until [`Session::interact`] or [`Session::prepare`] is called.
pub struct Session {
    scan: Arc<Scan>,
    /// The states reached, the first of them empty unless it was forgotten; those after `now` can
    /// be redone.
    states: Vec<State>,
    now: usize,
    /// Where a released session looks, once that is known.
    place: Option<Patch>,
    /// The places of the patches that [`Session::ahead`] or [`Session::ahead_of`] returned last,
    /// while they are useful.
    sign: Option<Arc<Vec<Grid>>>,
    _joined: Arc<()>,
}

impl Session {
    /// A session for a new object on `scan`.
    pub fn new(scan: &Arc<Scan>) -> Session {
        let (states, _joined) = (vec![State::default()], scan.joined());
        Session { scan: scan.clone(), states, now: 0, place: None, sign: None, _joined }
    }

    /// A session for another object on the same scan. A [released](Options::released) one looks at
    /// the same patch as this.
    pub fn another(&self) -> Session {
        Session { place: self.place.clone(), ..Session::new(&self.scan) }
    }

    /// The scan that it works on.
    pub fn scan(&self) -> &Arc<Scan> {
        &self.scan
    }

    /// The present answer; None before the first interaction.
    pub fn prediction(&self) -> Option<&Arc<Prediction>> {
        self.states[self.now].prediction.as_ref()
    }

    /// The voxels that the user marked and that the answer obeys, in the order in which they were
    /// given.
    pub fn said(&self) -> &[Said] {
        &self.states[self.now].said
    }

    /// The patch that the network looked at last, or was [prepared](Session::prepare) for; None if
    /// there is neither.
    pub fn patch(&self) -> Option<&Patch> {
        self.prediction().map(|p| &p.patch).or(self.place.as_ref())
    }

    /// The numbers of interactions that can be undone and that can be redone.
    pub fn depth(&self) -> (usize, usize) {
        (self.now, self.states.len() - 1 - self.now)
    }

    /// Undoes the last interaction, bit for bit, without running the network; false if there is
    /// none to undo.
    pub fn undo(&mut self) -> bool {
        let can = self.now > 0;
        self.now -= usize::from(can);
        self.sign = None;
        can
    }

    /// Restores the answer that was undone last, without running the network; false if there is
    /// none. After an undo, a new interaction removes what could be redone.
    pub fn redo(&mut self) -> bool {
        let can = self.now + 1 < self.states.len();
        self.now += usize::from(can);
        self.sign = None;
        can
    }

    /// Forgets prompts, answers and history. Encoded patches stay.
    pub fn reset(&mut self) {
        self.states = vec![State::default()];
        self.now = 0;
        self.sign = None;
    }

    /// Bytes that the undo history holds, in addition to those of the present answer.
    pub fn history_bytes(&self) -> usize {
        self.states.iter().skip(1).map(|s| s.replaced).sum()
    }

    /// Forgets what exceeds the limits of the history, the oldest first.
    fn forget(&mut self) {
        let Options { undo_steps, undo_bytes, .. } = *self.scan.options();
        let all = undo_bytes.min((memory::limit() / 4) as usize);
        let undo_bytes = all / self.scan.sessions().max(1);
        let mut bytes = self.history_bytes();
        while self.now > 1 && (self.now > undo_steps || bytes > undo_bytes) {
            self.states.remove(0);
            self.now -= 1;
            bytes -= self.states[0].replaced;
        }
    }

    /// Encodes the patches that these prompts would make the network look at, so that the first
    /// interaction does not have to wait for them. The session does not get the prompts. Returns
    /// the time spent cutting patches out of the scan, and encoding them; if the session is not
    /// [released](Options::released), both are counted as encoding. A released session starts
    /// afresh: its answers and its history are gone.
    /// If memory is refused, other patches go, as [`Session::interact_observed`] says.
    ///
    /// # Errors
    /// As [`Session::interact`].
    pub fn prepare(
        &mut self,
        prompts: &Prompts,
        observer: &mut Observer,
    ) -> Result<[Duration; 2], SessionError> {
        self.check(prompts)?;
        self.attempted(observer, |session, observer| session.prepare_here(prompts, observer))
    }

    fn prepare_here(
        &mut self,
        prompts: &Prompts,
        observer: &mut Observer,
    ) -> Result<[Duration; 2], SessionError> {
        if self.scan.options().released {
            let patch = released::place(&self.scan, prompts)?;
            let (encoded, now) = self.scan.encoded(&patch, observer)?;
            self.reset();
            self.place = Some(patch);
            return Ok(if now { encoded.seconds } else { [Duration::ZERO; 2] });
        }
        let start = std::time::Instant::now();
        self.place = Some(steer::prepare(&self.scan, prompts, observer)?);
        Ok([Duration::ZERO, start.elapsed()])
    }

    /// The patch that the network will probably look at when a click disagrees with the answer:
    /// where it looked last, or at the mask that was given; to be encoded before that. None if that
    /// is unknown: a first click is looked at where it is ([`Session::ahead_of`]). This makes what
    /// was returned before useless, as another interaction, an undo, a redo or a reset does to
    /// this.
    pub fn ahead(&mut self) -> Option<Ahead> {
        self.sign = None;
        let patch = match self.scan.options().released {
            true => self.place.clone(),
            false => steer::ahead(&self.scan, &self.states[self.now]),
        }?;
        let sign = self.sign.insert(Arc::new(vec![patch.grid]));
        Some(Ahead::new(&self.scan, sign, patch))
    }

    /// The patches that the network will look at if these prompts are the first, as far as that is
    /// known, in order; to be encoded before that. A program calls this with the place where a
    /// pointer rests: a first click near that place is usually looked at with the same patches.
    /// Gives no prompt.
    ///
    /// Empty if there is an answer, whose next look [`Session::ahead`] gives, and if the very same
    /// places were returned last and some of them are still held. Otherwise this makes what was
    /// returned before useless, as an interaction, an undo, a redo or a reset does to this.
    ///
    /// # Errors
    /// A prompt is outside the scan, has the wrong size or is not finite, or nothing says where the
    /// object is.
    pub fn ahead_of(&mut self, prompts: &Prompts) -> Result<Vec<Ahead>, SessionError> {
        self.check(prompts)?;
        if self.prediction().is_some() {
            return Ok(vec![]);
        }
        let patches = match (self.scan.options().released, &self.place) {
            (true, Some(place)) => vec![place.clone()],
            (true, None) => vec![released::place(&self.scan, prompts)?],
            (false, _) => steer::places(&region::Sight::of(&self.scan), prompts)?,
        };
        let places: Vec<Grid> = patches.iter().map(|patch| patch.grid).collect();
        // Patches that are being encoded there, or waiting to be, continue.
        let is_told = |sign: &Arc<Vec<Grid>>| **sign == places && Arc::weak_count(sign) > 0;
        if self.sign.as_ref().is_some_and(is_told) {
            return Ok(vec![]);
        }
        let sign: &Arc<Vec<Grid>> = self.sign.insert(Arc::new(places));
        Ok(patches.into_iter().map(|patch| Ahead::new(&self.scan, sign, patch)).collect())
    }

    /// One interaction: adds the prompts to those given before, and returns the new answer.
    ///
    /// A box is kept until another replaces it, and so are other objects; a mask or logits replace
    /// the answer. After an answer, empty prompts mean agreement: nothing changes, and a [`Note`]
    /// says so. The network runs as often as needed ([`Prediction::looks`]), on patches that are
    /// encoded now or were before.
    ///
    /// # Errors
    /// A prompt is outside the scan, has the wrong size or is not finite
    /// ([`SessionError::Outside`], [`SessionError::Dense`], [`SessionError::Logit`]); nothing says
    /// where the object is ([`SessionError::NoPrompt`]); memory is refused; the device fails; the
    /// network's answer is not finite. The session is then as it was before.
    pub fn interact(&mut self, prompts: &Prompts) -> Result<&Arc<Prediction>, SessionError> {
        self.interact_observed(prompts, &mut Observer::none())
    }

    /// One interaction, as [`Session::interact`] does it, with an observer that sees every stage
    /// and may cancel it. If memory is refused, by the budget, the system or a device, the work
    /// begins again: once other work has given memory back, if the observer can wait for that, and
    /// then, if encoded patches take what is refused, without half of these, and without any.
    /// Stages that are done again are not told again.
    ///
    /// # Errors
    /// As [`Session::interact`]; [`OpError::Cancelled`] in [`SessionError::Op`] if the observer
    /// cancels it.
    pub fn interact_observed(
        &mut self,
        prompts: &Prompts,
        observer: &mut Observer,
    ) -> Result<&Arc<Prediction>, SessionError> {
        self.check(prompts)?;
        let mut next =
            self.attempted(observer, |session, observer| session.next(prompts, observer))?;
        next.replaced = self.states[self.now].bytes_beyond(&next);
        self.states.truncate(self.now + 1);
        self.states.push(next);
        self.now += 1;
        self.sign = None;
        self.forget();
        Ok(self.prediction().expect("just pushed"))
    }

    /// Does work that changes nothing if it fails: more than once, if memory is refused.
    fn attempted<T>(
        &mut self,
        observer: &mut Observer,
        mut work: impl FnMut(&mut Session, &mut Observer) -> Result<T, SessionError>,
    ) -> Result<T, SessionError> {
        let done = observer.done();
        let (mut has_waited, mut attempt) = (false, 0);
        loop {
            let worked = memory::caught(|| work(self, observer));
            let refusal = match worked.unwrap_or_else(|refused| Err(refused.into())) {
                Err(SessionError::Memory(refused) | SessionError::Op(OpError::Memory(refused))) => {
                    SessionError::Memory(refused)
                }
                Err(e @ SessionError::Op(OpError::Cuda(CudaError::Memory { .. }))) => e,
                worked => return worked,
            };
            observer.again(done);
            // What other work holds comes back without loss. Encoded patches are kept to save time:
            // they go next, before an answer is refused.
            if !has_waited && observer.alone()? {
                has_waited = true;
            } else if self.scan.makes_room(&refusal, attempt) {
                attempt += 1;
            } else {
                return Err(refusal);
            }
        }
    }

    /// The state that an interaction leads to.
    fn next(&mut self, prompts: &Prompts, observer: &mut Observer) -> Result<State, SessionError> {
        let state = &self.states[self.now];
        Ok(match self.scan.options().released {
            true => {
                let patch = match &self.place {
                    Some(patch) => patch.clone(),
                    None => released::place(&self.scan, prompts)?,
                };
                let (encoded, now) = self.scan.encoded(&patch, observer)?;
                let mut next = released::interact(&self.scan, state, &encoded, prompts, observer)?;
                self.place = Some(patch);
                if let (true, Some(p)) = (now, &mut next.prediction) {
                    Arc::make_mut(p).encoding = encoded.seconds;
                }
                next
            }
            false => steer::interact(&self.scan, state, prompts, observer)?,
        })
    }

    fn check(&self, prompts: &Prompts) -> Result<(), SessionError> {
        let size = self.scan.grid().size;
        let beyond = |v: [usize; 3], slack: usize| (0..3).any(|a| v[a] >= size[a] + slack);
        if let Some((voxel, _)) = prompts.points.iter().find(|(p, _)| beyond(*p, 0)) {
            return Err(SessionError::Outside { what: "point", voxel: *voxel, size });
        }
        if let Some(b) = prompts.bounds {
            let (low, high) = ([b[0], b[1], b[2]], [b[3], b[4], b[5]]);
            if beyond(high, 1) || (0..3).any(|a| low[a] >= high[a]) {
                return Err(SessionError::Outside { what: "box corner", voxel: high, size });
            }
        }
        let expected = self.scan.grid().voxels();
        let dense = match &prompts.dense {
            Some(Dense::Mask(m)) => m.len(),
            Some(Dense::Logits(l)) => l.len(),
            None => expected,
        };
        let others = prompts.others.as_ref().map_or(expected, Vec::len);
        let lengths = [("the dense prompt", dense), ("the mask of other objects", others)];
        if let Some((what, got)) = lengths.into_iter().find(|(_, got)| *got != expected) {
            return Err(SessionError::Dense { what, got, expected });
        }
        let Some(Dense::Logits(logits)) = &prompts.dense else { return Ok(()) };
        match logits.iter().position(|v| !v.is_finite()) {
            Some(at) => {
                let [_, nj, nk] = size;
                let voxel = [at / nk / nj, at / nk % nj, at % nk];
                Err(SessionError::Logit { voxel, value: logits[at] })
            }
            None => Ok(()),
        }
    }

    /// The present answer's mask on the scan's own grid, `[i][j][k]`: 1 on the object, 0 off it; 0
    /// everywhere before the first interaction.
    ///
    /// # Panics
    /// If memory for it is refused, this unwinds to [`memory::caught`].
    pub fn mask(&self) -> Vec<u8> {
        self.prediction()
            .map_or_else(|| memory::zeroed(ANSWER, self.scan.grid().voxels()), |p| p.mask())
    }

    /// The present answer's probabilities on the scan's own grid, as [`Prediction::probability`]
    /// gives them. All 0 before the first interaction.
    ///
    /// # Panics
    /// If memory for it is refused, this unwinds to [`memory::caught`].
    pub fn probability(&self) -> Vec<f32> {
        self.prediction()
            .map_or_else(|| memory::zeroed(ANSWER, self.scan.grid().voxels()), |p| p.probability())
    }
}
