//! The state of a client of MONAI Label, which sends all of its clicks each time: a scan, an object
//! on it, and the clicks at each step.
//!
//! A list of clicks that continues an earlier one is answered from there, step by step, as the user
//! made them; one that takes something back goes back as far as necessary.

use super::failure::{Failure, in_turns};
use super::journal::{IMAGE, Journal, Kept, Stored, kept, session_anew};
use super::opened::Opened;
use super::shelf::Taken;
use super::turns::Turn;
use crate::memory::{self, Charge};
use crate::prompt::Prompts;
use crate::session::kept::{Reader, Saved, Writer};
use crate::session::{Ahead, Session};
use crate::sync::{locked, own};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

/// Kinds of records in a session's journal, besides its scan: that it went back, that it continued,
/// and how the state that a rewritten journal describes begins.
const BACK: u8 = 2;
const BROUGHT: u8 = 3;
const BEGUN: u8 = 4;

/// How messages name the memory that clicks take.
const CLICKS: &str = "the prompts of the object";

/// All that a client says about an object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Clicks {
    /// The client's name for the object.
    pub label: String,
    /// Voxels on it, and off it.
    pub on: Vec<[usize; 3]>,
    pub off: Vec<[usize; 3]>,
    /// The object's box, `[i0, j0, k0, i1, j1, k1]`, ends exclusive.
    pub bounds: Option<[usize; 6]>,
}

impl Clicks {
    /// What these clicks add to others; none if they do not include all of those.
    fn beyond(&self, before: &Clicks) -> Option<Prompts> {
        let goes_on = self.label == before.label
            && self.on.starts_with(&before.on)
            && self.off.starts_with(&before.off)
            && (before.bounds.is_none() || before.bounds == self.bounds);
        goes_on.then(|| {
            let on = self.on[before.on.len()..].iter().map(|v| (*v, true));
            let off = self.off[before.off.len()..].iter().map(|v| (*v, false));
            Prompts {
                points: on.chain(off).collect(),
                bounds: self.bounds.filter(|_| before.bounds.is_none()),
                ..Prompts::default()
            }
        })
    }

    /// All of them as prompts.
    fn all(&self) -> Prompts {
        let on = self.on.iter().map(|v| (*v, true));
        let points = on.chain(self.off.iter().map(|v| (*v, false))).collect();
        Prompts { points, bounds: self.bounds, ..Prompts::default() }
    }

    fn put(&self, out: &mut Writer) {
        out.text(&self.label);
        for voxels in [&self.on, &self.off] {
            out.size(voxels.len());
            voxels.iter().for_each(|voxel| out.voxel(*voxel));
        }
        out.bounds(self.bounds);
    }

    /// Reads written clicks on a scan of the given size.
    fn of(size: [usize; 3], from: &mut Reader) -> Result<Clicks, String> {
        let label = from.text()?;
        let mut lists = [vec![], vec![]];
        for voxels in &mut lists {
            // Three numbers each.
            for _ in 0..from.count(12)? {
                voxels.push(from.voxel(size)?);
            }
        }
        let [on, off] = lists;
        Ok(Clicks { label, on, off, bounds: from.bounds(size)? })
    }
}

/// A scan with an object on it.
pub struct Clicked {
    pub opened: Opened,
    /// When it arrived, and when it was last used, in seconds since 1970.
    pub came: u64,
    used: AtomicU64,
    work: Mutex<Steps>,
    /// The series of the server's folder that it is, if it is one.
    pub series: Option<Taken>,
    /// The journal in which changes are written, and the scan as the journal describes it.
    pub journal: Option<Arc<Journal>>,
    pub stored: Option<Stored>,
}

impl Kept for Clicked {
    fn journal(&self) -> Option<&Arc<Journal>> {
        self.journal.as_ref()
    }

    fn renew(&self) -> Result<(), Failure> {
        let (Some(journal), Some(stored)) = (&self.journal, &self.stored) else { return Ok(()) };
        let work = locked(&self.work);
        journal.renew(|fresh| {
            fresh.put(IMAGE, |out| stored.put(out))?;
            // What was undone is never redone.
            let last = work.session.depth().0;
            let head = |n: usize, out: &mut Writer| {
                let said = work.said(n);
                if n == 0 {
                    out.flag(said.is_some());
                    said.iter().for_each(|said| said.put(out));
                } else {
                    Back::default().put(out);
                    said.unwrap_or(&Clicks::default()).put(out);
                }
            };
            session_anew(fresh, &work.session, [BEGUN, BROUGHT], last, head)
        })
    }
}

/// An object, and the clicks up to each step of its session.
struct Steps {
    session: Session,
    said: Vec<Arc<Step>>,
}

/// The clicks up to a step, which are counted.
struct Step {
    clicks: Clicks,
    _charge: Charge,
}

impl Step {
    /// Unwinds if memory is refused.
    fn new(clicks: Clicks) -> Step {
        let voxels = clicks.on.capacity() + clicks.off.capacity();
        let charge = Charge::of::<[usize; 3]>(CLICKS, voxels);
        Step { clicks, _charge: charge.unwrap_or_else(|e| memory::refuse(e)) }
    }
}

/// Steps that return to what they were unless what is done with them is done to its end: on
/// failure, if memory is refused, and on a panic.
struct Attempt<'a> {
    steps: &'a mut Steps,
    /// None once it is done.
    before: Option<(Saved, Vec<Arc<Step>>)>,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if let Some((session, said)) = self.before.take() {
            self.steps.session.restore(session);
            self.steps.said = said;
        }
    }
}

/// How far a session went back before it continued.
#[derive(Clone, Copy, Default)]
struct Back {
    /// To its beginning.
    anew: bool,
    /// This many steps.
    steps: usize,
}

impl Back {
    fn put(self, out: &mut Writer) {
        out.flag(self.anew);
        out.size(self.steps);
    }
}

/// The answer to a request.
pub struct Answered {
    /// The mask, `[i][j][k]`.
    pub mask: Vec<u8>,
    pub voxels: usize,
    pub score: Option<f32>,
    pub notes: Vec<String>,
}

impl Answered {
    /// A session's answer. Memory may be refused, which unwinds.
    fn of(session: &Session) -> Answered {
        let answer = session.prediction();
        let notes =
            answer.map_or_else(Vec::new, |a| a.notes.iter().map(|n| n.to_string()).collect());
        Answered {
            voxels: answer.map_or(0, |a| a.field.voxels()),
            score: answer.and_then(|a| a.score),
            notes,
            mask: session.mask(),
        }
    }
}

impl Clicked {
    /// A scan without clicks, of which nothing is written.
    pub fn new(opened: Opened) -> Clicked {
        let session = Session::new(&opened.scan);
        let now = now();
        Clicked {
            opened,
            came: now,
            used: AtomicU64::new(now),
            work: Mutex::new(Steps { session, said: vec![] }),
            series: None,
            journal: None,
            stored: None,
        }
    }

    /// Repeats what its journal says.
    pub fn follow(&mut self, kind: u8, from: &mut Reader) -> Result<(), String> {
        let size = self.opened.image.grid.size;
        own(&mut self.work).follow(kind, size, from)
    }

    /// Called when all of its journal has been followed.
    pub fn followed(&mut self) {
        own(&mut self.work).session.look_anew();
    }

    /// Where the object will probably be looked at next.
    pub fn ahead(&mut self) -> Option<Ahead> {
        own(&mut self.work).session.ahead()
    }

    /// When it was last used, in seconds since 1970.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Brings the object to the state of the given clicks, from its beginning if it is to be
    /// `anew`, and returns what `tell` makes of the answer. That is part of the change, because
    /// memory for it may be refused: if it fails nothing has changed, and nothing is written.
    pub fn ask<T>(
        &self,
        said: Clicks,
        anew: bool,
        turn: &Turn,
        tell: impl FnOnce(Answered) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.used.store(now(), Ordering::Relaxed);
        // The state is consistent after a panic: it goes back to where it was.
        let mut work = locked(&self.work);
        let tell = |session: &Session| tell(Answered::of(session));
        work.bring(said, anew, turn, self.journal.as_ref(), tell)
    }
}

impl Steps {
    /// Brings the object to the state of the given clicks, and has it told; if either fails it is
    /// unchanged.
    fn bring<T>(
        &mut self,
        said: Clicks,
        anew: bool,
        turn: &Turn,
        journal: Option<&Arc<Journal>>,
        tell: impl FnOnce(&Session) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.attempt(|steps| steps.brought(said, anew, turn, journal, tell))
    }

    fn attempt<T>(
        &mut self,
        work: impl FnOnce(&mut Steps) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let before = Some((self.session.saved(), self.said.clone()));
        let mut attempt = Attempt { steps: self, before };
        let done = work(attempt.steps)?;
        attempt.before = None;
        Ok(done)
    }

    fn brought<T>(
        &mut self,
        said: Clicks,
        anew: bool,
        turn: &Turn,
        journal: Option<&Arc<Journal>>,
        tell: impl FnOnce(&Session) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut back = Back::default();
        if anew {
            self.reset(&mut back);
        }
        let more = loop {
            let last = self.said.last().map(|step| &step.clicks);
            match last.map_or_else(|| Some(said.all()), |last| said.beyond(last)) {
                Some(more) => break more,
                // If the history does not go back that far, it begins afresh.
                None if self.session.undo() => {
                    self.said.pop();
                    back.steps += 1;
                }
                None => self.reset(&mut back),
            }
        };
        if more.is_empty() {
            let told = tell(&self.session)?;
            if let Some(journal) = journal.filter(|_| back.anew || back.steps > 0) {
                journal.note(BACK, |out| back.put(out))?;
            }
            return Ok(told);
        }
        let said = Step::new(said);
        let head = |out: &mut Writer| {
            back.put(out);
            said.clicks.put(out);
        };
        let told = kept(journal, &mut self.session, BROUGHT, head, |session| {
            in_turns(turn, |o| session.interact_observed(&more, o).map(|_| ()))?;
            tell(session)
        })?;
        self.push(said);
        Ok(told)
    }

    /// Records a step that was made, with the clicks up to it.
    fn push(&mut self, said: Step) {
        self.said.push(Arc::new(said));
        // The session cannot go back to what it has forgotten: its first step and those after it
        // are kept.
        let kept = self.session.depth().0 + 1;
        self.said.drain(..self.said.len().saturating_sub(kept));
    }

    /// The clicks up to the n-th step that can be undone; those of the very first state if n is 0,
    /// if there were any.
    fn said(&self, n: usize) -> Option<&Clicks> {
        // As many as steps, and one more if the first ones are forgotten.
        let before = self.said.len().checked_sub(self.session.depth().0)?;
        self.said.get((n + before).checked_sub(1)?).map(|step| &step.clicks)
    }

    fn reset(&mut self, back: &mut Back) {
        self.session.reset();
        self.said.clear();
        *back = Back { anew: true, steps: 0 };
    }

    fn follow(&mut self, kind: u8, size: [usize; 3], from: &mut Reader) -> Result<(), String> {
        let odd = || format!("unknown record of kind {kind}");
        if kind == BEGUN {
            self.reset(&mut Back::default());
            if from.flag()? {
                self.said.push(Arc::new(Step::new(Clicks::of(size, from)?)));
            }
            return self.session.follow_first(from);
        }
        let (anew, steps) = (from.flag()?, from.size()?);
        let said = match kind {
            BACK => None,
            BROUGHT => Some(Clicks::of(size, from)?),
            _ => return Err(odd()),
        };
        if anew {
            self.reset(&mut Back::default());
        }
        for _ in 0..steps {
            if !self.session.undo() {
                return Err(odd());
            }
            self.said.pop();
        }
        if let Some(said) = said {
            self.session.follow(from)?;
            self.push(Step::new(said));
        }
        Ok(())
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::opened::Engine;
    use super::super::turns::Turns;
    use super::*;
    use crate::device::{Cpu, Device};
    use crate::model::{Model, Weights};
    use crate::session::{Encodings, Options};
    use crate::volume::{Affine, Description, Element, Grid, Volume};
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::path::Path;

    /// A scan of noise.
    fn noise() -> Clicked {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/small.safetensors");
        let weights = Weights::open(Path::new(path)).unwrap();
        let model = Arc::new(Model::new(&Device::Cpu(Cpu::new(2).unwrap()), &weights).unwrap());
        let grid = Grid { size: [28, 24, 20], affine: Affine::from_spacing([1.0; 3]) };
        let values = (0..28 * 24 * 20).map(|at: usize| (at * at % 251) as u8).collect();
        let description = Description::of_new(&grid, Element::Uint8.name());
        let image = Volume::of_elements(grid, Element::Uint8, values, description).unwrap();
        let options = Options::default();
        let encodings = Arc::new(Encodings::new(options.memory));
        let engine = Engine { model: &model, options, encodings: &encodings };
        Clicked::new(Opened::new(engine, image).ok().unwrap())
    }

    /// The turn of a client that is alone.
    fn turn() -> Turn {
        Arc::<Turns>::default().enter(&Arc::default())
    }

    fn on(voxels: &[[usize; 3]]) -> Clicks {
        Clicks { on: voxels.to_vec(), ..Clicks::default() }
    }

    const FIRST: [usize; 3] = [14, 12, 10];

    #[test]
    fn what_cannot_be_told_is_not_done() {
        let clicked = noise();
        let state = || {
            let steps = locked(&clicked.work);
            let said: Vec<Clicks> = steps.said.iter().map(|step| step.clicks.clone()).collect();
            (said, steps.session.depth(), steps.session.mask())
        };
        let fails = |said: &Clicks, anew: bool| {
            let before = state();
            let full = |_: Answered| Err::<(), _>(Failure::full("no room to tell of it"));
            let failed = clicked.ask(said.clone(), anew, &turn(), full);
            assert_eq!(failed.unwrap_err().message(), "no room to tell of it");
            assert!(state() == before);
            // Memory for the answer is refused, which unwinds.
            let refused = crate::memory::caught(|| {
                clicked.ask(said.clone(), anew, &turn(), |_| {
                    crate::memory::zeroed::<u8>("a test", usize::MAX / 2);
                    Ok(())
                })
            });
            assert!(refused.is_err() && state() == before);
        };
        // A first click, one more, one that is taken back, a beginning anew.
        let (one, two) = (on(&[FIRST]), on(&[FIRST, [3, 3, 3]]));
        fails(&one, false);
        for (said, depth) in [(&one, 1), (&two, 2)] {
            fails(said, false);
            let told = clicked.ask(said.clone(), false, &turn(), |answered| Ok(answered.mask));
            let (all, steps, mask) = state();
            assert!(told.unwrap() == mask && (all.len(), steps) == (depth, (depth, 0)));
        }
        fails(&one, false);
        fails(&Clicks::default(), false);
        fails(&one, true);
    }

    #[test]
    fn a_fault_leaves_the_object_as_it_was() {
        let clicked = noise();
        let told = clicked.ask(on(&[FIRST]), false, &turn(), |answered| Ok(answered.mask));
        let mask = told.unwrap();
        let mut steps = clicked.work.lock().unwrap();
        let fault = catch_unwind(AssertUnwindSafe(|| {
            steps.attempt(|steps| -> Result<(), Failure> {
                steps.reset(&mut Back::default());
                assert_eq!((steps.said.len(), steps.session.depth()), (0, (0, 0)));
                resume_unwind(Box::new("a fault"))
            })
        }));
        assert!(fault.is_err());
        assert_eq!((steps.said.len(), steps.session.depth()), (1, (1, 0)));
        assert!(steps.session.mask() == mask);
    }

    #[test]
    fn clicks_go_on_from_others_or_do_not() {
        let (a, b, c) = ([1, 2, 3], [4, 5, 6], [7, 8, 9]);
        let clicks = |on: &[[usize; 3]], off: &[[usize; 3]], bounds: Option<[usize; 6]>| Clicks {
            label: "tumour".into(),
            on: on.to_vec(),
            off: off.to_vec(),
            bounds,
        };
        let bounds = Some([0, 0, 0, 9, 9, 9]);
        let two = clicks(&[a, b], &[c], bounds);
        assert_eq!(two.all().points, [(a, true), (b, true), (c, false)]);
        let more = two.beyond(&clicks(&[a], &[], None)).unwrap();
        assert_eq!((more.points, more.bounds), (vec![(b, true), (c, false)], bounds));
        let more = two.beyond(&clicks(&[a, b], &[], bounds)).unwrap();
        assert_eq!((more.points, more.bounds), (vec![(c, false)], None));
        assert!(two.beyond(&two).unwrap().is_empty());
        for other in [
            clicks(&[b], &[], None),
            clicks(&[a, b, c], &[c], bounds),
            clicks(&[a], &[a], None),
            clicks(&[a], &[], Some([0, 0, 0, 1, 1, 1])),
            Clicks { label: "other".into(), ..clicks(&[a], &[], None) },
        ] {
            assert_eq!(two.beyond(&other), None, "{other:?}");
        }
        assert_eq!(clicks(&[a], &[], None).beyond(&clicks(&[a], &[], bounds)), None);
    }
}
