//! Sums over the GPUs of several processes, by NCCL. They run on a stream of their own, beside what is launched meanwhile.

use super::CudaError;
use super::driver::{Event, Stream};
use cudarc::driver::result;
use cudarc::nccl::{result as nccl, sys as nccl_sys};
use std::ffi::CStr;
use std::mem::MaybeUninit;

/// This process's membership in a group of GPUs.
pub struct Group {
    communicator: nccl_sys::ncclComm_t,
    stream: Stream,
    event: Event,
}

// NCCL's and the driver's handles may be used from any thread; calls are under the launcher's lock.
unsafe impl Send for Group {}

fn failed(what: &'static str) -> impl Fn(nccl::NcclError) -> CudaError {
    move |e| {
        // SAFETY: a static text of the library.
        let text = unsafe { CStr::from_ptr(nccl_sys::ncclGetErrorString(e.0)) };
        CudaError::Launch(format!("{what}: {}", text.to_string_lossy()))
    }
}

fn driver_failed(e: result::DriverError) -> CudaError {
    CudaError::Launch(format!("sums over a group: {:?}", e.0))
}

/// Whether the library is there.
pub fn is_present() -> bool {
    // SAFETY: loads a library, as any call of it would.
    unsafe { nccl_sys::is_culib_present() }
}

/// A name for a new group, to be told to its members.
pub fn new_id() -> Result<Vec<u8>, CudaError> {
    if !is_present() {
        return Err(CudaError::Unavailable("NCCL (libnccl.so) was not found: it adds up the gradients of several GPUs".into()));
    }
    let id = nccl::get_uniqueid().map_err(failed("a new group"))?;
    Ok(id.internal.iter().map(|v| *v as u8).collect())
}

impl Group {
    /// Joins; returns when all have. The caller's context is current.
    pub fn join(id: &[u8], rank: usize, world: usize) -> Result<Group, CudaError> {
        if !is_present() {
            return Err(CudaError::Unavailable("NCCL (libnccl.so) was not found: it adds up the gradients of several GPUs".into()));
        }
        let mut name = nccl_sys::ncclUniqueId { internal: [0; 128] };
        if id.len() != name.internal.len() {
            return Err(CudaError::Launch(format!("a group's name of {} bytes, expected {}", id.len(), name.internal.len())));
        }
        name.internal.iter_mut().zip(id).for_each(|(to, from)| *to = *from as _);
        let (stream, event) = (Stream::new().map_err(driver_failed)?, Event::new().map_err(driver_failed)?);
        let mut communicator = MaybeUninit::uninit();
        // SAFETY: the name is NCCL's own; it writes the communicator.
        let communicator = unsafe {
            nccl::comm_init_rank(communicator.as_mut_ptr(), world as i32, name, rank as i32).map_err(failed("joining a group"))?;
            communicator.assume_init()
        };
        Ok(Group { communicator, stream, event })
    }

    /// Begins to add up arrays of floats (address, count) over the group, in place, behind what `after` has to do so far.
    pub fn sum(&self, after: &Stream, arrays: &[(u64, usize)]) -> Result<(), CudaError> {
        self.event.record(after).map_err(driver_failed)?;
        self.event.hold(&self.stream).map_err(driver_failed)?;
        // SAFETY: the caller owns the arrays, and leaves them alone until `finish`.
        unsafe {
            nccl::group_start().map_err(failed("a sum"))?;
            for (address, count) in arrays {
                let at = *address as *mut std::ffi::c_void;
                let (float, sum) = (nccl_sys::ncclDataType_t::ncclFloat32, nccl_sys::ncclRedOp_t::ncclSum);
                nccl::all_reduce(at, at, *count, float, sum, self.communicator, self.stream.handle().cast()).map_err(failed("a sum"))?;
            }
            nccl::group_end().map_err(failed("a sum"))?;
        }
        Ok(())
    }

    /// Lets `then` wait for all sums.
    pub fn finish(&self, then: &Stream) -> Result<(), CudaError> {
        self.event.record(&self.stream).map_err(driver_failed)?;
        self.event.hold(then).map_err(driver_failed)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
        // SAFETY: its own handle, its last use.
        let _ = unsafe { nccl::comm_destroy(self.communicator) };
    }
}
