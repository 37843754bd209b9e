//! The records of a lease's journal: how they are written, and how they are followed.

use super::{Buffer, Layer, Queued, State};
use crate::prompt::Prompts;
use crate::serve::failure::Failure;
use crate::serve::journal::{IMAGE, session_anew};
use crate::serve::wire::Dtype;
use crate::session::Session;
use crate::session::kept::{Reader, Writer};

/// Kinds of records in a lease's journal, besides its image.
pub(super) const BUFFER: u8 = 2;
pub(super) const QUEUED: u8 = 3;
pub(super) const SAID: u8 = 4;
pub(super) const INITIAL: u8 = 5;
pub(super) const UNDONE: u8 = 6;
/// A session in a rewritten journal, and a step of it.
const LAYER: u8 = 7;
const STEP: u8 = 8;

impl State {
    /// Rewrites the journal, if it is long.
    pub(super) fn renew(&self) -> Result<(), Failure> {
        let Some(journal) = &self.journal else { return Ok(()) };
        let image = self.image.as_ref().and_then(|image| Some((image, image.scan.as_ref()?)));
        if image.is_some() != self.image.is_some() {
            return Ok(());
        }
        journal.renew(|fresh| {
            // Without an image there is at most a buffer.
            if let Some((_, scan)) = image {
                fresh.put(IMAGE, |out| scan.put(out))?;
            }
            if let Some(buffer) = self.buffer {
                fresh.put(BUFFER, |out| buffer.put(out))?;
            }
            let layers = image.map(|(image, _)| &image.layers[..]).unwrap_or_default();
            for (at, layer) in layers.iter().enumerate() {
                // What was undone is never redone.
                let last = layer.session.depth().0;
                let head = |n: usize, out: &mut Writer| {
                    if n == 0 {
                        out.flag(at == 0);
                        out.size(layer.steps);
                    }
                };
                session_anew(fresh, &layer.session, [LAYER, STEP], last, head)?;
                for queued in &layer.queued {
                    fresh.put(QUEUED, |out| put_prompts(&queued.said, out))?;
                }
            }
            Ok(())
        })
    }

    /// Writes a record, if there is a journal.
    pub(super) fn note(&self, kind: u8, tell: impl FnOnce(&mut Writer)) -> Result<(), Failure> {
        self.journal.as_ref().map_or(Ok(()), |journal| journal.note(kind, tell))
    }

    /// Repeats what the journal says.
    pub fn follow(&mut self, kind: u8, from: &mut Reader) -> Result<(), String> {
        let odd = || format!("unknown record of kind {kind}");
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
                image.layer().queued.push(Queued::new(said));
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

    /// Called when all of the journal has been followed.
    pub fn followed(&mut self) {
        for layer in self.image.iter_mut().flat_map(|image| &mut image.layers) {
            layer.session.look_anew();
        }
    }
}

impl Layer {
    /// Follows a journal through one prediction.
    fn followed(&mut self, from: &mut Reader) -> Result<(), String> {
        self.session.follow(from)?;
        self.queued.clear();
        self.steps += 1;
        Ok(())
    }
}

impl Buffer {
    pub(super) fn put(&self, out: &mut Writer) {
        self.shape.iter().for_each(|n| out.size(*n));
        out.text(self.dtype.name());
    }
}

/// Writes prompts: never a mask or other objects, which do not wait for a prediction.
pub(super) fn put_prompts(said: &Prompts, out: &mut Writer) {
    out.size(said.points.len());
    for (voxel, positive) in &said.points {
        out.voxel(*voxel);
        out.flag(*positive);
    }
    out.bounds(said.bounds);
    out.bounds(said.drawn);
    out.flag(said.clipped);
}

/// Reads written prompts on a scan of the given size.
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
