//! What a client of MONAI Label works on, which says all of its clicks each time: a scan, an object
//! on it, and what was said at each step.
//!
//! A list of clicks that goes on from an earlier one is answered from there, step by step, as the
//! person made them; one that takes something back goes back as far as it has to.

use super::failure::{Failure, unless_left};
use super::opened::Opened;
use crate::prompt::Prompts;
use crate::session::Session;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// All that a client says of an object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Clicks {
    /// What it calls the object.
    pub label: String,
    /// Voxels on it, and off it.
    pub on: Vec<[usize; 3]>,
    pub off: Vec<[usize; 3]>,
    /// Its box, `[i0, j0, k0, i1, j1, k1]`, ends exclusive.
    pub bounds: Option<[usize; 6]>,
}

impl Clicks {
    /// What these say that others did not; none where they do not say all that those did.
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

    /// All that they say.
    fn all(&self) -> Prompts {
        let on = self.on.iter().map(|v| (*v, true));
        let points = on.chain(self.off.iter().map(|v| (*v, false))).collect();
        Prompts { points, bounds: self.bounds, ..Prompts::default() }
    }
}

/// A scan with an object on it.
pub struct Clicked {
    pub opened: Opened,
    /// When it came, and when it was used, in seconds since 1970.
    pub came: u64,
    used: AtomicU64,
    work: Mutex<Steps>,
}

/// An object, and what was said of it up to each step of its session.
struct Steps {
    session: Session,
    said: Vec<Clicks>,
}

/// What is answered.
pub struct Answered {
    /// The mask, `[i][j][k]`.
    pub mask: Vec<u8>,
    pub voxels: usize,
    pub score: Option<f32>,
    pub notes: Vec<String>,
}

impl Clicked {
    pub fn new(opened: Opened) -> Clicked {
        let session = Session::new(&opened.scan);
        let now = now();
        Clicked {
            opened,
            came: now,
            used: AtomicU64::new(now),
            work: Mutex::new(Steps { session, said: vec![] }),
        }
    }

    /// When it was used last, in seconds since 1970.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Brings the object to what is said of it, from its beginning where it is to be `anew`.
    pub fn ask(&self, said: Clicks, anew: bool, left: &AtomicBool) -> Result<Answered, Failure> {
        self.used.store(now(), Ordering::Relaxed);
        // What a panic left is whole: a step is noted when it has come to its end.
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        work.bring(said, anew, left)?;
        let answer = work.session.prediction();
        let notes =
            answer.map_or_else(Vec::new, |a| a.notes.iter().map(|n| n.to_string()).collect());
        Ok(Answered {
            voxels: answer.map_or(0, |a| a.field.voxels()),
            score: answer.and_then(|a| a.score),
            notes,
            mask: work.session.mask(),
        })
    }
}

impl Steps {
    fn bring(&mut self, said: Clicks, anew: bool, left: &AtomicBool) -> Result<(), Failure> {
        if anew {
            self.reset();
        }
        let more = loop {
            match self.said.last().map_or_else(|| Some(said.all()), |last| said.beyond(last)) {
                Some(more) => break more,
                // Where the history does not go back so far, it begins anew.
                None if self.session.undo() => drop(self.said.pop()),
                None => self.reset(),
            }
        };
        if !more.is_empty() {
            unless_left(left, |o| self.session.interact_observed(&more, o).map(|_| ()))?;
            self.said.push(said);
            // What the session has forgotten is not gone back to: its first step and those behind.
            let kept = self.session.depth().0 + 1;
            self.said.drain(..self.said.len().saturating_sub(kept));
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.session.reset();
        self.said.clear();
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

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
