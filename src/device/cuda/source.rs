//! The kernels' text, as it is compiled for a GPU.

/// A text that kernels are made of, by the name under which it is included.
pub type Source = (&'static str, &'static str);

/// Headers.
pub const HEADERS: &[Source] = &[
    ("lib/base.cuh", include_str!("../../../kernels/lib/base.cuh")),
    ("lib/attention.cuh", include_str!("../../../kernels/lib/attention.cuh")),
    ("lib/attention_matrix.cuh", include_str!("../../../kernels/lib/attention_matrix.cuh")),
    ("lib/matrix.cuh", include_str!("../../../kernels/lib/matrix.cuh")),
    ("lib/conv.cuh", include_str!("../../../kernels/lib/conv.cuh")),
];

/// Files of kernels, and how the names of each one's begin.
pub const FILES: &[(&str, &str, &[&str])] = &[
    ("adamw.cu", include_str!("../../../kernels/adamw.cu"), &["adamw"]),
    ("attention.cu", include_str!("../../../kernels/attention.cu"), &["two_way_attention", "vit_attention"]),
    ("attention_gradient.cu", include_str!("../../../kernels/attention_gradient.cu"), &["attention_gradient"]),
    ("ceiling.cu", include_str!("../../../kernels/ceiling.cu"), &["ceiling"]),
    ("conv3d.cu", include_str!("../../../kernels/conv3d.cu"), &["conv3d"]),
    ("decoder_stage.cu", include_str!("../../../kernels/decoder_stage.cu"), &["decoder_stage", "skip_border"]),
    ("linear.cu", include_str!("../../../kernels/linear.cu"), &["linear"]),
    ("loss.cu", include_str!("../../../kernels/loss.cu"), &["loss"]),
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

/// How the names of kernels begin whose products run on tensor cores, where maps have 16 bits.
const MATRIX: &[&str] = &[
    "linear_f16",
    "linear_bf16",
    "linear_few_",
    "two_way_attention_",
    "vit_attention_",
    "ceiling_multiply_",
    "weight_gradient_",
    "conv3d_16_",
    "conv3d_single_",
    "conv3d_32_",
    "decoder_stage_16_",
    "decoder_stage_32_",
    "decoder_stage_gradient_16_",
    "decoder_stage_gradient_32_",
];

/// Whether a kernel's product runs on tensor cores.
pub fn is_matrix(kernel: &str) -> bool {
    (kernel.ends_with("_f16") || kernel.ends_with("_bf16")) && MATRIX.iter().any(|begin| kernel.starts_with(begin))
}
