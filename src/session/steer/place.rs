//! Where to look: the patch that shows the prompts, and whether a click begins a separate part of
//! the object.

use super::Work;
use super::look::{CONTACT, Look};
use crate::memory;
use crate::session::field::Field;
use crate::session::guess::{Guess, most_believable};
use crate::session::region::{self, beyond, fitted, of_voxel, probes, shown, shows, union};
use crate::session::{CLICKS, Said, SessionError};
use crate::volume::patch::{Extent, Patch};

/// The distance between a click and the nearest look, in lengths of what a look shows, beyond which
/// the click may begin another part of the object.
const AWAY: f64 = 0.75;
/// The number of other clicks, the nearest ones, to which a path through the same tissue is looked
/// for.
const NEIGHBOURS: usize = 4;
/// The distance in object lengths beyond which it certainly does: a look at both would show
/// neither.
const APART: f64 = 4.5;
/// The distance in mm within which first clicks are assumed to be on one part of the object.
const TOGETHER: f64 = 60.0;

/// How the patch that shows a click was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// The network looked at it before.
    Known,
    /// A wider patch, which shows the object and the click beyond it.
    Wider,
    /// A patch on another part of the object, far from all others.
    Apart,
}

impl Work<'_, '_> {
    /// What prompts without a box point at, as an extent: the first positive click and those near
    /// it. Others far off are separate parts of the object.
    pub(super) fn pointed(&self) -> Option<Extent> {
        let positive = self.said.iter().filter(|s| s.positive).map(|s| of_voxel(s.voxel));
        let mut left: Vec<Extent> = memory::counted(CLICKS, positive);
        if left.is_empty() {
            return None;
        }
        let mut all = left.remove(0);
        loop {
            let near = |e: &Extent| {
                region::longest(&union(&all, e), self.scan.grid())
                    <= TOGETHER.max(2.0 * region::longest(&all, self.scan.grid()))
            };
            let Some(at) = left.iter().position(near) else { return Some(all) };
            all = union(&all, &left.swap_remove(at));
        }
    }

    /// A look at the first positive click if it is on an object of its own, far from all others.
    pub(super) fn separate(&mut self) -> Result<Option<Look>, SessionError> {
        let positive: Vec<Said> =
            memory::counted(CLICKS, self.said.iter().copied().filter(|s| s.positive));
        match positive.split_first() {
            Some((first, others)) if !others.is_empty() && self.fits() => {
                // Points of one stroke, or nearly so.
                if others.iter().any(|s| region::beside(first.voxel, s.voxel, self.scan.grid())) {
                    return Ok(None);
                }
                self.alone(*first, &memory::collected(CLICKS, others.iter().map(|s| s.voxel)))
            }
            _ => Ok(None),
        }
    }

    /// Looks at prompts without a size from several distances, and again at what was seen from
    /// each, and chooses the patch that shows the [guess](Guess) to believe; also returns the Dice
    /// coefficient to expect of it, if there was something to choose from.
    pub(super) fn probe(&mut self, extent: &Extent) -> Result<(Patch, Option<f32>), SessionError> {
        let patches = probes(self.scan, extent);
        if patches.len() == 1 {
            return Ok((patches[0].clone(), None));
        }
        let unseen = patches[patches.len() / 3].clone();
        let grid = *self.scan.grid();
        let mut seen: Vec<[(Patch, Vec<f32>); 2]> = vec![];
        for patch in patches {
            let first = self.look(&patch, None, None)?.logits;
            let Some(object) = shown(&first, &patch, &grid) else { continue };
            // What was seen determines how far to look; not further off than twice, nor nearer than
            // half.
            let object = union(&object, extent);
            let spacing = fitted(self.scan, &object).spacing;
            let spacing = spacing.clamp(0.5 * patch.spacing, 2.0 * patch.spacing);
            let centred = Patch::place(&grid, patch.grid.size[0], spacing, &object);
            let mut guess = self.look(&centred, None, None)?;
            self.recognise(&mut guess)?;
            seen.push([(patch, first), (centred, guess.logits)]);
        }
        fn guess((patch, logits): &(Patch, Vec<f32>)) -> Guess<'_> {
            Guess { patch, logits }
        }
        let guesses: Vec<(Guess, Guess)> =
            seen.iter().map(|[first, then]| (guess(first), guess(then))).collect();
        let middle = [0, 1, 2].map(|a| (extent.low[a] + extent.high[a]) / 2.0);
        Ok(match most_believable(&guesses, middle) {
            Some((at, dice)) => (seen[at][1].0.clone(), Some(dice)),
            // Nothing was seen from any distance.
            None => (unseen, None),
        })
    }

    /// The patch that shows a click that disagrees: one that was looked at before, or a new one.
    pub(super) fn place_for(&mut self, click: Said) -> Result<(Patch, View), SessionError> {
        let grid = *self.scan.grid();
        if let Some(known) = self.looked.iter().rev().find(|p| shows(p, click.voxel, &grid)) {
            return Ok((known.clone(), View::Known));
        }
        let at = of_voxel(click.voxel);
        let object = self.field.bounds().map(Extent::of_box);
        let config = self.scan.model().config();
        if let (Some(object), true) = (object, self.fits()) {
            return Ok((fitted(self.scan, &union(&object, &at)), View::Wider));
        }
        let spacing = self.looked.last().map_or(config.spacing as f64, |p| p.spacing);
        Ok((Patch::place(&grid, config.patch, spacing, &at), View::Apart))
    }

    /// Whether the network looks at objects from a distance that fits them.
    pub(super) fn fits(&self) -> bool {
        self.scan.model().config().fit.is_some() && self.scan.options().spacing.is_none()
    }

    /// A look at a positive click away from everything that was looked at, as if it were the only
    /// one, if that shows an object of its own, or if a look at both would show neither.
    pub(super) fn another_part(&mut self, click: Said) -> Result<Option<Look>, SessionError> {
        let grid = *self.scan.grid();
        let Some(object) = self.field.bounds().map(Extent::of_box) else { return Ok(None) };
        let edge = self.scan.model().config().patch as f64;
        let away = |p: &Patch| region::centre_distance(p, click.voxel) > AWAY * edge * p.spacing;
        if !(click.positive && self.fits() && self.looked.iter().all(away)) {
            return Ok(None);
        }
        let others = self.said.iter().filter(|s| s.positive && s.voxel != click.voxel);
        let parts: Vec<[usize; 3]> = memory::counted(CLICKS, others.map(|s| s.voxel));
        let look = self.alone(click, &parts)?;
        if look.is_none()
            && region::longest(&union(&object, &of_voxel(click.voxel)), &grid)
                > APART * region::longest(&object, &grid)
        {
            let seen = std::mem::replace(&mut self.field, Field::new(grid.size, true));
            let probed = self.probe(&of_voxel(click.voxel));
            self.field = seen;
            return self.correct_on(&probed?.0, View::Apart, &[click]);
        }
        // Parts that are not empty already are not looked at again.
        let empty = |look: &Look| self.on_patch(look.encoded.patch()).iter().all(|v| *v <= 0.0);
        Ok(look.filter(empty))
    }

    /// A look at a positive click as if it were the only one; none if that does not show an object
    /// that ends, and ends far from all `others`, or if the values between it and one of them look
    /// like both.
    fn alone(&mut self, click: Said, others: &[[usize; 3]]) -> Result<Option<Look>, SessionError> {
        let off =
            |at: usize| region::distance(&of_voxel(click.voxel), others[at], self.scan.grid());
        // Of what is as near what was said first, which a stable sort would need memory for.
        let mut nearest = memory::collected(CLICKS, 0..others.len());
        nearest.sort_unstable_by(|a, b| off(*a).total_cmp(&off(*b)).then(a.cmp(b)));
        if nearest
            .iter()
            .take(NEIGHBOURS)
            .any(|at| region::joined(self.scan, click.voxel, others[*at]))
        {
            return Ok(None);
        }
        let only = self.said.iter().copied().filter(|s| !s.positive || s.voxel == click.voxel);
        let only = memory::counted(CLICKS, only);
        let said = std::mem::replace(&mut self.said, only);
        let look = self.probe(&of_voxel(click.voxel)).and_then(|(patch, dice)| {
            let mut look = self.look(&patch, None, None)?;
            self.recognise(&mut look)?;
            look.expected = dice;
            Ok(look)
        });
        self.said = said;
        let (look, grid) = (look?, *self.scan.grid());
        let patch = look.encoded.patch();
        let Some(object) = shown(&look.logits, patch, &grid) else { return Ok(None) };
        let ends = beyond(&look.logits, patch, &grid, &[]).len() < CONTACT;
        let far =
            |v: &[usize; 3]| region::distance(&object, *v, &grid) > region::longest(&object, &grid);
        Ok((ends && others.iter().all(far)).then_some(look))
    }
}
