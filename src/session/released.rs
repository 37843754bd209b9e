//! An interaction as the paper runs it: the network alone, on one patch, with the prompts of this
//! interaction; the refiner with all so far.

use super::encodings::EncodedPatch;
use super::region;
use super::{
    ANSWER, CLICKS, MASK_LOGIT, Prediction, Said, SessionError, State, finite, thin,
    working_spacing,
};
use crate::memory::{self, Charged};
use crate::model::{Observer, PatchPrompts, prompt_maps};
use crate::prompt::{Dense, Prompts};
use crate::session::field::Field;
use crate::session::scan::Scan;
use crate::tensor::Tensor;
use crate::volume::Grid;
use crate::volume::patch::{Extent, Patch};
use crate::volume::resample::{Interpolation, sample};
use std::collections::HashMap;
use std::sync::Arc;

/// The patch of a whole session: at the box, otherwise at what the prompts mark, at the requested
/// spacing or the model's own choice.
pub(super) fn place(scan: &Scan, prompts: &Prompts) -> Result<Patch, SessionError> {
    let config = scan.model().config();
    let bounds = prompts.bounds.map(Extent::of_box);
    let spacing = scan
        .options()
        .spacing
        .unwrap_or_else(|| working_spacing(config, scan.grid(), bounds.as_ref()));
    let extent = prompts.extent(scan.grid()).ok_or(SessionError::NoPrompt)?;
    Ok(Patch::place(scan.grid(), config.patch, spacing, &extent))
}

pub(super) fn interact(
    scan: &Arc<Scan>,
    state: &State,
    encoded: &Arc<EncodedPatch>,
    prompts: &Prompts,
    observer: &mut Observer,
) -> Result<State, SessionError> {
    let (model, patch) = (scan.model(), encoded.patch());
    let (s, cpu) = (model.config().patch, model.device().cpu());
    let bounds = prompts.bounds.or(state.bounds);
    if prompts.points.is_empty() && bounds.is_none() && prompts.dense.is_none() {
        return Err(SessionError::NoPrompt);
    }
    let all = prompts.points.len();
    let mut points = memory::list(CLICKS, all);
    let mut seen: HashMap<([i32; 3], bool), ()> = memory::map(CLICKS, all);
    let mut left_out = 0;
    for (p, positive) in &prompts.points {
        match patch.voxel(p.map(|c| c as f64)) {
            // Voxels of a scan finer than the patch can share one of the patch's: it is given once.
            Some(v) if seen.insert((v, *positive), ()).is_none() => points.push((v, *positive)),
            Some(_) => {}
            None => left_out += 1,
        }
    }
    let mut said: Vec<Said> = memory::list(CLICKS, state.said.len() + all);
    said.extend_from_slice(&state.said);
    said.extend(
        prompts.points.iter().map(|(voxel, positive)| Said { voxel: *voxel, positive: *positive }),
    );
    let history =
        said.iter().filter_map(|s| Some((patch.voxel(s.voxel.map(|c| c as f64))?, s.positive)));
    let history: Vec<([i32; 3], bool)> = memory::counted(CLICKS, history);
    let (points, thinned) = thin(points);
    if points.is_empty() && left_out > 0 && bounds.is_none() && prompts.dense.is_none() {
        return Err(SessionError::NoPrompt);
    }
    let maps = prompt_maps(model.device(), s, history.iter());
    let dense = match (&prompts.dense, &state.prediction) {
        (Some(dense), _) => on_patch(scan, dense, scan.grid(), patch),
        (None, Some(previous)) => previous.logits.clone(),
        (None, None) => Tensor::from_buffer([s; 3], cpu.zeros(s * s * s)),
    };
    let given = PatchPrompts { points, bounds: bounds.map(|b| patch.bounds(&Extent::of_box(b))) };
    let answer = model.interact(&encoded.features, &given, &dense, &maps, observer)?;
    finite(&answer)?;
    let logits = answer.logits.value().reshape([s; 3]);
    let mut field = Field::new(scan.grid().size, false);
    let values = logits.try_data()?;
    cpu.run(|| {
        field
            .edit(&patch.block(scan.grid()), |voxel, old| patch.value(values, voxel).unwrap_or(old))
    });
    let changed =
        state.prediction.as_ref().map_or_else(|| field.voxels(), |p| field.difference(&p.field));
    let notes = region::notes(scan, prompts);
    let prediction = Prediction {
        looks: 1,
        changed,
        left_out,
        thinned,
        notes,
        ..Prediction::of(&answer, field, logits, encoded)?
    };
    Ok(State {
        said: Arc::new(Charged::new(CLICKS, said)),
        bounds,
        prediction: Some(Arc::new(prediction)),
        ..state.clone()
    })
}

/// A dense prompt as logits on the patch.
fn on_patch(scan: &Scan, dense: &Dense, grid: &Grid, patch: &Patch) -> Tensor {
    let cpu = scan.model().device().cpu();
    let (logits, how) = match dense {
        Dense::Mask(m) => (
            memory::collected(
                ANSWER,
                m.iter().map(|v| if *v != 0 { MASK_LOGIT } else { -MASK_LOGIT }),
            ),
            Interpolation::Nearest,
        ),
        Dense::Logits(l) => (memory::copied(ANSWER, l), Interpolation::Linear),
    };
    let to_image = patch.from_image.inverse();
    let s = patch.grid.size[0];
    let mut out = cpu.alloc(s * s * s);
    cpu.chunks_mut(&mut out, s * s, |i, plane| {
        for (at, v) in plane.iter_mut().enumerate() {
            let place = to_image.apply([i as f64, (at / s) as f64, (at % s) as f64]);
            *v = sample(&logits, grid.size, place, how).map_or(-MASK_LOGIT, |v| v as f32);
        }
    });
    Tensor::from_buffer([s; 3], out)
}
