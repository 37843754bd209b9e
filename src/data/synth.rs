//! Synthetic scans with tumours: CT-, MR- and PET-like volumes from a seed, with labels.
//!
//! A scene is a stack of soft shapes (body, organs, vessels, bones, cavities, the tumour), each an
//! ellipsoid or a tube whose surface a smooth random field perturbs. It is drawn on a fine cubic
//! grid and averaged to thick slices, so that borders have partial volume; then texture, the blur
//! of a scanner, noise, and for MR a bias field are added. Intensities of a CT are Hounsfield
//! units. Nothing of it is anatomically accurate: it teaches what a lesion's border looks like.

use super::noise::{blur, field};
use crate::prompt::simulate::{generator, normal};
use crate::volume::{Affine, Description, Grid, Modality, Volume};
use rand::{Rng, RngExt};

/// A synthetic scan.
pub struct Synthetic {
    /// What it imitates: Hounsfield units; arbitrary units with a bias field; standardised uptake,
    /// dark and blurred, lesions up to eight times as bright as what surrounds them.
    pub modality: Modality,
    /// The scan.
    pub image: Volume,
    /// 1 in the tumour, on the scan's grid.
    pub label: Vec<u8>,
}

/// Edge of the cubic grid that scenes are drawn on.
const FINE: usize = 84;

/// An ellipsoid with its own axes.
struct Ellipsoid {
    centre: [f32; 3],
    /// World to unit ball.
    rows: [[f32; 3]; 3],
    radius: f32,
    reach: f32,
}

impl Ellipsoid {
    fn new(rng: &mut impl Rng, centre: [f32; 3], radii: [f32; 3]) -> Ellipsoid {
        // A random rotation from a random quaternion.
        let q: [f32; 4] = std::array::from_fn(|_| normal(rng));
        let n = q.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-6);
        let [w, x, y, z] = q.map(|v| v / n);
        let rotation = [
            [1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y)],
            [2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x)],
            [2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y)],
        ];
        let rows = std::array::from_fn(|r| rotation[r].map(|v| v / radii[r]));
        let radius = (radii[0] * radii[1] * radii[2]).cbrt();
        Ellipsoid { centre, rows, radius, reach: radii.into_iter().fold(0.0, f32::max) }
    }

    /// The approximate distance from the surface in voxels; negative inside.
    fn distance(&self, p: [f32; 3]) -> f32 {
        let d = [p[0] - self.centre[0], p[1] - self.centre[1], p[2] - self.centre[2]];
        let u = self.rows.map(|r| r[0] * d[0] + r[1] * d[1] + r[2] * d[2]);
        ((u[0] * u[0] + u[1] * u[1] + u[2] * u[2]).sqrt() - 1.0) * self.radius
    }

    /// Voxels that may be within `margin` of it.
    fn range(&self, axis: usize, margin: f32) -> std::ops::Range<usize> {
        let reach = self.reach + margin;
        let low = (self.centre[axis] - reach).floor().clamp(0.0, FINE as f32) as usize;
        let high = (self.centre[axis] + reach).ceil().clamp(0.0, FINE as f32 - 1.0) as usize + 1;
        low..high.max(low)
    }
}

/// A scene on the fine grid.
struct Scene {
    values: Vec<f32>,
    /// Amplitude of the texture at each voxel.
    texture: Vec<f32>,
    /// Fields that perturb surfaces: coarse and fine.
    fields: [Vec<f32>; 2],
}

impl Scene {
    /// Calls `f(voxel, occupancy)` where a perturbed ellipsoid covers a voxel at least partly.
    /// `rough` is the perturbation in parts of the radius, `soft` half the width of the border in
    /// voxels.
    fn cover(&self, e: &Ellipsoid, rough: [f32; 2], soft: f32, mut f: impl FnMut(usize, f32)) {
        let margin = soft + e.radius * (rough[0] + rough[1]) * 2.5;
        for i in e.range(0, margin) {
            for j in e.range(1, margin) {
                for k in e.range(2, margin) {
                    let at = (i * FINE + j) * FINE + k;
                    let bump =
                        e.radius * (rough[0] * self.fields[0][at] + rough[1] * self.fields[1][at]);
                    let d = e.distance([i as f32, j as f32, k as f32]) + bump;
                    if d < soft {
                        let part = ((soft - d) / (2.0 * soft)).min(1.0);
                        f(at, part * part * (3.0 - 2.0 * part));
                    }
                }
            }
        }
    }

    /// Paints a shape with an intensity and a texture.
    fn paint(&mut self, e: &Ellipsoid, rough: [f32; 2], soft: f32, value: f32, texture: f32) {
        let mut covered = vec![];
        self.cover(e, rough, soft, |at, part| covered.push((at, part)));
        for (at, part) in covered {
            self.values[at] += part * (value - self.values[at]);
            self.texture[at] += part * (texture - self.texture[at]);
        }
    }

    /// A bent tube through the scene.
    fn vessel(&mut self, rng: &mut impl Rng, value: f32, radius: f32) {
        let from = std::array::from_fn(|_| rng.random_range(0.0..FINE as f32));
        self.vessel_from(rng, from, value, radius);
    }

    /// A bent tube that begins at a given place.
    fn vessel_from(&mut self, rng: &mut impl Rng, from: [f32; 3], value: f32, radius: f32) {
        let edge = FINE as f32;
        let mut p = from;
        let mut direction: [f32; 3] = std::array::from_fn(|_| normal(rng));
        for _ in 0..(2.0 * edge / radius) as usize {
            let e = Ellipsoid::new(rng, p, [radius; 3]);
            self.paint(&e, [0.0, 0.0], 0.8, value, 2.0);
            let length = direction.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-6);
            for a in 0..3 {
                direction[a] = direction[a] / length + 0.25 * normal(rng);
                p[a] += direction[a] * radius * 0.7;
            }
            if p.iter().any(|v| *v < -radius || *v > edge + radius) {
                break;
            }
        }
    }
}

/// Makes scan number `index` of the series `seed`: the same numbers give the same scan.
pub fn generate(seed: u64, index: u64) -> Synthetic {
    let mut rng = generator(seed, &[0x73_79_6e_74_68, index]);
    let modality = match rng.random_range(0..20) {
        0..11 => Modality::Ct,
        11..16 => Modality::Mr,
        _ => Modality::Pet,
    };
    generate_as(&mut rng, modality)
}

/// Makes a scan of a given modality from a generator's numbers.
pub fn generate_as(rng: &mut impl Rng, modality: Modality) -> Synthetic {
    let edge = FINE as f32;
    let ct = modality == Modality::Ct;
    let size = [FINE; 3];
    let fields = [field(rng, size, [5; 3]), field(rng, size, [14; 3])];
    let around = |rng: &mut _, value: f32, by: f32| value + by * normal(rng);
    // The background: fat, muscle, or an organ that fills the view.
    let (ground, ground_texture) = match (ct, rng.random_range(0..4)) {
        (true, 0) => (around(rng, -100.0, 10.0), 8.0),
        (true, 1) => (around(rng, -850.0, 40.0), 30.0),
        (true, _) => (around(rng, 50.0, 20.0), 6.0),
        (false, _) => (rng.random_range(150.0..700.0), rng.random_range(5.0..40.0)),
    };
    let pet = modality == Modality::Pet;
    let mut scene = Scene {
        values: vec![ground; FINE.pow(3)],
        texture: vec![ground_texture; FINE.pow(3)],
        fields,
    };

    // The tumour's size relative to the view, and its place.
    let radius = edge * rng.random_range(0.11..0.24);
    let flat: [f32; 3] = std::array::from_fn(|_| rng.random_range(0.65..1.35));
    let centre: [f32; 3] =
        std::array::from_fn(|_| edge / 2.0 + rng.random_range(-0.12..0.12) * edge);

    // Organs, bones and cavities around it.
    for _ in 0..rng.random_range(4..11) {
        let place: [f32; 3] = std::array::from_fn(|_| rng.random_range(-0.1..1.1) * edge);
        let size = edge * rng.random_range(0.08..0.4);
        let radii: [f32; 3] = std::array::from_fn(|_| size * rng.random_range(0.5..1.6));
        let e = Ellipsoid::new(rng, place, radii);
        let (value, texture) = match (ct, rng.random_range(0..10)) {
            (true, 0) => (around(rng, -950.0, 30.0), 10.0),
            (true, 1) => (around(rng, -800.0, 60.0), 40.0),
            (true, 2 | 3) => (around(rng, -100.0, 10.0), 8.0),
            (true, 4) => (rng.random_range(200.0..1100.0), 60.0),
            (true, 5) => (around(rng, 10.0, 8.0), 3.0),
            (true, _) => (rng.random_range(20.0..170.0), 7.0),
            (false, _) => (rng.random_range(20.0..1200.0), rng.random_range(3.0..50.0)),
        };
        let (rough, soft) = (
            [rng.random_range(0.0..0.18), rng.random_range(0.0..0.06)],
            rng.random_range(0.6..1.6),
        );
        scene.paint(&e, rough, soft, value, texture);
    }
    // Often the tumour grows in a host organ.
    if rng.random_bool(0.6) {
        let shift = radius * 0.6;
        let place: [f32; 3] = std::array::from_fn(|a| centre[a] + shift * normal(rng));
        let radii: [f32; 3] = std::array::from_fn(|_| radius * rng.random_range(1.2..3.5));
        let e = Ellipsoid::new(rng, place, radii);
        let (value, texture) = match (ct, rng.random_range(0..4)) {
            (true, 0) => (around(rng, -830.0, 50.0), 35.0),
            (true, 1) => (around(rng, -100.0, 10.0), 8.0),
            (true, _) => (rng.random_range(20.0..150.0), 7.0),
            (false, _) => (rng.random_range(100.0..900.0), rng.random_range(5.0..40.0)),
        };
        scene.paint(&e, [rng.random_range(0.0..0.15), 0.03], 1.0, value, texture);
    }
    for _ in 0..rng.random_range(0..5) {
        let value = if ct { rng.random_range(30.0..260.0) } else { rng.random_range(10.0..1300.0) };
        let thick = rng.random_range(1.0..3.5);
        scene.vessel(rng, value, thick);
    }

    let occupancy = tumour(rng, &mut scene, modality, centre, radius, flat);
    // A vessel that runs past the tumour or through it; the part inside belongs to it.
    if !pet && rng.random_bool(0.2) {
        let value = if ct { rng.random_range(30.0..260.0) } else { rng.random_range(10.0..1300.0) };
        let thick = rng.random_range(0.8..2.0);
        scene.vessel_from(rng, centre, value, thick);
    }
    finish(rng, scene, occupancy, modality, radius)
}

/// Paints the tumour and returns how much of each fine voxel it fills.
fn tumour(
    rng: &mut impl Rng,
    scene: &mut Scene,
    modality: Modality,
    centre: [f32; 3],
    radius: f32,
    flat: [f32; 3],
) -> Vec<f32> {
    let ct = modality == Modality::Ct;
    let lobes = [1, 1, 2, 3, 4][rng.random_range(0..5)];
    // Some lesions have several parts.
    let spread = if rng.random_bool(0.2) { rng.random_range(1.2..2.0) } else { 0.7 };
    let rough = [rng.random_range(0.02..0.22), rng.random_range(0.0..0.10)];
    // A border between sharp and a third of the radius wide.
    let soft = if rng.random_bool(0.6) {
        rng.random_range(0.6..1.5)
    } else {
        rng.random_range(1.0..(0.3 * radius).max(1.2))
    };
    let mut occupancy = vec![0.0f32; scene.values.len()];
    for lobe in 0..lobes {
        let scale = if lobe == 0 { 1.0 } else { rng.random_range(0.45..0.85) };
        let place: [f32; 3] = std::array::from_fn(|a| {
            centre[a] + if lobe == 0 { 0.0 } else { radius * spread * normal(rng).clamp(-1.2, 1.2) }
        });
        let radii: [f32; 3] = std::array::from_fn(|a| radius * scale * flat[a]);
        let e = Ellipsoid::new(rng, place, radii);
        scene.cover(&e, rough, soft, |at, part| occupancy[at] = occupancy[at].max(part));
    }
    // Its contrast is relative to the tissue that it replaces.
    let (mut sum, mut count) = (0.0f64, 0.0f64);
    for (v, o) in scene.values.iter().zip(&occupancy) {
        if *o > 0.0 && *o < 0.5 {
            (sum, count) = (sum + *v as f64, count + 1.0);
        }
    }
    let around = if count > 0.0 { (sum / count) as f32 } else { scene.values[0] };
    let value = if ct {
        match around {
            v if v < -60.0 => rng.random_range(-10.0..80.0),
            v => {
                let contrast = rng.random_range(12.0..90.0f32);
                v + if rng.random_bool(0.55) { -contrast } else { contrast }
            }
        }
    } else if modality == Modality::Pet {
        around * rng.random_range(1.5f32.ln()..8.0f32.ln()).exp()
    } else {
        let contrast = rng.random_range(0.12..0.9f32);
        around * if rng.random_bool(0.65) { 1.0 + contrast } else { 1.0 / (1.0 + contrast) }
    };
    let step = if ct { 40.0 } else { 0.3 * value.abs() + 10.0 };
    let core = rng
        .random_bool(0.4)
        .then(|| (rng.random_range(0.3..0.8f32), value - step * rng.random_range(0.2..1.5f32)));
    let rim = rng.random_bool(0.3).then(|| value + step * rng.random_range(0.3..1.6f32));
    let uneven = step * rng.random_range(0.0..0.35f32);
    let texture =
        if ct { rng.random_range(3.0..12.0) } else { rng.random_range(0.02..0.1) * value.abs() };
    let inner = core.map(|(size, v)| {
        let place: [f32; 3] = std::array::from_fn(|a| centre[a] + 0.2 * radius * normal(rng));
        (Ellipsoid::new(rng, place, [radius * size; 3]), v)
    });
    for (at, &o) in occupancy.iter().enumerate().filter(|(_, o)| **o > 0.0) {
        let mut v = value + uneven * scene.fields[1][at];
        let p = [at / (FINE * FINE), at / FINE % FINE, at % FINE].map(|v| v as f32);
        if let Some((e, low)) = &inner {
            let d = e.distance(p) + radius * 0.2 * scene.fields[0][at];
            v += (low - v) * ((1.5 - d) / 3.0).clamp(0.0, 1.0);
        }
        if let Some(rim) = rim
            && o < 0.98
        {
            v = rim;
        }
        scene.values[at] += o * (v - scene.values[at]);
        scene.texture[at] += o * (texture - scene.texture[at]);
    }
    if rng.random_bool(0.12) {
        let place: [f32; 3] = std::array::from_fn(|a| centre[a] + 0.4 * radius * normal(rng));
        let e = Ellipsoid::new(rng, place, [radius * 0.15 + 0.5; 3]);
        let bright = if ct { 500.0 } else { 5.0 };
        scene.paint(&e, [0.2, 0.1], 0.8, bright, 10.0);
    }
    occupancy
}

/// Texture, slices, blur, noise and bias; and the label.
fn finish(
    rng: &mut impl Rng,
    mut scene: Scene,
    mut occupancy: Vec<f32>,
    modality: Modality,
    radius: f32,
) -> Synthetic {
    let grain = field(rng, [FINE; 3], [FINE / 3; 3]);
    for ((v, t), g) in scene.values.iter_mut().zip(&scene.texture).zip(&grain) {
        *v += t * g;
    }
    let slices = [1, 1, 2, 3, 4, 6][rng.random_range(0..6)];
    let nk = FINE / slices;
    let mut values = average(&scene.values, slices, nk);
    occupancy = average(&occupancy, slices, nk);
    let size = [FINE, FINE, nk];
    let (w, wk) =
        (rng.random_range(0.0..0.3), if slices > 1 { 0.0 } else { rng.random_range(0.0..0.25) });
    blur(&mut values, size, [w, w, wk]);
    let (ct, pet) = (modality == Modality::Ct, modality == Modality::Pet);
    for _ in 0..if pet { rng.random_range(1..5) } else { 0 } {
        blur(&mut values, size, [0.25, 0.25, if slices > 1 { 0.1 } else { 0.25 }]);
    }

    let level = if ct { rng.random_range(4.0..28.0) } else { rng.random_range(3.0..45.0) };
    let mut noise: Vec<f32> = (0..values.len()).map(|_| normal(rng)).collect();
    if rng.random_bool(0.7) {
        blur(&mut noise, size, [0.25, 0.25, 0.0]);
    }
    let bias = (modality == Modality::Mr).then(|| field(rng, size, [2, 2, 2]));
    for (at, v) in values.iter_mut().enumerate() {
        *v += level * noise[at];
        if let Some(bias) = &bias {
            *v *= (0.18 * bias[at]).exp();
        }
        *v = match modality {
            Modality::Ct => v.round().clamp(-1024.0, 3071.0),
            Modality::Mr => v.round().max(0.0),
            // Uptakes from a few hundredths to about thirty.
            Modality::Pet => v.max(0.0) / 200.0,
        };
    }
    // In millimetres, a radius between that of a small nodule and that of a large sarcoma.
    let millimetres = (rng.random_range(4.0f64.ln()..45.0f64.ln())).exp();
    let step = millimetres / radius as f64;
    let mut affine = Affine::from_spacing([step, step, step * slices as f64]);
    // Half of the scans run from right to left and front to back, as scanners store them.
    if rng.random_bool(0.5) {
        for axis in 0..2 {
            affine.0[axis][axis] = -step;
            affine.0[axis][3] = step * (FINE as f64 - 1.0);
        }
    }
    let grid = Grid { size, affine };
    let description =
        Description::of_new(&grid, if pet { "float32" } else { "int16" }).made_by(Some(modality));
    let label = occupancy.iter().map(|o| u8::from(*o >= 0.5)).collect();
    let image = Volume::new(grid, values, description).expect("synthetic values are numbers");
    Synthetic { modality, image, label }
}

/// Means over runs of `slices` along k.
fn average(values: &[f32], slices: usize, nk: usize) -> Vec<f32> {
    let mean = |run: &[f32]| run.iter().sum::<f32>() / slices as f32;
    values.chunks_exact(FINE).flat_map(|row| row.chunks_exact(slices).take(nk).map(mean)).collect()
}
