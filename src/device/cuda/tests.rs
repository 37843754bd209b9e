//! What the device layer promises whoever is above it, on the emulator.

use super::*;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

/// Longer than anything here takes: whoever is not done by then never will be.
const LONG: Duration = Duration::from_secs(60);

fn emulated() -> Cuda {
    Cuda::emulated(Cpu::new(1).unwrap(), DType::F32, 0)
}

/// A recording has the device's turn when it asks for what is laid out once; a thread that lays it out needs the turn to copy it.
#[test]
fn a_recording_and_a_thread_that_lays_out_the_same_do_not_wait_for_each_other() {
    let (cuda, weights, meeting) = (emulated(), Arc::new(PerDevice::<Memory>::default()), Arc::new(Barrier::new(2)));
    let (done, finished) = channel();
    {
        let (cuda, weights, meeting, done) = (cuda.clone(), weights.clone(), meeting.clone(), done.clone());
        thread::spawn(move || {
            let first = AtomicBool::new(true);
            let recorded = cuda.record(&mut Arena::default(), || -> Result<_, CudaError> {
                if first.swap(false, Ordering::Relaxed) {
                    meeting.wait();
                }
                weights.get(&cuda, DType::F32, || cuda.upload(&[1.0f32; 8]))
            });
            done.send(recorded.map(|(_, memory)| memory)).unwrap();
        });
    }
    thread::spawn(move || {
        let made = weights.get(&cuda, DType::F32, || {
            meeting.wait();
            cuda.upload(&[1.0f32; 8])
        });
        done.send(made).unwrap();
    });
    let [a, b] = [0, 1].map(|_| finished.recv_timeout(LONG).expect("both threads end").unwrap());
    assert!(Arc::ptr_eq(&a, &b), "the same was laid out twice");
}
