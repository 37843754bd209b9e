//! What the network is shown of a scan while the rest of it is still being read.

use super::Segment;
use crate::memory;
use crate::model::{Model, Observer};
use crate::prompt::Iteration;
use crate::session::{Image, Options, Scan, places};
use crate::volume::Grid;
use crate::volume::begun::{Begun, Part};
use crate::volume::intensity::Normalization;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// The most voxels of a part. It takes memory in addition to the scan, and the reading thread
/// copies it, and reads nothing meanwhile: for a fine scan a wide look could be nearly all of it.
const MOST: usize = 1 << 25;

/// The channel for parts of a scan from the thread that reads it to one that works on them.
pub(super) fn parts() -> (Giver, Taker) {
    let ((grid, its_grid), (ask, asked), (given, gifts)) = (channel(), channel(), channel());
    let giver = Giver { grid: Some(grid), asked, given, wanted: None };
    (giver, Taker { grid: its_grid, ask, gifts })
}

/// Gives parts of what was read. When it is dropped no more parts come.
pub(super) struct Giver {
    /// The channel for the grid, which is sent once.
    grid: Option<Sender<Grid>>,
    asked: Receiver<[Range<usize>; 3]>,
    given: Sender<Option<Part>>,
    wanted: Option<[Range<usize>; 3]>,
}

impl Giver {
    /// Examines what has been read so far, and sends the requested block if it is available.
    pub(super) fn see(&mut self, begun: &Begun) {
        if let Some(grid) = self.grid.take() {
            let _ = grid.send(*begun.grid());
        }
        if self.wanted.is_none() {
            self.wanted = self.asked.try_recv().ok();
        }
        if let Some(block) = self.wanted.take_if(|block| begun.holds(block)) {
            // The reader continues if there is no memory for this.
            let part = memory::caught(|| begun.part(&block)).ok().flatten();
            let _ = self.given.send(part);
        }
    }
}

/// Requests parts of what was read, and waits for them.
pub(super) struct Taker {
    grid: Receiver<Grid>,
    ask: Sender<[Range<usize>; 3]>,
    gifts: Receiver<Option<Part>>,
}

impl Taker {
    /// The scan's size and place; none if no part of it is available before all is read.
    fn grid(&self) -> Option<Grid> {
        self.grid.recv().ok()
    }

    /// A block, as soon as it was read; none if everything was read before, or if it says too
    /// little.
    fn part(&self, block: [Range<usize>; 3]) -> Option<Part> {
        self.ask.send(block).ok()?;
        self.gifts.recv().ok()?
    }
}

impl Segment {
    /// A scan of the parts where the network looks first, encoded as they come, until `ended`. It
    /// is valid for the whole scan if that turns out to be normalised the same way
    /// ([`Scan::showing`]).
    ///
    /// None if prompts in numbers do not determine those places, or if the values of the whole scan
    /// are needed.
    pub(super) fn look_ahead(
        &self,
        model: &Arc<Model>,
        first: &Iteration,
        parts: &Taker,
        ended: &AtomicBool,
    ) -> Option<Scan> {
        let files = [&first.scribble, &first.mask, &first.others];
        if self.released || files.into_iter().any(Option::is_some) {
            return None;
        }
        let grid = parts.grid()?;
        let prompts = self.in_numbers(first, &grid).ok()?;
        let on_object = prompts.points.iter().filter(|(_, positive)| *positive).count();
        // Of several points, some may be on parts of the object that are looked at separately.
        if prompts.bounds.or(prompts.drawn).is_none() && on_object != 1 {
            return None;
        }
        let options = Options { spacing: self.spacing, ..Default::default() };
        let (mut seen, mut expected) = (None::<Scan>, None);
        for patch in places(model, &grid, &options, &prompts).ok()? {
            let block = patch.needed(&grid);
            if block.iter().map(|range| range.len()).product::<usize>() > MOST {
                break;
            }
            let Some(mut part) = parts.part(block) else { break };
            part.modality = self.modality;
            let Some(normalization) = expected.or_else(|| self.expected(&part, model)) else {
                break;
            };
            expected = Some(normalization);
            let part: Arc<dyn Image> = Arc::new(part);
            let scan = match seen.take() {
                Some(scan) => scan.showing(part, &normalization)?,
                None => Scan::new(model, part, normalization, options),
            };
            let mut goes_on = |_: usize, _: &str| !ended.load(Ordering::Relaxed);
            let encoded = scan.encoded(&patch, &mut Observer::steps(&mut goes_on));
            seen = Some(scan);
            if encoded.is_err() {
                break;
            }
        }
        seen
    }

    /// How the scan of which this is a part will probably be normalised; none if that depends on
    /// all of its values.
    fn expected(&self, part: &Part, model: &Model) -> Option<Normalization> {
        let statistics = model.config().intensity;
        let intensities = self.intensities(part, statistics);
        let given = self.clip.is_some() || self.preset.is_some();
        let known = given || statistics.is_some_and(|i| i.applies_to(intensities.modality));
        (known && !self.percentiles).then_some(intensities.normalization)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::device::{Cpu, Device};
    use crate::model::{Config, Intensity, Weights};
    use crate::session::Session;
    use crate::volume::Volume;
    use clap::Parser;
    use std::path::Path;
    use std::thread;

    /// `prism segment` with such flags.
    fn segment(flags: &str) -> Segment {
        let line = format!("prism segment -i a.nii -o b.nii {flags}");
        match Cli::try_parse_from(line.split(' ')).map(|cli| cli.command) {
            Ok(Command::Segment(segment)) => *segment,
            _ => panic!("{line}"),
        }
    }

    /// The scan, and the part of it that is seen before the rest is read, by a thread with
    /// unlimited time.
    fn read(path: &Path, segment: &Segment, model: &Arc<Model>) -> (Volume, Option<Scan>) {
        let (mut giver, taker) = parts();
        thread::scope(|scope| {
            let looking = scope.spawn(move || {
                let never = AtomicBool::new(false);
                segment.look_ahead(model, &Iteration::default(), &taker, &never)
            });
            let volume = Volume::read_watched(path, None, None, &mut |begun| {
                giver.see(begun);
                // What is requested then has yet to be read.
                while giver.wanted.is_none() && !looking.is_finished() {
                    thread::yield_now();
                    giver.see(begun);
                }
            });
            drop(giver);
            let mut volume = volume.unwrap();
            volume.description.modality = segment.modality;
            (volume, looking.join().unwrap())
        })
    }

    #[test]
    fn what_was_seen_ahead_is_what_is_seen_of_the_whole_scan() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/lung1_image.nii.gz");
        let intensity = Intensity { clip: [-200.0, 300.0], mean: 0.0, sd: 120.0, hounsfield: true };
        let device = Device::Cpu(Cpu::new(1).unwrap());
        for (fit, flags, early) in [
            (None, "--box 69,68,13,93,94,16", true),
            (Some(1.75), "--box 69,68,13,93,94,16 --point 80,80,14 --modality ct", true),
            (Some(1.75), "--line 70,80,14,92,81,14", true),
            (Some(1.75), "--point 80,80,14", true),
            (None, "--point 80,80,14 --clip -1000,400 --mean -300 --sd 350 --modality mr", true),
            (None, "--point 80,80,14 --preset liver --spacing 0.8", true),
            (None, "--point 80,80,14 --modality mr", false),
            (None, "--point 80,80,14 --percentiles", false),
            (None, "--point 80,80,14 --released", false),
            (None, "--point 80,80,14 --point 90,80,14", false),
            (None, "--box 69,68,13,93,94,28", false),
            (None, "--box 69,68,13,93,94,16 --point 80,80,99", false),
        ] {
            let config = Config { fit, intensity: Some(intensity), ..Config::tiny() };
            let model = Arc::new(Model::new(&device, &Weights::hashed(config, "ahead")).unwrap());
            let segment = segment(flags);
            let (volume, ahead) = read(&path, &segment, &model);
            assert_eq!(ahead.is_some(), early, "{flags}");
            let Some(ahead) = ahead else { continue };
            let options = Options { spacing: segment.spacing, ..Default::default() };
            let normalization = segment.intensities(&volume, Some(intensity)).normalization;
            let prompts = segment.in_numbers(&Iteration::default(), &volume.grid).unwrap();
            let image = Arc::new(volume);
            let ahead = ahead.showing(image.clone(), &normalization).expect(flags);
            assert!(ahead.bytes() > 0 && *ahead.options() == options, "{flags}");
            let first = &places(&model, ahead.grid(), &options, &prompts).unwrap()[0];
            let (_, encoded_now) = ahead.encoded(first, &mut Observer::none()).unwrap();
            assert!(!encoded_now, "{flags}");
            let whole = Scan::new(&model, image.clone(), normalization, options);
            let answers = [ahead, whole].map(|scan| {
                let mut session = Session::new(&Arc::new(scan));
                let answer = session.interact(&prompts).unwrap().clone();
                let bits: Vec<u32> = answer.logits.data().iter().map(|v| v.to_bits()).collect();
                (bits, session.mask(), answer.score.map(f32::to_bits), answer.looks)
            });
            assert!(answers[0] == answers[1], "{flags}");
        }
        // For a scan that is normalised differently nothing of it is valid.
        let model = Model::new(&device, &Weights::hashed(Config::tiny(), "ahead")).unwrap();
        let volume = Arc::new(Volume::read(&path, None).unwrap());
        let [low, high] = [0.0, 1.0].map(|mean| Normalization { clip: [-1.0, 9.0], mean, sd: 1.0 });
        let scan = Scan::new(&Arc::new(model), volume.clone(), low, Options::default());
        assert!(scan.showing(volume, &high).is_none());
    }
}
