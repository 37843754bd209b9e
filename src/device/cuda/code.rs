//! Kernels' machine code on a GPU: modules, their functions, and launches that the driver's plain
//! call cannot make.

use super::Launch;
use super::stream::Stream;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::c_void;

/// More than the parameters of any kernel.
const MOST_PARAMETERS: usize = 64;

/// Machine code on the device: one module per file of kernels, and the functions asked for so far.
#[derive(Default)]
pub(super) struct Code {
    pub(super) modules: HashMap<&'static str, sys::CUmodule>,
    pub(super) functions: HashMap<&'static str, Function>,
}

/// A kernel's code, and how much shared memory it has been allowed so far beyond what every kernel
/// may have.
#[derive(Clone, Copy)]
pub(super) struct Function {
    pub(super) code: sys::CUfunction,
    pub(super) allowed: usize,
}

// SAFETY: handles of the context that `Driver` sets before it uses them; they are never unloaded.
unsafe impl Send for Code {}

/// The size in bytes of each parameter of a function; none if the driver does not tell.
///
/// # Safety
/// A function of a module that stays loaded.
pub(super) unsafe fn parameters(function: sys::CUfunction) -> Option<Vec<u8>> {
    // Drivers tell from CUDA 12.4 on; calling what an older one lacks would panic.
    // SAFETY: the driver is loaded; whatever has this name is not called here.
    let tells =
        unsafe { sys::culib().get::<unsafe extern "C" fn()>("cuFuncGetParamInfo".as_bytes()) }
            .is_ok();
    let most = if tells { MOST_PARAMETERS } else { 0 };
    let mut sizes: Vec<u8> = vec![];
    for at in 0..most {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: guaranteed by the caller; two numbers to write to.
        let asked = unsafe { sys::cuFuncGetParamInfo(function, at, &mut offset, &mut size) };
        match u8::try_from(size) {
            Ok(size) if asked.result().is_ok() => sizes.push(size),
            // There is no such parameter.
            _ => break,
        }
    }
    // Every kernel has parameters.
    (!sizes.is_empty()).then_some(sizes)
}

/// A launch that may begin before the previous one in its stream has finished.
///
/// # Safety
/// The kernel waits for the previous launch before it touches memory, and `arguments` are its
/// parameters.
pub(super) unsafe fn launch_early(
    function: sys::CUfunction,
    grid: [u32; 3],
    launch: Launch,
    stream: &Stream,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value,
    };
    let config = sys::CUlaunchConfig {
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: launch.threads as u32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared as u32,
        hStream: stream.0,
        attrs: &mut attribute,
        numAttrs: 1,
    };
    // SAFETY: guaranteed by the caller; the configuration lives until the call is over.
    unsafe {
        sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
    }
    .result()
}
