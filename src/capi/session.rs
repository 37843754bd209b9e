//! Sessions: one object each, prompts in, predictions out. Prompts are described in `prompts.rs`.

use super::engine::{ModelObject, prism_model};
use super::handles::{self, Object, Vacant};
use super::log::say;
use super::prediction::{PredictionObject, prism_prediction};
use super::prompts::{prism_prompts, prompts_of};
use super::status::{
    Failure, VersionedStruct, call, prism_status, read_struct, store, text, write_struct,
};
use super::volume::{Scan, matrix, prism_volume};
use crate::model::{Model, Observer};
use crate::prompt::Prompts;
use crate::session::{MEMORY, Options, Session, UNDO_BYTES, UNDO_STEPS, intensities_of};
use crate::sync::if_free;
use crate::volume::intensity::{Modality, Normalization};
use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// One object on a volume: its prompts so far, its predictions, what can be undone. Made by
/// prism_session_open or prism_session_fork. One thread at a time: a call while another is under
/// way returns PRISM_BUSY and does nothing; prism_session_cancel alone may come at any time.
/// Different sessions work at the same time, and share the engine's threads.
pub struct prism_session;

/// The part that a session's calls change.
struct State {
    volume: Arc<Scan>,
    session: Session,
    progress: Progress,
    /// Seconds of cutting and encoding the patch, until a prediction has reported them.
    encoded: [f64; 2],
}

#[derive(Clone, Copy)]
struct Progress(prism_progress_callback, *mut c_void);
// SAFETY: the pointer is only handed back to the callback; the caller that sets it guarantees its
// use.
unsafe impl Send for Progress {}

pub(super) struct SessionObject {
    state: Mutex<State>,
    cancel: AtomicBool,
}

impl Object for SessionObject {
    const NAME: &'static str = "a session";
}

impl SessionObject {
    /// The state, if it is not in use. It is consistent after a panic: a session changes only when
    /// an interaction has finished.
    fn lock(&self) -> Result<MutexGuard<'_, State>, Failure> {
        if_free(&self.state).ok_or_else(|| {
            Failure::new(
                prism_status::PRISM_BUSY,
                "the session is in use by another call: use it from one thread at a time",
            )
        })
    }
}

/// How intensities are normalised for the model.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum prism_intensity {
    /// By the statistics of the model's training data, or by percentiles if the model records none
    /// or they do not apply to the scan's modality, which the distribution of its values
    /// determines. The log says what was decided, and why.
    PRISM_INTENSITY_AUTO = 0,
    /// By the scan's own 0.5 and 99.5 percentiles, and mean and standard deviation between them.
    PRISM_INTENSITY_PERCENTILES = 1,
    /// By clip, mean and sd of the options.
    PRISM_INTENSITY_GIVEN = 2,
    /// What PRISM_INTENSITY_AUTO does for a CT, whatever the values look like.
    PRISM_INTENSITY_CT = 3,
    /// What PRISM_INTENSITY_AUTO does for an MR, whatever the values look like.
    PRISM_INTENSITY_MR = 4,
    /// What PRISM_INTENSITY_AUTO does for a PET, whatever the values look like.
    PRISM_INTENSITY_PET = 5,
}

/// How to open a session.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct prism_session_options {
    /// sizeof(prism_session_options).
    pub struct_size: usize,
    /// Spacing in mm at which the model looks at the scan, below 100; 0: the model's own, or fitted
    /// to the box if the model does that.
    pub spacing: f64,
    /// A prism_intensity.
    pub intensity: i32,
    /// The range with PRISM_INTENSITY_GIVEN: intensities are clipped to clip[0] to clip[1].
    pub clip: [f32; 2],
    /// The mean with PRISM_INTENSITY_GIVEN: it is subtracted from the clipped value.
    pub mean: f32,
    /// The standard deviation, above 0, with PRISM_INTENSITY_GIVEN: the difference is divided by
    /// it.
    pub sd: f32,
    /// Unused: 0.
    pub reserved: i32,
    /// 1: the network alone, as in the paper: one patch, the prompts of the last interaction, no
    /// guarantee that they are obeyed. 0: the session keeps its guarantees.
    pub released: i32,
    /// The most bytes of encoded patches that are kept, so that they need not be encoded again; at
    /// most half of the memory budget; 0: 2 GiB.
    pub memory: usize,
    /// Most interactions that can be undone; older ones are dropped; 0: 1000.
    pub undo_steps: usize,
    /// Bytes that the undo history may take, at most a quarter of the library's budget, shared
    /// equally with sessions forked from this one (the last interaction can always be undone); 0: 1
    /// GiB.
    pub undo_bytes: usize,
}

impl VersionedStruct for prism_session_options {
    const NAME: &'static str = "prism_session_options";
    const LEAST: usize = std::mem::offset_of!(prism_session_options, released);
}

/// The patch of a session: the cube of the scan that the model saw last, or will see first. A
/// session that follows an object looks at several.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct prism_patch_info {
    /// sizeof(prism_patch_info), set by the caller.
    pub struct_size: usize,
    /// Voxels along each side.
    pub edge: usize,
    /// Spacing of these voxels in mm.
    pub spacing: f64,
    /// Whether the spacing was made coarser than requested, so that the object fits.
    pub coarsened: i32,
    /// Row-major matrix that maps patch voxel (i, j, k, 1) to millimetres in RAS.
    pub affine: [f64; 16],
    /// Bytes of all encoded patches that are kept.
    pub bytes: usize,
}

impl VersionedStruct for prism_patch_info {
    const NAME: &'static str = "prism_patch_info";
}

/// Called as work proceeds: `done` runs from 0 to 1, `stage` names the completed stage and is valid
/// during the call. Returning 0 cancels the current call with PRISM_CANCELLED and leaves the
/// session unchanged. It runs on the thread of that call, must not throw or jump out, and gets
/// PRISM_BUSY from this session's other functions.
pub type prism_progress_callback =
    Option<unsafe extern "C" fn(user: *mut c_void, done: f64, stage: *const c_char) -> i32>;

/// Opens a session on a volume, for one object. `options` may be NULL. The scan is not encoded yet:
/// prism_session_encode or the first interaction does it. On success the caller owns `*session` and
/// releases it with prism_session_free.
///
/// # Safety
/// `options` is NULL or a structure of the size that it says; `session` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_session_open(
    model: *const prism_model,
    volume: *const prism_volume,
    options: *const prism_session_options,
    session: *mut *mut prism_session,
) -> prism_status {
    call(|| {
        let model = handles::get::<ModelObject, _>(model)?.model.clone();
        // Lent for the whole call, which reads the voxels: freeing the volume waits for it.
        let lent = handles::get::<Scan, _>(volume)?;
        let volume = lent.share();
        // SAFETY: guaranteed by the caller.
        let options = if options.is_null() { None } else { Some(unsafe { read_struct(options)? }) };
        if session.is_null() {
            return Err(Failure::null("session"));
        }
        let spacing = options.map_or(0.0, |o| o.spacing);
        if !(0.0..100.0).contains(&spacing) {
            return Err(Failure::argument(format!(
                "spacing is {spacing} mm, expected 0 (the model's own) or more, below 100"
            )));
        }
        let normalization = match options.map_or(0, |o| o.intensity) {
            said @ (0 | 3..=5) => {
                let modality =
                    [Modality::Ct, Modality::Mr, Modality::Pet].get((said - 3) as usize).copied();
                let decided = match &*volume {
                    Scan::Read { volume: v, .. } => {
                        intensities_of(&**v, modality, model.config().intensity)
                    }
                    Scan::Wrapped(v) => intensities_of(&**v, modality, model.config().intensity),
                };
                say(&format!("the scan is {}", decided.why()));
                decided.warning.iter().for_each(|w| say(w));
                decided.normalization
            }
            1 => match &*volume {
                Scan::Read { volume: v, .. } => Normalization::of_percentiles(&**v),
                Scan::Wrapped(v) => Normalization::of_percentiles(&**v),
            },
            2 => {
                let o = options.ok_or_else(|| Failure::null("options"))?;
                let sound = o.clip[0] < o.clip[1]
                    && o.clip.iter().all(|c| c.is_finite())
                    && o.mean.is_finite()
                    && o.sd > 0.0
                    && o.sd.is_finite();
                if !sound {
                    let (clip, mean, sd) = (o.clip, o.mean, o.sd);
                    return Err(Failure::argument(format!(
                        "clip {clip:?}, mean {mean}, sd {sd}: expected clip[0] below clip[1] and sd above 0"
                    )));
                }
                Normalization { clip: o.clip, mean: o.mean, sd: o.sd }
            }
            other => {
                return Err(Failure::argument(format!(
                    "intensity is {other}, expected a prism_intensity, 0 to 5"
                )));
            }
        };
        let released = match options.map_or(0, |o| o.released) {
            0 => false,
            1 => true,
            other => {
                return Err(Failure::argument(format!("released is {other}, expected 0 or 1")));
            }
        };
        let memory = options.map(|o| o.memory).filter(|m| *m > 0).unwrap_or(MEMORY);
        let undo_steps = options.map(|o| o.undo_steps).filter(|n| *n > 0).unwrap_or(UNDO_STEPS);
        let undo_bytes = options.map(|o| o.undo_bytes).filter(|n| *n > 0).unwrap_or(UNDO_BYTES);
        let options = Options {
            spacing: (spacing > 0.0).then_some(spacing),
            released,
            memory,
            undo_steps,
            undo_bytes,
        };
        let scan = crate::session::Scan::new(&model, volume.clone(), normalization, options);
        let progress = Progress(None, std::ptr::null_mut());
        let state =
            State { volume, session: Session::new(&Arc::new(scan)), progress, encoded: [0.0; 2] };
        // SAFETY: as above.
        unsafe { store(session, "session", made(state)?) }
    })
}

fn made(state: State) -> Result<*mut prism_session, Failure> {
    handles::make(Arc::new(SessionObject {
        state: Mutex::new(state),
        cancel: AtomicBool::new(false),
    }))
}

/// Opens a session for another object on the scan that `session` has encoded, or will encode for
/// itself where it has not. Options and callbacks are the same.
///
/// # Safety
/// `another` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_session_fork(
    session: *const prism_session,
    another: *mut *mut prism_session,
) -> prism_status {
    call(|| {
        let held = handles::get::<SessionObject, _>(session)?;
        if another.is_null() {
            return Err(Failure::null("another"));
        }
        let state = held.lock()?;
        let copy = State {
            volume: state.volume.clone(),
            session: state.session.another(),
            encoded: [0.0; 2],
            ..*state
        };
        drop(state);
        // SAFETY: guaranteed by the caller.
        unsafe { store(another, "another", made(copy)?) }
    })
}

/// Calls `callback` as later encodings and interactions of this session proceed, passing `user` to
/// it; NULL for none.
///
/// # Safety
/// `user` must stay usable, from any thread that calls this session's functions, until another
/// callback was set or the session was freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_session_set_progress(
    session: *const prism_session,
    callback: prism_progress_callback,
    user: *mut c_void,
) -> prism_status {
    call(|| {
        handles::get::<SessionObject, _>(session)?.lock()?.progress = Progress(callback, user);
        Ok(())
    })
}

/// Cancels the session's call that is running on another thread, at its next stage, with
/// PRISM_CANCELLED; without such a call nothing happens.
#[unsafe(no_mangle)]
pub extern "C" fn prism_session_cancel(session: *const prism_session) -> prism_status {
    call(|| {
        handles::get::<SessionObject, _>(session)?.cancel.store(true, Ordering::Relaxed);
        Ok(())
    })
}

/// Runs `work` with an observer that reports stages `first` to ... of `all`.
fn watched<T, E>(
    progress: Progress,
    cancel: &AtomicBool,
    [first, all]: [usize; 2],
    work: impl FnOnce(&mut Observer) -> Result<T, E>,
) -> Result<T, E> {
    let mut step = |done: usize, name: &str| {
        let Progress(callback, user) = progress;
        let share = ((first + done) as f64 / all as f64).min(1.0);
        // SAFETY: only `prism_session_set_progress` sets it, whose caller guarantees `user`; the
        // text outlives the call.
        let goes_on = callback
            .is_none_or(|callback| unsafe { callback(user, share, text(name).as_ptr()) } != 0);
        goes_on && !cancel.load(Ordering::Relaxed)
    };
    work(&mut Observer::steps(&mut step))
}

impl State {
    fn model(&self) -> &Arc<Model> {
        self.session.scan().model()
    }

    /// Encodes the scan where the prompts make the model look.
    fn encode(
        &mut self,
        prompts: &Prompts,
        cancel: &AtomicBool,
        all: usize,
    ) -> Result<(), Failure> {
        let session = &mut self.session;
        let seconds = watched(self.progress, cancel, [0, all], |observer| {
            session.prepare(prompts, observer)
        })?;
        self.encoded = seconds.map(|s| s.as_secs_f64());
        if let Some(patch) = self.session.patch().filter(|p| p.coarsened) {
            let (edge, at) = (patch.grid.size[0], patch.spacing);
            say(&format!(
                "the object does not fit {edge} voxels at the requested spacing: it is processed at {at:.3} mm"
            ));
        }
        Ok(())
    }

    fn interact(&mut self, prompts: &Prompts, cancel: &AtomicBool) -> Result<(), Failure> {
        let [encode, interact] = self.model().steps();
        let all = if self.session.patch().is_none() { encode + interact } else { interact };
        let session = &mut self.session;
        let p = watched(self.progress, cancel, [0, all], |observer| {
            session.interact_observed(prompts, observer).cloned()
        })?;
        (0..2).for_each(|n| self.encoded[n] += p.encoding[n].as_secs_f64());
        p.notes.iter().for_each(|note| say(&note.to_string()));
        if p.left_out > 0 {
            say(&format!("{} points lie outside the patch and were ignored", p.left_out));
        }
        if p.thinned > 0 {
            say(&format!(
                "more points than the prompt encoder takes: {} of them went to the refiner only",
                p.thinned
            ));
        }
        Ok(())
    }

    /// A handle, in the given place, for the present answer.
    fn answer(&mut self, place: Vacant) -> Result<*mut prism_prediction, Failure> {
        let prediction = self.session.prediction().cloned();
        let prediction = prediction.ok_or_else(|| {
            Failure::new(prism_status::PRISM_NOTHING, "the session has no prediction yet")
        })?;
        let encoded = std::mem::take(&mut self.encoded);
        let volume = self.volume.clone();
        Ok(place.fill(Arc::new(PredictionObject { prediction, volume, encoded })))
    }
}

/// Encodes the patch that `prompts` would make the model look at (a box, else the points on the
/// object), so that the first interaction does not have to; give what is known before the user's
/// first click. It adds no prompts. A released session that was used before starts over: its
/// predictions and history are dropped.
///
/// # Safety
/// `prompts` is a structure of the size that it says, its arrays hold what its counts say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_session_encode(
    session: *const prism_session,
    prompts: *const prism_prompts,
) -> prism_status {
    call(|| {
        let held = handles::get::<SessionObject, _>(session)?;
        let mut state = held.lock()?;
        held.cancel.store(false, Ordering::Relaxed);
        // SAFETY: guaranteed by the caller.
        let prompts = unsafe { prompts_of(prompts, state.volume.grid())? };
        let all = state.model().steps()[0];
        state.encode(&prompts, &held.cancel, all)
    })
}

/// One interaction: these prompts are added to the earlier ones. Encodes the scan first if needed.
/// On success `*prediction`, unless `prediction` is NULL, is the result; the caller owns it and
/// releases it with prism_prediction_free. On failure the session is unchanged.
///
/// # Safety
/// `prompts` is a structure of the size that it says, its arrays hold what its counts say;
/// `prediction` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_session_interact(
    session: *const prism_session,
    prompts: *const prism_prompts,
    prediction: *mut *mut prism_prediction,
) -> prism_status {
    call(|| {
        let held = handles::get::<SessionObject, _>(session)?;
        let mut state = held.lock()?;
        held.cancel.store(false, Ordering::Relaxed);
        // SAFETY: guaranteed by the caller.
        let prompts = unsafe { prompts_of(prompts, state.volume.grid())? };
        // Before the step is made, which stays if there is no place for its answer afterwards.
        let place = (!prediction.is_null()).then(handles::vacant).transpose()?;
        state.interact(&prompts, &held.cancel)?;
        match place {
            None => Ok(()),
            // SAFETY: guaranteed by the caller.
            Some(place) => unsafe { store(prediction, "prediction", state.answer(place)?) },
        }
    })
}

/// Steps through a session's history.
fn step(
    session: *const prism_session,
    what: &str,
    go: impl FnOnce(&mut Session) -> bool,
) -> prism_status {
    call(|| {
        let held = handles::get::<SessionObject, _>(session)?;
        let mut state = held.lock()?;
        let done = go(&mut state.session);
        if done {
            Ok(())
        } else {
            Err(Failure::new(prism_status::PRISM_NOTHING, format!("there is nothing to {what}")))
        }
    })
}

/// Undoes the last interaction; PRISM_NOTHING if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn prism_session_undo(session: *const prism_session) -> prism_status {
    step(session, "undo", Session::undo)
}

/// Restores the interaction that was undone last; PRISM_NOTHING if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn prism_session_redo(session: *const prism_session) -> prism_status {
    step(session, "redo", Session::redo)
}

/// Removes prompts, predictions and history. Encoded patches are kept.
#[unsafe(no_mangle)]
pub extern "C" fn prism_session_reset(session: *const prism_session) -> prism_status {
    call(|| {
        let held = handles::get::<SessionObject, _>(session)?;
        held.lock()?.session.reset();
        Ok(())
    })
}

/// Number of interactions that can be undone and redone. Either pointer may be NULL.
///
/// # Safety
/// Each is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_session_get_depth(
    session: *const prism_session,
    undo: *mut usize,
    redo: *mut usize,
) -> prism_status {
    call(|| {
        let held = handles::get::<SessionObject, _>(session)?;
        let (back, forth) = held.lock()?.session.depth();
        for (place, value) in [(undo, back), (redo, forth)] {
            if !place.is_null() {
                // SAFETY: guaranteed by the caller.
                unsafe { store(place, "depth", value)? };
            }
        }
        Ok(())
    })
}

/// The current prediction, also after undo and redo; PRISM_NOTHING if there is none. On success the
/// caller owns `*prediction` and releases it with prism_prediction_free.
///
/// # Safety
/// `prediction` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_session_get_prediction(
    session: *const prism_session,
    prediction: *mut *mut prism_prediction,
) -> prism_status {
    call(|| {
        let held = handles::get::<SessionObject, _>(session)?;
        if prediction.is_null() {
            return Err(Failure::null("prediction"));
        }
        let answer = held.lock()?.answer(handles::vacant()?)?;
        // SAFETY: guaranteed by the caller.
        unsafe { store(prediction, "prediction", answer) }
    })
}

/// Fills in `*info` about the patch; set its struct_size first. PRISM_NOTHING before the scan is
/// encoded.
///
/// # Safety
/// `info` is a structure of the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_session_get_patch(
    session: *const prism_session,
    info: *mut prism_patch_info,
) -> prism_status {
    call(|| {
        let held = handles::get::<SessionObject, _>(session)?;
        let state = held.lock()?;
        let patch = state.session.patch();
        let patch = patch.ok_or_else(|| {
            Failure::new(prism_status::PRISM_NOTHING, "the scan is not encoded yet")
        })?;
        let value = prism_patch_info {
            struct_size: 0,
            edge: patch.grid.size[0],
            spacing: patch.spacing,
            coarsened: patch.coarsened.into(),
            affine: matrix(&patch.grid.affine),
            bytes: state.session.scan().bytes(),
        };
        // SAFETY: guaranteed by the caller.
        unsafe { write_struct(info, value) }
    })
}

/// Frees a session. If another thread's call is using it, this waits for the end of that call
/// (which prism_session_cancel brings nearer): the arrays and callbacks of the session's callers
/// are not used any more when this returns. So hold no lock that a callback of that call takes. In
/// a callback, which cannot wait, this returns PRISM_BUSY, and the session stays. Predictions can
/// still be used. NULL is allowed.
#[unsafe(no_mangle)]
pub extern "C" fn prism_session_free(session: *mut prism_session) -> prism_status {
    call(|| handles::free::<SessionObject, _>(session))
}
