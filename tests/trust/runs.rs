//! Runs that are told to end.

use crate::common::here;
use crate::program::{ONE_STEP, Run, eval, prism, segment, train};
use crate::{model, text};
use prism::output::lock;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime};

/// Waits for something to become true while a process runs; false if that ended before.
#[track_caller]
fn is_seen(child: &mut Child, what: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !what() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(start.elapsed() < Duration::from_secs(600), "it did not come to be");
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Waits for something to become true while a process runs that does not end by itself.
#[track_caller]
fn until(child: &mut Child, what: impl Fn() -> bool) {
    assert!(is_seen(child, what), "it ended before");
}

/// How often something is tried that this process may come too late for: it may be paused for
/// longer than the other one runs.
const TRIES: usize = 20;

/// Tries until it is not too late.
#[track_caller]
fn in_time(try_it: impl FnMut(usize) -> bool) {
    assert!((0..TRIES).any(try_it), "too late {TRIES} times");
}

fn signal(child: &Child, name: &str) {
    assert!(
        Command::new("kill")
            .args(["-s", name, &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
}

/// Signals that ask a process to end.
const ENDS: &[libc::c_int] = &[
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGXCPU,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    #[cfg(target_os = "linux")]
    libc::SIGABRT,
    #[cfg(target_os = "linux")]
    libc::SIGPWR,
    #[cfg(target_os = "linux")]
    libc::SIGPOLL,
];

/// A run that starts with the given handling of signals, whatever these tests run under.
fn born(mut run: Run, signals: &'static [libc::c_int], does: libc::sighandler_t) -> Run {
    let set = move || {
        for signal in signals {
            // SAFETY: neither choice runs code of this process.
            unsafe { libc::signal(*signal, does) };
        }
        Ok(())
    };
    // SAFETY: between fork and exec a process may change its handling of signals.
    unsafe { run.0.pre_exec(set) };
    run
}

/// A run that signals end, as when a shell starts it in the foreground.
fn ending(run: Run) -> Run {
    born(run, ENDS, libc::SIG_DFL)
}

/// A training of the tiny network that takes long, and saves nothing before it is told to end.
fn long(folder: &Path, model: &Path) -> Run {
    let run = train(model, &folder.join("run")).with("--epochs 1 --steps 100000 --batch 1");
    run.with("--iterations 1 --validation-cases 0 --threads 1")
}

fn training(folder: &Path, model: &Path) -> Child {
    ending(long(folder, model)).start()
}

/// Waits until a training in a folder answers signals: it does before it begins its log.
#[track_caller]
fn until_it_listens(child: &mut Child, run: &Path) {
    until(child, || run.join("log.jsonl").exists());
}

#[test]
fn a_folder_is_locked_before_a_training_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let (model, run) = (model(folder.path()), folder.path().join("run"));
    let train = |more: &str| text(&train(&model, &run).with(ONE_STEP).with(more).output());
    // A name that was mistyped.
    let said = train("--resume");
    assert!(said.contains("no such folder") && !run.exists(), "{said}");
    std::fs::create_dir(&run).unwrap();
    // The lock's name leads to a file of the user's.
    let (notes, state) = (folder.path().join("notes"), run.join("last.state.safetensors"));
    std::fs::write(&notes, "a user's").unwrap();
    std::os::unix::fs::symlink(&notes, run.join("run.lock")).unwrap();
    std::fs::write(&state, "half a state").unwrap();
    let another = lock(&run, "run.lock").unwrap().unwrap();
    for more in ["", "--resume"] {
        let said = train(more);
        assert!(said.contains("another training is writing"), "'{more}': {said}");
    }
    drop(another);
    assert!(train("").contains("give --resume to continue that run"));
    let said = train("--resume");
    assert!(said.contains("last.state.safetensors: "), "{said}");
    assert_eq!(std::fs::read(&state).unwrap(), b"half a state");
    assert_eq!(std::fs::read(&notes).unwrap(), b"a user's");
}

#[test]
fn a_training_that_is_told_to_end_saves_and_a_folder_has_one_training() {
    // Schedulers and service managers send several, and mean the same by all of them.
    let wishes =
        ["TERM", "HUP", "INT", "QUIT", "USR1", "TERM HUP", "XCPU XCPU", "HUP HUP", "INT TERM"];
    let rare = if cfg!(target_os = "linux") { "ABRT VTALRM PROF PWR POLL" } else { "ABRT PROF" };
    for (n, name) in wishes.into_iter().chain([rare]).enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        let mut child = training(folder.path(), &model);
        until_it_listens(&mut child, &folder.path().join("run"));
        std::thread::sleep(Duration::from_millis(300));
        if n == 0 {
            let other = training(folder.path(), &model).wait_with_output().unwrap();
            assert!(
                !other.status.success() && text(&other).contains("another training is writing"),
                "{}",
                text(&other)
            );
        }
        name.split(' ').for_each(|name| signal(&child, name));
        let out = child.wait_with_output().unwrap();
        assert!(
            out.status.success() && text(&out).contains("continue with --resume"),
            "{name}: {}",
            text(&out)
        );
        assert!(folder.path().join("run/last.state.safetensors").exists(), "{name}");
    }
}

#[test]
fn a_second_interrupt_gives_up_what_a_training_finishes() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    in_time(|n| {
        // A step takes long.
        let run = folder.path().join(format!("run-{n}"));
        let long = train(&model, &run).with("--epochs 9 --steps 9 --batch 64");
        let long = long.with("--iterations 8 --validation-cases 0 --threads 1");
        let mut child = ending(long).start();
        until_it_listens(&mut child, &run);
        // Those that come while one waits to be handled are merged with it.
        signal(&child, "TERM");
        while child.try_wait().unwrap().is_none() {
            signal(&child, "INT");
            std::thread::sleep(Duration::from_millis(20));
        }
        let out = child.wait_with_output().unwrap();
        let left = std::fs::read_dir(&run).unwrap().flatten();
        let temporary = left.filter(|e| e.file_name().to_string_lossy().contains("prism-tmp"));
        assert_eq!(temporary.count(), 0);
        // The step may have been finished before the second.
        let said = text(&out);
        let finished = out.status.success() && said.contains("continue with --resume");
        assert!(finished || out.status.code() == Some(130), "{}: {said}", out.status);
        !finished
    });
}

#[test]
fn a_signal_that_is_ignored_when_the_program_starts_stays_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    // As `nohup` starts a program.
    let run = born(long(folder.path(), &model), &[libc::SIGHUP], libc::SIG_IGN);
    let mut child = born(run, &[libc::SIGTERM], libc::SIG_DFL).start();
    until_it_listens(&mut child, &folder.path().join("run"));
    signal(&child, "HUP");
    std::thread::sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none(), "it ended");
    signal(&child, "TERM");
    let out = child.wait_with_output().unwrap();
    assert_eq!(text(&out).matches("finishing the step").count(), 1);
    assert!(
        out.status.success() && text(&out).contains("continue with --resume"),
        "{}",
        text(&out)
    );
}

#[test]
fn an_evaluation_that_is_told_to_end_goes_on_and_a_folder_has_one_evaluation() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let model = model(folder.path());
    let [image, label] =
        ["image", "label"].map(|n| here(&format!("examples/data/lung1_{n}.nii.gz")));
    let rows: String =
        (0..8).map(|n| format!("{},{},case {n}\n", image.display(), label.display())).collect();
    std::fs::write(at("data.csv"), format!("image,label,name\n{rows}")).unwrap();
    let eval = |out: &str| {
        let run = eval(&model, Path::new(&at("data.csv")), Path::new(&at(out)));
        run.with("--protocol plain-b-1 --iterations 20 --threads 1")
    };
    assert!(eval("whole").output().status.success());
    in_time(|n| {
        let out = format!("out-{n}");
        let lines = || {
            std::fs::read(at(&format!("{out}/cases.jsonl")))
                .map_or(0, |b| b.iter().filter(|b| **b == b'\n').count())
        };
        // The first line has the settings.
        let is_over = || lines() > 8;
        let signals = [("TERM", libc::SIGTERM), ("HUP", libc::SIGHUP), ("INT", libc::SIGINT)];
        for (n, (name, number)) in signals.into_iter().enumerate() {
            let before = lines();
            let mut child = ending(eval(&out)).start();
            if n == 0 {
                until(&mut child, || lines() > 0);
                let other = eval(&out).output();
                let refused = text(&other).contains("another evaluation is writing");
                assert!(!other.status.success() && refused || is_over(), "{}", text(&other));
            }
            if is_seen(&mut child, || lines() > before.max(1)) {
                signal(&child, name);
            }
            let ended = child.wait_with_output().unwrap();
            if is_over() {
                return false;
            }
            let said = text(&ended);
            assert_eq!(ended.status.code(), Some(128 + number), "{name}: {said}");
            assert!(
                said.contains(&format!("stopped: {} of 8 cases done", lines() - 1)),
                "{name}: {said}"
            );
            assert!(
                said.contains("to resume, run the same command")
                    && !Path::new(&at(&format!("{out}/cases.csv"))).exists(),
                "{name}: {said}"
            );
        }
        let done = lines() - 1;
        let ended = eval(&out).output();
        assert!(
            ended.status.success() && text(&ended).contains(&format!("reused: {done} of 8 cases")),
            "{}",
            text(&ended)
        );
        for name in ["cases.csv", "results.json", "results.md", "iterations.svg"] {
            let [a, b] = [out.as_str(), "whole"]
                .map(|out| std::fs::read(Path::new(&at(out)).join(name)).unwrap());
            assert!(a == b, "{name}");
        }
        true
    });
}

/// A run that may write no file longer than so many bytes, as after `ulimit -f`. The signal that
/// reports a longer one ends it unless the program prevents that.
fn limited(run: Run, bytes: libc::rlim_t) -> Run {
    let mut run = born(run, &[libc::SIGXFSZ], libc::SIG_DFL);
    let set = move || {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: the limit is only read.
        match unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec a process may limit itself.
    unsafe { run.0.pre_exec(set) };
    run
}

#[test]
fn a_file_beyond_the_limit_of_the_shell_is_an_error_that_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = model(folder.path());
    let scan = here("tests/data/odd/m00_base.nii.gz");
    let to = |mask: &str| segment(&model, &scan, &at(mask)).with("--point 10,8,7");
    let convert = prism("convert").arg(here("tests/data/checkpoint.pth.tar"));
    let convert = convert.file("--network", here("tests/data/checkpoint.json"));
    // A map of numbers is longer than the mask that fits, a picture than a packed mask, and a model
    // than everything that a training writes before it.
    let runs = [
        (64, "m.nii.gz", to("m.nii.gz")),
        (64, "m.nii", to("m.nii")),
        (64, "m.nrrd", to("m.nrrd")),
        (64, "m.seg.nrrd", to("m.seg.nrrd")),
        (64, "m.mha", to("m.mha")),
        (64, "m.zraw", to("m.mhd")),
        (100_000, "p.nii", to("m.nii").file("--probability", at("p.nii"))),
        (20_000, "p.png", to("m.nii.gz").file("--preview", at("p.png"))),
        (64, "c.safetensors", convert.arg(at("c.safetensors"))),
        (5000, "last.safetensors", train(&model, &at("run")).with(ONE_STEP)),
    ];
    let written = [
        "m.nii.gz",
        "m.nii",
        "m.nrrd",
        "m.seg.nrrd",
        "m.mha",
        "m.mhd",
        "p.nii",
        "p.png",
        "c.safetensors",
    ];
    for name in written {
        std::fs::write(at(name), "what was there before").unwrap();
    }
    let temporary = |folder: &Path| -> Vec<String> {
        let names = std::fs::read_dir(folder).into_iter().flatten();
        let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".prism-")).collect()
    };
    for (bytes, name, run) in runs {
        let mut run = limited(run, bytes);
        let said = run.output();
        assert!(
            said.status.code() == Some(1)
                && text(&said).contains(name)
                && text(&said).contains("File too large"),
            "{run:?}: {}, {}",
            said.status,
            text(&said)
        );
        let left = [temporary(folder.path()), temporary(&at("run"))].concat();
        assert!(left.is_empty(), "{run:?}: {left:?}");
    }
    for name in written {
        assert_eq!(std::fs::read_to_string(at(name)).unwrap(), "what was there before", "{name}");
    }
    assert!(!at("m.zraw").exists() && !at("run/last.safetensors").exists());
}

/// A scan of noise with so many voxels along each axis.
fn noise(folder: &Path, edge: u32) -> PathBuf {
    let scan = folder.join("scan.nrrd");
    let header = format!(
        "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: {edge} {edge} {edge}\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n\n"
    );
    let voxels: Vec<u8> =
        (0..edge.pow(3)).map(|v| (v.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&scan, [header.as_bytes(), &voxels].concat()).unwrap();
    scan
}

#[test]
fn what_a_killed_process_leaves_is_removed_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let (model, scan) = (model(folder.path()), noise(folder.path(), 128));
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let left = || -> Vec<PathBuf> {
        let paths = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().path());
        let named = |path: &PathBuf| path.to_string_lossy().contains(".prism-tmp-");
        paths.filter(named).collect()
    };
    // The files that it replaces are their owner's alone, and what it leaves is no less so.
    let (mask, probability) = (out.join("m.nii.gz"), out.join("p.nii.gz"));
    for path in [&mask, &probability] {
        std::fs::write(path, "before").unwrap();
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }
    in_time(|_| {
        let run = segment(&model, &scan, &mask).with("--point 64,64,64");
        let mut child = run.file("--probability", &probability).start();
        let seen = is_seen(&mut child, || !left().is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
        seen && !left().is_empty()
    });
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    for path in left() {
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.permissions().mode() & 0o077, 0, "{}", path.display());
        File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
    }
    let small = here("tests/data/odd/m00_base.nii.gz");
    let said = segment(&model, &small, &out.join("next.nii.gz")).with("--point 10,8,7").output();
    assert!(said.status.success(), "{}", text(&said));
    assert!(left().is_empty(), "{:?}", left());
}

#[test]
fn a_signal_leaves_no_temporary_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    // Large enough that writing its probabilities takes a while.
    let scan = noise(folder.path(), 256);
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let names = || {
        std::fs::read_dir(&out)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect::<Vec<_>>()
    };
    let (mask, probability) = (out.join("m.nii.gz"), out.join("p.nii.gz"));
    for (name, number) in [
        ("TERM", libc::SIGTERM),
        ("INT", libc::SIGINT),
        ("HUP", libc::SIGHUP),
        ("QUIT", libc::SIGQUIT),
        ("USR1", libc::SIGUSR1),
        ("USR2", libc::SIGUSR2),
        ("XCPU", libc::SIGXCPU),
        ("ALRM", libc::SIGALRM),
    ] {
        in_time(|_| {
            let run = ending(segment(&model, &scan, &mask)).with("--point 128,128,128");
            let mut child = run.file("--probability", &probability).start();
            if is_seen(&mut child, || names().iter().any(|n| n.starts_with(".prism-"))) {
                signal(&child, name);
            }
            let ended = child.wait_with_output().unwrap();
            // If the signal came too late the files are complete; nothing is ever left beside them.
            assert!(!names().iter().any(|n| n.starts_with(".prism-")), "{name}: {:?}", names());
            let complete = ended.status.success() && mask.exists() && probability.exists();
            let said = text(&ended);
            let told = ended.status.code() == Some(128 + number);
            assert!(complete || told, "{name}: {}, {said}", ended.status);
            !complete
        });
    }
}
