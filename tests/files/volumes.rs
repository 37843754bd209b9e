//! Geometry: whatever the affine, a voxel is mapped back to its place; odd files give the right
//! volume or a clear error.

use crate::common;

use common::{here, shared};
use prism::volume::intensity::Normalization;
use prism::volume::labels::Labels;
use prism::volume::patch::{Beyond, Extent, Patch};
use prism::volume::resample::{Interpolation, resample, respaced};
use prism::volume::{Affine, Grid, Orientation, Volume, Voxels};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::io::{Read, Write};

/// A random affine: axes permuted and flipped, spacings from 0.4 to 6 mm, rotated by up to 25
/// degrees about a random axis.
fn affine(rng: &mut StdRng) -> Affine {
    let mut axes = [0, 1, 2];
    axes.shuffle(rng);
    let angle = rng.random_range(-0.43..0.43f64);
    let mut n: [f64; 3] = std::array::from_fn(|_| rng.random_range(-1.0..1.0));
    let length = n.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-3);
    n.iter_mut().for_each(|v| *v /= length);
    let (s, c) = angle.sin_cos();
    let cross = [[0.0, -n[2], n[1]], [n[2], 0.0, -n[0]], [-n[1], n[0], 0.0]];
    let rotation = |r: usize, k: usize| {
        let along = if r == k { c } else { 0.0 };
        along + s * cross[r][k] + (1.0 - c) * n[r] * n[k]
    };
    let mut rows = [[0.0; 4]; 3];
    for (column, axis) in axes.into_iter().enumerate() {
        let step = rng.random_range(0.4..6.0) * if rng.random() { 1.0 } else { -1.0 };
        (0..3).for_each(|r| rows[r][column] = rotation(r, axis) * step);
    }
    rows.iter_mut().for_each(|r| r[3] = rng.random_range(-500.0..500.0));
    Affine(rows)
}

#[test]
fn a_marked_voxel_returns_to_where_it_was() {
    let mut rng = StdRng::seed_from_u64(42);
    for _ in 0..60 {
        let size = [rng.random_range(2..24), rng.random_range(2..24), rng.random_range(2..24)];
        let grid = Grid { size, affine: affine(&mut rng) };
        let voxel: [usize; 3] = std::array::from_fn(|a| rng.random_range(0..size[a]));
        let at = voxel.map(|v| v as f64);
        let extent = Extent { low: at.map(|v| v - 0.5), high: at.map(|v| v + 0.5) };
        // Fine enough that a patch voxel is smaller than any of the scan's.
        let patch = Patch::place(&grid, 32, 0.35, &extent);
        let p = patch.voxel(at).expect("a patch centred on the voxel holds it");
        assert!(p.iter().all(|v| (12..=20).contains(v)), "{p:?} is not near the middle");
        let s = patch.grid.size[0];
        let mut logits = vec![-1.0f32; s * s * s];
        // Everything within the marked voxel, as the patch sees it.
        for i in 0..s {
            for j in 0..s {
                for k in 0..s {
                    let back = patch.from_image.inverse().apply([i as f64, j as f64, k as f64]);
                    if (0..3).all(|a| (back[a] - at[a]).abs() <= 0.5) {
                        logits[(i * s + j) * s + k] = 1.0;
                    }
                }
            }
        }
        let mut marked = vec![];
        patch.paste(&logits, &grid, |at, v| {
            if v > 0.0 {
                marked.push([at / size[2] / size[1], at / size[2] % size[1], at % size[2]]);
            }
        });
        assert_eq!(marked, [voxel], "affine {:?}", grid.affine);
    }
}

#[test]
fn canonical_is_the_same_place_in_ras() {
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..200 {
        let grid = Grid { size: [5, 7, 9], affine: affine(&mut rng) };
        let canonical = grid.canonical();
        assert_eq!(Orientation::of(&canonical.affine).letters(), "RAS");
        assert_eq!(canonical.canonical(), canonical);
        assert!((canonical.voxel_ml() - grid.voxel_ml()).abs() < 1e-9);
        // Voxel centres coincide: each canonical index is a whole index of the original.
        let index = grid.affine.inverse().after(&canonical.affine);
        let p = index.apply([1.0, 2.0, 3.0]);
        assert!(p.iter().all(|v| (v - v.round()).abs() < 1e-6), "{p:?}");
        let fine = respaced(&canonical, 0.9);
        let centre = |g: &Grid| g.affine.apply(g.size.map(|s| (s as f64 - 1.0) / 2.0));
        assert!(centre(&fine).iter().zip(centre(&canonical)).all(|(a, b)| (a - b).abs() < 1e-9));
    }
}

#[test]
fn a_box_too_large_for_the_patch_is_seen_coarser() {
    let grid = Grid { size: [200, 100, 50], affine: Affine::from_spacing([1.0, 1.0, 2.0]) };
    let extent = Extent { low: [9.5, 9.5, 9.5], high: [149.5, 59.5, 29.5] };
    let patch = Patch::place(&grid, 64, 1.0, &extent);
    assert!(patch.coarsened && (patch.spacing - 140.0 / 62.0).abs() < 1e-9);
    let b = patch.bounds(&extent);
    assert!(b.iter().all(|v| (0.0..=64.0).contains(v)) && b[3] - b[0] >= 61.0, "{b:?}");
    let fits = Patch::place(&grid, 140, 1.0, &extent);
    assert!(
        !fits.coarsened
            && fits.spacing == 1.0
            && fits.bounds(&extent)[3] - fits.bounds(&extent)[0] == 140.0
    );
}

/// The expected result for a file: the sum of its values, or an error with these words.
enum Expect {
    Sum(f64),
    Refused(&'static str),
}
use Expect::{Refused, Sum};

#[test]
fn odd_files_give_the_right_volume_or_a_clear_error() {
    let base = -25_968_316.0;
    let cases = [
        ("m00_base.nii.gz", Sum(base)),
        ("m01_trunc_gz.nii.gz", Refused("truncated or corrupt gzip")),
        ("m02_trunc_voxels.nii", Refused("shorter than its header says")),
        ("m03_trunc_header.nii", Refused("shorter than a NIfTI header: 200 bytes")),
        ("m04_bad_crc.nii.gz", Refused("corrupt gzip")),
        ("m05_multi_member.nii.gz", Sum(base)),
        ("m06_bad_magic.nii", Refused("its magic is 'xyz'")),
        ("m07_dim_negative.nii", Refused("dim[1] is -64")),
        ("m09_dim_huge.nii", Refused("shorter than its header says")),
        ("m11_vox_offset_eof.nii", Refused("shorter than its header says")),
        ("m12_gzip_bomb.nii.gz", Sum(base)),
        ("m14_pixdim_bad.nii.gz", Sum(base)),
        ("m15_codes_zero.nii.gz", Sum(base)),
        ("m17_oblique.nii.gz", Sum(base)),
        ("m18_lefthanded_qform.nii.gz", Sum(base)),
        ("m20_scl_slope.nii.gz", Sum(-26_225_912.0)),
        ("m23_2d.nii.gz", Sum(-452_073.0)),
    ];
    for (name, expect) in cases {
        let result = Volume::read(&here("tests/data/odd").join(name), None);
        match (result, expect) {
            (Ok(v), Sum(sum)) => {
                let got: f64 = v.values().iter().map(|v| *v as f64).sum();
                assert!((got - sum).abs() <= 1e-6 * sum.abs(), "{name}: {got}");
                assert!(v.grid.affine.is_regular(), "{name}");
            }
            (Err(e), Refused(words)) => assert!(
                e.to_string().contains(words) && e.to_string().contains(name),
                "{name}: {e}"
            ),
            (Ok(_), Refused(_)) => panic!("{name} was read"),
            (Err(e), Sum(_)) => panic!("{e}"),
        }
    }
}

#[test]
fn odd_files_say_what_was_made_of_them() {
    let read = |name: &str| Volume::read(&here("tests/data/odd").join(name), None).unwrap();
    let nan = read("m13_nan_inf.nii.gz");
    assert!(
        nan.values().iter().all(|v| v.is_finite())
            && nan.warnings[0].starts_with("4 voxels are not finite")
    );
    let slope = read("m21_scl_slope_zero.nii.gz");
    assert!(slope.warnings[0].contains("scl_slope is 0"));
    assert!(read("m12_gzip_bomb.nii.gz").warnings[0].contains("follow the voxels"));
    assert_eq!(read("m14_pixdim_bad.nii.gz").warnings.len(), 3);
    let zero = read("m15_codes_zero.nii.gz");
    assert_eq!(
        (zero.description.affine_from, zero.grid.affine.0.map(|r| r[3])),
        ("pixdim", [0.0; 3])
    );
    assert!(read("m18_lefthanded_qform.nii.gz").grid.affine.determinant() < 0.0);
    let s = read("m17_oblique.nii.gz").grid.spacing();
    assert!((s[0] - 0.627).abs() < 1e-3 && (s[2] - 5.0).abs() < 1e-3, "{s:?}");
    let base = read("m00_base.nii.gz").grid;
    let labels = Labels::read(&here("tests/data/odd/m25_label_float.nii.gz"), &base).unwrap();
    assert_eq!(labels.counts()[&1], 14_636);
    let e = Labels::read(&here("tests/data/odd/m26_label_shifted.nii.gz"), &base)
        .err()
        .unwrap()
        .to_string();
    assert!(e.contains("its size is [63, 48, 24], the image's is [64, 48, 24]"), "{e}");
}

#[test]
fn shared_odd_files_behave() {
    let Some(folder) = shared("data/odd") else { return };
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let mut seen = 0;
    for (name, case) in expected.as_object().unwrap() {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        seen += 1;
        let volumes = case["nibabel"]["shape"]
            .as_array()
            .map_or(1, |s| s.iter().skip(3).map(|v| v.as_u64().unwrap()).product());
        let result = Volume::read(&path, None);
        match case["expect"].as_str().unwrap() {
            // A shifted label is a valid file by itself: it is refused together with its image, in
            // the test above.
            "error" if name.starts_with("m26") => assert!(result.is_ok()),
            "error" => assert!(result.is_err(), "{name} was read"),
            _ if volumes > 1 => {
                let e = result.unwrap_err().to_string();
                assert!(e.contains(&format!("{volumes} volumes")), "{e}");
                let all = (0..volumes as usize).map(|v| Volume::read(&path, Some(v)).unwrap());
                let sum: f64 = all.map(|v| v.values().iter().map(|v| *v as f64).sum::<f64>()).sum();
                assert_eq!(sum, case["nibabel"]["sum"].as_f64().unwrap(), "{name}");
                assert!(Volume::read(&path, Some(volumes as usize)).is_err());
            }
            "ok" => {
                let v = result.unwrap();
                let (sum, want) = (
                    v.values().iter().map(|v| *v as f64).sum::<f64>(),
                    case["nibabel"]["sum"].as_f64().unwrap(),
                );
                assert!((sum - want).abs() <= 1e-5 * want.abs(), "{name}: {sum} not {want}");
                if !name.starts_with("m15") {
                    let row =
                        |r: usize, c: usize| case["nibabel"]["affine"][r][c].as_f64().unwrap();
                    let want = Affine(std::array::from_fn(|r| std::array::from_fn(|c| row(r, c))));
                    assert!(v.grid.affine.distance(&want, v.grid.size) < 1e-2, "{name}");
                }
            }
            _ => assert!(result.is_ok(), "{name}: {}", result.unwrap_err()),
        }
    }
    assert!(seen >= 25, "only {seen} files");
}

#[test]
fn shared_orientations_are_one_anatomy() {
    let Some(folder) = shared("data/orient") else { return };
    let mut first: Option<(Grid, Vec<f32>)> = None;
    let mut names = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let volume = Volume::read(&path, None).unwrap();
        let letters = Orientation::of(&volume.grid.affine).letters();
        assert_eq!(
            letters,
            path.file_name().unwrap().to_str().unwrap()[..3],
            "axes of {}",
            path.display()
        );
        let grid = volume.grid.canonical();
        assert_eq!(grid.size, [64, 79, 67]);
        let data =
            resample(&volume.values(), &volume.grid, &grid, Interpolation::Nearest, f32::NAN);
        match &first {
            Some((g, d)) => assert!(
                g.affine.distance(&grid.affine, grid.size) < 1e-3 && *d == data,
                "{}",
                path.display()
            ),
            None => first = Some((grid, data)),
        }
        names += 1;
    }
    assert_eq!(names, 16);
}

/// Writes an NRRD file and reads it back.
#[test]
fn nrrd_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<i16> = (0..24).map(|v| v * 3 - 20).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_be_bytes()).collect();
    let header = "NRRD0004\n# made for a test\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 3 2\n\
                  space directions: (2,0,0) (0,2,0) (0,0,5)\nkinds: domain domain domain\nendian: big\nencoding: raw\nspace origin: (10,20,30)\n\n";
    let path = folder.path().join("a.nrrd");
    std::fs::write(&path, [header.as_bytes(), &bytes].concat()).unwrap();
    let v = Volume::read(&path, None).unwrap();
    assert_eq!(v.grid.size, [4, 3, 2]);
    assert_eq!(
        v.grid.affine,
        Affine([[-2.0, 0.0, 0.0, -10.0], [0.0, -2.0, 0.0, -20.0], [0.0, 0.0, 5.0, 30.0]])
    );
    assert_eq!(
        (v.at([0, 0, 0]), v.at([3, 0, 0]), v.at([0, 1, 0]), v.at([1, 2, 1])),
        (-20.0, -11.0, -8.0, 43.0)
    );
    // Too few voxels, gzip, an unknown type.
    std::fs::write(&path, [header.as_bytes(), &bytes[..40]].concat()).unwrap();
    assert!(Volume::read(&path, None).unwrap_err().to_string().contains("40 of 48 bytes"));
    let mut gz = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    std::io::Write::write_all(&mut gz, &bytes).unwrap();
    let gz = gz.finish().unwrap();
    std::fs::write(&path, [header.replace("raw", "gzip").as_bytes(), &gz].concat()).unwrap();
    assert_eq!(Volume::read(&path, None).unwrap().values(), v.values());
    std::fs::write(&path, header.replace("short", "block")).unwrap();
    assert!(Volume::read(&path, None).unwrap_err().to_string().contains("type is 'block'"));
}

/// Voxels of scans that are watched while they are being read: more than a piece of every type.
const WATCHED: [usize; 3] = [96, 80, 160];

/// A NIfTI file of such a scan, in the place of the example but with thinner slices, `turned` with
/// i towards the head: its type's code, the factor of its values, the voxels with the lowest byte
/// first; the file has the highest first if it is `big`.
fn nifti(code: i16, slope: f32, [turned, big]: [bool; 2], voxels: &[u8]) -> Vec<u8> {
    let example = std::fs::File::open(here("examples/data/lung1_image.nii.gz")).unwrap();
    let mut bytes = vec![0; 352];
    flate2::read::MultiGzDecoder::new(example).read_exact(&mut bytes).unwrap();
    let mut put = |at: usize, number: &[u8]| bytes[at..][..number.len()].copy_from_slice(number);
    (0..3).for_each(|a| put(42 + 2 * a, &(WATCHED[a] as i16).to_le_bytes()));
    put(70, &code.to_le_bytes());
    put(112, &slope.to_le_bytes());
    [88, 320].into_iter().for_each(|at| put(at, &1.5f32.to_le_bytes()));
    if turned {
        (280..296).for_each(|at| bytes.swap(at, at + 32));
    }
    bytes.extend(voxels);
    let width = voxels.len() / WATCHED.iter().product::<usize>();
    let fields = [(0, 4, 1), (40, 2, 8), (70, 2, 2), (76, 4, 11), (252, 2, 2), (280, 4, 12)];
    for (at, width, count) in fields.into_iter().chain([(352, width, voxels.len() / width)]) {
        let field = bytes[at..][..width * count].chunks_exact_mut(width);
        field.filter(|_| big).for_each(<[u8]>::reverse);
    }
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// The values of a scan whose voxels are whole numbers: scattered.
fn scattered() -> impl Iterator<Item = i16> {
    (0..WATCHED.iter().product::<usize>()).map(|at| (at * 7919 % 4001) as i16 - 2000)
}

/// Boxes in the middle and at the borders of such a scan; the last one needs the last slice.
const PLACES: [[usize; 6]; 5] = [
    [0, 0, 0, 9, 8, 5],
    [88, 70, 20, 96, 80, 40],
    [30, 30, 40, 50, 44, 60],
    [40, 10, 100, 60, 30, 120],
    [10, 10, 150, 40, 40, 160],
];

/// The patch at such a box.
fn patch_at(bounds: [usize; 6], grid: &Grid) -> Patch {
    Patch::place(grid, 24, 0.9, &Extent::of_box(bounds))
}

/// The bits of a patch.
fn cut(patch: &Patch, image: &impl Voxels) -> Vec<u32> {
    let normalization = Normalization { clip: [-900.0, 1200.0], mean: 10.0, sd: 300.0 };
    patch.extract(image, &normalization, Beyond::Edge).iter().map(|v| v.to_bits()).collect()
}

#[test]
fn patches_are_the_same_where_the_scan_is_still_read() {
    let folder = tempfile::tempdir().unwrap();
    let whole: Vec<u8> = scattered().flat_map(i16::to_le_bytes).collect();
    let small: Vec<u8> = scattered().map(|v| v as u8).collect();
    let floats: Vec<u8> = scattered().flat_map(|v| (f32::from(v) + 0.3).to_le_bytes()).collect();
    for turned in [false, true] {
        let files = [
            (true, nifti(4, 1.0, [turned, false], &whole)),
            (true, nifti(4, 1.0, [turned, true], &whole)),
            (false, nifti(4, 0.37, [turned, false], &whole)),
            (true, nifti(2, 1.0, [turned, false], &small)),
            (false, nifti(16, 1.0, [turned, true], &floats)),
        ];
        for (at, (is_whole, file)) in files.iter().enumerate() {
            for (name, bytes) in [("a.nii", file.clone()), ("a.nii.gz", gzip(file))] {
                let path = folder.path().join(name);
                std::fs::write(&path, bytes).unwrap();
                let mut early = [const { None }; PLACES.len()];
                let watched = Volume::read_watched(&path, None, None, &mut |begun| {
                    for (bounds, early) in PLACES.into_iter().zip(&mut early) {
                        let patch = patch_at(bounds, begun.grid());
                        let block = patch.needed(begun.grid());
                        let part = begun.part(&block);
                        assert_eq!(part.is_some(), begun.holds(&block));
                        if let (Some(part), true) = (part, early.is_none()) {
                            *early = Some(cut(&patch, &part));
                        }
                    }
                });
                let (scan, watched) = (Volume::read(&path, None).unwrap(), watched.unwrap());
                assert!(watched.values() == scan.values() && watched.warnings == scan.warnings);
                assert_eq!((scan.is_whole(), watched.is_whole()), (*is_whole, *is_whole));
                for (bounds, early) in PLACES.into_iter().zip(&early) {
                    let expected = cut(&patch_at(bounds, &scan.grid), &scan);
                    let same = early.as_ref().is_none_or(|early| *early == expected);
                    assert!(same, "{name}, file {at}, box {bounds:?}, {turned}");
                }
                let there = early.map(|early| early.is_some());
                assert_eq!(there, [true, true, true, true, false], "{name}, file {at}");
            }
        }
    }
}

#[test]
fn what_is_wrong_with_the_rest_of_a_scan_is_said_whatever_was_seen_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.nii.gz");
    let mut floats: Vec<u8> = scattered().flat_map(|v| f32::from(v).to_le_bytes()).collect();
    // Voxel [40, 37, 50] is NaN: as what it is read depends on the whole scan.
    let odd = ((50 * WATCHED[1] + 37) * WATCHED[0] + 40) * 4;
    floats[odd..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let file = gzip(&nifti(16, 1.0, [false; 2], &floats));
    let see = |file: &[u8]| {
        std::fs::write(&path, file).unwrap();
        let mut given = [false; 2];
        let read = Volume::read_watched(&path, None, None, &mut |begun| {
            for (bounds, given) in PLACES[1..3].iter().zip(&mut given) {
                let block = patch_at(*bounds, begun.grid()).needed(begun.grid());
                *given |= begun.part(&block).is_some();
            }
        });
        assert_eq!(given, [true, false]);
        let plainly = Volume::read(&path, None).map_err(|e| e.to_string());
        (read.map_err(|e| e.to_string()), plainly)
    };
    let (watched, plainly) = see(&file);
    assert!(watched.unwrap().values() == plainly.unwrap().values());
    let (cut_off, mut bad_sum) = (&file[..file.len() - 1000], file.clone());
    let sum = file.len() - 8;
    bad_sum[sum] ^= 1;
    for damaged in [cut_off, &bad_sum[..]] {
        let (watched, plainly) = see(damaged);
        let (watched, plainly) = (watched.unwrap_err(), plainly.unwrap_err());
        assert!(watched.contains("truncated or corrupt gzip"), "{watched}");
        assert_eq!(watched, plainly);
    }
}
