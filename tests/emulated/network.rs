//! The network as on the CPU, in any order of threads; the path of its tokens; what is copied; what
//! fails.

use crate::common::{self, apart, device_name, here, judge_rounding, judge_tokens, tiny};
use crate::{PRECISIONS, expected, open, session};
use prism::device::{CudaError, DType, Device, Precision};
use prism::model::{Model, Observer, Part, Weights};
use prism::prompt::Prompts;
use prism::session::{Options, Scan, Session, SessionError};
use prism::tensor::OpError;
use prism::volume::Volume;
use prism::volume::intensity::Normalization;
use std::sync::Arc;

#[test]
fn the_order_of_threads_changes_no_bit() {
    if device_name() != "emulated" {
        common::skipped("only the emulator runs threads in an order of one's choosing");
        return;
    }
    for precision in [Precision::F32, Precision::Tf32, Precision::F16] {
        let expected = expected(precision);
        assert!(expected.logits.iter().all(|v| v.is_finite()));
        for seed in [1, 7] {
            let device = Device::open_as(&format!("emulated:{seed}"), 0, precision).unwrap();
            assert_eq!(session(&device, tiny()), *expected, "{precision}, seed {seed}");
        }
    }
}

#[test]
fn the_same_network_as_on_the_cpu() {
    let on_cpu = session(&Device::open("cpu", 0).unwrap(), tiny()).masks;
    for (precision, bound) in [
        (Precision::F32, 1e-4),
        (Precision::Ieee, 1e-4),
        (Precision::Tf32, 2e-2),
        (Precision::F16, 2e-2),
        (Precision::Bf16, 1e-1),
    ] {
        let masks = &expected(precision).masks;
        let apart = apart(masks, &on_cpu);
        assert!(apart < bound, "{precision}: {apart}");
    }
}

#[test]
fn products_of_float32_are_rounded_as_was_asked_for() {
    for precision in [Precision::F32, Precision::Tf32, Precision::Ieee] {
        judge_rounding(&open(precision)).unwrap_or_else(|e| panic!("{precision}: {e}"));
    }
}

#[test]
fn the_token_path_is_as_on_the_cpu() {
    for precision in PRECISIONS {
        judge_tokens(&open(precision)).unwrap_or_else(|e| panic!("{precision}: {e}"));
    }
}

/// Everything between two complete reads of a result is one launch. For two layers: projections of
/// tokens and of the image, the layers of the MLP, attention with the layer after it, which in
/// float32 are two; each layer of the small networks after them at once.
#[test]
fn the_token_path_is_few_launches() {
    for (dtype, linears, attentions) in [(DType::F32, 21, 0), (DType::F16, 14, 7)] {
        let model = Model::new(&open(dtype), &Weights::hashed(tiny(), "launches")).unwrap();
        let [_, interact] = model.launches(12, false).unwrap().expect("a CUDA device");
        let count = |begin: &str| interact.iter().filter(|l| l.kernel.starts_with(begin)).count();
        assert_eq!(count("token_linear"), linears, "{dtype}");
        assert_eq!(count("token_attention"), attentions, "{dtype}");
        assert_eq!(count("two_way_attention"), linears - 14, "{dtype}");
        assert_eq!(count("row_linear"), 3, "{dtype}");
        // Two of the dense prompt, one after the last attention.
        assert_eq!(count("layer_norm"), 3, "{dtype}");
        assert_eq!(count("add"), 1, "{dtype}: the dense prompt's");
    }
}

#[test]
fn an_interaction_moves_prompts_up_and_the_answer_down() {
    // Up: all prompts in one copy. Down: choice, scores and masks; and the logits, because the test
    // asks for them.
    assert_eq!(expected(Precision::F16).transfers, [1, 2]);
}

/// If a copy from the device fails, the interaction that asked for it fails, and changes nothing:
/// there is no answer of zeros, and no other session is affected.
#[test]
fn a_failed_read_is_an_error_of_its_session_alone() {
    let device = open(DType::F16);
    let Device::Cuda(cuda) = &device else { panic!("{} is no CUDA device", device_name()) };
    let model = Arc::new(Model::new(&device, &Weights::hashed(tiny(), "failing")).unwrap());
    let image = Arc::new(Volume::read(&here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap());
    let prompts = Prompts { bounds: Some([22, 16, 10, 40, 32, 14]), ..Default::default() };
    for released in [true, false] {
        let normalization = Normalization { clip: [-1000.0, 400.0], mean: -300.0, sd: 350.0 };
        let options = Options { spacing: Some(1.0), released, ..Default::default() };
        let scan = Arc::new(Scan::new(&model, image.clone(), normalization, options));
        let answer = |session: &mut Session| -> Result<Vec<u32>, SessionError> {
            Ok(session.interact(&prompts)?.probability().iter().map(|v| v.to_bits()).collect())
        };
        // A session that steers looks often: there it is enough that it fails.
        let expected = released.then(|| answer(&mut Session::new(&scan)).unwrap());
        let mut failing = Session::new(&scan);
        // Of an interaction's reads, the report's and then the logits'.
        for nth in [1, 2] {
            cuda.fail_download(nth);
            let failure = answer(&mut failing).unwrap_err();
            assert!(
                matches!(failure, SessionError::Op(OpError::Cuda(_))),
                "released {released}, read {nth}: {failure}"
            );
            assert!(failure.to_string().contains("made to fail"), "{failure}");
            assert!(failing.prediction().is_none() && failing.depth() == (0, 0));
        }
        if let Some(expected) = expected {
            assert!(
                answer(&mut Session::new(&scan)).unwrap() == expected,
                "another session's answer is another"
            );
            assert!(answer(&mut failing).unwrap() == expected, "the answer afterwards is another");
        }
    }
}

/// Where a device refuses memory, an interaction begins again once other work has given some back;
/// where there is no other work, it fails and changes nothing.
#[test]
fn what_a_device_refuses_is_waited_for() {
    let device = open(DType::F16);
    let Device::Cuda(cuda) = &device else { panic!("{} is no CUDA device", device_name()) };
    let model = Arc::new(Model::new(&device, &Weights::hashed(tiny(), "full")).unwrap());
    let image = Arc::new(Volume::read(&here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap());
    let prompts = Prompts { bounds: Some([22, 16, 10, 40, 32, 14]), ..Default::default() };
    let session = || {
        let normalization = Normalization { clip: [-1000.0, 400.0], mean: -300.0, sd: 350.0 };
        let options = Options { spacing: Some(1.0), released: true, ..Default::default() };
        let scan = Scan::new(&model, image.clone(), normalization, options);
        Session::new(&Arc::new(scan))
    };
    // What recordings work in is there afterwards.
    let mut first = session();
    first.interact(&prompts).unwrap();
    let mut second = session();
    // There is as much as is held now: what the interaction needs beyond comes back while it waits,
    // or does not.
    let mut within = |comes_back: bool| {
        cuda.limit_memory(cuda.held()[0]);
        let mut waits = 0;
        let mut pace = |part: Part<'_>| {
            if !matches!(part, Part::Alone) {
                return true;
            }
            waits += 1;
            if comes_back {
                cuda.limit_memory(u64::MAX);
            }
            comes_back
        };
        let done = second.interact_observed(&prompts, &mut Observer::paced(&mut pace));
        let done = done.map(|prediction| prediction.mask());
        cuda.limit_memory(u64::MAX);
        (done, waits, second.depth())
    };
    let (refused, waits, depth) = within(false);
    let refused = refused.unwrap_err();
    let is_devices = matches!(refused, SessionError::Op(OpError::Cuda(CudaError::Memory { .. })));
    assert!(is_devices && waits == 1 && depth == (0, 0), "{refused}, {waits} waits, {depth:?}");
    let (done, waits, depth) = within(true);
    assert_eq!((waits, depth), (1, (1, 0)));
    assert!(done.unwrap() == first.mask());
}

#[test]
fn a_machine_without_a_driver_says_so() {
    if let Err(e) = Device::open("cuda", 0) {
        let said = e.to_string();
        assert!(said.starts_with("no CUDA device: ") && said.len() > 30, "{said}");
    }
    let unknown = Device::open("cuda:x", 0).unwrap_err().to_string();
    assert!(unknown.contains("unknown device 'cuda:x'") && unknown.contains("'cpu'"), "{unknown}");
    assert_eq!(
        Device::open_as("cpu", 0, DType::F16).unwrap_err().to_string(),
        "the CPU computes in f32 or, with AVX512-BF16, in bf16; not in f16"
    );
}
