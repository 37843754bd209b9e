//! Training end to end: a resumed run, an overfitted case, what stops a run, the files of a run.

mod common;

use common::{coarse, here, tiny};
use prism::autograd::ParamGrads;
use prism::data::cases::{Loaded, TargetLabel};
use prism::data::source::Pools;
use prism::device::{Device, Precision};
use prism::model::{Config, Encoder, Model, PatchPrompts, Weights};
use prism::ops::loss::{KERNEL, Target};
use prism::tensor::Tensor;
use prism::train::peers::{Peers, Place};
use prism::train::run::{Ended, StepReport, ValidationReport, Watch, begin, run};
use prism::train::settings::{Given, Recompute, Schedule, Settings};
use prism::train::state::State;
use prism::train::step::{LossWeights, Rerun, Share, run_item};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

fn device() -> Device {
    Device::open("cpu", 2).unwrap()
}

/// Remembers what it sees, and asks to stop after a step, or when a case of a validation begins.
#[derive(Default)]
struct Seen<'a> {
    steps: Vec<StepReport>,
    /// Cases of validations that were begun.
    cases: usize,
    validations: Vec<ValidationReport>,
    stop: Option<(usize, &'a AtomicBool)>,
    stop_at_case: Option<(usize, &'a AtomicBool)>,
}

impl Watch for Seen<'_> {
    fn step(&mut self, report: &StepReport, _: usize) {
        self.steps.push(report.clone());
        if let Some((at, stop)) = self.stop
            && report.step == at
        {
            stop.store(true, Ordering::Relaxed);
        }
    }
    fn case(&mut self, number: usize, _: usize) {
        self.cases += 1;
        if let Some((at, stop)) = self.stop_at_case
            && number == at
        {
            stop.store(true, Ordering::Relaxed);
        }
    }
    fn validation(&mut self, report: &ValidationReport) {
        self.validations.push(report.clone());
    }
}

fn settings(out: &Path, model: &Path) -> Settings {
    Settings {
        model: model.display().to_string(),
        out: out.to_path_buf(),
        epochs: 2,
        steps: 3,
        batch: 2,
        iterations: 2,
        lr: 1e-3,
        schedule: Schedule::Linear,
        warmup: 2,
        ema: 0.9,
        scribbles: 0.5,
        box_growth: 2,
        validation_cases: 2,
        validation_iterations: 2,
        ..Given::default().settings()
    }
}

fn written(config: &Config, folder: &Path) -> std::path::PathBuf {
    let path = folder.join("network.json");
    std::fs::write(&path, serde_json::to_string(config).unwrap()).unwrap();
    path
}

fn go(settings: Settings, seen: &mut Seen, stop: &AtomicBool) -> Result<Ended, String> {
    from(begin(settings).unwrap(), seen, stop)
}

/// A run from its first state on.
fn from(state: State, seen: &mut Seen, stop: &AtomicBool) -> Result<Ended, String> {
    let settings = &state.progress.settings;
    let pools = Pools::open(
        &settings.data,
        &settings.shares,
        &settings.target,
        None,
        settings.split.as_deref(),
        None,
        settings.seed,
    )
    .unwrap();
    run(&device(), state, &pools, &Peers::alone(), stop, seen)
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let never = AtomicBool::new(false);
    let mut seen = Seen::default();
    assert_eq!(go(settings(&whole, &model), &mut seen, &never), Ok(Ended::Finished));
    assert_eq!((seen.steps.len(), seen.validations.len()), (6, 2));

    // Stopped in the middle of the first epoch, as Ctrl-C does.
    let stop = AtomicBool::new(false);
    let mut first = Seen { stop: Some((2, &stop)), ..Default::default() };
    assert_eq!(go(settings(&parts, &model), &mut first, &stop), Ok(Ended::Stopped));
    assert_eq!(first.steps.len(), 2);
    let state = State::open(&parts.join("last.state.safetensors")).unwrap();
    assert_eq!(state.progress.step, 2);
    let s = state.progress.settings.clone();
    let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
    let mut second = Seen::default();
    assert_eq!(
        run(&device(), state, &pools, &Peers::alone(), &never, &mut second),
        Ok(Ended::Finished)
    );

    for file in ["last.safetensors", "best.safetensors"] {
        let read = |at: &Path| std::fs::read(at.join(file)).unwrap();
        assert!(read(&whole) == read(&parts), "{file} differs");
    }
    // A state that is read and written again is the same file.
    let (state, again) =
        (parts.join("last.state.safetensors"), folder.path().join("again.safetensors"));
    State::open(&state).unwrap().save(&again).unwrap();
    assert!(
        std::fs::read(&state).unwrap() == std::fs::read(&again).unwrap(),
        "the state became another file"
    );
    let losses = |steps: &[StepReport]| steps.iter().map(|s| s.loss).collect::<Vec<_>>();
    assert_eq!(losses(&seen.steps), [losses(&first.steps), losses(&second.steps)].concat());
    // The log has every step once, and the pictures are there.
    let log = std::fs::read_to_string(parts.join("log.jsonl")).unwrap();
    let logged: Vec<u64> = log
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok())
        .filter(|l| l["loss"].is_number())
        .map(|l| l["step"].as_u64().unwrap())
        .collect();
    assert_eq!(logged, [1, 2, 3, 4, 5, 6]);
    assert!(parts.join("loss.svg").exists() && parts.join("validation.svg").exists());
    // The result is a model.
    let weights = Weights::open(&parts.join("best.safetensors")).unwrap();
    assert_eq!(weights.config, tiny());
}

#[test]
fn a_run_that_is_stopped_while_it_validates_does_that_when_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let at = |name: &str| Settings {
        epochs: 1,
        validation_cases: 3,
        ..settings(&folder.path().join(name), &model)
    };
    let (never, mut whole) = (AtomicBool::new(false), Seen::default());
    assert_eq!(go(at("whole"), &mut whole, &never), Ok(Ended::Finished));
    assert_eq!((whole.steps.len(), whole.cases, whole.validations.len()), (3, 3, 1));

    let parts = at("parts").out;
    let state = || State::open(&parts.join("last.state.safetensors")).unwrap();
    let goes_on = |seen: &mut Seen, stop: &AtomicBool| {
        let state = state();
        let s = state.progress.settings.clone();
        let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
        run(&device(), state, &pools, &Peers::alone(), stop, seen)
    };
    // The present case is finished, and the next is not begun. All steps are done by then.
    let stop = AtomicBool::new(false);
    let mut seen = Seen { stop_at_case: Some((2, &stop)), ..Default::default() };
    assert_eq!(go(at("parts"), &mut seen, &stop), Ok(Ended::Stopped));
    assert_eq!((seen.steps.len(), seen.cases, seen.validations.len()), (3, 2, 0));
    // Once more, before anything was done.
    for stop in [AtomicBool::new(true), AtomicBool::new(true)] {
        let progress = state().progress;
        assert_eq!((progress.step, progress.best, progress.unvalidated), (3, None, true));
        let mut seen = Seen::default();
        assert_eq!(goes_on(&mut seen, &stop), Ok(Ended::Stopped));
        assert_eq!((seen.steps.len(), seen.cases), (0, 0));
    }
    // Twice from the same state, as if the first were killed when only its log was on the disk.
    let saved = std::fs::read(parts.join("last.state.safetensors")).unwrap();
    for again in [false, true] {
        if again {
            std::fs::write(parts.join("last.state.safetensors"), &saved).unwrap();
        }
        let mut seen = Seen::default();
        assert_eq!(goes_on(&mut seen, &never), Ok(Ended::Finished));
        assert_eq!((seen.steps.len(), seen.cases, seen.validations.len()), (0, 3, 1));
        assert_eq!(seen.validations[0].validation, whole.validations[0].validation);
    }
    let progress = state().progress;
    assert!(!progress.unvalidated && progress.best.is_some());
    for file in ["last.safetensors", "best.safetensors"] {
        let [a, b] = ["whole", "parts"].map(|name| std::fs::read(at(name).out.join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
    // The log has every step, and the validation once.
    let log = std::fs::read_to_string(parts.join("log.jsonl")).unwrap();
    // Behind the first it also has whether iterations are recomputed.
    let count = |name: &str| log.matches(&format!("\"{name}\":")).count();
    assert_eq!(["loss", "validation"].map(count), [3, 1], "{log}");
    // With nothing left to do it is done.
    let mut seen = Seen::default();
    assert_eq!(goes_on(&mut seen, &never), Ok(Ended::Finished));
    assert_eq!((seen.steps.len(), seen.cases), (0, 0));
}

#[test]
fn a_run_that_is_stopped_while_its_cases_are_read_goes_on_from_its_beginning() {
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let at = |name: &str| Settings { epochs: 1, ..settings(&folder.path().join(name), &model) };
    let [never, always] = [false, true].map(AtomicBool::new);
    let mut whole = Seen::default();
    assert_eq!(go(at("whole"), &mut whole, &never), Ok(Ended::Finished));
    let mut seen = Seen::default();
    assert_eq!(go(at("parts"), &mut seen, &always), Ok(Ended::Stopped));
    assert_eq!((seen.steps.len(), seen.cases), (0, 0));
    let state = State::open(&at("parts").out.join("last.state.safetensors")).unwrap();
    assert_eq!((state.progress.step, state.progress.unvalidated), (0, false));
    let s = state.progress.settings.clone();
    let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
    let ended = run(&device(), state, &pools, &Peers::alone(), &never, &mut seen);
    assert_eq!((ended, seen.steps.len()), (Ok(Ended::Finished), 3));
    // Behind the last case it is heard as well, here where there is none.
    let mut seen = Seen::default();
    let none = Settings { validation_cases: 0, ..at("none") };
    assert_eq!(go(none, &mut seen, &always), Ok(Ended::Stopped));
    assert_eq!(seen.steps.len(), 0);
    for file in ["last.safetensors", "best.safetensors"] {
        let [a, b] = ["whole", "parts"].map(|name| std::fs::read(at(name).out.join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
}

#[test]
fn the_curves_of_the_model_card_are_those_of_its_log() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(here("models/log-6.jsonl"), folder.path().join("log.jsonl")).unwrap();
    prism::train::curves::draw(folder.path()).unwrap();
    for name in ["loss.svg", "validation.svg"] {
        let [drawn, card] = [folder.path().join(name), here("models").join(name)]
            .map(|p| std::fs::read_to_string(p).unwrap());
        assert!(
            drawn == card,
            "models/{name} is not what is drawn of models/log-6.jsonl:\n{drawn}"
        );
    }
}

/// Steps of a run by `world` processes, here threads that communicate over TCP as processes do.
fn steps_of(world: usize, name: &str, settings: &Settings, ask: Option<usize>) -> Vec<StepReport> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let process = |rank: usize| {
        let device = Device::open(name, 1).unwrap();
        let place = Place { rank, world, local: rank, address: format!("127.0.0.1:{port}") };
        let state = begin(settings.clone()).unwrap();
        let mut peers = Peers::meet(&place, "a run", None).unwrap();
        peers.join(&device).unwrap();
        let s = &settings;
        let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
        // The last process is the one that is asked to stop.
        let stop = AtomicBool::new(false);
        let asked = ask.filter(|_| rank + 1 == world).map(|at| (at, &stop));
        let mut seen = Seen { stop: asked, ..Default::default() };
        let ended = run(&device, state, &pools, &peers, &stop, &mut seen).unwrap();
        assert_eq!(ended, if ask.is_some() { Ended::Stopped } else { Ended::Finished });
        assert_eq!(seen.validations.is_empty(), rank > 0 || ask.is_some());
        seen.steps
    };
    let all: Vec<Vec<StepReport>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || process(rank))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for steps in &all[1..] {
        let told = |s: &StepReport| (s.loss, s.norm, s.dice.clone());
        assert!(steps.iter().map(told).eq(all[0].iter().map(told)), "processes disagree");
    }
    all.into_iter().next().unwrap()
}

#[test]
fn processes_that_share_batches_learn_as_one_does() {
    let folder = tempfile::tempdir().unwrap();
    // The emulator is slow: one iteration of one step.
    for (name, config, batch, count) in [("cpu", tiny(), 3, 2), ("emulated", coarse(), 2, 1)] {
        let model = written(&config, folder.path());
        let at = |world: usize| Settings {
            epochs: 1,
            steps: count,
            batch,
            iterations: count,
            validation_cases: 1,
            validation_iterations: 1,
            ..settings(&folder.path().join(format!("{name}-{world}")), &model)
        };
        let (one, two) = (steps_of(1, name, &at(1), None), steps_of(2, name, &at(2), None));
        assert_eq!(one.len(), count);
        for (a, b) in one.iter().zip(&two) {
            assert!(
                (a.loss / b.loss - 1.0).abs() < 1e-4 && (a.norm / b.norm - 1.0).abs() < 1e-4,
                "{name}: {a:?} {b:?}"
            );
        }
        let weights =
            |world: usize| Weights::open(&at(world).out.join("last.safetensors")).unwrap();
        let (a, b) = (weights(1), weights(2));
        let (mut apart, mut moved, start) =
            (0.0, 0.0, Weights::initial(config.clone(), at(1).seed));
        for (name, _) in config.tensors() {
            for ((a, b), s) in
                a.get(&name).data().iter().zip(b.get(&name).data()).zip(start.get(&name).data())
            {
                apart += f64::from(a - b).powi(2);
                moved += f64::from(a - s).powi(2);
            }
        }
        // A gradient that is zero except for rounding moves its parameter either way.
        assert!(moved > 0.0 && (apart / moved).sqrt() < 0.05, "{name}: {}", (apart / moved).sqrt());
    }
}

/// The name of the GPU to test on; none, which is said, if there is none.
fn a_gpu() -> Option<String> {
    let name = common::device_name();
    let is_gpu = name.starts_with("cuda");
    if !is_gpu {
        common::skipped("PRISM_TEST_DEVICE names no GPU");
    }
    is_gpu.then_some(name)
}

/// A GPU alone in its group sums its gradients by NCCL, if NCCL is available, and learns as without
/// a group.
#[test]
fn a_gpu_alone_in_its_group_learns_as_the_cpu() {
    let Some(name) = a_gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let at = |name: &str| Settings { epochs: 1, ..settings(&folder.path().join(name), &model) };
    let (cpu, gpu) = (steps_of(1, "cpu", &at("cpu"), None), steps_of(1, &name, &at("gpu"), None));
    for (a, b) in cpu.iter().zip(&gpu) {
        assert!((a.loss / b.loss - 1.0).abs() < 1e-2, "{a:?} {b:?}");
    }
}

/// A GPU learns as the CPU does. Once an answer differs by a voxel, the simulated user gives other
/// prompts: so first steps are compared one by one, and all by their means.
#[test]
fn a_gpu_learns_for_200_steps_as_the_cpu() {
    let Some(name) = a_gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let losses = |device: Device, out: &str| -> Vec<f64> {
        let given = Settings {
            epochs: 1,
            steps: 200,
            batch: 1,
            validation_cases: 0,
            ..settings(&folder.path().join(out), &model)
        };
        let s = given.clone();
        let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
        let (never, mut seen) = (AtomicBool::new(false), Seen::default());
        run(&device, begin(given).unwrap(), &pools, &Peers::alone(), &never, &mut seen).unwrap();
        seen.steps.iter().map(|step| step.loss).collect()
    };
    let cpu = losses(Device::open("cpu", 0).unwrap(), "cpu");
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(cpu.len() == 200 && mean(&cpu[180..]) < mean(&cpu[..20]), "{cpu:?}");
    for (precision, bound) in [(Precision::F32, 1e-2), (Precision::F16, 5e-2)] {
        let gpu = losses(Device::open_as(&name, 0, precision).unwrap(), &precision.to_string());
        for (step, (a, b)) in cpu.iter().zip(&gpu).take(10).enumerate() {
            assert!((b / a - 1.0).abs() < bound, "{precision}, step {step}: {a} and {b}");
        }
        for (run, (a, b)) in cpu.chunks(20).zip(gpu.chunks(20)).enumerate() {
            let (a, b) = (mean(a), mean(b));
            assert!((b / a - 1.0).abs() < 0.1, "{precision}, 20 steps {run}: {a} and {b}");
        }
    }
}

/// A run on a GPU that was stopped goes on to the bits of one that was not.
#[test]
fn a_gpu_goes_on_bit_for_bit() {
    let Some(name) = a_gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let device = Device::open_as(&name, 0, Precision::F16).unwrap();
    let on = |state: State, stop_at: Option<usize>| {
        let s = state.progress.settings.clone();
        let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
        let stop = AtomicBool::new(false);
        let mut seen = Seen { stop: stop_at.map(|at| (at, &stop)), ..Default::default() };
        run(&device, state, &pools, &Peers::alone(), &stop, &mut seen)
    };
    let at = |name: &str| settings(&folder.path().join(name), &model);
    assert_eq!(on(begin(at("whole")).unwrap(), None), Ok(Ended::Finished));
    assert_eq!(on(begin(at("parts")).unwrap(), Some(2)), Ok(Ended::Stopped));
    let state = State::open(&at("parts").out.join("last.state.safetensors")).unwrap();
    assert_eq!(on(state, None), Ok(Ended::Finished));
    for file in ["last.safetensors", "best.safetensors"] {
        let [a, b] = ["whole", "parts"].map(|name| std::fs::read(at(name).out.join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
}

#[test]
fn all_processes_stop_when_one_is_asked_to() {
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let settings =
        Settings { epochs: 1, steps: 50, ..settings(&folder.path().join("out"), &model) };
    assert!((2..4).contains(&steps_of(2, "cpu", &settings, Some(2)).len()));
    assert!(settings.out.join("last.state.safetensors").exists());
}

#[test]
fn a_run_that_loses_a_process_ends_and_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let settings =
        Settings { epochs: 1, steps: 50, ..settings(&folder.path().join("out"), &model) };
    let address = format!(
        "127.0.0.1:{}",
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    );
    let meet = |rank: usize| {
        let place = Place { rank, world: 2, local: rank, address: address.clone() };
        Peers::meet(&place, "a run", None).unwrap()
    };
    std::thread::scope(|scope| {
        // It connects, and leaves in the middle of the first step.
        scope.spawn(|| drop(meet(1)));
        let peers = meet(0);
        let pools = Pools::open(
            &settings.data,
            &settings.shares,
            &settings.target,
            None,
            None,
            None,
            settings.seed,
        )
        .unwrap();
        let never = AtomicBool::new(false);
        let error = run(
            &device(),
            begin(settings.clone()).unwrap(),
            &pools,
            &peers,
            &never,
            &mut Seen::default(),
        )
        .unwrap_err();
        assert!(
            error.contains("process 1 of this training run was lost") && error.contains("--resume"),
            "{error}"
        );
    });
}

/// Lets a device be lost when an epoch was validated, before the epoch is saved.
#[cfg(feature = "emulator")]
struct Loses<'a> {
    cuda: &'a prism::device::Cuda,
    epoch: usize,
}

#[cfg(feature = "emulator")]
impl Watch for Loses<'_> {
    fn step(&mut self, _: &StepReport, _: usize) {}
    fn case(&mut self, _: usize, _: usize) {}
    fn validation(&mut self, report: &ValidationReport) {
        if report.epoch == self.epoch {
            self.cuda.lose_after(0);
        }
    }
}

/// If a device is lost, as a GPU whose context an error has ended, the run ends with that error.
/// What it saved before is whole, and goes on bit for bit.
#[cfg(feature = "emulator")]
#[test]
fn a_run_whose_device_is_lost_goes_on_from_what_it_saved() {
    let folder = tempfile::tempdir().unwrap();
    let model = written(&coarse(), folder.path());
    let at = |name: &str| Settings {
        steps: 1,
        batch: 1,
        iterations: 1,
        validation_cases: 1,
        validation_iterations: 1,
        ..settings(&folder.path().join(name), &model)
    };
    // Goes on with a new device until it is lost, after launches or behind a validation. Returns
    // how many launches were left.
    let go_on = |state: State, launches: u64, epoch: usize| {
        let device = Device::open_as("emulated", 2, Precision::F16).unwrap();
        let Device::Cuda(cuda) = &device else { panic!("{} is no CUDA device", device.describe()) };
        let s = state.progress.settings.clone();
        let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
        let never = AtomicBool::new(false);
        cuda.lose_after(launches);
        let mut watch = Loses { cuda, epoch };
        let ended = run(&device, state, &pools, &Peers::alone(), &never, &mut watch);
        (ended, cuda.lose_after(u64::MAX))
    };
    let most = u64::MAX - 1;
    let (ended, left) = go_on(begin(at("whole")).unwrap(), most, 0);
    assert_eq!(ended, Ok(Ended::Finished));
    let all = most - left;
    // Before anything is saved; in the second epoch's step; behind the first validation, which is
    // saved all the same, for all that is saved was read before.
    for (name, launches, epoch) in
        [("early", all / 5, 0), ("step", all * 3 / 5, 0), ("saved", most, 1)]
    {
        let out = at(name).out;
        let failure = go_on(begin(at(name)).unwrap(), launches, epoch).0.unwrap_err();
        assert!(failure.contains("the device is lost"), "{name}: {failure}");
        let saved = out.join("last.state.safetensors");
        if name == "early" {
            assert!(!saved.exists() && !out.join("last.safetensors").exists());
            continue;
        }
        let state = State::open(&saved).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(state.progress.step, 1, "{name}");
        Weights::open(&out.join("last.safetensors")).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(go_on(state, u64::MAX, 0).0, Ok(Ended::Finished), "{name}");
        for file in ["last.safetensors", "best.safetensors"] {
            let [a, b] = [&at("whole").out, &out].map(|at| std::fs::read(at.join(file)).unwrap());
            assert!(a == b, "{name}: {file} differs");
        }
    }
}

#[test]
fn recomputing_iterations_changes_no_gradient() {
    let device = device();
    let config = tiny();
    let model = Model::new(&device, &Weights::hashed(config.clone(), "r")).unwrap();
    let s = config.patch;
    let label: Vec<f32> =
        (0..s * s * s).map(|v| f32::from(u8::from(v / (s * s) < s / 2))).collect();
    let image = Tensor::new(
        [s; 3],
        label.iter().enumerate().map(|(i, l)| l + (i % 7) as f32 * 0.1).collect(),
    );
    let target = Target::new(&device, label, [s; 3], KERNEL).unwrap();
    let count = config.tensors().len();
    let pass = |recompute: Rerun, prompts: usize| {
        let share = Share {
            weights: LossWeights::default(),
            iterations: 3,
            batch: 1,
            recompute,
            scale: 1.0,
        };
        let mut grads = ParamGrads::new(count);
        let prompt = |t: usize, _: Option<&Tensor>| {
            (t < prompts).then(|| PatchPrompts {
                points: vec![([t as i32, 3, 5], t.is_multiple_of(2))],
                bounds: None,
            })
        };
        let outcome =
            run_item(&device, &model, &image, &target, share, &mut grads, prompt).unwrap();
        (outcome, grads)
    };
    // Also if the user is satisfied early: then fewer iterations count.
    for prompts in [3, 1, 0] {
        let (b, gb) = pass(Rerun::Never, prompts);
        for recompute in [Rerun::Exact, Rerun::Fast] {
            let (a, ga) = pass(recompute, prompts);
            assert_eq!((a.iterations.len(), a.loss.to_bits()), (prompts, b.loss.to_bits()));
            assert!((0..count).all(|id| ga.get(id) == gb.get(id)), "{recompute:?}");
            assert_eq!(prompts == 0, (0..count).all(|id| ga.get(id).is_none()));
        }
    }
}

#[test]
fn one_real_case_can_be_learned_by_heart() {
    let folder = tempfile::tempdir().unwrap();
    let config =
        Config { fit: Some(1.75), encoder: Encoder::Cnn, channels: [8, 16, 16, 32, 48], ..tiny() };
    let model = written(&config, folder.path());
    let csv = folder.path().join("one.csv");
    let file = |name: &str| here(&format!("tests/data/odd/{name}")).display().to_string();
    std::fs::write(
        &csv,
        format!(
            "image,label,name\n{},{},lung\n",
            file("m00_base.nii.gz"),
            file("m00_base_label.nii.gz")
        ),
    )
    .unwrap();
    let split = folder.path().join("split.json");
    std::fs::write(&split, r#"{"train": ["lung"], "validation": []}"#).unwrap();
    let given = Settings {
        data: csv.display().to_string(),
        split: Some(split),
        epochs: 1,
        steps: 160,
        batch: 1,
        iterations: 2,
        lr: 2e-3,
        lr_end: 0.05,
        ema: 0.0,
        augment: false,
        boxed: 1.0,
        scribbles: 0.0,
        points_max: 10,
        box_growth: 0,
        validation_cases: 0,
        ..settings(&folder.path().join("run"), &model)
    };
    let mut seen = Seen::default();
    go(given, &mut seen, &AtomicBool::new(false)).unwrap();
    // Dice of the last answer's mask, on the very patch it learned from.
    let weights = Weights::open(&folder.path().join("run/last.safetensors")).unwrap();
    let device = device();
    let net = Model::new(&device, &weights).unwrap();
    let case = prism::data::cases::list(&csv, None).unwrap().remove(0);
    let Loaded { image, mask: label, .. } = case.read(&TargetLabel::Any).unwrap();
    let sample = prism::data::sample::centred(&config, "lung", &image, &label).unwrap();
    let features = net
        .encode(&Tensor::new([32; 3], sample.image.clone()), &mut prism::model::Observer::none())
        .unwrap();
    let user =
        prism::prompt::simulate::User { boxed: 1.0, ..prism::prompt::simulate::User::of_points(5) };
    let mut rng = prism::prompt::simulate::generator(1, &[]);
    let mut dice = vec![];
    let see = |_: usize, logits: &[f32]| {
        let mask: Vec<u8> = logits.iter().map(|v| u8::from(*v > 0.0)).collect();
        dice.push(prism::eval::metrics::dice(&sample.label, &mask));
    };
    prism::train::interactive::interact(
        &device,
        &net,
        &features,
        &sample.label,
        &user,
        &mut rng,
        2,
        see,
    )
    .unwrap();
    assert!(
        dice[1] > 0.95,
        "Dice {dice:?}, loss {:.3} to {:.3}",
        seen.steps[0].loss,
        seen.steps[159].loss
    );
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_its_samples() {
    let folder = tempfile::tempdir().unwrap();
    let model = written(&tiny(), folder.path());
    let given = Settings { warmup: 0, ..settings(&folder.path().join("run"), &model) };
    let mut state = begin(given).unwrap();
    // A rate that settings may not have.
    state.progress.settings.lr = 1e30;
    let error = from(state, &mut Seen::default(), &AtomicBool::new(false)).unwrap_err();
    assert!(
        error.contains("step ")
            && error.contains("synth:1/")
            && (error.contains("NaN") || error.contains("inf")),
        "{error}"
    );
}

#[test]
fn weights_that_are_no_numbers_end_the_run_and_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (written(&tiny(), folder.path()), folder.path().join("run"));
    for validation_cases in [0, 1] {
        let given = Settings {
            epochs: 1,
            steps: 1,
            batch: 1,
            iterations: 1,
            warmup: 0,
            ema: 0.0,
            validation_cases,
            ..settings(&out, &model)
        };
        let mut state = begin(given).unwrap();
        state.progress.settings.lr = 1e300;
        let mut seen = Seen::default();
        let error = from(state, &mut seen, &AtomicBool::new(false)).unwrap_err();
        assert!(error.contains("the training has diverged, so nothing was saved"), "{error}");
        assert!(seen.cases == 0 && seen.validations.is_empty());
        for file in ["last.safetensors", "last.state.safetensors", "best.safetensors"] {
            assert!(!out.join(file).exists(), "{file}");
        }
    }
}

#[test]
fn settings_come_from_flags_then_the_file_then_defaults() {
    let file: Given =
        toml::from_str("lr = 1e-3\nepochs = 7\nschedule = \"exponential\"\ntarget = \"any\"")
            .unwrap();
    let flags = Given { epochs: Some(9), ..Default::default() };
    let s = flags.over(file).settings();
    assert_eq!(
        (s.lr, s.epochs, s.schedule, s.batch, s.boundary),
        (1e-3, 9, Schedule::Exponential, 2, 10.0)
    );
    for (text, value) in
        [("\"auto\"", Recompute::Auto), ("true", Recompute::Always), ("false", Recompute::Never)]
    {
        let line = format!("recompute = {text}");
        let given: Given = toml::from_str(&line).unwrap();
        assert_eq!(given.recompute, Some(value), "{line}");
        // As a run's folder and its state have it.
        let settings = given.settings();
        let written = toml::to_string(&settings).unwrap();
        assert!(written.lines().any(|l| l == line), "{written}");
        let json = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&json).unwrap(), settings);
    }
    assert_eq!(s.recompute, Recompute::Auto);
    for wrong in ["1", "\"always\""] {
        let error = toml::from_str::<Given>(&format!("recompute = {wrong}")).unwrap_err();
        assert!(error.to_string().contains("true, false or \"auto\""), "{error}");
    }
    let unknown = toml::from_str::<Given>("learning_rate = 1").unwrap_err().to_string();
    assert!(unknown.contains("learning_rate"), "{unknown}");
    assert!(
        Settings { points_min: 9, points_max: 3, ..s.clone() }
            .check()
            .unwrap_err()
            .contains("points_min")
    );
    assert!(Settings { steps: 0, ..s.clone() }.check().unwrap_err().contains("steps"));
    assert!(Settings { lr: f64::NAN, ..s.clone() }.check().unwrap_err().contains("lr"));

    // The rates: the paper's falls by a step an epoch, and never below its floor; the others end
    // where they should.
    let paper = Settings {
        lr: 4e-5,
        schedule: Schedule::Paper,
        lr_fall: 2e-6,
        lr_end: 0.01,
        epochs: 200,
        steps: 10,
        warmup: 0,
        ..s
    };
    assert!(
        (paper.rate(9) - 4e-5).abs() < 1e-12
            && (paper.rate(10) - 3.8e-5).abs() < 1e-12
            && (paper.rate(1999) - 4e-7).abs() < 1e-12
    );
    let linear = Settings { schedule: Schedule::Linear, ..paper.clone() };
    assert!(
        (linear.rate(1000) - 4e-5 * 0.505).abs() < 1e-12
            && (linear.rate(2000) - 4e-7).abs() < 1e-12
    );
    let exponential = Settings { schedule: Schedule::Exponential, ..paper.clone() };
    assert!(
        (exponential.rate(1000) - 4e-6).abs() < 1e-12
            && (exponential.rate(2000) - 4e-7).abs() < 1e-12
    );
    let warm = Settings { warmup: 4, schedule: Schedule::Constant, ..paper };
    assert_eq!([0, 1, 3, 4].map(|t| (warm.rate(t) / 1e-5).round()), [1.0, 2.0, 4.0, 4.0]);
}
