//! Training losses and the boundary map (forward).
//!
//! Sums run in float64, in a fixed order. Logits and labels are `[n, 1, d, h, w]` or `[n, d, h, w, 1]` alike: one value a voxel.

use crate::tensor::{OpError, Tensor};

fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + (-x as f64).exp())
}

fn pairs<'a>(op: &'static str, logits: &'a Tensor, label: &'a Tensor) -> Result<(usize, &'a [f32], &'a [f32]), OpError> {
    label.expect(op, "label", logits.shape())?;
    if logits.is_empty() {
        return Err(logits.misfit(op, "logits", "no empty axis"));
    }
    Ok((logits.shape()[0], logits.data(), label.data()))
}

/// `1 - (2 Σ p g + s) / (Σ p + Σ g + s)` with `p = sigmoid(logits)`, per item, averaged; denominators squared where asked.
pub fn dice(logits: &Tensor, label: &Tensor, squared: bool, smooth: f64) -> Result<f64, OpError> {
    let (n, x, g) = pairs("dice_loss", logits, label)?;
    let voxels = x.len() / n;
    let item = |(x, g): (&[f32], &[f32])| {
        let (mut both, mut total) = (0.0, 0.0);
        for (x, g) in x.iter().zip(g) {
            let (p, g) = (sigmoid(*x), *g as f64);
            both += p * g;
            total += if squared { p * p + g * g } else { p + g };
        }
        1.0 - (2.0 * both + smooth) / (total + smooth)
    };
    Ok(x.chunks_exact(voxels).zip(g.chunks_exact(voxels)).map(item).sum::<f64>() / n as f64)
}

/// Binary cross entropy of logits, mean over voxels.
pub fn binary_cross_entropy(logits: &Tensor, label: &Tensor) -> Result<f64, OpError> {
    let (_, x, g) = pairs("bce_loss", logits, label)?;
    let term = |(x, g): (&f32, &f32)| {
        let (x, g) = (*x as f64, *g as f64);
        x.max(0.0) - x * g + (-x.abs()).exp().ln_1p()
    };
    Ok(x.iter().zip(g).map(term).sum::<f64>() / x.len() as f64)
}

/// Dice loss plus binary cross entropy.
pub fn dice_ce(logits: &Tensor, label: &Tensor, squared: bool, smooth: f64) -> Result<f64, OpError> {
    Ok(dice(logits, label, squared, smooth)? + binary_cross_entropy(logits, label)?)
}

/// `|m - avgpool(m)|` of each channel map of `m` `[n, c, d, h, w]`: odd kernel, stride 1, zero padding counted in the mean.
pub fn boundary_map(m: &Tensor, kernel: [usize; 3]) -> Result<Tensor, OpError> {
    let [n, c, d, h, w] = m.map5("boundary_map", "m")?;
    if kernel.iter().any(|k| k % 2 == 0) {
        let message = format!("kernel {kernel:?} must be odd along each axis");
        return Err(OpError::Argument { op: "boundary_map", message });
    }
    let values: Vec<f64> = m.data().iter().map(|v| *v as f64).collect();
    let out = boundary(&values, n * c, [d, h, w], kernel);
    Ok(Tensor::new(m.shape(), out.into_iter().map(|v| v as f32).collect()))
}

fn boundary(values: &[f64], maps: usize, size: [usize; 3], kernel: [usize; 3]) -> Vec<f64> {
    // The window is a product of intervals, so three running sums give the mean.
    let mut pooled = values.to_vec();
    let strides = [size[1] * size[2], size[2], 1];
    for axis in 0..3 {
        let (edge, stride, reach) = (size[axis], strides[axis], kernel[axis] / 2);
        let mut line = vec![0.0; edge];
        for start in (0..maps * size.iter().product::<usize>()).filter(|v| v / stride % edge == 0) {
            (0..edge).for_each(|i| line[i] = pooled[start + i * stride]);
            for i in 0..edge {
                pooled[start + i * stride] = line[i.saturating_sub(reach)..(i + reach + 1).min(edge)].iter().sum();
            }
        }
    }
    let count = kernel.iter().product::<usize>() as f64;
    values.iter().zip(pooled).map(|(v, p)| (v - p / count).abs()).collect()
}

/// Mean squared difference of the boundary maps of `sigmoid(logits)` and of the label, both `[n, 1, d, h, w]`.
pub fn boundary_loss(logits: &Tensor, label: &Tensor, kernel: [usize; 3]) -> Result<f64, OpError> {
    pairs("boundary_loss", logits, label)?;
    let [n, c, d, h, w] = logits.map5("boundary_loss", "logits")?;
    let p: Vec<f64> = logits.data().iter().map(|x| sigmoid(*x)).collect();
    let g: Vec<f64> = label.data().iter().map(|g| *g as f64).collect();
    let (p, g) = (boundary(&p, n * c, [d, h, w], kernel), boundary(&g, n * c, [d, h, w], kernel));
    Ok(p.iter().zip(&g).map(|(p, g)| (p - g).powi(2)).sum::<f64>() / p.len() as f64)
}
