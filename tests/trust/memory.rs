//! Memory and threads: what does not fit is refused with a message.

use crate::common::{here, tiny};
use crate::program::{ONE_STEP, Run, eval, metrics, prism, segment, simulate, train};
use crate::{model, text};
use prism::model::Config;
use std::io::Write;
use std::path::Path;
use std::process::Command;

#[test]
fn sizes_are_held_against_a_budget() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = model(folder.path());
    // 200 MB of zeros in 200 kB.
    let mut header =
        std::fs::read(here("tests/data/odd/m02_trunc_voxels.nii")).unwrap()[..352].to_vec();
    header[40..56].copy_from_slice(bytemuck::cast_slice(&[3i16, 1000, 1000, 200, 1, 1, 1, 1]));
    header[70..74].copy_from_slice(bytemuck::cast_slice(&[2i16, 8]));
    let mut gz = flate2::write::GzEncoder::new(
        std::fs::File::create(at("bomb.nii.gz")).unwrap(),
        flate2::Compression::fast(),
    );
    gz.write_all(&header).unwrap();
    (0..200).for_each(|_| gz.write_all(&[0; 1_000_000]).unwrap());
    gz.finish().unwrap();
    let (bomb, out) = (at("bomb.nii.gz"), at("mask.nii.gz"));
    let scan = here("tests/data/odd/m00_base.nii.gz");
    let segment = |image: &Path| segment(&model, image, &out).with("--point 5,5,5");
    for (run, memory, part) in [
        (prism("info").arg(&bomb), "100M", "bomb.nii.gz: out of memory: its voxels would take"),
        (metrics(&bomb, &bomb), "100M", "bomb.nii.gz: out of memory: "),
        (simulate(&bomb, &bomb, &at("prompts")), "100M", "bomb.nii.gz: out of memory: "),
        (segment(&bomb), "180MB", "out of memory"),
        (segment(&scan), "1M", "out of memory"),
        (segment(&scan), "1000000", "out of memory"),
        (segment(&scan), "12M", "out of memory: working memory of the network"),
    ] {
        let mut run = run.file("--memory", memory);
        let said = run.output();
        assert!(
            said.status.code() == Some(1) && text(&said).contains(part),
            "{run:?}: {}",
            text(&said)
        );
        assert!(!out.exists());
    }
    let said = prism("info").arg(&bomb).with("--memory much").output();
    assert!(said.status.code() == Some(2) && text(&said).contains("such as 8G"), "{}", text(&said));
    let said = prism("info").arg(&bomb).with("--memory 8").output();
    assert!(
        said.status.code() == Some(2) && text(&said).contains("such as 8G or 8Gi"),
        "{}",
        text(&said)
    );
    assert!(segment(&scan).with("--memory 1G").output().status.success());
    // Networks that no machine could run are refused as networks; those that this machine cannot
    // run are refused when they are laid out.
    for (change, part) in [
        (Config { window: 65_536, ..tiny() }, "window is 65536, expected 1 to 32"),
        (Config { prompt_heads: (1 << 63) + 1, ..tiny() }, "prompt_heads is 9223372036854775809"),
        (Config { vit_heads: 1 << 20, ..tiny() }, "vit_heads is 1048576"),
        (Config { fit: Some(0.5), ..tiny() }, "fit is 0.5, expected 1 to 16 times"),
        (Config { calibration: Some([f32::NAN, 1.0]), ..tiny() }, "calibration is [NaN, 1.0], "),
    ] {
        let said = change.check().unwrap_err().to_string();
        assert!(said.contains(part), "{said}");
    }
}

/// A run in so many kilobytes of address space.
#[cfg(target_os = "linux")]
fn within(kilobytes: usize, run: &Run) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {kilobytes}; exec \"$@\""), "sh"]);
    command.arg(run.0.get_program()).args(run.0.get_args());
    command.env("RUST_BACKTRACE", "0");
    command
}

/// The largest patch that a network may have is far more than most machines can run, though its
/// file is small.
#[cfg(target_os = "linux")]
#[test]
fn a_patch_without_room_for_it_is_refused_in_words() {
    use prism::model::{Weights, weights::Precision};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let config = Config { patch: 512, ..tiny() };
    config.check().unwrap();
    Weights::hashed(config, "trust").save(&at("m.safetensors"), Precision::F32).unwrap();
    assert!(std::fs::metadata(at("m.safetensors")).unwrap().len() < 10 << 20);
    let (scan, out) = (here("tests/data/odd/m00_base.nii.gz"), at("mask.nii.gz"));
    let run = segment(&at("m.safetensors"), &scan, &out).with("--point 5,5,5");
    let (mut short, mut refused) = (within(1_000_000, &run), run.with("--memory 400M"));
    for said in [short.output().unwrap(), refused.output()] {
        let expected = "error: out of memory: a patch would take 536.9 MB, ";
        assert!(said.status.code() == Some(1) && text(&said).contains(expected), "{}", text(&said));
    }
    let names = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(names, 1, "it left something behind");
}

#[test]
fn pickles_that_hold_more_than_a_model_needs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bomb.pth");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    for n in 0..9 {
        let stored = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        zip.start_file(format!("x{n}.pkl"), stored).unwrap();
        // A program that pushes None for a long time.
        zip.write_all(b"\x80\x02").unwrap();
        zip.write_all(&[b'N'; 1 << 20]).unwrap();
        zip.write_all(b".").unwrap();
    }
    zip.finish().unwrap();
    let said = prism::model::checkpoint::read(&path).err().expect("a bomb").to_string();
    assert!(said.contains("pickles are longer than 8 MiB"), "{said}");
    // A stream of before there were archives, whose text is as long; and one that is damaged.
    let length = (9u32 << 20).to_le_bytes();
    for (begin, expected) in [
        ([b"\x80\x02X", &length[..]].concat(), "pickles are longer than 8 MiB"),
        (b"\x80\x02\xff".to_vec(), "unknown instruction 0xff"),
    ] {
        std::fs::write(&path, [&begin[..], &[b'n'; 9 << 20], b"."].concat()).unwrap();
        let said = prism::model::checkpoint::read(&path).err().expect("a bomb").to_string();
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn no_more_threads_than_processors_are_started() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("mask.nii.gz"));
    let scan = here("tests/data/odd/m00_base.nii.gz");
    #[cfg(target_os = "linux")]
    let label = here("tests/data/odd/m00_base_label.nii.gz");
    // Those that are told no number, where the stacks of so many have no room.
    #[cfg(target_os = "linux")]
    for run in [prism("info").arg(&scan), metrics(&label, &label)] {
        let mut command = within(4_000_000, &run);
        let said = command.env("RAYON_NUM_THREADS", "100000").output().unwrap();
        assert!(said.status.success(), "{run:?}: {}", text(&said));
    }
    let mut run = segment(&model, &scan, &out).with("--point 5,5,5 --threads 100000");
    run.0.env("RAYON_NUM_THREADS", "100000");
    let said = run.output();
    let most = prism::device::processors();
    assert!(
        said.status.success()
            && text(&said).contains(&format!("100000 threads were requested: {most} are used")),
        "{}",
        text(&said)
    );
}

#[test]
fn networks_and_trainings_that_do_not_fit_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (model, new) = (model(folder.path()), at("new.safetensors"));
    let train = train(&model, &at("run")).with("--epochs 1 --steps 1 --batch 2 --iterations 1");
    for mut run in [
        train.with("--validation-cases 0 --threads 2 --memory 24M"),
        prism("weights --salt a --memory 100M").file("-o", &new),
    ] {
        let said = run.output();
        assert!(
            said.status.code() == Some(1) && text(&said).contains("error: out of memory"),
            "{run:?}: {}",
            text(&said)
        );
        assert!(!new.exists());
    }
}

/// What a header says of voxels far apart is far too many at a network's spacing.
#[test]
fn a_case_that_cannot_be_resampled_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = model(folder.path());
    let header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: 20 20 20\nspace directions: (90000,0,0) (0,90000,0) (0,0,90000)\nencoding: raw\n\n";
    let voxels: Vec<u8> = (0..20 * 20 * 20).map(|v| u8::from(v > 4000)).collect();
    for name in ["wide.nrrd", "label.nrrd"] {
        std::fs::write(at(name), [header.as_bytes(), &voxels].concat()).unwrap();
    }
    std::fs::write(at("one.csv"), "image,label\nwide.nrrd,label.nrrd\n").unwrap();
    let run = train(&model, &at("run")).with(ONE_STEP).file("--data", at("one.csv"));
    let said = run.file("--cache", at("cache")).output();
    let words = text(&said);
    assert!(
        said.status.code() == Some(1)
            && words.contains("wide.nrrd: resampled at 1 mm: out of memory: a resampled scan"),
        "{words}"
    );
}

/// A case of the CVPR 2025 challenge: a bright block in the dark, and a mask of it from the step
/// before.
fn challenge(folder: &Path) {
    use prism::challenge::{npy::of_bytes, npz};
    let size = [16usize, 40, 40];
    let inside = |v: usize| {
        [v / 1600, v / 40 % 40, v % 40]
            .iter()
            .zip([5..10, 12..25, 10..24])
            .all(|(c, range)| range.contains(c))
    };
    let of = |value: u8| {
        (0..size.iter().product()).map(|v| if inside(v) { value } else { 0 }).collect::<Vec<u8>>()
    };
    let spacing = [1.0f64, 1.0, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut numbers =
        b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }"
            .to_vec();
    numbers.resize(10 + 0x46, b' ');
    numbers.extend(spacing);
    let arrays = [
        ("imgs", of_bytes(&size, &of(200))),
        ("prev_pred", of_bytes(&size, &of(1))),
        ("spacing", numbers),
    ];
    std::fs::create_dir(folder).unwrap();
    npz::write(&folder.join("case.npz"), &arrays, true).unwrap().commit().unwrap();
}

/// Every command, with less address space than it needs and then more and more: it succeeds, or
/// says that memory was short, and leaves nothing behind.
#[cfg(target_os = "linux")]
#[test]
fn no_command_aborts_where_the_system_refuses_memory() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = model(folder.path());
    let [scan, label] =
        ["lung1_image", "lung1_label"].map(|n| here(&format!("examples/data/{n}.nii.gz")));
    let listed = format!("image,label\n{},{}\n", scan.display(), label.display());
    std::fs::write(at("all.csv"), listed).unwrap();
    challenge(&at("cases"));
    let (list, out) = (at("all.csv"), at("out"));
    let challenge = prism("challenge").file("-m", &model).file("-i", at("cases"));
    let training = train(&model, &out).with("--data synth:1 --epochs 1 --steps 1 --batch 2");
    let commands = [
        metrics(&label, &label),
        simulate(&scan, &label, &out),
        prism("synth --count 1").file("-o", &out),
        challenge.file("-o", &out),
        eval(&model, &list, &out).with("--protocol plain --iterations 2"),
        eval(&model, &list, &out).with("--protocol click --iterations 2"),
        training.with("--iterations 1 --validation-cases 0"),
        segment(&model, &scan, &at("mask.nii.gz")).with("--point 80,80,14"),
    ];
    let limited = |limit: usize, run: &Run| within(limit, run).output().unwrap();
    // The least with which the program itself can be loaded.
    let least = (16_000..)
        .step_by(1_000)
        .find(|limit| limited(*limit, &prism("--version")).status.success())
        .unwrap();
    for run in commands {
        let (mut limit, mut refused, mut done) = (least, 0, 0);
        while done < 2 {
            let _ = std::fs::remove_dir_all(&out);
            let said = limited(limit, &run);
            let words = text(&said);
            match said.status.code() {
                Some(0) => done += 1,
                // A thread is memory too.
                Some(1)
                    if words.contains("error: ")
                        && (words.contains("out of memory") || words.contains("thread")) =>
                {
                    (refused, done) = (refused + 1, 0)
                }
                // The system's own library cannot go on without a few words for a thread.
                None if words.contains("Fatal glibc error") && words.contains("out of memory") => {
                    done = 0
                }
                _ => panic!("{run:?} with {limit} kB: {}, {words}", said.status),
            }
            for place in [folder.path(), out.as_path()] {
                let names = std::fs::read_dir(place)
                    .into_iter()
                    .flatten()
                    .map(|e| e.unwrap().file_name().into_string().unwrap());
                assert_eq!(
                    names.filter(|n| n.starts_with(".prism-tmp-")).collect::<Vec<_>>(),
                    [""; 0],
                    "{run:?} with {limit} kB"
                );
            }
            limit += limit / 4;
        }
        assert!(refused > 0, "{run:?} was never refused anything");
    }
}

/// What a command makes itself counts against the budget too.
#[test]
fn commands_keep_to_their_budget() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    challenge(&at("cases"));
    let (model, out) = (model(folder.path()), at("out"));
    let challenge = prism("challenge --memory 4M").file("-m", &model).file("-i", at("cases"));
    for mut run in
        [prism("synth --count 1 --memory 1M").file("-o", &out), challenge.file("-o", &out)]
    {
        let said = run.output();
        assert!(said.status.code() == Some(1), "{run:?}: {}", text(&said));
        assert!(text(&said).contains("out of memory: "), "{run:?}: {}", text(&said));
    }
}
