//! Reading predictions.

use super::handles::{self, Object};
use super::status::{Failure, VersionedStruct, call, prism_status, store, str_of, write_struct};
use super::volume::Scan;
use crate::input::IS_INPUT;
use crate::session::Prediction;
use crate::volume::{Element, View, VolumeError, data_file, span, write_mask_on};
use std::ffi::{c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An answer: logits, candidates, scores. Made by prism_session_interact or
/// prism_session_get_prediction. It does not change; any number of threads may read it at once.
pub struct prism_prediction;

pub(super) struct PredictionObject {
    pub prediction: Arc<Prediction>,
    pub volume: Arc<Scan>,
    /// Seconds of cutting and encoding the patch, where this answer had to wait for it.
    pub encoded: [f64; 2],
}

impl Object for PredictionObject {
    const NAME: &'static str = "a prediction";
}

/// The logit, on the volume's grid, of voxels for which the session has computed none: far from the
/// object.
pub const PRISM_LOGIT_OUTSIDE: f32 = -100.0;

/// The grid of what is read.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum prism_grid {
    /// The volume's own grid: every voxel. This is the result.
    PRISM_GRID_VOLUME = 0,
    /// The patch, the cube that the model saw last; prism_session_get_patch gives its position. The
    /// result there, as the model computed it.
    PRISM_GRID_PATCH = 1,
}

/// Facts about an answer.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct prism_prediction_info {
    /// sizeof(prism_prediction_info), set by the caller.
    pub struct_size: usize,
    /// Candidate masks.
    pub candidates: usize,
    /// Index of the candidate that was refined into the result, from 0.
    pub selected: usize,
    /// The expected Dice of the answer, 0 to 1; NaN if the model is not calibrated, has not run for
    /// this answer, or the answer is empty.
    pub score: f32,
    /// Points of the interaction that were outside the patch and were left out: only in released
    /// sessions, otherwise 0.
    pub left_out: usize,
    /// Points of the interaction that only the refiner saw, because there were more than the prompt
    /// encoder takes.
    pub thinned: usize,
    /// Seconds that it took: cutting the patch out of the scan, encoding it (both 0 if that was
    /// done before), prompts, decoder, refiner. A GPU does the last three in one step, which is
    /// counted in the last.
    pub seconds: [f64; 5],
    /// How many times the network was run: 0 if the prompts did not need it.
    pub looks: usize,
    /// Voxels of the volume that changed from one side to the other.
    pub changed: usize,
}

impl VersionedStruct for prism_prediction_info {
    const NAME: &'static str = "prism_prediction_info";
    const LEAST: usize = std::mem::offset_of!(prism_prediction_info, looks);
}

/// Copies a result out, or reports its size.
///
/// # Safety
/// `buffer` is NULL or holds `capacity` bytes; `needed` is NULL or can be written.
pub(super) unsafe fn fill(
    bytes: &[u8],
    buffer: *mut u8,
    capacity: usize,
    needed: *mut usize,
) -> Result<(), Failure> {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if fits(bytes.len(), buffer.is_null(), capacity, needed)? {
            buffer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }
    Ok(())
}

/// Stores the number of bytes of a result; returns whether the result is to be written: false if
/// only the size is asked for.
///
/// # Safety
/// `needed` is NULL or can be written.
unsafe fn fits(
    bytes: usize,
    asking: bool,
    capacity: usize,
    needed: *mut usize,
) -> Result<bool, Failure> {
    if !needed.is_null() {
        // SAFETY: guaranteed by the caller.
        unsafe { store(needed, "needed", bytes)? };
    }
    match asking {
        true if needed.is_null() => {
            Err(Failure::argument("buffer and needed are both NULL: expected at least one"))
        }
        true => Ok(false),
        false if capacity < bytes => {
            let message = format!("the buffer holds {capacity} bytes, the result needs {bytes}");
            Err(Failure::new(prism_status::PRISM_BUFFER_TOO_SMALL, message))
        }
        false => Ok(true),
    }
}

/// Fills `*info` in; set its struct_size first.
///
/// # Safety
/// `info` is a structure of the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_prediction_get_info(
    prediction: *const prism_prediction,
    info: *mut prism_prediction_info,
) -> prism_status {
    call(|| {
        let answer = handles::get::<PredictionObject, _>(prediction)?;
        let p = &answer.prediction;
        let [patch, encode] = answer.encoded;
        let [prompts, decode, refine] = p.seconds.map(|s| s.as_secs_f64());
        let value = prism_prediction_info {
            struct_size: 0,
            candidates: p.candidates.len(),
            selected: p.selected,
            score: p.score.unwrap_or(f32::NAN),
            left_out: p.left_out,
            thinned: p.thinned,
            seconds: [patch, encode, prompts, decode, refine],
            looks: p.looks,
            changed: p.changed,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { write_struct(info, value) }
    })
}

/// Writes the candidates' scores, the network's estimate of the Dice of each (not calibrated), to
/// `scores`, which holds `capacity` of them. `*needed`, unless `needed` is NULL, becomes their
/// number; if `scores` is NULL, nothing else happens.
///
/// # Safety
/// `scores` is NULL or holds `capacity` floats; `needed` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_prediction_get_scores(
    prediction: *const prism_prediction,
    scores: *mut f32,
    capacity: usize,
    needed: *mut usize,
) -> prism_status {
    call(|| {
        let answer = handles::get::<PredictionObject, _>(prediction)?;
        let values: Vec<f32> = answer.prediction.candidates.iter().map(|c| c.score).collect();
        // SAFETY: guaranteed by the caller; counted in floats.
        unsafe {
            if fits(values.len(), scores.is_null(), capacity, needed)? {
                values.iter().enumerate().for_each(|(i, v)| scores.add(i).write_unaligned(*v));
            }
        }
        Ok(())
    })
}

/// The destination of results.
struct Out<T> {
    buffer: *mut u8,
    strides: [usize; 3],
    element: std::marker::PhantomData<T>,
}

impl<T: Copy> Out<T> {
    /// Checks a caller's buffer for a result of `size`; None if only its size is asked for.
    ///
    /// # Safety
    /// `strides` is NULL or three numbers; `needed` as for [`fits`].
    unsafe fn new(
        size: [usize; 3],
        element: Element,
        (buffer, capacity): (*mut c_void, usize),
        strides: *const isize,
        needed: *mut usize,
    ) -> Result<Option<Out<T>>, Failure> {
        let dense = View::dense(element, size);
        // SAFETY: called if `strides` is not NULL: then it is three numbers.
        let given = |a| unsafe { strides.add(a).read_unaligned() };
        let strides: [isize; 3] =
            if strides.is_null() { dense } else { std::array::from_fn(given) };
        let forwards: Option<Vec<usize>> =
            strides.iter().map(|s| usize::try_from(*s).ok()).collect();
        let forwards = forwards.ok_or_else(|| {
            Failure::argument(format!("strides of {strides:?} bytes: expected positive strides"))
        })?;
        let bytes = span(element.size(), size, strides)?;
        // SAFETY: guaranteed by the caller.
        let wanted = unsafe { fits(bytes, buffer.is_null(), capacity, needed)? };
        let out = Out {
            buffer: buffer.cast(),
            strides: [forwards[0], forwards[1], forwards[2]],
            element: std::marker::PhantomData,
        };
        Ok(wanted.then_some(out))
    }

    /// # Safety
    /// The voxel is within the size that was checked.
    unsafe fn put(&self, [i, j, k]: [usize; 3], value: T) {
        let at = i * self.strides[0] + j * self.strides[1] + k * self.strides[2];
        // SAFETY: within the span, which the buffer holds.
        unsafe { self.buffer.add(at).cast::<T>().write_unaligned(value) };
    }

    /// Writes every voxel of `size`.
    ///
    /// # Safety
    /// As [`Out::put`].
    unsafe fn each(&self, [ni, nj, nk]: [usize; 3], value: impl Fn(usize) -> T) {
        for i in 0..ni {
            for j in 0..nj {
                for k in 0..nk {
                    // SAFETY: guaranteed by the caller.
                    unsafe { self.put([i, j, k], value((i * nj + j) * nk + k)) };
                }
            }
        }
    }
}

/// The answer's logits, as `value` makes them, on either grid.
///
/// # Safety
/// As the functions below.
unsafe fn read<T: Copy>(
    prediction: *const prism_prediction,
    grid: i32,
    element: Element,
    target: (*mut c_void, usize),
    [strides, needed]: [*const c_void; 2],
    (outside, value): (T, impl Fn(f32) -> T),
) -> Result<(), Failure> {
    let answer = handles::get::<PredictionObject, _>(prediction)?;
    let size = match grid {
        0 => answer.volume.grid().size,
        1 => answer.prediction.patch.grid.size,
        other => {
            return Err(Failure::argument(format!(
                "grid is {other}, expected a prism_grid, 0 or 1"
            )));
        }
    };
    // SAFETY: guaranteed by the caller; voxels are within the size.
    unsafe {
        let Some(out) = Out::new(size, element, target, strides.cast(), needed.cast_mut().cast())?
        else {
            return Ok(());
        };
        if grid == 1 {
            let logits = answer.prediction.logits.try_data()?;
            out.each(size, |at| value(logits[at]));
        } else {
            out.each(size, |_| outside);
            let [_, nj, nk] = size;
            answer.prediction.field.each(|at, logit| {
                if logit > f32::NEG_INFINITY {
                    out.put([at / nk / nj, at / nk % nj, at % nk], value(logit));
                }
            });
        }
    }
    Ok(())
}

/// Writes the mask to `buffer`, which holds `capacity` bytes: one uint8 per voxel, 1 on the object
/// and 0 off it. `grid` is a prism_grid. Voxel (i, j, k) is at buffer + i * strides[0] + j *
/// strides[1] + k * strides[2]; strides are in bytes, none negative; NULL: contiguous, i fastest,
/// as in a NIfTI file. `*needed`, unless `needed` is NULL, becomes the number of bytes from the
/// first voxel to the end of the last; if `buffer` is NULL, nothing else happens.
///
/// # Safety
/// `buffer` is NULL or holds `capacity` bytes; `strides` is NULL or three numbers; `needed` is NULL
/// or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_prediction_get_mask(
    prediction: *const prism_prediction,
    grid: i32,
    buffer: *mut u8,
    capacity: usize,
    strides: *const isize,
    needed: *mut usize,
) -> prism_status {
    // SAFETY: guaranteed by the caller.
    call(|| unsafe {
        let places = [strides.cast(), needed.cast_const().cast()];
        read(
            prediction,
            grid,
            Element::Uint8,
            (buffer.cast(), capacity),
            places,
            (0u8, |logit| u8::from(logit > 0.0)),
        )
    })
}

/// Writes the logits, one float32 per voxel, positive on the object, to `buffer`, which holds
/// `capacity` bytes; grid, strides and `*needed` are as for prism_prediction_get_mask. The
/// probability is 1 / (1 + exp(-logit)). On PRISM_GRID_VOLUME, voxels that were never predicted
/// hold PRISM_LOGIT_OUTSIDE.
///
/// # Safety
/// As prism_prediction_get_mask.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_prediction_get_logits(
    prediction: *const prism_prediction,
    grid: i32,
    buffer: *mut f32,
    capacity: usize,
    strides: *const isize,
    needed: *mut usize,
) -> prism_status {
    // SAFETY: guaranteed by the caller.
    call(|| unsafe {
        let places = [strides.cast(), needed.cast_const().cast()];
        read(
            prediction,
            grid,
            Element::Float32,
            (buffer.cast(), capacity),
            places,
            (PRISM_LOGIT_OUTSIDE, |logit| logit),
        )
    })
}

/// Writes the mask of candidate number `candidate`, from 0, before refinement, on the patch, to
/// `buffer`; strides and `*needed` are as for prism_prediction_get_mask.
///
/// # Safety
/// As prism_prediction_get_mask.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_prediction_get_candidate(
    prediction: *const prism_prediction,
    candidate: usize,
    buffer: *mut u8,
    capacity: usize,
    strides: *const isize,
    needed: *mut usize,
) -> prism_status {
    call(|| {
        let answer = handles::get::<PredictionObject, _>(prediction)?;
        let all = &answer.prediction.candidates;
        let bits = &all
            .get(candidate)
            .ok_or_else(|| Failure::argument(format!("candidate {candidate} of {}", all.len())))?
            .bits;
        let size = answer.prediction.patch.grid.size;
        // SAFETY: guaranteed by the caller; voxels are within the size.
        unsafe {
            if let Some(out) =
                Out::new(size, Element::Uint8, (buffer.cast(), capacity), strides, needed)?
            {
                out.each(size, |at| bits[at / 8] >> (7 - at % 8) & 1);
            }
        }
        Ok(())
    })
}

/// Writes the mask on the volume's grid to a file whose extension selects the format: NIfTI
/// (.nii.gz, .nii) with the volume's affine, codes and units, NRRD (.nrrd; .seg.nrrd, a 3D Slicer
/// segmentation) or MetaImage (.mha; .mhd with its voxels in a .zraw file beside it); the same
/// bytes as `prism segment` writes. For a volume read from a DICOM series also a DICOM segmentation
/// (.dcm), which refers to its slices. The file appears complete or not at all. A file that the
/// volume was read from is not overwritten, by whatever name (a link, a hard link): that gives
/// PRISM_FILE, and nothing is written.
///
/// # Safety
/// `path` ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_prediction_save_mask(
    prediction: *const prism_prediction,
    path: *const c_char,
) -> prism_status {
    call(|| {
        let answer = handles::get::<PredictionObject, _>(prediction)?;
        // SAFETY: guaranteed by the caller.
        let path = Path::new(unsafe { str_of(path, "path")? });
        let outputs = [Some(path.to_path_buf()), data_file(path)];
        let is_input = |at: &PathBuf| answer.volume.was_read_from(at);
        if let Some(input) = outputs.into_iter().flatten().find(is_input) {
            return Err(VolumeError::new(&input, IS_INPUT).into());
        }
        let mask = answer.prediction.mask();
        let pending =
            write_mask_on(path, answer.volume.grid(), &answer.volume.description(), &mask)?;
        pending
            .commit()
            .map_err(|e| Failure::new(prism_status::PRISM_FILE, format!("{}: {e}", path.display())))
    })
}

/// Frees a prediction. NULL is allowed.
#[unsafe(no_mangle)]
pub extern "C" fn prism_prediction_free(prediction: *mut prism_prediction) -> prism_status {
    call(|| handles::free::<PredictionObject, _>(prediction))
}
