//! The kernels' text, as it is compiled for a GPU.

/// A text that kernels are made of, by the name under which it is included.
pub type Source = (&'static str, &'static str);

/// Headers.
pub const HEADERS: &[Source] = &[
    ("lib/base.cuh", include_str!("../../../kernels/lib/base.cuh")),
    ("lib/matrix.cuh", include_str!("../../../kernels/lib/matrix.cuh")),
    ("lib/conv.cuh", include_str!("../../../kernels/lib/conv.cuh")),
];

/// Files of kernels, and how the names of each one's begin.
pub const FILES: &[(&str, &str, &[&str])] = &[
    ("attention.cu", include_str!("../../../kernels/attention.cu"), &["two_way_attention", "vit_attention"]),
    ("ceiling.cu", include_str!("../../../kernels/ceiling.cu"), &["ceiling"]),
    ("conv3d.cu", include_str!("../../../kernels/conv3d.cu"), &["conv3d"]),
    ("decoder_stage.cu", include_str!("../../../kernels/decoder_stage.cu"), &["decoder_stage", "skip_border"]),
    ("linear.cu", include_str!("../../../kernels/linear.cu"), &["linear"]),
    ("norm.cu", include_str!("../../../kernels/norm.cu"), &["norm", "layer_norm"]),
    (
        "pointwise.cu",
        include_str!("../../../kernels/pointwise.cu"),
        &["convert", "add", "function", "multiply_add", "heads", "slope", "times"],
    ),
    (
        "resample.cu",
        include_str!("../../../kernels/resample.cu"),
        &["halve", "double", "quarter", "max_pool", "unfold", "fold", "unpool", "refiner_input"],
    ),
    ("session.cu", include_str!("../../../kernels/session.cu"), &["scatter", "select", "pack_bits", "pick"]),
    ("weight_gradient.cu", include_str!("../../../kernels/weight_gradient.cu"), &["weight_gradient"]),
];

/// The file that has `kernel`, and its text.
pub fn file_of(kernel: &str) -> Option<Source> {
    FILES.iter().find(|(_, _, begins)| begins.iter().any(|b| kernel.starts_with(b))).map(|(name, text, _)| (*name, *text))
}
