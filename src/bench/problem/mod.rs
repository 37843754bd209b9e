//! Problems to time, as text: `conv3d:n1ic32oc32d128k3s1p1`.

use crate::model::Config;
use std::fmt;
use std::str::FromStr;

/// Something to time. Maps are cubes; letters are those of the text.
#[derive(Clone, Debug, PartialEq)]
pub enum Problem {
    /// `conv3d:n1ic32oc32d128k3s1p1`: items, input and output channels, edge of the input, edge of
    /// the kernel, stride, padding. Kernels of 3 with stride 1 and padding 1, and kernels as large
    /// as their stride without padding.
    Conv {
        /// Items.
        n: usize,
        /// Input channels.
        ic: usize,
        /// Output channels.
        oc: usize,
        /// Edge of the input.
        d: usize,
        /// Edge of the kernel.
        k: usize,
    },
    /// `upcat:ic32uc32sc32oc32d64`: a decoder stage's transposed convolution (`ic` to `uc`
    /// channels, from edge `d` to twice that), concatenation behind `sc` channels of skip feature
    /// and 3×3×3 convolution to `oc` channels. Timed is what an interaction does of it: the skip
    /// feature's half is computed before.
    UpCat {
        /// Channels of the coarse input.
        ic: usize,
        /// Channels behind the transposed convolution.
        uc: usize,
        /// Channels of the skip feature.
        sc: usize,
        /// Output channels.
        oc: usize,
        /// Edge of the coarse input.
        d: usize,
    },
    /// `attn:h12d64s8w14`: a ViT block's attention with projections: heads, channels of a head,
    /// edge of the token grid, edge of a window, 0 for the whole grid.
    Attention {
        /// Heads.
        h: usize,
        /// Channels of a head.
        d: usize,
        /// Edge of the token grid.
        s: usize,
        /// Edge of a window.
        w: usize,
    },
    /// `xattn:h8d24q60k512`: attention of `q` projected queries to `k` projected keys, heads and
    /// channels of a head.
    Cross {
        /// Heads.
        h: usize,
        /// Channels of a head.
        d: usize,
        /// Queries.
        q: usize,
        /// Keys.
        k: usize,
    },
    /// `linear:m512k768n2304`: rows, inputs, outputs.
    Linear {
        /// Rows.
        m: usize,
        /// Inputs.
        k: usize,
        /// Outputs.
        n: usize,
    },
    /// `lnorm:m512c768`: layer norm of rows.
    LayerNorm {
        /// Rows.
        m: usize,
        /// Channels.
        c: usize,
    },
    /// `encode:base` or `encode:small`, with `,d64` at another patch edge: encoding a scan's patch.
    Encode(Network),
    /// `interact:base,t60`: a click of so many prompt voxels on an encoded patch.
    Interact(Network, usize),
    /// `train:small`, with `,i4` for so many iterations: a training step of one item, its optimiser
    /// included.
    Train(Network, usize),
}

/// A network to time: a preset, perhaps at another patch edge.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// `base` or `small`.
    pub preset: String,
    /// The patch's edge.
    pub patch: usize,
}

impl Network {
    /// The configuration of the preset at this patch edge.
    pub fn config(&self) -> Config {
        Config { patch: self.patch, ..Config::preset(&self.preset).unwrap_or_else(Config::base) }
    }
}

/// What a text that is no problem lacks.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("problem '{text}': {why}")]
pub struct ProblemError {
    text: String,
    why: String,
}

/// The forms, for messages.
const FORMS: [(&str, &str); 9] = [
    ("conv3d", "conv3d:n1ic32oc32d128k3s1p1"),
    ("upcat", "upcat:ic32uc32sc32oc32d64"),
    ("attn", "attn:h12d64s8w14"),
    ("xattn", "xattn:h8d24q60k512"),
    ("linear", "linear:m512k768n2304"),
    ("lnorm", "lnorm:m512c768"),
    ("encode", "encode:base"),
    ("interact", "interact:base,t60"),
    ("train", "train:small"),
];

/// Largest number of a problem.
const MOST: usize = 1 << 20;

/// Letters with the numbers behind them, in the order of `letters`.
fn numbers<const N: usize>(
    text: &str,
    letters: [&str; N],
    usual: [Option<usize>; N],
) -> Result<[usize; N], String> {
    let mut values = usual;
    let mut given = [false; N];
    let mut rest = text;
    while !rest.is_empty() {
        let at = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let end = rest[at..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |e| at + e);
        let (letter, number) = (&rest[..at], &rest[at..end]);
        let which = letters
            .iter()
            .position(|l| *l == letter)
            .ok_or_else(|| format!("'{letter}' is none of {}", letters.join(", ")))?;
        let value = number.parse().ok().filter(|v| *v <= MOST);
        values[which] = Some(value.ok_or_else(|| {
            format!("'{letter}{number}' needs a number up to {MOST} behind {letter}")
        })?);
        if std::mem::replace(&mut given[which], true) {
            return Err(format!("'{letter}' is given twice"));
        }
        rest = &rest[end..];
    }
    let mut out = [0; N];
    for (i, value) in values.iter().enumerate() {
        out[i] = value.ok_or_else(|| format!("'{}' is missing", letters[i]))?;
    }
    Ok(out)
}

/// A preset and options behind commas.
fn network(text: &str, letter: &str, usual: usize) -> Result<(Network, usize), String> {
    let (preset, options) = text.split_once(',').unwrap_or((text, ""));
    let config =
        Config::preset(preset).ok_or_else(|| format!("'{preset}' is neither base nor small"))?;
    let options = options.replace(',', "");
    let [value, patch] = match letter {
        "" => [0, numbers(&options, ["d"], [Some(config.patch)])?[0]],
        letter => numbers(&options, [letter, "d"], [Some(usual), Some(config.patch)])?,
    };
    Config { patch, ..config }.check().map_err(|e| e.to_string())?;
    Ok((Network { preset: preset.into(), patch }, value))
}

impl FromStr for Problem {
    type Err = ProblemError;

    fn from_str(text: &str) -> Result<Problem, ProblemError> {
        let fail = |why: String| ProblemError { text: text.into(), why };
        let forms = || FORMS.map(|(_, form)| form).join(", ");
        let (kind, rest) = text
            .split_once(':')
            .ok_or_else(|| fail(format!("expected KIND:SIZES, as {}", forms())))?;
        let form = FORMS.iter().find(|(k, _)| *k == kind).map(|(_, form)| *form);
        let form = form
            .ok_or_else(|| fail(format!("unknown kind '{kind}', expected one of {}", forms())))?;
        let parse = || -> Result<Problem, String> {
            let problem = match kind {
                "conv3d" => {
                    let one = Some(1);
                    let [n, ic, oc, d, k, s, p] = numbers(
                        rest,
                        ["n", "ic", "oc", "d", "k", "s", "p"],
                        [one, None, None, None, Some(3), one, None],
                    )
                    .or_else(|e| {
                        // Padding follows from the kernel where it is not said.
                        let [n, ic, oc, d, k, s] = numbers(
                            rest,
                            ["n", "ic", "oc", "d", "k", "s"],
                            [one, None, None, None, Some(3), one],
                        )
                        .map_err(|_| e)?;
                        Ok::<_, String>([n, ic, oc, d, k, s, usize::from(k == 3 && s == 1)])
                    })?;
                    let [same, patches] =
                        [[k, s, p] == [3, 1, 1], k == s && p == 0 && k > 0 && d % k.max(1) == 0];
                    if !same && !patches {
                        return Err(format!(
                            "k{k}s{s}p{p} over d{d}: k3s1p1, or a stride that is the kernel and divides d, without padding"
                        ));
                    }
                    Problem::Conv { n, ic, oc, d, k }
                }
                "upcat" => {
                    let [ic, uc, sc, oc, d] =
                        numbers(rest, ["ic", "uc", "sc", "oc", "d"], [None; 5])?;
                    Problem::UpCat { ic, uc, sc, oc, d }
                }
                "attn" => {
                    let [h, d, s, w] =
                        numbers(rest, ["h", "d", "s", "w"], [None, None, None, Some(0)])?;
                    if s > 64 || w > 64 {
                        return Err("grids and windows have at most 64 tokens along an axis".into());
                    }
                    Problem::Attention { h, d, s, w }
                }
                "xattn" => {
                    let [h, d, q, k] = numbers(rest, ["h", "d", "q", "k"], [None; 4])?;
                    Problem::Cross { h, d, q, k }
                }
                "linear" => {
                    let [m, k, n] = numbers(rest, ["m", "k", "n"], [None; 3])?;
                    Problem::Linear { m, k, n }
                }
                "lnorm" => {
                    let [m, c] = numbers(rest, ["m", "c"], [None; 2])?;
                    Problem::LayerNorm { m, c }
                }
                "encode" => Problem::Encode(network(rest, "", 0)?.0),
                "interact" => {
                    let (network, t) = network(rest, "t", 1)?;
                    Problem::Interact(network, t)
                }
                _ => {
                    let (network, i) = network(rest, "i", 2)?;
                    Problem::Train(network, i)
                }
            };
            let empty = problem.sizes().contains(&0);
            if empty { Err("a size is 0".into()) } else { Ok(problem) }
        };
        let problem = parse().map_err(|why| fail(format!("{why} (as {form})")))?;
        let bytes = problem.floats() * 4.0;
        if bytes > (64u64 << 30) as f64 {
            return Err(fail(format!("its tensors take {:.0} GB", bytes / 1e9)));
        }
        Ok(problem)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = |n: &Network| match Config::preset(&n.preset) {
            Some(config) if config.patch == n.patch => n.preset.clone(),
            _ => format!("{},d{}", n.preset, n.patch),
        };
        match self {
            Problem::Conv { n, ic, oc, d, k } => {
                let [s, p] = if *k == 3 && self.is_same() { [1, 1] } else { [*k, 0] };
                write!(f, "conv3d:n{n}ic{ic}oc{oc}d{d}k{k}s{s}p{p}")
            }
            Problem::UpCat { ic, uc, sc, oc, d } => write!(f, "upcat:ic{ic}uc{uc}sc{sc}oc{oc}d{d}"),
            Problem::Attention { h, d, s, w } => write!(f, "attn:h{h}d{d}s{s}w{w}"),
            Problem::Cross { h, d, q, k } => write!(f, "xattn:h{h}d{d}q{q}k{k}"),
            Problem::Linear { m, k, n } => write!(f, "linear:m{m}k{k}n{n}"),
            Problem::LayerNorm { m, c } => write!(f, "lnorm:m{m}c{c}"),
            Problem::Encode(n) => write!(f, "encode:{}", options(n)),
            Problem::Interact(n, t) => write!(f, "interact:{},t{t}", options(n)),
            Problem::Train(n, i) => write!(f, "train:{},i{i}", options(n)),
        }
    }
}

impl Problem {
    /// Whether a convolution keeps its input's size: a kernel of 3 always does.
    fn is_same(&self) -> bool {
        matches!(self, Problem::Conv { k: 3, .. })
    }

    /// Sizes that must not be 0.
    fn sizes(&self) -> Vec<usize> {
        match *self {
            Problem::Conv { n, ic, oc, d, k } => vec![n, ic, oc, d, k],
            Problem::UpCat { ic, uc, sc, oc, d } => vec![ic, uc, sc, oc, d],
            Problem::Attention { h, d, s, .. } => vec![h, d, s],
            Problem::Cross { h, d, q, k } => vec![h, d, q, k],
            Problem::Linear { m, k, n } => vec![m, k, n],
            Problem::LayerNorm { m, c } => vec![m, c],
            Problem::Encode(_) => vec![],
            Problem::Interact(_, t) => vec![t],
            Problem::Train(_, i) => vec![i],
        }
    }

    /// Floating-point operations of the plain algorithm, a multiply-add being two; none for a
    /// network, whose ops are counted as they run.
    pub fn flops(&self) -> Option<f64> {
        let product = |sizes: &[usize]| 2.0 * sizes.iter().map(|s| *s as f64).product::<f64>();
        Some(match *self {
            Problem::Conv { n, ic, oc, d, k } => {
                let out = if self.is_same() { d } else { d / k };
                product(&[n, ic, oc, out, out, out, k, k, k])
            }
            // A transposed convolution and the 27 taps over its output.
            Problem::UpCat { ic, uc, oc, d, .. } => {
                product(&[ic, uc, 8, d, d, d]) + product(&[uc, oc, 27, 8, d, d, d])
            }
            Problem::Attention { h, d, s, w } => {
                // As released: windows filled up with padding.
                let edge = if w == 0 { s } else { w };
                let (dim, windows, tokens) = (h * d, s.div_ceil(edge).pow(3), edge.pow(3));
                product(&[windows, tokens, dim, 4 * dim])
                    + 2.0 * product(&[windows, tokens, tokens, dim])
            }
            Problem::Cross { h, d, q, k } => 2.0 * product(&[q, k, h * d]),
            Problem::Linear { m, k, n } => product(&[m, k, n]),
            Problem::LayerNorm { m, c } => 8.0 * (m * c) as f64,
            Problem::Encode(_) | Problem::Interact(..) | Problem::Train(..) => return None,
        })
    }

    /// Floats of inputs, weights and outputs, each counted once; 0 for a network.
    pub fn floats(&self) -> f64 {
        let cube = |d: usize| (d as f64).powi(3);
        match *self {
            Problem::Conv { n, ic, oc, d, k } => {
                let out = if self.is_same() { d } else { d / k };
                n as f64 * (ic as f64 * cube(d) + oc as f64 * cube(out))
                    + (ic * oc) as f64 * cube(k)
            }
            Problem::UpCat { ic, uc, oc, d, .. } => {
                ic as f64 * cube(d)
                    + 2.0 * oc as f64 * cube(2 * d)
                    + (uc * (8 * ic + 27 * oc)) as f64
            }
            Problem::Attention { h, d, s, .. } => {
                2.0 * (h * d) as f64 * cube(s) + 4.0 * ((h * d) as f64).powi(2)
            }
            Problem::Cross { h, d, q, k } => (2 * (q + k) * h * d) as f64,
            Problem::Linear { m, k, n } => (m * k + k * n + m * n) as f64,
            Problem::LayerNorm { m, c } => 2.0 * (m * c) as f64,
            Problem::Encode(_) | Problem::Interact(..) | Problem::Train(..) => 0.0,
        }
    }
}

/// The problems of a file: one a line, behind `#` a comment.
pub fn suite(text: &str) -> Result<Vec<Problem>, ProblemError> {
    let lines = text.lines().map(|l| l.split('#').next().unwrap_or("").trim());
    lines.filter(|l| !l.is_empty()).map(str::parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_read_and_written() {
        for text in [
            "conv3d:n1ic32oc32d128k3s1p1",
            "conv3d:n2ic1oc768d128k16s16p0",
            "upcat:ic32uc32sc32oc32d64",
            "attn:h12d64s8w14",
            "xattn:h8d24q60k512",
            "linear:m512k768n2304",
            "lnorm:m512c768",
            "encode:base",
            "encode:small,d32",
            "interact:base,t60",
            "train:small,i4",
        ] {
            assert_eq!(text.parse::<Problem>().unwrap().to_string(), text);
        }
        // What follows from the rest may be left out.
        assert_eq!(
            "conv3d:ic8oc8d16".parse::<Problem>().unwrap().to_string(),
            "conv3d:n1ic8oc8d16k3s1p1"
        );
        assert_eq!(
            "train:small".parse::<Problem>().unwrap(),
            Problem::Train(Network { preset: "small".into(), patch: 64 }, 2)
        );
        let conv: Problem = "conv3d:n1ic32oc32d128k3s1p1".parse().unwrap();
        assert_eq!(conv.flops(), Some(2.0 * 27.0 * 1024.0 * 128f64.powi(3)));
        assert_eq!(suite("# all\n\nlnorm:m2c3 # one\n").unwrap().len(), 1);
    }

    #[test]
    fn other_text_is_told_what_is_wrong() {
        for (text, part) in [
            ("conv3d", "KIND:SIZES"),
            ("convolve:n1", "unknown kind 'convolve'"),
            ("conv3d:n1ic32d128", "'oc' is missing"),
            ("conv3d:ic1oc1d8k5s1p2", "k3s1p1, or a stride"),
            ("conv3d:ic1oc1d9k2s2p0", "divides d"),
            ("conv3d:ic1ic1oc1d8", "given twice"),
            ("linear:m5x7", "'x' is none of m, k, n"),
            ("linear:m0k1n1", "a size is 0"),
            ("linear:m99999999999999999999k1n1", "up to"),
            ("conv3d:ic1048576oc1048576d1048576", "GB"),
            ("encode:huge", "neither base nor small"),
            ("encode:base,d17", "17"),
        ] {
            let message = text.parse::<Problem>().unwrap_err().to_string();
            assert!(
                message.starts_with(&format!("problem '{text}'")) && message.contains(part),
                "{message}"
            );
        }
    }
}
