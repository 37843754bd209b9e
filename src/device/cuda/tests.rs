//! The device layer's promises to the layers above it, on the emulator.

use super::*;
use crate::tensor::Tensor;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

/// Longer than anything here takes: a thread that has not finished by then never will.
const LONG: Duration = Duration::from_secs(600);

fn emulated() -> Cuda {
    Cuda::emulated(Cpu::new(1).unwrap(), DType::F32, 0)
}

/// A recording holds the device's stream when it asks for what is laid out once; a thread that lays
/// it out needs the stream to copy it.
#[test]
fn a_recording_and_a_thread_that_lays_out_the_same_do_not_wait_for_each_other() {
    let (cuda, weights, meeting) =
        (emulated(), Arc::new(DeviceCache::<Memory>::default()), Arc::new(Barrier::new(2)));
    let (done, finished) = channel();
    {
        let (cuda, weights, meeting, done) =
            (cuda.clone(), weights.clone(), meeting.clone(), done.clone());
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

#[test]
fn a_recording_on_one_device_leaves_another_alone() {
    let (one, other) = (emulated(), emulated());
    let recorded = one.record(&mut Arena::default(), || -> Result<_, CudaError> {
        let beside = other.upload(&[3.0f32, 4.0])?;
        let mut values = [0.0f32; 2];
        other.download(&beside, &mut values)?;
        assert_eq!(values, [3.0, 4.0]);
        let stream = other.lock_stream();
        assert!(
            other.0.stream.try_lock().is_err(),
            "work on the other device did not hold its stream"
        );
        drop(stream);
        let own = one.allocate(2, DType::F32)?;
        one.clear(&own)?;
        Ok((own, beside))
    });
    let (graph, (own, beside)) = recorded.unwrap();
    assert!(own.arena.is_some() && beside.arena.is_none(), "memory of the wrong device");
    graph.replay().unwrap();
    let mut values = [1.0f32; 2];
    one.download(&own, &mut values).unwrap();
    assert_eq!(values, [0.0; 2]);
    assert!(other.0.stream.try_lock().is_ok() && one.0.stream.try_lock().is_ok());
}

/// A copy to the device waits for work that was launched before only if its place is still taken,
/// and none is once the host has waited.
#[test]
fn copies_to_the_device_wait_only_for_their_places() {
    let cuda = emulated();
    let (small, large) = (cuda.upload(&[1u8; 4]).unwrap(), vec![2u8; staging::SMALL_BYTES + 1]);
    let mut values = [0u8; 4];
    cuda.download(&small, &mut values).unwrap();
    let twice = |waited: u64| {
        let before = cuda.waits();
        for _ in 0..staging::PLACES - 2 {
            cuda.upload_to(&small, &[3u8; 4]).unwrap();
        }
        let large = [(); 2].map(|()| cuda.upload(&large).unwrap());
        assert_eq!(cuda.waits() - before, waited);
        large
    };
    let [_, last] = twice(0);
    // All places are taken, and all of these copies wait.
    twice(staging::PLACES as u64);
    cuda.download(&small, &mut values).unwrap();
    twice(0);
    cuda.synchronize().unwrap();
    twice(0);
    cuda.seconds(|| Ok(())).unwrap();
    twice(0);
    cuda.download(&last, &mut values).unwrap();
    assert_eq!(values, [2; 4]);
}

/// If its function panics or fails, a recording still ends: later work happens, and can be
/// recorded.
#[test]
fn a_recording_ends_however_its_function_does() {
    let cuda = emulated();
    let memory = cuda.upload(&[1.0f32; 4]).unwrap();
    let read = || {
        let mut values = [0.0f32; 4];
        cuda.download(&memory, &mut values).map(|()| values)
    };
    for fails in [false, true] {
        let runs = AtomicU64::new(0);
        let second = || runs.fetch_add(1, Ordering::Relaxed) == 1;
        let record = || {
            cuda.record(&mut Arena::default(), || {
                cuda.clear(&memory)?;
                let taken = cuda.allocate(4, DType::F32)?;
                match second() {
                    true if fails => Err(CudaError::Launch("on purpose".into())),
                    true => panic!("on purpose"),
                    false => Ok(taken),
                }
            })
            .is_ok()
        };
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(record));
        assert_eq!(ended.ok(), fails.then_some(false));
        assert_eq!(read().unwrap(), [1.0; 4], "what was recorded was done");
        thread::scope(|scope| {
            scope.spawn(|| cuda.allocate(4, DType::F32).map(drop)).join().unwrap()
        })
        .unwrap();
    }
    let (graph, ()) = cuda.record(&mut Arena::default(), || cuda.clear(&memory)).unwrap();
    assert_eq!(read().unwrap(), [1.0; 4]);
    graph.replay().unwrap();
    assert_eq!(read().unwrap(), [0.0; 4]);
}

/// The emulator refuses to allocate, to wait and to time while it records, as a GPU spoils the
/// recording.
#[test]
fn other_threads_wait_while_work_is_recorded() {
    let (cuda, stop) = (emulated(), AtomicBool::new(false));
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let memory = cuda.allocate(16, DType::F32)?;
            cuda.synchronize()?;
            cuda.seconds(|| cuda.clear(&memory))?;
        }
        Ok::<(), CudaError>(())
    };
    thread::scope(|scope| {
        let others = [0, 1].map(|_| scope.spawn(work));
        let record = |_| {
            let recorded = cuda.record(&mut Arena::default(), || -> Result<_, CudaError> {
                let memory = cuda.allocate(16, DType::F32)?;
                thread::sleep(Duration::from_millis(2));
                cuda.clear(&memory)?;
                Ok(memory)
            });
            recorded.map(drop)
        };
        let recorded: Result<Vec<()>, CudaError> = (0..20).map(record).collect();
        stop.store(true, Ordering::Relaxed);
        recorded.unwrap();
        others.into_iter().for_each(|other| other.join().unwrap().unwrap());
    });
}

/// Neither branch waits for the other: in whichever order their steps run, the result is the same,
/// because no memory of one overlaps what the other uses.
#[test]
fn branches_may_be_done_in_any_order() {
    for seed in 0..8 {
        let cuda = Cuda::emulated(Cpu::new(1).unwrap(), DType::F32, seed);
        let x = cuda.upload(&[1.0f32; 4]).unwrap();
        let twice = |x: &Arc<Memory>| -> Result<Arc<Memory>, CudaError> {
            let y = cuda.allocate(4, DType::F32)?;
            let arguments = kernels::AddArgs { y: (&y).into(), ..doubling(x) };
            cuda.launch(kernels::ADD_F32, Launch::per_element(4), arguments)?;
            Ok(y)
        };
        // Each step gives back what the one before took.
        let chain = |steps: usize| (1..steps).try_fold(twice(&x)?, |x, _| twice(&x));
        let (graph, made) = cuda
            .record(&mut Arena::default(), || -> Result<_, CudaError> {
                let first = twice(&x)?;
                let fork = cuda.fork()?.expect("work is recorded");
                assert!(cuda.fork().is_err(), "a branch branches");
                let side = chain(6)?;
                fork.back()?;
                let main = chain(9)?;
                let sum = twice(&first)?;
                drop(first);
                fork.join()?;
                let sum = [&side, &main, &sum].map(twice);
                Ok(sum)
            })
            .unwrap();
        graph.replay().unwrap();
        for (memory, expected) in made.into_iter().zip([128.0f32, 1024.0, 8.0]) {
            let mut values = [0.0f32; 4];
            cuda.download(&memory.unwrap(), &mut values).unwrap();
            assert_eq!(values, [expected; 4], "seed {seed}");
        }
        assert!(cuda.fork().unwrap().is_none(), "nothing is recorded");
    }
}

/// What would be in two branches is recorded one after the other where they are switched off.
#[test]
fn a_device_without_branches_records_one_line() {
    let emulator = emulator::Emulator::new(Cpu::new(1).unwrap(), 0).without_branches();
    let cuda = Cuda::new(Box::new(emulator), Cpu::new(1).unwrap(), DType::F32, Tuned::none());
    let x = cuda.upload(&[1.0f32; 4]).unwrap();
    let twice = || cuda.launch(kernels::ADD_F32, Launch::per_element(4), doubling(&x));
    let (graph, ()) = cuda
        .record(&mut Arena::default(), || {
            twice()?;
            assert!(cuda.fork()?.is_none(), "there is a branch");
            twice()
        })
        .unwrap();
    graph.replay().unwrap();
    let mut values = [0.0f32; 4];
    cuda.download(&x, &mut values).unwrap();
    assert_eq!(values, [4.0; 4]);
}

#[test]
fn results_lie_where_they_are_wanted() {
    let cuda = emulated();
    let x = cuda.upload(&[1.0f32; 4]).unwrap();
    let to = cuda.allocate(4, DType::F32).unwrap();
    let record = |placed: &dyn Fn(&Arc<Memory>) -> Arc<Memory>| {
        cuda.record_into(
            &mut Arena::default(),
            || -> Result<_, CudaError> {
                let between = cuda.allocate(4, DType::F32)?;
                cuda.clear(&between)?;
                let y = cuda.allocate(4, DType::F32)?;
                let arguments = kernels::AddArgs { y: (&y).into(), ..doubling(&x) };
                cuda.launch(kernels::ADD_F32, Launch::per_element(4), arguments)?;
                Ok(y)
            },
            |made| Ok(vec![(placed(made), to.clone())]),
        )
    };
    let (graph, made) = record(&|made| made.clone()).unwrap();
    assert_eq!(made.address(), to.address());
    graph.replay().unwrap();
    let mut values = [0.0f32; 4];
    cuda.download(&to, &mut values).unwrap();
    assert_eq!(values, [2.0; 4]);
    let failure = record(&|_| x.clone()).map(drop).unwrap_err().to_string();
    assert_eq!(failure, "recorded work must move memory that it did not allocate");
}

#[test]
fn part_of_memory_is_the_same_memory() {
    let cuda = emulated();
    let x = cuda.upload(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).unwrap();
    let held = cuda.held()[0];
    let part = x.part(16, 16);
    cuda.launch(kernels::ADD_F32, Launch::per_element(4), doubling(&part)).unwrap();
    let values = cuda.download_read(&x, 32, bytemuck::pod_collect_to_vec::<u8, f32>).unwrap();
    assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 10.0, 12.0, 14.0, 16.0]);
    drop(x);
    // It holds the memory that it is a part of.
    assert_eq!(cuda.held()[0], held);
    drop(part);
    assert_eq!(cuda.held()[0], held - 32);
    let beyond = std::panic::catch_unwind(|| {
        let x = emulated().upload(&[1.0f32; 4]).unwrap();
        x.part(8, 12)
    });
    assert!(beyond.is_err());
}

#[test]
fn what_stays_is_laid_out_in_the_first_run_of_a_recording() {
    let (cuda, runs) = (emulated(), AtomicU64::new(0));
    let late = DeviceCache::<Memory>::default();
    let recorded =
        cuda.record(&mut Arena::default(), || match runs.fetch_add(1, Ordering::Relaxed) {
            0 => Ok(None),
            _ => late.get(&cuda, DType::F32, || cuda.upload(&[1.0f32])).map(Some),
        });
    let failure = recorded.map(drop).unwrap_err().to_string();
    assert_eq!(failure, "recorded work keeps memory that its first run did not");
}

/// `x + x` in memory of its own, of four values.
fn doubled(cuda: &Cuda, x: &Arc<Memory>) -> Result<Arc<Memory>, CudaError> {
    let y = cuda.allocate(4, DType::F32)?;
    let arguments = kernels::AddArgs { y: (&y).into(), ..doubling(x) };
    cuda.launch(kernels::ADD_F32, Launch::per_element(4), arguments)?;
    Ok(y)
}

fn four(cuda: &Cuda, x: &Memory) -> [f32; 4] {
    let mut values = [0.0f32; 4];
    cuda.download(x, &mut values).unwrap();
    values
}

/// The parts of recorded work that was cut are replayed one by one. What one of them leaves may be
/// changed before the next.
#[test]
fn recorded_work_is_cut_into_parts() {
    let cuda = emulated();
    let x = cuda.upload(&[1.0f32; 4]).unwrap();
    let work = || -> Result<_, CudaError> {
        let half = doubled(&cuda, &x)?;
        cuda.cut()?;
        let whole = doubled(&cuda, &half)?;
        Ok((half, whole))
    };
    let recorded = cuda.record_parts(&mut Arena::default(), work, |_| Ok(vec![]));
    let (graphs, (half, whole)) = recorded.unwrap();
    let [first, second] = &graphs[..] else { panic!("{} parts", graphs.len()) };
    first.replay().unwrap();
    assert_eq!(four(&cuda, &half), [2.0; 4]);
    second.replay().unwrap();
    assert_eq!(four(&cuda, &whole), [4.0; 4]);
    cuda.upload_to(&half, &[5.0f32; 4]).unwrap();
    second.replay().unwrap();
    assert_eq!((four(&cuda, &half), four(&cuda, &whole)), ([5.0; 4], [10.0; 4]));
    let failure = cuda.record(&mut Arena::default(), work).map(drop).unwrap_err().to_string();
    assert_eq!(failure, "recorded work was cut into several parts");
    let in_a_branch = || -> Result<(), CudaError> {
        let _fork = cuda.fork()?;
        cuda.cut()
    };
    let failure = cuda.record(&mut Arena::default(), in_a_branch).map(drop).unwrap_err();
    assert_eq!(failure.to_string(), "a branch of recorded work cannot be cut");
    // Nothing is recorded.
    cuda.cut().unwrap();
}

/// What was laid out from memory that changes can be laid out again, where it is. Copies of host
/// values are neither repeated nor kept for that; what was made from values on the host cannot be
/// repeated.
#[test]
fn what_was_laid_out_is_laid_out_again_in_its_place() {
    let cuda = emulated();
    let x = cuda.upload(&[1.0f32; 4]).unwrap();
    let (cache, mut layouts) = (DeviceCache::<Memory>::default(), Layouts::default());
    let held = cuda.held()[0];
    let laid_out = cuda.noting(&mut layouts, || {
        let copies = DeviceCache::<Memory>::default();
        let copied = copies.get(&cuda, DType::F32, || cuda.upload(&[3.0f32]));
        copied.map(drop).unwrap();
        let make = || doubled(&cuda, &doubled(&cuda, &x)?);
        cache.get(&cuda, DType::F32, make).unwrap()
    });
    assert_eq!(four(&cuda, &laid_out), [4.0; 4]);
    assert_eq!(cuda.held()[0] - held, 32, "what is between is kept, and what was copied is not");
    for value in [2.0f32, 3.0] {
        cuda.upload_to(&x, &[value; 4]).unwrap();
        cuda.lay_out_again(&mut layouts).unwrap();
        assert_eq!(four(&cuda, &laid_out), [4.0 * value; 4]);
    }
    assert!(layouts.can_repeat());
    let read = || -> Result<f32, CudaError> { Ok(four(&cuda, &x)[0]) };
    cuda.laying_out(read).unwrap();
    assert!(layouts.can_repeat(), "that was not noted");
    cuda.noting(&mut layouts, || cuda.laying_out(read)).unwrap();
    assert!(!layouts.can_repeat());
}

/// `x + x` in place of `x`, of four values.
fn doubling(x: &Arc<Memory>) -> kernels::AddArgs<'_> {
    let (at, four) = (x.into(), 4usize.into());
    kernels::AddArgs { a: at, b: at, y: at, count: four, period: four }
}

#[test]
fn memory_of_another_device_is_an_error_that_names_the_parameter() {
    let (cuda, other) = (emulated(), emulated());
    let (x, far) = (cuda.upload(&[1.0f32; 4]).unwrap(), other.upload(&[1.0f32; 4]).unwrap());
    let add = |arguments| cuda.launch(kernels::ADD_F32, Launch::per_element(4), arguments);
    let refused = |result: Result<(), CudaError>| {
        assert_eq!(
            result.unwrap_err().to_string(),
            "kernel add_f32, parameter y: memory of another device"
        );
    };
    let arguments = kernels::AddArgs { y: (&far).into(), ..doubling(&x) };
    refused(add(arguments));
    assert!(
        cuda.copy(&far, 0, &x, 0, 4).unwrap_err().to_string().contains("has no part in memory of")
    );
    // Recorded work is checked when it is recorded.
    refused(cuda.record(&mut Arena::default(), || add(arguments)).map(drop));
    add(doubling(&x)).unwrap();
    let mut values = [0.0f32; 4];
    cuda.download(&x, &mut values).unwrap();
    assert_eq!(values, [2.0; 4], "a launch that was refused took place");
}

#[test]
fn arguments_lie_in_the_order_of_the_parameters() {
    let cuda = emulated();
    let (x, missing) = (cuda.upload(&[1.0f32; 4]).unwrap(), None);
    let bits = |arguments: &dyn Arguments| -> Vec<(&'static str, u64)> {
        let list = arguments.bits(cuda.id()).into_iter();
        list.map(|(parameter, bits)| (parameter, bits.unwrap())).collect()
    };
    let step = kernels::AdamwStepArgs {
        lr: -9.0,
        decay: 8.0,
        scale: 7.0,
        max_norm: 6.0,
        eps: 5.0,
        corrected2: 4.0,
        corrected1: 3.0,
        beta2: 2.0,
        beta1: 1.0,
        total: x.at(0),
        runs: Pointer::none(),
        table: x.at(8),
    };
    assert_eq!(
        bits(&step),
        [
            ("table", x.address() + 8),
            ("runs", 0),
            ("total", x.address()),
            ("beta1", 1f64.to_bits()),
            ("beta2", 2f64.to_bits()),
            ("corrected1", 3f64.to_bits()),
            ("corrected2", 4f64.to_bits()),
            ("eps", 5f64.to_bits()),
            ("max_norm", 6f64.to_bits()),
            ("scale", 7f64.to_bits()),
            ("decay", 8f64.to_bits()),
            ("lr", (-9f64).to_bits()),
        ]
    );
    // Parameters of every other kind: 32 bits are in the lower half.
    let norm = kernels::LayerNormArgs {
        x: (&x).into(),
        weight: (&x).into(),
        bias: (&missing).into(),
        y: (&x).into(),
        rows: (1usize << 40).into(),
        c: (-1i32).into(),
        eps: 0.5,
        gelu_behind: true.into(),
        d: 2usize.into(),
        h: 3usize.into(),
        w: 4usize.into(),
        group: 5usize.into(),
    };
    assert_eq!(
        bits(&norm),
        [
            ("x", x.address()),
            ("weight", x.address()),
            ("bias", 0),
            ("y", x.address()),
            ("rows", 1 << 40),
            ("c", 0xffff_ffff),
            ("eps", 0.5f32.to_bits().into()),
            ("gelu_behind", 1),
            ("d", 2),
            ("h", 3),
            ("w", 4),
            ("group", 5),
        ]
    );
}

/// The emulator has every kernel of the table, built with the parameters that the table has from
/// the source.
#[test]
fn kernels_are_built_as_their_sources_declare_them() {
    let emulator = emulator::Emulator::new(Cpu::new(1).unwrap(), 0);
    source::KERNELS
        .iter()
        .for_each(|kernel| emulator.prepare(kernel).unwrap_or_else(|e| panic!("{e}")));
}

#[test]
fn counts_beyond_their_parameters_and_launches_beyond_the_device_are_errors() {
    let cuda = emulated();
    let x = cuda.upload(&[1.0f32; 4]).unwrap();
    let add = |launch: Launch| {
        cuda.launch(kernels::ADD_F32, launch, doubling(&x)).unwrap_err().to_string()
    };
    let launch = Launch::per_element(4);
    assert_eq!(
        add(Launch { grid: [1, 65536, 1], ..launch }),
        "kernel add_f32: [1, 65536, 1] blocks; the device takes at most [2147483647, 65535, 65535]"
    );
    // As 32 bits this would be a single block.
    assert!(
        add(Launch { grid: [(1 << 32) + 1, 1, 1], ..launch })
            .contains("blocks; the device takes at most")
    );
    assert_eq!(
        add(Launch { threads: 2048, ..launch }),
        "kernel add_f32: 2048 threads per block; the device takes at most 1024"
    );
    assert_eq!(
        add(Launch { threads: 512, ..launch }),
        "kernel add_f32 has blocks of at most 256 threads, got 512"
    );
    assert_eq!(
        add(Launch { shared: 1 << 20, ..launch }),
        "kernel add_f32: 1048576 bytes of shared memory per block; the device has 232448"
    );
    let many = cuda.launch(
        kernels::ADD_F32,
        launch,
        kernels::AddArgs { period: (1usize << 63).into(), ..doubling(&x) },
    );
    assert_eq!(
        many.unwrap_err().to_string(),
        "kernel add_f32, parameter period: 9223372036854775808 is more than it holds"
    );
    let list = Pointer::none();
    let scatter = |count: usize| {
        let arguments = kernels::ScatterArgs { list, maps: (&x).into(), count: count.into() };
        cuda.launch(kernels::SCATTER_F32, launch, arguments).unwrap_err().to_string()
    };
    assert_eq!(
        scatter(1 << 31),
        "kernel scatter_f32, parameter count: 2147483648 is more than it holds"
    );
    for (from, to) in [(8, 0), (0, 8), (usize::MAX - 7, 0), (0, usize::MAX - 7)] {
        let copied = cuda.copy(&x, from, &x, to, 12).unwrap_err().to_string();
        assert_eq!(copied, "a copy of 12 bytes goes beyond a buffer of 16 or 16");
    }
    assert!(cuda.allocate(usize::MAX, DType::F32).is_err());
    let mut values = [0.0f32; 4];
    cuda.download(&x, &mut values).unwrap();
    assert_eq!(values, [1.0; 4], "what was refused took place");
}

#[test]
fn a_copy_back_that_fails_is_an_error_of_whoever_asked() {
    let cuda = emulated();
    let tensor = || Tensor::from_device([2], cuda.upload(&[1.0f32, 2.0]).unwrap(), DType::F32);
    let read = tensor();
    cuda.fail_download(1);
    assert_eq!(read.try_data().unwrap_err().to_string(), "a copy from the device: made to fail");
    // No other thread sees it, and nothing of it stays.
    let x = cuda.upload(&[1.0f32; 4]).unwrap();
    cuda.launch(kernels::ADD_F32, Launch::per_element(4), doubling(&x)).unwrap();
    assert_eq!(read.try_data().unwrap(), [1.0, 2.0]);
    // What was copied back once is not copied again.
    cuda.fail_download(1);
    assert_eq!(read.data(), [1.0, 2.0]);
    let unread = tensor();
    let panic =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| unread.data().len())).unwrap_err();
    let text = panic.downcast_ref::<String>().unwrap();
    assert_eq!(
        text,
        "values [2] cannot be read back from the device: a copy from the device: made to fail"
    );
}

/// A lost device is like a GPU whose context an error has ended: nothing is done any more, and what
/// is dropped then does no harm.
#[test]
fn a_device_that_is_lost_does_nothing_more() {
    let cuda = emulated();
    let x = cuda.upload(&[1.0f32; 4]).unwrap();
    let add = || cuda.launch(kernels::ADD_F32, Launch::per_element(4), doubling(&x));
    let (graph, ()) = cuda.record(&mut Arena::default(), add).unwrap();
    // Recording it launched nothing; a replay does.
    assert_eq!(cuda.lose_after(2), u64::MAX);
    graph.replay().unwrap();
    add().unwrap();
    let mut values = [0.0f32; 4];
    for failure in [
        add().unwrap_err(),
        graph.replay().unwrap_err(),
        cuda.download(&x, &mut values).unwrap_err(),
        cuda.upload_to(&x, &values).unwrap_err(),
        cuda.copy(&x, 0, &x, 8, 8).unwrap_err(),
        cuda.clear(&x).unwrap_err(),
        cuda.synchronize().unwrap_err(),
        cuda.allocate(4, DType::F32).map(drop).unwrap_err(),
        cuda.record(&mut Arena::default(), add).map(drop).unwrap_err(),
    ] {
        assert_eq!(failure.to_string(), "the device is lost: made to be");
    }
    assert_eq!(cuda.lose_after(u64::MAX), 0);
    cuda.download(&x, &mut values).unwrap();
    assert_eq!(values, [4.0; 4]);
}

/// A recording keeps its arena, and not what it was given: if that is gone, a replay that still
/// reads it is an error and not a result of whatever lies there.
#[test]
fn recorded_work_that_reads_memory_which_is_gone_is_an_error() {
    let cuda = emulated();
    let (x, y) = (cuda.upload(&[1.0f32; 4]).unwrap(), cuda.upload(&[2.0f32; 4]).unwrap());
    let add = |x: &Arc<Memory>| {
        let arguments = kernels::AddArgs { a: x.into(), ..doubling(&y) };
        cuda.launch(kernels::ADD_F32, Launch::per_element(4), arguments)
    };
    let (graph, ()) = cuda.record(&mut Arena::default(), || add(&x)).unwrap();
    graph.replay().unwrap();
    assert_eq!(four(&cuda, &y), [3.0; 4]);
    drop(x);
    let failure = graph.replay().unwrap_err().to_string();
    assert!(failure.contains("add_f32"), "{failure}");
}
