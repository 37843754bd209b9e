//! Files: damaged, changed by others, or given twice, and settings in them.

use crate::common::{here, skipped, tiny};
use crate::program::{ONE_STEP, eval, prism, segment, simulate, train};
use crate::{model, text};
use prism::capi::*;
use prism::data::cache::Cache;
use prism::data::cases::{Loaded, TargetLabel, list};
use prism::device::Device;
use prism::model::{Config, Model, Observer, Weights, weights::Precision};
use prism::output::write_text;
use prism::tensor::Tensor;
use prism::train::state::State;
use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::Mutex;

#[test]
fn settings_have_bounds_in_files_and_on_resume() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let out = folder.path().join("run");
    let run = |more: &str| train(&model, &out).with(more).output();
    for (flag, value) in [
        ("--validation-iterations", "9223372036854775808"),
        ("--box-growth", "18446744073709551615"),
        ("--batch", "100000000"),
        ("--iterations", "100000000"),
        ("--points-max", "99999999"),
        ("--epochs", "0"),
        ("--steps", "0"),
        ("--sparing", "7"),
        ("--lr", "2"),
        ("--lr-fall", "2"),
        ("--lr", "1e300"),
        ("--clip-norm", "2e30"),
    ] {
        let said = run(&format!("{flag} {value}"));
        let name = flag.trim_start_matches('-').replace('-', "_");
        assert!(
            said.status.code() == Some(2) && text(&said).contains(&format!("{name} is {value}")),
            "{flag}: {}",
            text(&said)
        );
    }
    // Sums of shares that are not finite.
    let shared =
        |shares: &str| run(&format!("--data synth:1,synth:2 --shares={shares} {ONE_STEP}"));
    for shares in ["inf,1", "1e308,1e308", "-1,2", "nan,1", "0,0"] {
        let said = shared(shares);
        assert_eq!(said.status.code(), Some(1), "{shares}: {}", text(&said));
        let words: String = match shares {
            "0,0" => "no data to sample from".into(),
            _ => format!("shares '{shares}': expected a number from 0"),
        };
        assert!(text(&said).contains(&words), "{shares}: {}", text(&said));
    }
    let said = shared("0,2");
    assert!(said.status.success(), "{}", text(&said));
    // A state whose settings were changed.
    let state = out.join("last.state.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    for (from, to, words) in [
        (r#"\"sparing\":0.0"#, r#"\"sparing\":7.0"#, "sparing is 7"),
        (r#"\"steps\":1,"#, r#"\"steps\":0,"#, "steps is 0"),
        (r#"\"iterations\":1,"#, r#"\"iterations\":0,"#, "iterations is 0"),
        (
            r#"\"validation_iterations\":6,"#,
            r#"\"validation_iterations\":0,"#,
            "validation_iterations is 0",
        ),
        (r#"\"batch\":1,"#, r#"\"batch\":0,"#, "batch is 0"),
        (r#"\"lr\":0."#, r#"\"lr\":7."#, "lr is 7"),
    ] {
        let place = bytes.windows(from.len()).position(|w| w == from.as_bytes());
        let at = place.unwrap_or_else(|| panic!("the state tells no {from}"));
        let changed = [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat();
        std::fs::write(&state, changed).unwrap();
        let said = run("--resume");
        assert!(!said.status.success() && text(&said).contains(words), "{}", text(&said));
    }
}

#[test]
fn numbers_of_a_command_have_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let none = folder.path().join("none");
    for (command, flag, value) in [
        ("eval", "--iterations", "0"),
        ("eval", "--iterations", "18446744073709551615"),
        ("eval", "--points", "0"),
        ("eval", "--points", "18446744073709551615"),
        ("synth", "--count", "18446744073709551615"),
        ("simulate", "--box-growth", "18446744073709551615"),
        ("simulate", "--box-shift", "2147483647"),
        ("simulate", "--box-shift", "-2147483648"),
        ("bench", "--points", "18446744073709551615"),
        ("bench", "--clicks", "4294967295"),
        #[cfg(feature = "serve")]
        ("serve", "--max-sessions", "0"),
        #[cfg(feature = "serve")]
        ("serve", "--max-sessions", "18446744073709551615"),
        #[cfg(feature = "serve")]
        ("serve", "--idle-timeout", "0"),
        #[cfg(feature = "serve")]
        ("serve", "--idle-timeout", "18446744073709551615"),
    ] {
        let run = match command {
            "eval" => eval(&none, &none, &none),
            "synth" => prism("synth").file("-o", &none),
            "simulate" => simulate(&none, &none, &none),
            _ => prism(command),
        };
        let said = run.with(&format!("{flag} {value}")).output();
        let named = format!("invalid value '{value}' for '{flag} ");
        assert!(
            said.status.code() == Some(2) && text(&said).contains(&named),
            "{flag} {value}: {}",
            text(&said)
        );
    }
    assert!(!none.exists());
}

#[test]
fn folders_that_lead_back_to_themselves_end() {
    let folder = tempfile::tempdir().unwrap();
    let case = folder.path().join("loop/c1");
    std::fs::create_dir_all(&case).unwrap();
    for name in ["image", "label"] {
        std::fs::copy(
            here("examples/data").join(format!("lung1_{name}.nii.gz")),
            case.join(format!("{name}.nii.gz")),
        )
        .unwrap();
    }
    for name in ["a", "b"] {
        symlink("../loop", folder.path().join("loop").join(name)).unwrap();
        let cases = list(&folder.path().join("loop"), None).unwrap();
        assert_eq!(cases.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["c1"]);
    }
}

#[test]
fn an_output_is_no_input_and_no_other_output_however_it_is_spelled() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = model(folder.path());
    std::fs::create_dir(at("d")).unwrap();
    for name in ["mask.nii.gz", "others.nii.gz"] {
        std::fs::copy(here("examples/data/lung1_label.nii.gz"), at(name)).unwrap();
    }
    symlink(at("mask.nii.gz"), at("link.nii.gz")).unwrap();
    let image = here("examples/data/lung1_image.nii.gz");
    let to = |mask: &str| segment(&model, &image, &at(mask));
    std::fs::write(at("p.json"), r#"[{"points": [{"position": [80, 80, 14]}]}, {"mask": "mask.nii.gz", "others": "others.nii.gz"}]"#)
        .unwrap();
    let before = std::fs::read(at("mask.nii.gz")).unwrap();
    let point = "--point 80,80,14";
    for (mut run, words) in [
        (to("mask.nii.gz").file("--prompts", at("p.json")), "is an input"),
        (to("d/../others.nii.gz").file("--prompts", at("p.json")), "is an input"),
        (to("link.nii.gz").with(point).file("--mask", at("mask.nii.gz")), "is an input"),
        (to("x.nii").with(point).file("--probability", at("d/../x.nii")), "the same file"),
        (to("x.nii").with(point).file("--probability", at("X.nii")), "upper and lower case"),
        (
            to("x.nii").with(point).with("--clip 0,9 --mean nan --sd 1"),
            "--mean must be a finite number",
        ),
        (to("x.nii").with(point).with("--clip 0,9 --mean 1 --sd inf"), "--sd a number above 0"),
    ] {
        let said = run.output();
        assert!(
            said.status.code() == Some(2) && text(&said).contains(words),
            "{run:?}: {}",
            text(&said)
        );
    }
    assert!(std::fs::read(at("mask.nii.gz")).unwrap() == before && !at("x.nii").exists());
}

/// A group that this process may give its files to, besides `own`.
fn other_group(own: u32) -> Option<u32> {
    let mut groups = [0; 256];
    // SAFETY: at most as many groups are written as there is room for.
    let count = unsafe { libc::getgroups(groups.len() as libc::c_int, groups.as_mut_ptr()) };
    let mine = &groups[..usize::try_from(count).unwrap_or(0)];
    // SAFETY: it only tells who this is.
    let is_root = unsafe { libc::geteuid() } == 0;
    mine.iter().copied().find(|group| *group != own).or(is_root.then_some(own + 1))
}

#[test]
fn what_replaces_a_file_has_its_group() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("m.nii");
    std::fs::write(&at, "old").unwrap();
    let group = other_group(std::fs::metadata(&at).unwrap().gid());
    let Some(group) = group.filter(|group| chown(&at, None, Some(*group)).is_ok()) else {
        return skipped("this user has one group: none is kept");
    };
    for mode in [0o640, 0o664, 0o604] {
        std::fs::set_permissions(&at, std::fs::Permissions::from_mode(mode)).unwrap();
        write_text(&at, &format!("{mode:o}")).unwrap();
        let there = std::fs::metadata(&at).unwrap();
        assert_eq!((there.gid(), there.mode() & 0o777), (group, mode), "{mode:o}");
        assert_eq!(std::fs::read_to_string(&at).unwrap(), format!("{mode:o}"));
    }
}

/// A file's attribute, if it has it.
#[cfg(target_os = "linux")]
fn attribute(at: &Path, name: &CStr) -> Option<Vec<u8>> {
    let path = CString::new(at.to_str().unwrap()).unwrap();
    let mut value = [0u8; 1024];
    let (to, most) = (value.as_mut_ptr().cast(), value.len());
    // SAFETY: both names end with a NUL, and at most as many bytes are written as there are.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), to, most) };
    Some(value[..usize::try_from(length).ok()?].to_vec())
}

/// Gives a file an attribute; false where there are none.
#[cfg(target_os = "linux")]
fn set_attribute(at: &Path, name: &CStr, value: &[u8]) -> bool {
    let path = CString::new(at.to_str().unwrap()).unwrap();
    let (from, length) = (value.as_ptr().cast(), value.len());
    // SAFETY: both names end with a NUL, and `length` bytes are read.
    unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), from, length, 0) == 0 }
}

#[cfg(target_os = "linux")]
#[test]
fn what_replaces_a_file_has_its_access_list() {
    let [own, given] = [c"system.posix_acl_access", c"system.posix_acl_default"];
    // A version; then kinds of users, what they may do, and who they are: the owner reads and
    // writes, and one other user reads, whose right is all that the bits of the group tell.
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 4, 12345), (4, 0, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (kind, rights, who) in entries {
        list.extend(kind.to_le_bytes());
        list.extend(rights.to_le_bytes());
        list.extend(who.to_le_bytes());
    }
    let folder = tempfile::tempdir().unwrap();
    let [listed, plain] = ["listed.nii", "plain.nii"].map(|name| folder.path().join(name));
    for file in [&listed, &plain] {
        std::fs::write(file, "old").unwrap();
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o640)).unwrap();
    }
    if !set_attribute(&listed, own, &list) || !set_attribute(folder.path(), given, &list) {
        return skipped("files have no access lists here");
    }
    // The second one has none, though every new file in the folder has.
    for (file, expected) in [(&listed, Some(list)), (&plain, None)] {
        write_text(file, "new").unwrap();
        assert_eq!(attribute(file, own), expected, "{}", file.display());
        let mode = std::fs::metadata(file).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o640, "{}", file.display());
    }
}

#[test]
fn what_a_command_reads_it_does_not_write_over() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (from, to) in [
        ("tests/data/checkpoint.pth.tar", "a.pth.tar"),
        ("benches/problems/base.txt", "problems.txt"),
    ] {
        std::fs::copy(here(from), at(to)).unwrap();
    }
    let convert = prism("convert").arg(at("a.pth.tar")).arg(folder.path().join("./a.pth.tar"));
    let bench = prism("bench").file("--suite", at("problems.txt"));
    for (mut run, name) in [
        (convert.file("--network", here("tests/data/checkpoint.json")), "a.pth.tar"),
        (bench.file("--save", at("problems.txt")), "problems.txt"),
    ] {
        let before = std::fs::read(at(name)).unwrap();
        let said = run.output();
        assert!(
            said.status.code() == Some(1) && text(&said).contains("is an input"),
            "{run:?}: {}",
            text(&said)
        );
        assert!(std::fs::read(at(name)).unwrap() == before, "{name}");
    }
}

/// Every bit of a file that was written with a hash counts.
#[track_caller]
fn every_bit_counts(file: &Path, reads: impl Fn(&Path) -> Result<(), String>) {
    reads(file).unwrap();
    let bytes = std::fs::read(file).unwrap();
    let changed = file.with_file_name("changed.safetensors");
    // Through the header, which contains names, shapes, settings and the hash itself, and through
    // the values after it.
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mark = bytes.windows(8).position(|w| w == b"hash\\\":\\").expect("it carries a hash");
    let places = (mark..mark + 80)
        .chain((0..60).map(|n| n * header / 60))
        .chain((0..60).map(|n| header + n * (bytes.len() - header) / 60))
        .chain([bytes.len() - 1]);
    for (n, at) in places.enumerate() {
        let mut other = bytes.clone();
        other[at] ^= 1 << (n % 8);
        std::fs::write(&changed, &other).unwrap();
        // Blanks between the parts of a header, and its padding, do not count.
        let is_blank =
            at < header && (bytes[at].is_ascii_whitespace() && other[at].is_ascii_whitespace());
        // A digit of the hash in capitals is the same digit.
        let is_digit =
            (mark + 9..mark + 73).contains(&at) && bytes[at].eq_ignore_ascii_case(&other[at]);
        assert!(
            is_blank || is_digit || reads(&changed).is_err(),
            "bit {} of byte {at} of {}",
            n % 8,
            bytes.len()
        );
    }
    std::fs::write(&changed, &bytes[..bytes.len() - 5]).unwrap();
    assert!(reads(&changed).is_err(), "cut short");
}

#[test]
fn models_and_states_know_when_they_are_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    every_bit_counts(&model, |path| Weights::open(path).map(|_| ()).map_err(|e| e.to_string()));
    every_bit_counts(&model, |path| {
        Weights::from_bytes(&std::fs::read(path).unwrap()).map(|_| ()).map_err(|e| e.to_string())
    });
    let out = folder.path().join("run");
    assert!(train(&model, &out).with(ONE_STEP).output().status.success());
    every_bit_counts(&out.join("last.state.safetensors"), |path| State::open(path).map(|_| ()));

    let said = prism("verify").arg(&model).output();
    assert!(said.status.success() && text(&said).contains("matches the hash"), "{}", text(&said));
    let mut bytes = std::fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&model, bytes).unwrap();
    let anew = folder.path().join("anew");
    for mut run in [prism("verify").arg(&model), train(&model, &anew).with(ONE_STEP)] {
        let said = run.output();
        assert!(
            !said.status.success() && text(&said).contains("damaged"),
            "{run:?}: {}",
            text(&said)
        );
    }
}

/// A model file as another program would write it: without the hash that ends its configuration.
fn without_hash(model: &[u8]) -> Vec<u8> {
    let length = u64::from_le_bytes(model[..8].try_into().unwrap()) as usize;
    let (header, values) = model[8..].split_at(length);
    let header = std::str::from_utf8(header).unwrap();
    let mark = r#",\"hash\":\""#;
    let (before, rest) = header.split_once(mark).expect("it carries a hash");
    // Behind the 64 digits of the hash there is its second quote.
    let header = format!("{before}{}", &rest[64 + r#"\""#.len()..]);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), values].concat()
}

#[test]
fn a_model_without_a_hash_is_used_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let sealed = model(folder.path());
    let bare = at("bare.safetensors");
    std::fs::write(&bare, without_hash(&std::fs::read(&sealed).unwrap())).unwrap();
    let scan = here("tests/data/odd/m00_base.nii.gz");
    let warning = format!("warning: {}: carries no hash of its contents", bare.display());
    let point = "--point 5,5,5";
    for mut run in [
        segment(&bare, &scan, &at("m.nii.gz")).with(point),
        segment(&bare, &scan, &at("m.nii.gz")).with(point).with("--json"),
        train(&bare, &at("run")).with(ONE_STEP),
    ] {
        let said = run.output();
        assert!(said.status.success(), "{run:?}: {}", text(&said));
        let errors = String::from_utf8_lossy(&said.stderr);
        assert_eq!(errors.matches(&warning).count(), 1, "{run:?}: {errors}");
    }
    let said = segment(&bare, &scan, &at("m.nii.gz")).with(point).with("--json --quiet").output();
    let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    let told = report["warnings"].as_array().unwrap();
    assert!(told.iter().any(|w| w.as_str().unwrap().contains("carries no hash")), "{report:#}");
    let said = segment(&sealed, &scan, &at("m.nii.gz")).with(point).output();
    assert!(said.status.success() && !text(&said).contains("carries no hash"), "{}", text(&said));

    // What the command that it names writes carries one.
    let again = at("again.safetensors");
    for (from, warnings) in [(&sealed, 0), (&bare, 1)] {
        let said = prism("convert").arg(from).arg(&again).output();
        assert!(said.status.success(), "{}", text(&said));
        let errors = String::from_utf8_lossy(&said.stderr);
        assert_eq!(errors.matches("carries no hash of its contents").count(), warnings, "{errors}");
    }
    assert!(Weights::open(&again).unwrap().sealed && !Weights::open(&bare).unwrap().sealed);
}

/// Notes what the C interface tells its log.
///
/// # Safety
/// `user` is the list of messages, which outlives the log; `message` ends with a NUL.
unsafe extern "C" fn note(user: *mut c_void, message: *const c_char) {
    // SAFETY: the text ends with a NUL, and `user` is the list below, which outlives the log.
    let (told, text) = unsafe { (&*user.cast::<Mutex<Vec<String>>>(), CStr::from_ptr(message)) };
    told.lock().unwrap().push(text.to_string_lossy().into_owned());
}

#[test]
fn the_log_of_the_c_interface_is_told_of_a_model_without_a_hash() {
    let folder = tempfile::tempdir().unwrap();
    let sealed = std::fs::read(model(folder.path())).unwrap();
    let path = folder.path().join("bare.safetensors");
    let bare = without_hash(&sealed);
    std::fs::write(&path, &bare).unwrap();
    let name = CString::new(path.to_str().unwrap()).unwrap();
    let told: Mutex<Vec<String>> = Mutex::default();
    let fine = |status: prism_status| assert!(status == prism_status::PRISM_OK, "{status:?}");
    // SAFETY: all pointers and sizes are valid, and the list is in place until no log is set.
    unsafe {
        fine(prism_set_log(Some(note), (&raw const told).cast_mut().cast()));
        let mut engine = null_mut();
        fine(prism_engine_open(c"cpu".as_ptr(), null(), &mut engine));
        let mut models = [null_mut(); 3];
        fine(prism_model_load(engine, name.as_ptr(), &mut models[0]));
        fine(prism_model_load_memory(engine, bare.as_ptr().cast(), bare.len(), &mut models[1]));
        fine(prism_model_load_memory(engine, sealed.as_ptr().cast(), sealed.len(), &mut models[2]));
        fine(prism_set_log(None, null_mut()));
        models.into_iter().for_each(|model| fine(prism_model_free(model)));
        fine(prism_engine_free(engine));
    }
    let mut told = told.into_inner().unwrap();
    told.retain(|line| line.contains("carries no hash"));
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].contains("bare.safetensors") && told[1].contains("a model in memory"));
}

#[test]
fn a_cached_case_knows_when_it_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let (csv, kept) = (folder.path().join("one.csv"), folder.path().join("cache"));
    let [image, label] =
        ["m00_base", "m00_base_label"].map(|n| here(&format!("tests/data/odd/{n}.nii.gz")));
    std::fs::write(&csv, format!("image,label\n{},{}\n", image.display(), label.display()))
        .unwrap();
    let case = list(&csv, None).unwrap().remove(0);
    let cache = Cache::new(&kept, 4.0, TargetLabel::Any);
    let Loaded { image, mask, .. } =
        cache.put(&case, case.read(&TargetLabel::Any).unwrap()).unwrap();
    let entry = std::fs::read_dir(&kept).unwrap().next().unwrap().unwrap().path();
    every_bit_counts(&entry, |path| {
        std::fs::write(&entry, std::fs::read(path).unwrap()).unwrap();
        let again = cache.get(&case).ok_or("it is no entry")?;
        assert!(again.image.values() == image.values() && again.mask == mask);
        Ok(())
    });
}

#[test]
fn a_model_file_that_others_change_is_an_error_and_one_that_is_replaced_is_none() {
    // Wide enough for matrices that stay in the file.
    let config = Config { vit_width: 264, ..tiny() };
    let folder = tempfile::tempdir().unwrap();
    let (path, other) = (folder.path().join("m.safetensors"), folder.path().join("n.safetensors"));
    let save = |salt: &str, to: &Path| {
        Weights::hashed(config.clone(), salt).save(to, Precision::F32).unwrap()
    };
    save("other", &other);
    let device = Device::open("cpu", 2).unwrap();
    let s = config.patch;
    let image = Tensor::new([s; 3], (0..s * s * s).map(|v| (v % 17) as f32 / 17.0).collect());
    let encode = |model: &Model| {
        model.encode(&image, &mut Observer::none()).map(|f| f.vars()[0].value().data().to_vec())
    };
    let open = || {
        save("one", &path);
        Model::new(&device, &Weights::open(&path).unwrap()).unwrap()
    };
    let expected = encode(&open()).unwrap();
    assert_eq!(
        encode(&Model::new(&device, &Weights::hashed(config.clone(), "one")).unwrap()).unwrap(),
        expected
    );

    // Replaced, as prism and others write files: the model continues with what it was loaded from.
    let model = open();
    std::fs::rename(&other, &path).unwrap();
    assert_eq!(encode(&model).unwrap(), expected);
    // Overwritten in its place, before and after it was used.
    for used in [false, true] {
        let model = open();
        if used {
            assert_eq!(encode(&model).unwrap(), expected);
        }
        save("other", &other);
        std::fs::copy(&other, &path).unwrap();
        let said = encode(&model).unwrap_err().to_string();
        assert!(said.contains("m.safetensors") && said.contains("has changed"), "{said}");
        save("one", &other);
        // The original is restored.
        std::fs::copy(&other, &path).unwrap();
        assert_eq!(encode(&model).unwrap(), expected);
    }
    // Truncated.
    for used in [false, true] {
        let model = open();
        if used {
            assert_eq!(encode(&model).unwrap(), expected);
        }
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
        let said = encode(&model).unwrap_err().to_string();
        assert!(said.contains("shorter than it was"), "{said}");
    }
}

#[test]
fn no_command_writes_over_what_it_has_read() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = model(folder.path());
    for name in ["out", "lab", "s"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    let (scan, label) =
        (here("examples/data/lung1_image.nii.gz"), here("examples/data/lung1_label.nii.gz"));
    for name in ["lab/k_basic.nii.gz", "s/box.nii.gz"] {
        std::fs::copy(&label, at(name)).unwrap();
    }
    let list =
        |label: &Path| format!("image,label,name\n{},{},k\n", scan.display(), label.display());
    std::fs::write(at("out/cases.csv"), list(&label)).unwrap();
    std::fs::write(at("lab.csv"), list(&at("lab/k_basic.nii.gz"))).unwrap();
    // Voxels beside their header.
    std::fs::write(at("v.nii"), vec![7u8; 20 * 20 * 20]).unwrap();
    std::fs::hard_link(at("v.nii"), at("hard.nii")).unwrap();
    let header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: 20 20 20\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\ndata file: v.nii\n";
    std::fs::write(at("h.nhdr"), header).unwrap();
    std::fs::create_dir(at("run")).unwrap();
    std::fs::copy(&model, at("run/last.safetensors")).unwrap();
    for (kept, mut run) in [
        ("v.nii", segment(&model, &at("h.nhdr"), &at("v.nii")).with("--point 5,5,5")),
        ("hard.nii", segment(&model, &at("h.nhdr"), &at("hard.nii")).with("--point 5,5,5")),
        ("out/cases.csv", eval(&model, &at("out/cases.csv"), &at("out")).with("--iterations 1")),
        (
            "lab/k_basic.nii.gz",
            eval(&model, &at("lab.csv"), &at("o"))
                .file("--masks", at("lab"))
                .with("--iterations 1 --protocol basic"),
        ),
        ("s/box.nii.gz", simulate(&scan, &at("s/box.nii.gz"), &at("s"))),
        ("run/last.safetensors", train(&at("run/last.safetensors"), &at("run")).with(ONE_STEP)),
    ] {
        let before = std::fs::read(at(kept)).unwrap();
        let said = run.output();
        assert!(
            !said.status.success() && text(&said).contains("is an input"),
            "{run:?}: {}",
            text(&said)
        );
        assert!(std::fs::read(at(kept)).unwrap() == before, "{kept}");
    }
}
