//! Engines and models.

use super::handles::{self, Object};
use super::log::say;
use super::status::{
    Failure, VersionedStruct, call, prism_status, read_struct, store, str_of, text, write_struct,
};
use crate::device::{Device, Precision, processors};
use crate::memory;
use crate::model::{Model, Weights};
use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;

/// A device to compute on: CPU threads, or a GPU. Made by prism_engine_open. Any number of threads
/// may use it at once.
pub struct prism_engine;

/// A network, laid out for an engine. Made by prism_model_load. Any number of sessions and threads
/// may use it at once.
pub struct prism_model;

pub(super) struct Engine {
    pub device: Device,
}

impl Object for Engine {
    const NAME: &'static str = "an engine";
}

pub(super) struct ModelObject {
    pub model: Arc<Model>,
    parameters: usize,
}

impl Object for ModelObject {
    const NAME: &'static str = "a model";
}

/// Element types of feature maps on a CUDA device, or of products on the CPU; sums are always
/// float32.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum prism_precision {
    /// 32-bit floats. A CUDA device multiplies them on tensor cores, as the sum of three TF32
    /// products: within 2^-21, checked against float32's bounds.
    PRISM_F32 = 0,
    /// IEEE half precision: CUDA devices.
    PRISM_F16 = 1,
    /// bfloat16: CUDA devices, and processors with AVX512-BF16.
    PRISM_BF16 = 2,
    /// 32-bit floats, rounded to TF32 for products, as with PyTorch's tf32: CUDA devices.
    PRISM_TF32 = 3,
    /// 32-bit floats in plain arithmetic, as with PyTorch's ieee.
    PRISM_IEEE = 4,
}

/// How to open an engine.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct prism_engine_options {
    /// sizeof(prism_engine_options).
    pub struct_size: usize,
    /// Number of threads, at most one per processor; 0: one per processor.
    pub threads: u32,
    /// A prism_precision.
    pub precision: i32,
    /// The memory budget: bytes that the library may use in this process, for all engines; 0: as it
    /// was set before, at first what the machine has; SIZE_MAX: what the machine has. Scans that
    /// were read, weights, working memory and encoded patches are counted; any other request must
    /// fit what is left. Calls that would need more return PRISM_OUT_OF_MEMORY.
    pub memory: usize,
}

impl VersionedStruct for prism_engine_options {
    const NAME: &'static str = "prism_engine_options";
    const LEAST: usize = std::mem::offset_of!(prism_engine_options, memory);
}

/// Facts about a model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct prism_model_info {
    /// sizeof(prism_model_info), set by the caller.
    pub struct_size: usize,
    /// Voxels along each side of the patch, the cube that the model sees.
    pub patch_edge: usize,
    /// Spacing of these voxels in mm; a model that fits the cube to a box chooses its own each
    /// time.
    pub spacing: f64,
    /// Candidate masks of an interaction.
    pub candidates: usize,
    /// The number of its parameters.
    pub parameters: u64,
}

impl VersionedStruct for prism_model_info {
    const NAME: &'static str = "prism_model_info";
}

/// Opens a device. `device` is "cpu", or "cuda" or "cuda:N" for NVIDIA GPU number N (its driver and
/// NVRTC are loaded now; neither is needed for "cpu"). `options` may be NULL: a thread per
/// processor, float32. The environment variable PRISM_ISA (avx512, avx2, neon, portable) limits the
/// CPU's instruction set.
///
/// Fails with PRISM_DEVICE if there is no such device, or it lacks what was asked for. On success
/// `*engine` is the caller's, to be freed with prism_engine_free.
///
/// # Safety
/// `device` ends with a NUL; `options` is NULL or a structure of the size that it says; `engine`
/// can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_engine_open(
    device: *const c_char,
    options: *const prism_engine_options,
    engine: *mut *mut prism_engine,
) -> prism_status {
    call(|| {
        // SAFETY: guaranteed by the caller.
        let (name, options) = unsafe {
            let options = if options.is_null() { None } else { Some(read_struct(options)?) };
            (str_of(device, "device")?, options)
        };
        if engine.is_null() {
            return Err(Failure::null("engine"));
        }
        let (threads, precision) = options.map_or((0, 0), |o| (o.threads as usize, o.precision));
        let most = processors();
        if threads > most {
            say(&format!("{threads} threads were requested: {most} are used, one per processor"));
        }
        let precision = match precision {
            0 => Precision::F32,
            1 => Precision::F16,
            2 => Precision::Bf16,
            3 => Precision::Tf32,
            4 => Precision::Ieee,
            other => {
                return Err(Failure::argument(format!(
                    "precision is {other}, expected a prism_precision, 0 to 4"
                )));
            }
        };
        let device = Device::open_as(name, threads, precision)?;
        match options.map_or(0, |o| o.memory) {
            0 => {}
            usize::MAX => memory::set_limit(0),
            bytes => memory::set_limit(bytes as u64),
        }
        let opened = handles::make(Arc::new(Engine { device }))?;
        // SAFETY: as above.
        unsafe { store(engine, "engine", opened) }
    })
}

/// Writes a line about an engine, for example "cpu, 2 threads, avx512", NUL-terminated, to
/// `buffer`, which holds `capacity` bytes. `*needed`, unless `needed` is NULL, becomes the number
/// of bytes, including the NUL; if `buffer` is NULL, nothing else happens.
///
/// # Safety
/// `buffer` is NULL or holds `capacity` bytes; `needed` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_engine_describe(
    engine: *const prism_engine,
    buffer: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> prism_status {
    call(|| {
        let line = text(&handles::get::<Engine, _>(engine)?.device.describe());
        let bytes = line.as_bytes_with_nul();
        // SAFETY: guaranteed by the caller; checked against the capacity.
        unsafe { super::prediction::fill(bytes, buffer.cast(), capacity, needed) }
    })
}

/// Frees an engine. Models that were loaded for it keep what they need of it. NULL is allowed.
#[unsafe(no_mangle)]
pub extern "C" fn prism_engine_free(engine: *mut prism_engine) -> prism_status {
    call(|| handles::free::<Engine, _>(engine))
}

/// Lays weights out for an engine. `file` is how a warning about them calls where they came from.
///
/// # Safety
/// `model` is NULL or can be written.
unsafe fn load(
    engine: *const prism_engine,
    weights: Weights,
    file: &str,
    model: *mut *mut prism_model,
) -> Result<(), Failure> {
    let engine = handles::get::<Engine, _>(engine)?;
    let parameters = weights.parameters();
    let loaded = ModelObject { model: Arc::new(Model::new(&engine.device, &weights)?), parameters };
    // SAFETY: guaranteed by the caller.
    unsafe { store(model, "model", handles::make(Arc::new(loaded))?)? };
    weights.warning(file).iter().for_each(|w| say(w));
    Ok(())
}

/// Loads a model file (.safetensors, as `prism train` and `prism convert` write it) for an engine.
/// Its contents are checked against the hash in it; if it carries none, the log is told. The file
/// stays open, and large matrices are read again when they are needed: if the file is replaced,
/// nothing changes; if it is overwritten or truncated, later calls return PRISM_FILE, and never a
/// wrong answer. Fails with PRISM_FILE if the file cannot be used, PRISM_OUT_OF_MEMORY if it does
/// not fit. On success `*model` is the caller's, to be freed with prism_model_free.
///
/// # Safety
/// `path` ends with a NUL; `model` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_model_load(
    engine: *const prism_engine,
    path: *const c_char,
    model: *mut *mut prism_model,
) -> prism_status {
    call(|| {
        // SAFETY: guaranteed by the caller.
        let path = unsafe { str_of(path, "path")? };
        if model.is_null() {
            return Err(Failure::null("model"));
        }
        handles::get::<Engine, _>(engine)?;
        let weights = Weights::open(Path::new(path))?;
        // SAFETY: `model` can be written: guaranteed by the caller.
        unsafe { load(engine, weights, path, model) }
    })
}

/// Loads a model for an engine from `size` bytes in memory, the contents of a model file. They are
/// not needed any more when this returns. Fails with PRISM_FILE if they cannot be used,
/// PRISM_OUT_OF_MEMORY if the model does not fit. On success `*model` is the caller's, to be freed
/// with prism_model_free.
///
/// # Safety
/// `data` holds `size` bytes; `model` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_model_load_memory(
    engine: *const prism_engine,
    data: *const c_void,
    size: usize,
    model: *mut *mut prism_model,
) -> prism_status {
    call(|| {
        if data.is_null() {
            return Err(Failure::null("data"));
        }
        if model.is_null() {
            return Err(Failure::null("model"));
        }
        if size > isize::MAX as usize {
            return Err(Failure::argument(format!(
                "size is {size}, more bytes than the address space"
            )));
        }
        handles::get::<Engine, _>(engine)?;
        // SAFETY: guaranteed by the caller.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size) };
        let weights = Weights::from_bytes(bytes)?;
        // SAFETY: `model` can be written: guaranteed by the caller.
        unsafe { load(engine, weights, "a model in memory", model) }
    })
}

/// Fills `*info` in; set its struct_size first.
///
/// # Safety
/// `info` is a structure of the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_model_get_info(
    model: *const prism_model,
    info: *mut prism_model_info,
) -> prism_status {
    call(|| {
        let loaded = handles::get::<ModelObject, _>(model)?;
        let config = loaded.model.config();
        let value = prism_model_info {
            struct_size: 0,
            patch_edge: config.patch,
            spacing: config.spacing.into(),
            candidates: if config.confidence { config.candidates } else { 1 },
            parameters: loaded.parameters as u64,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { write_struct(info, value) }
    })
}

/// Does in advance what the first encoding and the first interaction do once (they allocate memory,
/// lay out weights, make recordings on a GPU), so that no user waits for it. Takes about as long as
/// one of each.
#[unsafe(no_mangle)]
pub extern "C" fn prism_model_warm_up(model: *const prism_model) -> prism_status {
    call(|| Ok(handles::get::<ModelObject, _>(model)?.model.warm_up()?))
}

/// Frees a model. Sessions that were opened with it can still be used. NULL is allowed.
#[unsafe(no_mangle)]
pub extern "C" fn prism_model_free(model: *mut prism_model) -> prism_status {
    call(|| handles::free::<ModelObject, _>(model))
}
