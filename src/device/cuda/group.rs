//! Sums over the GPUs of several processes, by NCCL. They run on a stream of their own, in parallel
//! with other launches.
//!
//! NCCL waits for the other processes for ever. So the communicator is one whose calls return at
//! once, and the thread that waits for them checks whether a process was lost meanwhile; sums on
//! the device that wait for a lost process end when the communicator is aborted, from any thread.

use super::CudaError;
use super::stream::{Event, Stream};
use cudarc::driver::result;
use cudarc::nccl::{result as nccl, sys as nccl_sys};
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The time that all processes have to join, and to finish with each other at the end.
const JOINING: Duration = Duration::from_secs(300);
const LEAVING: Duration = Duration::from_secs(20);

/// This process's membership in a group of GPUs.
pub struct Group {
    /// Null once aborted.
    communicator: nccl_sys::ncclComm_t,
    stream: Stream,
    event: Event,
}

// SAFETY: NCCL's and the driver's handles may be used from any thread; calls are under the
// launcher's lock.
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

fn missing() -> CudaError {
    CudaError::Unavailable(
        "NCCL (libnccl.so) was not found: it adds up the gradients of several GPUs".into(),
    )
}

/// A name for a new group, to be sent to its members.
pub fn new_id() -> Result<Vec<u8>, CudaError> {
    if !is_present() {
        return Err(missing());
    }
    let id = nccl::get_uniqueid().map_err(failed("a new group"))?;
    Ok(id.internal.iter().map(|v| *v as u8).collect())
}

/// The configuration of a communicator whose calls return at once; otherwise that of
/// NCCL_CONFIG_INITIALIZER.
fn without_waits() -> nccl_sys::ncclConfig_t {
    let (unset, none) = (i32::MIN, std::ptr::null());
    nccl_sys::ncclConfig_t {
        size: size_of::<nccl_sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 23000,
        blocking: 0,
        cgaClusterSize: unset,
        minCTAs: unset,
        maxCTAs: unset,
        netName: none,
        splitShare: unset,
        trafficClass: unset,
        commName: none,
        collnetEnable: unset,
        CTAPolicy: unset,
        shrinkShare: unset,
        nvlsCTAs: unset,
        nChannelsPerNetPeer: unset,
        nvlinkCentricSched: unset,
        graphUsageMode: unset,
        numRmaCtx: unset,
        maxP2pPeers: unset,
    }
}

impl Group {
    /// Joins the group; returns when all have joined, or `left` is set. The caller's context is
    /// current.
    pub fn join(
        id: &[u8],
        rank: usize,
        world: usize,
        left: &AtomicBool,
    ) -> Result<Group, CudaError> {
        if !is_present() {
            return Err(missing());
        }
        let mut name = nccl_sys::ncclUniqueId { internal: [0; 128] };
        if id.len() != name.internal.len() {
            return Err(CudaError::Launch(format!(
                "a group's name of {} bytes, expected {}",
                id.len(),
                name.internal.len()
            )));
        }
        name.internal.iter_mut().zip(id).for_each(|(to, from)| *to = *from as _);
        let (stream, event) =
            (Stream::new().map_err(driver_failed)?, Event::new().map_err(driver_failed)?);
        let mut group = Group { communicator: std::ptr::null_mut(), stream, event };
        let (what, mut config) = ("joining a group", without_waits());
        // SAFETY: the name is NCCL's own; it writes the communicator, and copies the configuration.
        unsafe {
            nccl::comm_init_rank_config(
                &mut group.communicator,
                world as i32,
                name,
                rank as i32,
                &mut config,
            )
        }
        .map_err(failed(what))?;
        group.wait(what, left, Some(JOINING))?;
        Ok(group)
    }

    /// Waits until the last call has been accepted. A failure ends the communicator.
    fn wait(
        &mut self,
        what: &'static str,
        left: &AtomicBool,
        most: Option<Duration>,
    ) -> Result<(), CudaError> {
        let start = Instant::now();
        let failure = loop {
            if left.load(Ordering::SeqCst) {
                break CudaError::Launch(format!("{what}: another process of the group was lost"));
            }
            let mut state = nccl_sys::ncclResult_t::ncclSuccess;
            // SAFETY: the communicator lives; this writes one value.
            let asked =
                unsafe { nccl_sys::ncclCommGetAsyncError(self.communicator, &mut state) }.result();
            match asked.and_then(|_| state.result()) {
                Ok(nccl::NcclStatus::InProgress) => {}
                Ok(_) => return Ok(()),
                Err(e) => break failed(what)(e),
            }
            if most.is_some_and(|most| start.elapsed() > most) {
                break CudaError::Launch(format!(
                    "{what}: the other processes did not within {} s",
                    start.elapsed().as_secs()
                ));
            }
            std::thread::sleep(Duration::from_micros(20));
        };
        self.abort();
        Err(failure)
    }

    /// Begins to add up arrays of floats (address, count) over the group, in place, after the work
    /// that `after` has so far.
    pub fn sum(
        &mut self,
        after: &Stream,
        arrays: &[(u64, usize)],
        left: &AtomicBool,
    ) -> Result<(), CudaError> {
        let what = "a sum over a group";
        if self.communicator.is_null() {
            return Err(CudaError::Launch(format!(
                "{what}: another process of the group was lost"
            )));
        }
        self.event.record(after).map_err(driver_failed)?;
        self.event.hold(&self.stream).map_err(driver_failed)?;
        // SAFETY: the caller owns the arrays, and leaves them alone until `finish`.
        unsafe {
            nccl::group_start().map_err(failed(what))?;
            for (address, count) in arrays {
                let at = *address as *mut std::ffi::c_void;
                let (float, sum) =
                    (nccl_sys::ncclDataType_t::ncclFloat32, nccl_sys::ncclRedOp_t::ncclSum);
                nccl::all_reduce(
                    at,
                    at,
                    *count,
                    float,
                    sum,
                    self.communicator,
                    self.stream.handle().cast(),
                )
                .map_err(failed(what))?;
            }
            nccl::group_end().map_err(failed(what))?;
        }
        // The stream knows of the sums from here on. The first ones also connect to the other
        // processes, which may still be busy.
        self.wait(what, left, None)
    }

    /// Lets `then` wait for all sums.
    pub fn finish(&self, then: &Stream) -> Result<(), CudaError> {
        self.event.record(&self.stream).map_err(driver_failed)?;
        self.event.hold(then).map_err(driver_failed)
    }

    /// Ends everything that waits for other processes, and the membership.
    pub fn abort(&mut self) {
        let communicator = std::mem::replace(&mut self.communicator, std::ptr::null_mut());
        if !communicator.is_null() {
            // SAFETY: its own handle, its last use.
            let _ = unsafe { nccl::comm_abort(communicator) };
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
        // SAFETY: its own handle, its last use.
        unsafe {
            if !self.communicator.is_null() {
                // Others may still be reading from this process. One that has been lost is not
                // waited for long.
                let done =
                    nccl::comm_finalize(self.communicator).map_err(failed("leaving a group"));
                if done
                    .and_then(|_| {
                        self.wait("leaving a group", &AtomicBool::new(false), Some(LEAVING))
                    })
                    .is_ok()
                {
                    let _ = nccl::comm_destroy(self.communicator);
                } else {
                    self.abort();
                }
            }
        }
    }
}
