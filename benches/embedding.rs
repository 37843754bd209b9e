//! The cost of the C interface: the same clicks through it and through the library, alternately.
//! `cargo bench --bench embedding`.

use prism::capi::*;
use prism::device::Device;
use prism::model::{Model, Weights};
use prism::prompt::{Prompts, RawBox, RawPoint, Space};
use prism::session::{Options, Scan, Session, normalization};
use prism::volume::Volume;
use std::ffi::CString;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::time::Instant;

const CLICKS: usize = 200;
const BOX: [f64; 6] = [69.0, 68.0, 13.0, 93.0, 94.0, 16.0];
const POINT: [f64; 3] = [80.0, 80.0, 14.0];

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let [model_path, image_path] = ["models/small.safetensors", "examples/data/lung1_image.nii.gz"];
    let device = Device::open("cpu", 0).expect("the CPU");
    let model = Arc::new(
        Model::new(&device, &Weights::open(Path::new(model_path)).expect("the model"))
            .expect("the model"),
    );
    let image = Volume::read(Path::new(image_path), None).expect("the scan");
    let mut prompts = Prompts::default();
    prompts.set_box(&image.grid, RawBox(BOX), Space::Ijk).expect("a box");
    prompts
        .add_point(&image.grid, RawPoint { position: POINT, positive: true }, Space::Ijk)
        .expect("a point");
    let normalization = normalization(&image, model.config().intensity);
    let scan = Scan::new(&model, Arc::new(image), normalization, Options::default());
    let mut session = Session::new(&Arc::new(scan));

    let text = |t: &str| CString::new(t).expect("no NUL");
    let (mut engine, mut loaded, mut volume, mut held) =
        (null_mut(), null_mut(), null_mut(), null_mut());
    let given = prism_prompts {
        struct_size: size_of::<prism_prompts>(),
        space: 0,
        points: POINT.as_ptr(),
        point_labels: null(),
        point_count: 1,
        bounds: BOX.as_ptr(),
        scribble: null(),
        scribble_labels: null(),
        scribble_count: 0,
        dense: null(),
        dense_kind: 0,
        dense_strides: [0; 3],
        lines: null(),
        line_count: 0,
        lasso: null(),
        lasso_count: 0,
        others: null(),
        others_strides: [0; 3],
    };
    let fine = |status: prism_status| assert!(status == prism_status::PRISM_OK, "{status:?}");
    // SAFETY: all pointers and sizes are valid.
    unsafe {
        fine(prism_engine_open(c"cpu".as_ptr(), null(), &mut engine));
        fine(prism_model_load(engine, text(model_path).as_ptr(), &mut loaded));
        fine(prism_volume_read(text(image_path).as_ptr(), -1, &mut volume));
        fine(prism_session_open(loaded, volume, null(), &mut held));
    }
    let [mut own, mut through] = [vec![], vec![]];
    for click in 0..CLICKS + 5 {
        session.reset();
        prism_session_reset(held);
        let start = Instant::now();
        session.interact(&prompts).expect("an answer");
        let first = start.elapsed();
        let start = Instant::now();
        // SAFETY: as above.
        fine(unsafe { prism_session_interact(held, &given, null_mut()) });
        if click >= 5 {
            own.push(first.as_secs_f64());
            through.push(start.elapsed().as_secs_f64());
        }
    }
    let (own, through) = (median(&mut own), median(&mut through));
    println!(
        "{CLICKS} clicks each: {:.3} ms by the library, {:.3} ms through C, {:+.3} ms ({:+.2} %)",
        own * 1e3,
        through * 1e3,
        (through - own) * 1e3,
        100.0 * (through / own - 1.0)
    );
}
