//! An item of a step, as the thread that reads the data makes it ahead of the step: a sample, and
//! what its simulated user says before there is an answer.

use crate::data::sample::Sample;
use crate::device::Device;
use crate::model::PatchPrompts;
use crate::prompt::simulate::{Bits, Errors, User, generator};
use crate::train::settings::Settings;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// A sample, and how its simulated user begins.
pub(super) struct Item {
    pub(super) sample: Sample,
    /// None for a user who steers: they begin with the step.
    pub(super) corrector: Option<Corrector>,
}

/// A simulated user who gives many points at once, as the paper's, at work on one item. Of an item
/// that may be learned from again, a copy is put to work.
#[derive(Clone)]
pub(super) struct Corrector {
    user: User,
    rng: ChaCha8Rng,
    label: Bits,
    size: [usize; 3],
    bounds: Option<[f32; 6]>,
    /// The first round's points; none if there is nothing to correct.
    first: Option<Vec<([i32; 3], bool)>>,
}

impl Item {
    /// Begins with a sample of `patch`³ voxels. `place` is the step, from 0, and the number of the
    /// item within its batch: all that is drawn is a function of these and the seed.
    pub(super) fn new(
        sample: Sample,
        settings: &Settings,
        patch: usize,
        [step, item]: [u64; 2],
    ) -> Item {
        let steers = generator(settings.seed, &[5, step, item]).random_bool(settings.clicking);
        let corrector = (!steers).then(|| {
            let user = settings.item_user(&mut generator(settings.seed, &[4, step, item]));
            let rng = generator(settings.seed, &[2, step, item]);
            Corrector::new(user, rng, &sample.label, [patch; 3])
        });
        Item { sample, corrector }
    }
}

impl Corrector {
    fn new(user: User, mut rng: ChaCha8Rng, label: &[u8], size: [usize; 3]) -> Corrector {
        let bounds = user.bounds(&mut rng, label, size).map(|b| b.map(|v| v as f32));
        let label = Bits::of(label);
        let errors = Errors::between(&label, None);
        let first = (!errors.is_empty()).then(|| user.correct(&mut rng, &errors, size));
        Corrector { user, rng, label, size, bounds, first }
    }

    /// The prompts of the first round; none if there is nothing to correct.
    pub(super) fn begin(&self) -> Option<PatchPrompts> {
        let (points, bounds) = (self.first.clone()?, self.bounds);
        Some(PatchPrompts { points, bounds })
    }

    /// The prompts of a later round, given the answer's mask as
    /// [`positive`](crate::ops::pointwise::positive) sends it; none if there is nothing to correct.
    pub(super) fn correct(&mut self, device: &Device, answer: &[u8]) -> Option<PatchPrompts> {
        let Corrector { user, rng, label, size, bounds, .. } = self;
        let answer = Bits::packed(answer, size.iter().product());
        let errors = Errors::between(label, Some(&answer));
        if errors.is_empty() {
            return None;
        }
        let points = device.cpu().run(|| user.correct(rng, &errors, *size));
        Some(PatchPrompts { points, bounds: *bounds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::pointwise::positive;
    use crate::tensor::Tensor;
    use crate::train::settings::Given;

    /// The rounds of a user who begins with the step: the box is drawn, then each round's prompts.
    fn rounds(
        settings: &Settings,
        label: &[u8],
        size: [usize; 3],
        [step, item]: [u64; 2],
        answers: &[Vec<f32>],
    ) -> Vec<Option<PatchPrompts>> {
        let user = settings.item_user(&mut generator(settings.seed, &[4, step, item]));
        let mut rng = generator(settings.seed, &[2, step, item]);
        let bounds = user.bounds(&mut rng, label, size).map(|b| b.map(|v| v as f32));
        let round = |answer: Option<&Vec<f32>>| {
            let mask = answer.map(|a| a.iter().map(|v| u8::from(*v > 0.0)).collect::<Vec<u8>>());
            let errors = Errors::of(label, mask.as_deref());
            (!errors.is_empty())
                .then(|| PatchPrompts { points: user.correct(&mut rng, &errors, size), bounds })
        };
        [None].into_iter().chain(answers.iter().map(Some)).map(round).collect()
    }

    #[test]
    fn who_begins_ahead_of_the_step_says_what_is_said_in_it() {
        let (patch, device) = (12, Device::open("cpu", 2).unwrap());
        let voxels = || 0..patch * patch * patch;
        let settings =
            Given { clicking: Some(0.3), sparing: Some(0.3), ..Given::default() }.settings();
        let label = |n: usize| -> Vec<u8> {
            voxels().map(|at| u8::from(n > 0 && at % patch > 4 && at / patch % patch < n)).collect()
        };
        let answer = |n: usize| -> Vec<f32> {
            voxels().map(|at| if at * 31 % (5 + n) < 2 { 1.5 } else { -0.5 }).collect()
        };
        let (mut steering, mut boxed, mut many) = (0, 0, 0);
        for number in 0..40u64 {
            let label = label(number as usize % 10);
            let exact: Vec<f32> = label.iter().map(|l| f32::from(*l) - 0.5).collect();
            let answers = [answer(0), exact, answer(3)];
            let sample = Sample { name: String::new(), image: vec![], label };
            let place = [number / 4, number % 4];
            let item = Item::new(sample, &settings, patch, place);
            let Some(corrector) = &item.corrector else {
                steering += 1;
                continue;
            };
            let label = &item.sample.label;
            let expected = rounds(&settings, label, [patch; 3], place, &answers);
            // A step may be done again.
            for _ in 0..2 {
                let mut corrector = corrector.clone();
                let mut found = vec![corrector.begin()];
                for answer in &answers {
                    let answer = Tensor::new([patch; 3], answer.clone());
                    let bits = positive(&device, &answer).unwrap();
                    found.push(corrector.correct(&device, &bits));
                }
                assert_eq!(found, expected, "item {number}");
            }
            assert_eq!(expected[0].is_none(), number.is_multiple_of(10), "item {number}");
            assert!(expected[2].is_none(), "item {number}");
            boxed += usize::from(expected.iter().flatten().any(|p| p.bounds.is_some()));
            many += usize::from(expected.iter().flatten().any(|p| p.points.len() > 50));
        }
        assert!(steering > 3 && boxed > 3 && many > 3, "{steering}, {boxed}, {many}");
    }
}
