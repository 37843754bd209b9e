//! Kernels compiled at run time by NVRTC, and kept on disk.
//!
//! NVRTC needs no GPU: the same function shows, on any machine, that the kernels compile for an
//! architecture. Compiled code is kept on disk (`cache.rs`), by a hash of the source with its
//! headers, the options, the architecture and NVRTC's version.

use super::CudaError;
use super::cache::{self, Fnv};
use super::source::{FILES, HEADERS};
use cudarc::nvrtc::{result, sys};
use std::ffi::{CString, c_char, c_int};

/// The version of this machine's NVRTC library: major and minor number.
///
/// # Errors
/// [`CudaError::Unavailable`] if there is no such library.
pub fn version() -> Result<(i32, i32), CudaError> {
    // If the library is absent, later calls would panic: check first.
    // SAFETY: loads a library, as any call of it would.
    if !unsafe { sys::is_culib_present() } {
        let text = "the library NVRTC (libnvrtc.so) was not found; it comes with the CUDA toolkit, or as the Python package nvidia-cuda-nvrtc: add its folder to LD_LIBRARY_PATH";
        return Err(CudaError::Unavailable(text.into()));
    }
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: two integers to write to.
    let asked = unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result();
    asked.map_err(|e| CudaError::Unavailable(format!("NVRTC does not report its version: {e}")))?;
    Ok((major, minor))
}

/// What to compile for on a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The architecture as [`compile`] takes it.
    pub arch: String,
    /// The number of the architecture, as 86 for 8.6: what the kernels' sources see.
    pub number: i32,
}

/// What to compile for on a GPU of a compute capability: its own architecture, if this NVRTC knows
/// that. Otherwise the highest that is not newer: as machine code, if the major numbers are the
/// same, or as PTX (`compute_86`), which the driver translates.
///
/// # Errors
/// [`CudaError::Unavailable`] without NVRTC, or if all architectures that it knows are newer.
pub fn target(capability: (i32, i32)) -> Result<Target, CudaError> {
    let (major, minor) = version()?;
    let fail = |e: result::NvrtcError| {
        CudaError::Unavailable(format!("NVRTC does not tell its architectures: {e}"))
    };
    let mut count: c_int = 0;
    // SAFETY: an integer to write to.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result().map_err(fail)?;
    let mut known: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: as many integers to write to as it has architectures.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(fail)?;
    nearest(&known, capability).ok_or_else(|| {
        let (high, low) = capability;
        CudaError::Unavailable(format!(
            "NVRTC {major}.{minor} compiles for {known:?}, and a GPU of compute capability {high}.{low} is older"
        ))
    })
}

/// [`target`] for a compiler that knows some architectures; none if all are newer.
fn nearest(known: &[c_int], (major, minor): (i32, i32)) -> Option<Target> {
    let own = 10 * major + minor;
    let number = known.iter().copied().filter(|number| *number <= own).max()?;
    let arch = match number {
        // Of the newer architectures only those with instructions of their own need the suffix.
        90 if own == 90 => "sm_90a".into(),
        _ if number / 10 == major => format!("sm_{number}"),
        _ => format!("compute_{number}"),
    };
    Some(Target { arch, number })
}

/// A compiled file of kernels: machine code, and the assembler's report.
pub struct Compiled {
    /// The machine code, a cubin; for a virtual architecture PTX, which ends with a zero.
    pub code: Vec<u8>,
    /// The lines of `ptxas --verbose`: registers, spills and local memory of each kernel.
    pub log: String,
}

/// Compiles a file of kernels to machine code for the GPU architecture `arch`, such as `sm_90a`, or
/// to PTX for a virtual one, such as `compute_90`.
///
/// `file` is its name, for messages, and `text` its source, which may include [`HEADERS`].
///
/// # Errors
/// [`CudaError::Unavailable`] without NVRTC, [`CudaError::Compile`] if the text does not compile.
pub fn compile(file: &str, text: &str, arch: &str) -> Result<Compiled, CudaError> {
    version()?;
    let fail = |log: String| CudaError::Compile { file: file.into(), arch: arch.into(), log };
    let c = |text: &str| CString::new(text).unwrap_or_default();
    let (source, name) = (c(text), c(file));
    let texts: Vec<CString> = HEADERS.iter().map(|(_, text)| c(text)).collect();
    let names: Vec<CString> = HEADERS.iter().map(|(name, _)| c(name)).collect();
    let pointers =
        |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
    let (texts, names) = (pointers(&texts), pointers(&names));
    let mut program = std::ptr::null_mut();
    // SAFETY: every string outlives the program.
    let made = unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            texts.len() as c_int,
            texts.as_ptr(),
            names.as_ptr(),
        )
    };
    made.result().map_err(|e| fail(e.to_string()))?;
    // SAFETY: the program was just made, and is destroyed once, at the end.
    let outcome = unsafe {
        let compiled = result::compile_program(program, &options(arch));
        let log = result::get_program_log(program).unwrap_or_default();
        let log: Vec<u8> = log.iter().map(|v| *v as u8).take_while(|v| *v != 0).collect();
        let log = String::from_utf8_lossy(&log).trim_end().to_string();
        compiled.map_err(|e| fail(format!("{e}\n{log}"))).and_then(|()| {
            let (mut size, is_virtual) = (0, arch.starts_with("compute_"));
            let asked = match is_virtual {
                true => sys::nvrtcGetPTXSize(program, &mut size),
                false => sys::nvrtcGetCUBINSize(program, &mut size),
            };
            asked.result().map_err(|e| fail(e.to_string()))?;
            let mut code = vec![0u8; size];
            let asked = match is_virtual {
                true => sys::nvrtcGetPTX(program, code.as_mut_ptr().cast()),
                false => sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()),
            };
            asked.result().map_err(|e| fail(e.to_string()))?;
            Ok(Compiled { code, log })
        })
    };
    // SAFETY: as above.
    let _ = unsafe { result::destroy_program(program) };
    outcome
}

fn options(arch: &str) -> Vec<String> {
    vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".into(),
        "--ptxas-options=--verbose".into(),
    ]
}

/// The code of `file`, one of [`FILES`], for the GPU architecture `arch`: from the cache, or
/// compiled and stored there.
///
/// # Errors
/// There is no such file, or those of [`compile`]. A cache that cannot be written is no error.
pub fn code_of(file: &str, arch: &str) -> Result<Vec<u8>, CudaError> {
    let (_, text) = FILES
        .iter()
        .find(|(name, _)| *name == file)
        .ok_or_else(|| CudaError::Launch(format!("no kernels/{file}")))?;
    let mut key = Fnv::new();
    let (major, minor) = version()?;
    key.add(&[major as u8, minor as u8]);
    options(arch).iter().for_each(|o| key.add(o.as_bytes()));
    key.add(text.as_bytes());
    HEADERS.iter().for_each(|(_, text)| key.add(text.as_bytes()));
    let stem = file.strip_suffix(".cu").unwrap_or(file);
    let path = cache::folder().map(|f| f.join(format!("{stem}-{arch}-{:016x}.cubin", key.0)));
    if let Some(code) = path.as_ref().and_then(|p| cache::read(p).ok().flatten()) {
        return Ok(code);
    }
    let code = compile(file, text, arch)?.code;
    if let Some(path) = path {
        // If the cache cannot be written, that costs time and nothing else.
        let _ = cache::write(&path, &code);
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_gets_code_that_runs_on_it() {
        let all = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121];
        let of = |known: &[c_int], capability| nearest(known, capability).unwrap().arch;
        let own = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)].map(|c| of(&all, c));
        assert_eq!(own, ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_103", "sm_121"]);
        // Of a compiler that is older than the GPU: machine code of the same family, or PTX.
        let older = [80, 86, 90, 100, 120];
        let near = [(8, 9), (10, 3), (11, 0), (12, 1), (13, 0)].map(|c| of(&older, c));
        assert_eq!(near, ["sm_86", "sm_100", "compute_100", "sm_120", "compute_120"]);
        assert_eq!([(9, 0), (10, 0)].map(|c| of(&older[..2], c)), ["compute_86", "compute_86"]);
        let newest = nearest(&older[..3], (10, 0)).unwrap();
        assert_eq!((newest.arch.as_str(), newest.number), ("compute_90", 90));
        assert_eq!(nearest(&[90, 100], (8, 6)), None);
    }
}
