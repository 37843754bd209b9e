use prism::data::{cases, sample::centred};
use prism::device::Device;
use prism::model::{Model, Observer, PatchPrompts, Weights, prompt_maps};
use prism::prompt::simulate::{Errors, User, click::click, generator};
use prism::session::correction::*;
use prism::tensor::Tensor;
use prism::train::interactive::{dice, mask};
use std::path::Path;
fn env(name: &str, or: f32) -> f32 { std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(or) }
fn main() {
    let device = Device::open("cpu", 2).unwrap();
    let path = std::env::var("MODEL").unwrap_or("models/small.safetensors".into());
    let model = Model::new(&device, &Weights::open(Path::new(&path)).unwrap()).unwrap();
    let mut list = cases::list(Path::new("../shared/data/train/all.csv")).unwrap();
    let names: Vec<String> = std::env::var("CASES").unwrap_or("sts_012,sts_041,sts_020,sts_033,sts_007,sts_049".into()).split(',').map(|s| s.to_string()).collect();
    list.retain(|c| names.iter().any(|n| c.name.starts_with(n.as_str())));
    let how = Steering { length_by_depth: env("LD", 2.0), most_length: env("ML", 0.25), beyond: env("BY", 1.0), reach_by_depth: env("RD", 3.0), reach_by_size: env("RS", 0.3), trust: env("MIX", 0.6) };
    let (mode, cumulative, radius) = (env("MODE", 2.0) as i32, env("CUM", 1.0) > 0.0, env("RADIUS", 0.0));
    let boxed = env("BOX", 1.0); let mix = env("MIX", 1.0); let one = env("ONE", 0.0);
    let clicks = env("CLICKS", 10.0) as usize;
    let (s, size) = (64usize, [64usize; 3]);
    let mut sums = vec![0.0; clicks + 1];
    let mut count = 0.0;
    let mut times = 0.0;
    for case in &list {
        let (image, label) = case.read(cases::TargetLabel::Any).unwrap();
        let Some(sample) = centred(model.config(), &case.name, &image, &label) else { continue };
        let features = model.encode(&Tensor::new([s; 3], sample.image.clone()), &mut Observer::none()).unwrap();
        
        let mut rng = generator(0, &[case.name.len() as u64]);
        let user = User { boxed: boxed as f64, ..User::of_points(1) };
        let bounds = user.bounds(&mut rng, &sample.label, size).map(|b| b.map(|v| v as f32));
        let mut before: Option<Vec<f32>> = None;
        let mut all: Vec<Click> = vec![];
        let mut line = vec![];
        for t in 0..=clicks {
            let errors = Errors::of(&sample.label, before.as_ref().map(|b| mask(b)).as_deref());
            let given: Vec<Click> = if t == 0 && bounds.is_some() { vec![] } else { click(&mut rng, &errors, size).into_iter().collect() };
            all.extend(&given);
            let start = std::time::Instant::now();
            let mut dense = before.clone().unwrap_or(vec![0.0; s * s * s]);
            let size_of = before.as_ref().map_or(20.0, |b| diameter(b));
            let wrong = before.as_ref().map_or(vec![], |b| disagreeing(b, size, &given));
            if mode > 0 && before.is_some() { correct(&mut dense, size, &all, size_of, &how); }
            let mut next = dense.clone();
            if mode != 1 || before.is_none() {
                let points = if cumulative { all.clone() } else { given.clone() };
                let mut marks = vec![];
                for (p, positive) in &all { let r = radius.ceil() as i32; for a in -r..=r { for b in -r..=r { for c in -r..=r {
                    let q = [p[0] + a, p[1] + b, p[2] + c];
                    if ((a * a + b * b + c * c) as f32) <= radius * radius && q.iter().all(|v| (0..64).contains(v)) { marks.push((q, *positive)); } } } } }
                let answer = model.interact(&features, &PatchPrompts { points, bounds }, &Tensor::new([1, s, s, s, 1], if mode == 0 { before.clone().unwrap_or(dense.clone()) } else { dense.clone() }), &prompt_maps(&device, s, &marks), &mut Observer::none()).unwrap();
                let proposal = answer.logits.value().data();
                if mode == 2 && before.is_some() {
                    let w = locality(before.as_ref().unwrap(), size, &wrong, size_of, &how);
                    next = dense.iter().zip(proposal).zip(&w).map(|((d, p), w)| { let n = d + w * (p - d); if one > 0.0 && !given.is_empty() { let positive = given[0].1; let soft = d + w * (1.0 - one) * mix * (p - d); if positive { n.max(*d).max(soft.min(n.max(*d))) } else { n.min(*d) } } else { n } }).collect();
                } else { next = proposal.to_vec(); }
                if mode > 1 { correct(&mut next, size, &all, size_of, &how); }
            }
            times += start.elapsed().as_secs_f64();
            let d = dice(&sample.label, &mask(&next));
            line.push(format!("{d:.3}"));
            sums[t] += d;
            before = Some(next);
        }
        count += 1.0;
        if env("V", 0.0) > 0.0 { println!("{:14} {}", case.name, line.join(" ")); }
    }
    println!("{:.4} | {} | {:.3} s a turn", sums[clicks] / count, sums.iter().map(|v| format!("{:.3}", v / count)).collect::<Vec<_>>().join(" "), times / count / (clicks + 1) as f64);
}
