//! Weights that do not come from a file: a function of a salt, and those that training starts from.

use super::Weights;
use crate::memory;
use crate::model::config::Config;
use crate::prompt::simulate::{generator, normal};
use crate::tensor::{Tensor, WEIGHTS, extent};
use rand::RngExt;
use std::collections::HashMap;

impl Weights {
    /// Weights that are a function of `salt` and their names ([`hashed`]), for tests and
    /// installations without a trained model. A network with them segments nothing meaningful.
    ///
    /// # Panics
    /// If memory for them is refused, this unwinds to [`memory::caught`]. The configuration must
    /// pass [`Config::check`].
    pub fn hashed(config: Config, salt: &str) -> Weights {
        within_budget(&config);
        let named = config.tensors().into_iter().map(|(name, shape)| {
            let values = hashed(salt, &name, &shape);
            (name, Tensor::new(shape, values))
        });
        let tensors = named.collect();
        Weights::of(config, tensors)
    }

    /// Weights to start training from: PyTorch's defaults for convolutions and dense layers
    /// (uniform within the inverse root of the fan-in), ones and zeros for norms, zeros for
    /// relative positions, normal numbers for embeddings and position codes. The same seed gives
    /// the same weights.
    ///
    /// # Panics
    /// If memory for them is refused, this unwinds to [`memory::caught`]. The configuration must
    /// pass [`Config::check`].
    pub fn initial(config: Config, seed: u64) -> Weights {
        within_budget(&config);
        let list = config.tensors();
        let shapes: HashMap<&str, &Vec<usize>> =
            list.iter().map(|(n, s)| (n.as_str(), s)).collect();
        let tensors = list.iter().enumerate().map(|(place, (name, shape))| {
            let values =
                initial(&mut generator(seed, &[0x69_6e_69_74, place as u64]), name, shape, &shapes);
            (name.clone(), Tensor::new(shape.clone(), values))
        });
        let tensors = tensors.collect();
        Weights::of(config, tensors)
    }
}

/// Unwinds to [`memory::caught`] if all weights of a network do not fit the memory that is left.
fn within_budget(config: &Config) {
    let all =
        config.tensors().iter().try_fold(0usize, |n, (_, shape)| n.checked_add(extent(shape)?));
    memory::check::<f32>(WEIGHTS, all.unwrap_or(usize::MAX)).unwrap_or_else(|e| memory::refuse(e));
}

/// The starting values of a tensor.
fn initial(
    rng: &mut impl rand::Rng,
    name: &str,
    shape: &[usize],
    shapes: &HashMap<&str, &Vec<usize>>,
) -> Vec<f32> {
    let count: usize = shape.iter().product();
    let scale = |shape: &[usize]| {
        // PyTorch takes the second axis for the inputs, of transposed convolutions too.
        1.0 / (shape[1..].iter().product::<usize>() as f32).sqrt()
    };
    let embedding = [
        "point_embeddings.",
        "not_a_point_embed",
        "no_mask_embed",
        "mask_tokens",
        "iou_token",
        "gaussian_matrix",
    ];
    if embedding.iter().any(|t| name.contains(t)) {
        return memory::collected(WEIGHTS, (0..count).map(|_| normal(rng)));
    }
    if name.contains("rel_pos_") {
        return memory::zeroed(WEIGHTS, count);
    }
    if name.ends_with("pos_embed") {
        return memory::collected(WEIGHTS, (0..count).map(|_| 0.02 * normal(rng)));
    }
    let bound = match name.strip_suffix(".bias").map(|at| format!("{at}.weight")) {
        Some(weight) => match shapes.get(weight.as_str()) {
            Some(shape) if shape.len() > 1 => scale(shape),
            _ => return memory::zeroed(WEIGHTS, count),
        },
        None if shape.len() == 1 => return memory::filled(WEIGHTS, 1.0, count),
        None => scale(shape),
    };
    memory::collected(WEIGHTS, (0..count).map(|_| rng.random_range(-bound..=bound)))
}

/// The values of a hashed tensor: FNV-1a of `salt/name` seeds a splitmix64 sequence of uniform
/// numbers in [-1, 1), scaled by the kind of tensor.
pub fn hashed(salt: &str, name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = format!("{salt}/{name}")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x0000_0100_0000_01b3));
    let token =
        ["point_embeddings.", "not_a_point_embed", "no_mask_embed", "mask_tokens", "iou_token"];
    let (offset, scale) = if name.ends_with("positional_encoding_gaussian_matrix") {
        (0.0, 1.0)
    } else if name.ends_with("pos_embed") {
        (0.0, 0.5)
    } else if name.contains("rel_pos_") {
        (0.0, 0.3)
    } else if token.iter().any(|t| name.contains(t)) {
        (0.0, 1.0)
    } else if name.ends_with(".bias") {
        (0.0, 0.2)
    } else if shape.len() == 1 {
        (1.0, 0.2)
    } else {
        let transposed = name.ends_with("deconv.weight") || name.ends_with("single_up.3.weight");
        let fan_in = if transposed { shape[0] } else { shape[1..].iter().product() };
        (0.0f32, ((3.0 / fan_in as f64).sqrt()) as f32)
    };
    let value = |i: usize| {
        let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let u = (z >> 40) as f32 * (-24f32).exp2();
        offset + scale * (2.0 * u - 1.0)
    };
    memory::collected(WEIGHTS, (0..shape.iter().product()).map(value))
}

#[cfg(test)]
mod tests {

    // Miri does not round square roots exactly.
    #[cfg_attr(miri, ignore)]
    #[test]
    fn hash_matches_its_published_values() {
        let v = super::hashed("public", "a.weight", &[3, 3]);
        // Scaled by sqrt(3 / 3) = 1: 0x1.e847d8p-1, -0x1.11781p-1, -0x1.421f4p-4.
        assert_eq!(
            v[..3].iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            [0x3f74_23ec, 0xbf08bc08, 0xbda10fa0]
        );
    }
}
