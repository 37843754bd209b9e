//! Tests of the tests: kernels broken on purpose, in the ways in which kernels break, must be
//! noticed by the emulator.
//!
//! Each mutant is the text of `kernels/` with one thing changed, built as a library whose kernels
//! replace the right ones. The unchanged text, built the same way, must pass.
#![cfg(feature = "emulator")]

#[path = "common/built.rs"]
mod built;
mod common;

use built::{compile, is_clang};
use common::{
    here, judge_dense, judge_losses, judge_optimizer, judge_padding, judge_rolling, judge_rounding,
    judge_rows, judge_stage, judge_sums, judge_tokens,
};
use prism::device::{Cpu, Cuda, Device, Precision};
use prism::verify::run;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What has to notice.
#[derive(Clone, Copy, PartialEq)]
enum Check {
    /// A reference case.
    Case(&'static str),
    /// A decoder stage of a number of items and channels, compared with the CPU's.
    Stage(usize, usize),
    /// Layers and attention of tokens, compared with the CPU's.
    Tokens,
    /// Gradients through attention where tokens have padding, compared with those without it.
    Padding,
    /// How float32 is rounded in products.
    Rounding,
    /// A convolution of rolling planes, compared with the CPU's.
    Rolling,
    /// Dense layers by `wgmma`, compared with the CPU's.
    Dense,
    /// The gradient of what several ops read.
    Sums,
    /// Steps of the optimiser, compared with the CPU's.
    Optimizer,
    /// Losses and their gradients, compared with the CPU's.
    Losses,
    /// Rows of parameters and their gradients, compared with the CPU's.
    Rows,
}

/// A change of one kernel, and the check that has to notice it.
struct Mutant {
    what: &'static str,
    /// The kernel file to build.
    kernel: &'static str,
    /// The file to change, and what to change in it.
    file: &'static str,
    from: &'static str,
    to: &'static str,
    check: Check,
    precision: Precision,
    /// Part of the error, if there is one; otherwise the result must be wrong.
    message: Option<&'static str>,
}

const LINEAR_WAIT: &str = "        copy_wait<STAGES - 2>();\n        __syncthreads();";

const MUTANTS: [Mutant; 68] = [
    Mutant {
        what: "a barrier is missing between filling a tile and reading it",
        kernel: "linear",
        file: "linear.cu",
        from: "        load_tile(right, w, n0, s.n, k0, s.k);\n        __syncthreads();",
        to: "        load_tile(right, w, n0, s.n, k0, s.k);",
        check: Check::Case("ops/linear"),
        precision: Precision::Ieee,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between reading a tile and filling it again",
        kernel: "attention",
        file: "lib/attention.cuh",
        from: "        int count = min(KEYS, keys - k0);\n        __syncthreads();",
        to: "        int count = min(KEYS, keys - k0);",
        check: Check::Case("ops/vit_attention_global"),
        precision: Precision::Ieee,
        message: None,
    },
    Mutant {
        what: "an asynchronous copy is not waited for",
        kernel: "linear",
        file: "linear.cu",
        from: LINEAR_WAIT,
        to: "        __syncthreads();",
        check: Check::Case("ops/linear"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between a step's copies and their use by other warps",
        kernel: "attention",
        file: "lib/attention_matrix.cuh",
        from: "        copy_wait<0>();\n        __syncthreads();\n        load_step_async",
        to: "        copy_wait<0>();\n        load_step_async",
        check: Check::Case("ops/vit_attention_window_head64"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "keys behind the last count as keys",
        kernel: "attention",
        file: "attention.cu",
        from: "column_of_element(e) < count ? scale",
        to: "column_of_element(e) <= count ? scale",
        check: Check::Case("ops/two_way_attention_image_to_token"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between a table's products and their use",
        kernel: "attention",
        file: "lib/attention_matrix.cuh",
        from: "        __syncthreads();\n        if (axis == 0) {",
        to: "        if (axis == 0) {",
        check: Check::Case("ops/vit_attention_window_head64"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a tile is read before it has arrived",
        kernel: "conv3d",
        file: "lib/conv.cuh",
        from: "    copy_wait<0>();\n    if (!norms && !adds) return;",
        to: "    if (!norms && !adds) return;",
        check: Check::Case("ops/conv3d_k3_nobias"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a border is off by one",
        kernel: "conv3d",
        file: "lib/conv.cuh",
        from: "(unsigned)h < (unsigned)s.h &&",
        to: "(unsigned)h <= (unsigned)s.h &&",
        check: Check::Case("ops/conv3d_k3"),
        precision: Precision::Ieee,
        message: None,
    },
    Mutant {
        what: "a border is off by one at the end of a buffer",
        kernel: "pointwise",
        file: "pointwise.cu",
        from: "if (at >= count) return",
        to: "if (at > count) return",
        check: Check::Case("ops/gelu"),
        precision: Precision::F32,
        message: Some("beyond the end of the nearest buffer"),
    },
    Mutant {
        what: "the gradient so far is forgotten",
        kernel: "norm",
        file: "norm.cu",
        from: "        if (so_far) {",
        to: "        if (false) {",
        check: Check::Sums,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "the gradient so far of a map that was pooled is forgotten",
        kernel: "resample",
        file: "resample.cu",
        from: "if (so_far) value +=",
        to: "if (false) value +=",
        check: Check::Sums,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a stride is wrong",
        kernel: "norm",
        file: "norm.cu",
        from: "const T *from = x + ((int64)blockIdx.y * rows + row0) * c;",
        to: "const T *from = x + ((int64)blockIdx.y * rows + row0);",
        check: Check::Case("ops/instance_norm"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "more shared memory is used than was asked for",
        kernel: "linear",
        file: "linear.cu",
        from: "left + STAGES * ROWS * STRIDE;",
        to: "left + (STAGES + 20) * ROWS * STRIDE;",
        check: Check::Case("ops/linear"),
        precision: Precision::F16,
        message: Some("of shared memory, which has"),
    },
    Mutant {
        what: "a barrier is missing between a tile's gradients and their sums",
        kernel: "attention_gradient",
        file: "attention_gradient.cu",
        from: " : 0.0f;\n        }\n        __syncthreads();",
        to: " : 0.0f;\n        }",
        check: Check::Case("ops/vit_attention_window_exact"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between the sums of a block's halves and their addition",
        kernel: "attention_gradient",
        file: "lib/attention_gradient_matrix.cuh",
        from: "    __syncthreads();\n    if (!half_of_step()) {",
        to: "    if (!half_of_step()) {",
        check: Check::Case("ops/two_way_attention_many"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a line's queries are added up by the wrong lanes",
        kernel: "attention_gradient",
        file: "lib/attention_gradient_matrix.cuh",
        from: "second ? v[0] : v[2], 16);",
        to: "second ? v[0] : v[2], 8);",
        check: Check::Case("ops/vit_attention_window_exact"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a slot without a key counts as one",
        kernel: "attention_gradient",
        file: "lib/attention_gradient_matrix.cuh",
        from: "is_line && kw + e % 2 < w.ew",
        to: "is_line && kw + e % 2 <= w.ew",
        check: Check::Case("ops/vit_attention_window_padded"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a padded key has a gradient",
        kernel: "attention_gradient",
        file: "lib/attention_gradient_matrix.cuh",
        from: "row_of_element(e) >= valid) k_acc",
        to: "row_of_element(e) >= keys) k_acc",
        check: Check::Padding,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a padded key counts in the gradients of queries",
        kernel: "attention_gradient",
        file: "attention_gradient.cu",
        from: "if (live) keys = min(keys, *live);",
        to: "if (live) keys = min(keys, *live + 1);",
        check: Check::Padding,
        precision: Precision::Ieee,
        message: None,
    },
    Mutant {
        what: "a barrier is missing in a sum over a block",
        kernel: "loss",
        file: "loss.cu",
        from: "        __syncthreads();\n        if ((int)threadIdx.x < half) {",
        to: "        if ((int)threadIdx.x < half) {",
        check: Check::Case("ops/dice_ce_loss"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between the sums of a block's warps and adding them up",
        kernel: "norm",
        file: "lib/sums.cuh",
        from: "    __syncthreads();\n    if (at >= wide) return;",
        to: "    if (at >= wide) return;",
        check: Check::Case("ops/layer_norm_channels_first"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between sums of parts and turning them",
        kernel: "weight_gradient",
        file: "weight_gradient.cu",
        from: "    __syncthreads();\n    for (int at = threadIdx.x; at < count * 32; at += 256) {",
        to: "    for (int at = threadIdx.x; at < count * 32; at += 256) {",
        check: Check::Case("ops/conv3d_k3"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "planes that a weight gradient goes over are not waited for",
        kernel: "weight_gradient",
        file: "weight_gradient.cu",
        from: "            copy_wait<STAGES - 2>();\n            apply_prologue(step, slot);",
        to: "            apply_prologue(step, slot);",
        check: Check::Case("ops/conv3d_k3_nobias"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between the first planes' fragments and filling their places",
        kernel: "weight_gradient",
        file: "weight_gradient.cu",
        from: "load_x(a[k], k);\n        __syncthreads();",
        to: "load_x(a[k], k);",
        check: Check::Case("ops/conv3d_k3"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between filling a plane and its fragments",
        kernel: "weight_gradient",
        file: "weight_gradient.cu",
        from: "            apply_prologue(step, slot);\n            __syncthreads();",
        to: "            apply_prologue(step, slot);",
        check: Check::Case("ops/conv3d_k3"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a plane of x is read that lies beyond the map",
        kernel: "weight_gradient",
        file: "weight_gradient.cu",
        from: " && (unsigned)(plane + step) < (unsigned)s.d;",
        to: ";",
        check: Check::Case("ops/conv3d_k3_nobias"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "rows of a dense weight's gradient are not waited for",
        kernel: "weight_gradient",
        file: "weight_gradient.cu",
        from: LINEAR_WAIT,
        to: "        __syncthreads();",
        check: Check::Case("ops/linear"),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "rows of a weight that is read as it lies go on behind its last",
        kernel: "linear",
        file: "linear.cu",
        from: "within && row + i * APART < k",
        to: "within",
        check: Check::Case("ops/two_way_attention_self"),
        precision: Precision::F16,
        message: Some("beyond the end of the nearest buffer"),
    },
    Mutant {
        what: "some threads miss a barrier that others wait at",
        kernel: "attention",
        file: "lib/attention.cuh",
        from: "        int count = min(KEYS, keys - k0);\n        __syncthreads();",
        to: "        int count = min(KEYS, keys - k0);\n        if (threadIdx.x < 64) __syncthreads();",
        check: Check::Case("ops/vit_attention_window_exact"),
        precision: Precision::Ieee,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between a tile's last use and the sums in its place",
        kernel: "decoder_stage",
        file: "lib/conv.cuh",
        from: "    if (!partial) return;\n    __syncthreads();\n",
        to: "    if (!partial) return;\n",
        check: Check::Stage(81, 16),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a phase reads its tile from another's place",
        kernel: "decoder_stage",
        file: "lib/conv.cuh",
        from: "(b.phase >> 1 & 1)) * H::W + (b.phase & 1)) * STRIDE;",
        to: "(b.phase >> 1 & 1)) * H::W) * STRIDE;",
        check: Check::Stage(81, 16),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "registers are turned with the wrong lane",
        kernel: "decoder_stage",
        file: "lib/conv.cuh",
        from: "odd ? r[i] : r[i + 1], 1);",
        to: "odd ? r[i] : r[i + 1], 3);",
        check: Check::Stage(1, 16),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between weights that are read and their order",
        kernel: "conv3d_lay_out",
        file: "conv3d_lay_out.cu",
        from: "* taps + place] : 0.0f;\n        }\n        __syncthreads();",
        to: "* taps + place] : 0.0f;\n        }",
        check: Check::Stage(1, 16),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between products of a tile and filling it again",
        kernel: "decoder_stage_weights",
        file: "decoder_stage_weights.cu",
        from: "k0 < deep; k0 += STEP) {\n            __syncthreads();\n",
        to: "k0 < deep; k0 += STEP) {\n",
        check: Check::Stage(1, 16),
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "one side of a product in TF32 is cut off instead of rounded",
        kernel: "linear",
        file: "lib/matrix.cuh",
        from: "rounded.r[i] = rounded_to_tf32(__uint_as_float(a.r[i]));",
        to: "rounded.r[i] = a.r[i];",
        check: Check::Rounding,
        precision: Precision::Tf32,
        message: None,
    },
    Mutant {
        what: "of three passes one is left out",
        kernel: "linear",
        file: "lib/matrix.cuh",
        from: "multiply_each_tf32(sums, high, b, &Right::low);",
        to: "",
        check: Check::Case("ops/linear"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "registers of a weight of floats that is read as it lies are those of other rows",
        kernel: "linear",
        file: "linear.cu",
        from: "(k + i % 2 * 4) * ROW",
        to: "(k + i % 2 * 3) * ROW",
        check: Check::Case("ops/two_way_attention_self"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "values of floats stand in another order than their weights",
        kernel: "attention",
        file: "lib/attention_matrix.cuh",
        from: "(j * 8 + lane % 4 * 2) * t.row + c * 16 + lane / 4;",
        to: "(j * 8 + lane % 4) * t.row + c * 16 + lane / 4;",
        check: Check::Case("ops/vit_attention_window_head64"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a step of three passes reads the rows of another tap",
        kernel: "conv3d_tf32",
        file: "lib/conv.cuh",
        from: "from += part % EDGE * H::W * STRIDE",
        to: "from += part / DEEP % EDGE * H::W * STRIDE",
        check: Check::Case("ops/conv3d_k3_nobias"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "both floats of a pair take the first of the map to start from",
        kernel: "decoder_stage_tf32",
        file: "lib/conv.cuh",
        from: "(offset[j] + starts[i][n][e])",
        to: "(offset[j] + starts[i][n][0])",
        check: Check::Stage(1, 16),
        precision: Precision::Tf32,
        message: None,
    },
    Mutant {
        what: "weights of floats are laid out as pairs are",
        kernel: "conv3d_lay_out",
        file: "conv3d_lay_out.cu",
        from: "lane % 4 * EACH + e % EACH,",
        to: "lane % 4 * 2 % (ALONG / 2) + e % EACH,",
        check: Check::Stage(1, 16),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between the norm of tokens and their product",
        kernel: "tokens",
        file: "tokens.cu",
        from: "reinterpret_cast<float *>(tile + L::ROWS * stride);\n        __syncthreads();",
        to: "reinterpret_cast<float *>(tile + L::ROWS * stride);",
        check: Check::Tokens,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between attention and the layer behind it",
        kernel: "tokens",
        file: "tokens.cu",
        from: "stride, keys, dim);\n    }\n    __syncthreads();",
        to: "stride, keys, dim);\n    }",
        check: Check::Tokens,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a barrier is missing between the sums of warps that share k and their addition",
        kernel: "tokens",
        file: "tokens.cu",
        from: "across * 8 + lane % 4 * 2, v);\n        }\n        __syncthreads();",
        to: "across * 8 + lane % 4 * 2, v);\n        }",
        check: Check::Tokens,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "tokens that attention reads are not waited for",
        kernel: "tokens",
        file: "tokens.cu",
        from: "    copy_wait<0>();\n    __syncthreads();",
        to: "    __syncthreads();",
        check: Check::Tokens,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a block norms another tile's rows",
        kernel: "tokens",
        file: "tokens.cu",
        from: "in.x + (int64)min(row0 + r0 + e, in.rows - 1) * in.k;\n#",
        to: "in.x + (int64)min(r0 + e, in.rows - 1) * in.k;\n#",
        check: Check::Tokens,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a token behind the last counts as a key",
        kernel: "tokens",
        file: "tokens.cu",
        from: "j * 8 + two + e % 2 < keys ?",
        to: "j * 8 + two + e % 2 <= keys ?",
        check: Check::Tokens,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "weights are read beyond the end of k",
        kernel: "tokens",
        file: "tokens.cu",
        from: "at + own < k ? load_raw<8>(w + at)",
        to: "at < k ? load_raw<8>(w + at)",
        check: Check::Tokens,
        precision: Precision::F16,
        message: Some("beyond the end of the nearest buffer"),
    },
    Mutant {
        what: "a plane is not fenced before products read it",
        kernel: "conv3d_wgmma",
        file: "conv3d_wgmma.cu",
        from: "        fence_async();\n        arrive(memory.full + turn.slot);",
        to: "        arrive(memory.full + turn.slot);",
        check: Check::Rolling,
        precision: Precision::F16,
        message: Some("is not fenced by the thread that stored it"),
    },
    Mutant {
        what: "a descriptor has the steps along k and along rows exchanged",
        kernel: "conv3d_wgmma",
        file: "lib/wgmma.cuh",
        from: "(Descriptor)(along_k >> 4) << 16 | (Descriptor)(along_rows >> 4) << 32",
        to: "(Descriptor)(along_rows >> 4) << 16 | (Descriptor)(along_k >> 4) << 32",
        check: Check::Rolling,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "sums go round in the other direction",
        kernel: "conv3d_wgmma",
        file: "conv3d_wgmma.cu",
        from: "(3 - TURN) % 3",
        to: "TURN",
        check: Check::Rolling,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a plane is said to be full when half of it is",
        kernel: "conv3d_wgmma",
        file: "conv3d_wgmma.cu",
        from: "            }\n        }\n        fence_async();\n        arrive(memory.full + turn.slot);",
        to: "            }\n            if (!begin) fence_async(), arrive(memory.full + turn.slot);\n        }",
        check: Check::Rolling,
        precision: Precision::F16,
        message: Some("of shared memory, which nothing has stored"),
    },
    Mutant {
        what: "a plane is given back before its products have ended",
        kernel: "conv3d_wgmma",
        file: "conv3d_wgmma.cu",
        from: "        await_products(of.acc);\n        if (lane == 0) arrive(memory.empty + turn.slot);",
        to: "        if (lane == 0) arrive(memory.empty + turn.slot);\n        await_products(of.acc);",
        check: Check::Rolling,
        precision: Precision::F16,
        message: Some("has been stored since it began"),
    },
    Mutant {
        what: "the phase is waited for that ended before",
        kernel: "conv3d_wgmma",
        file: "conv3d_wgmma.cu",
        from: "wait(memory.full + turn.slot, turn.phase);",
        to: "wait(memory.full + turn.slot, turn.phase ^ 1);",
        check: Check::Rolling,
        precision: Precision::F16,
        message: Some("of shared memory, which nothing has stored"),
    },
    Mutant {
        what: "copies of a step are not fenced before products read it",
        kernel: "linear_wgmma",
        file: "linear_wgmma.cu",
        from: "        fence_async();\n        __syncthreads();",
        to: "        __syncthreads();",
        check: Check::Dense,
        precision: Precision::F16,
        message: Some("is not fenced by the thread that stored it"),
    },
    Mutant {
        what: "rows are swizzled by another number of bytes than products read them by",
        kernel: "linear_wgmma",
        file: "lib/linear.cuh",
        from: "(L::SWIZZLED ? row % 8 : 0)",
        to: "(L::SWIZZLED ? row % 4 : 0)",
        check: Check::Dense,
        precision: Precision::F16,
        message: None,
    },
    Mutant {
        what: "a buffer is filled again before its products have ended",
        kernel: "linear_wgmma",
        file: "linear_wgmma.cu",
        from: "        await_products(acc);",
        to: "        if (step + 1 == steps) await_products(acc);",
        check: Check::Dense,
        precision: Precision::F16,
        message: Some("has been stored since it began"),
    },
    Mutant {
        what: "a barrier is missing in the sum of a block's squares",
        kernel: "adamw",
        file: "adamw.cu",
        from: "        __syncthreads();\n        if ((int)threadIdx.x < half) all[threadIdx.x] +=",
        to: "        if ((int)threadIdx.x < half) all[threadIdx.x] +=",
        check: Check::Optimizer,
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a tensor's second run is its first",
        kernel: "adamw",
        file: "adamw.cu",
        from: "first = (int64)runs[2 * blockIdx.x + 1] * RUN;",
        to: "first = 0;",
        check: Check::Optimizer,
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "values behind the last four of a tensor do not learn",
        kernel: "adamw",
        file: "adamw.cu",
        from: "           update<1>(part.of(0), part.of(1), part.of(2), part.of(3), wide, part.count, u);\n",
        to: "",
        check: Check::Optimizer,
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "the gradient of a convolution takes a deconvolution's rows for its columns",
        kernel: "decoder_stage_weights",
        file: "decoder_stage_weights.cu",
        from: "fill<false>(b, right + deconv, up,",
        to: "fill<true>(b, right + deconv, up,",
        check: Check::Case("ops/upcat_conv"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "the gradient of a deconvolution reads weights of the skip's channels",
        kernel: "decoder_stage_weights",
        file: "decoder_stage_weights.cu",
        from: "fill<false>(b, right + conv, inputs,",
        to: "fill<false>(b, right + conv - skip, inputs,",
        check: Check::Case("ops/upcat_conv"),
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "the cross entropy near clicks is that of the first mask",
        kernel: "loss",
        file: "loss.cu",
        from: "to_float(x[from + at])",
        to: "to_float(x[at])",
        check: Check::Losses,
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "clicks near the last planes of a block are not seen",
        kernel: "loss",
        file: "loss.cu",
        from: "last_i = (int)(last_row / h);",
        to: "last_i = i;",
        check: Check::Losses,
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a voxel's distance is that of its neighbour in the next row",
        kernel: "loss",
        file: "loss.cu",
        from: "row = j + column / w;",
        to: "row = j + column / w + 1;",
        check: Check::Losses,
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a score is compared with the sums of another mask",
        kernel: "loss",
        file: "loss.cu",
        from: "const double *s = sums + (int64)mask * COLUMNS;",
        to: "const double *s = sums + (int64)mask;",
        check: Check::Losses,
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a label's bits are read from the other end",
        kernel: "session",
        file: "session.cu",
        from: "(float)(byte >> (7 - i) & 1)",
        to: "(float)(byte >> i & 1)",
        check: Check::Losses,
        precision: Precision::F32,
        message: None,
    },
    Mutant {
        what: "a row's gradient goes to the rows behind it too",
        kernel: "session",
        file: "session.cu",
        from: "if (number[r] == blockIdx.x)",
        to: "if (number[r] <= blockIdx.x)",
        check: Check::Rows,
        precision: Precision::F16,
        message: None,
    },
];

/// What each library is compiled with, beside its file.
fn flags(kernels: &Path) -> Vec<String> {
    let include = format!("-I{}", kernels.display());
    let given = ["-c", "-std=c++17", "-fPIC", "-DPRISM_EMULATOR", "-w", include.as_str()];
    given.map(String::from).into()
}

/// Compiles the emulator itself, which no mutant changes and every library has in it.
fn build_host(folder: &Path) -> PathBuf {
    let object = folder.join("host.o");
    let source = here("kernels/host/emulator.cpp").display().to_string();
    let to = object.display().to_string();
    let flags = flags(&here("kernels"));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    compile(&[&flags[..], &["-O2", &source, "-o", &to]].concat());
    object
}

/// Builds a kernel file of the tree `kernels` as a library, with the emulator's object `host`.
fn build(folder: &Path, kernels: &Path, kernel: &str, host: &Path) -> PathBuf {
    let object = build_object(folder, kernels, &format!("{kernel}.cu"));
    let library = folder.join("kernels.so").display().to_string();
    // Its symbols are its own, though the program has others of the same names.
    let host = host.display().to_string();
    compile(&["-shared", "-Wl,-Bsymbolic", &object, &host, "-o", &library]);
    library.into()
}

/// Compiles a file of kernels, with the headers of the tree `kernels`, as build.rs compiles them
/// all.
fn build_object(folder: &Path, kernels: &Path, file: &str) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    let [unit, object] = ["unit.cpp", "unit.o"].map(at);
    std::fs::write(&unit, format!("#include \"host/emulator.h\"\n#include {file:?}\n")).unwrap();
    let checked = ["-O1", "-fsanitize=kernel-address"].map(String::from);
    let (prefix, dash) = if is_clang() { ("-mllvm", "-") } else { ("--param", "") };
    let parameters =
        ["asan-instrumentation-with-call-threshold=0", "asan-stack=0", "asan-globals=0"]
            .into_iter()
            .flat_map(|p| [prefix.to_string(), format!("{dash}{p}")]);
    let flags: Vec<String> = flags(kernels).into_iter().chain(checked).chain(parameters).collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    compile(&[&flags[..], &[&unit, "-o", &object]].concat());
    object
}

/// The seeds that decide an order of threads each.
const SEEDS: [u64; 3] = [0, 1, 2];

/// A device over the library's kernels, which run in an order that the seed decides.
fn open(library: &Path, precision: Precision, seed: u64) -> Device {
    // SAFETY: it was just built from the emulator.
    let cuda = unsafe { Cuda::emulated_over(Cpu::new(1).unwrap(), precision, seed, library) };
    Device::Cuda(cuda.unwrap())
}

/// For each seed, whether the check passes on the library's kernels, or what was said if it does
/// not. A reference case is copied to a folder of `folder`, where it is alone.
fn judge(library: &Path, m: &Mutant, folder: &Path) -> [Result<(), String>; 3] {
    // All are open before the first is judged, so that the library is loaded once.
    SEEDS.map(|seed| open(library, m.precision, seed)).map(|device| match m.check {
        Check::Stage(items, channels) => judge_stage(&device, items, channels),
        Check::Tokens => judge_tokens(&device),
        Check::Padding => judge_padding(&device),
        Check::Rounding => judge_rounding(&device),
        Check::Rolling => judge_rolling(&device),
        Check::Dense => judge_dense(&device),
        Check::Sums => judge_sums(&device),
        Check::Optimizer => judge_optimizer(&device),
        Check::Losses => judge_losses(&device),
        Check::Rows => judge_rows(&device),
        Check::Case(case) => judge_case(&device, &alone(folder, case)),
    })
}

/// Whether the reference case in a folder passes on a device; what was said if it does not.
fn judge_case(device: &Device, folder: &Path) -> Result<(), String> {
    let mut said = String::new();
    let passed = run(device, folder, &[], |r| {
        let wrong = || {
            r.checks
                .iter()
                .find(|c| !c.passed())
                .map(|c| format!("wrong: {} {}", c.quantity, c.error))
        };
        said = r.failure.clone().or_else(wrong).unwrap_or_default();
    });
    if passed.unwrap() { Ok(()) } else { Err(said) }
}

/// A copy of `kernels/`, with a change of a file.
fn copy(to: &Path, (file, from, with): (&str, &str, &str)) {
    assert!(!file.starts_with("host/"), "{file} is compiled once, for all");
    let mut changed = false;
    for part in ["", "lib", "host"] {
        std::fs::create_dir_all(to.join(part)).unwrap();
        for entry in std::fs::read_dir(here("kernels").join(part)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            let name = format!("{part}/{}", path.file_name().unwrap().to_string_lossy())
                .trim_start_matches('/')
                .to_string();
            let mut text = std::fs::read_to_string(&path).unwrap();
            if name == file {
                assert_eq!(
                    text.matches(from).count(),
                    1,
                    "{file}: what is to be changed stands there once"
                );
                text = text.replace(from, with);
                changed = true;
            }
            std::fs::write(to.join(name), text).unwrap();
        }
    }
    assert!(changed, "there is no {file}");
}

/// A reference case alone in a folder of its own.
fn alone(folder: &Path, case: &str) -> PathBuf {
    let to = folder.join("cases").join(case);
    std::fs::create_dir_all(&to).unwrap();
    let file = here("tests/reference").join(format!("{case}.safetensors"));
    std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    to
}

/// Does a piece of work on each item, as many at a time as the machine has cores; what came of
/// them, in no order.
fn on_all_cores<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let (next, made) = (AtomicUsize::new(0), Mutex::new(vec![]));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let one = work(item);
                    made.lock().unwrap().push(one);
                }
            });
        }
    });
    made.into_inner().unwrap()
}

/// The emulator's products of warpgroups and barriers with phases by themselves: right, and with
/// each mistake that it knows.
#[test]
fn warpgroups_multiply_what_their_descriptors_say() {
    let folder = tempfile::tempdir().unwrap();
    let host = build_host(folder.path()).display().to_string();
    let [cases, main] = ["tests/wgmma/cases.cu", "tests/wgmma/cases.cpp"]
        .map(|file| here(file).display().to_string());
    let kernels = build_object(folder.path(), &here("kernels"), &cases);
    let program = folder.path().join("cases").display().to_string();
    let flags = flags(&here("kernels"));
    let flags: Vec<&str> = flags.iter().map(String::as_str).filter(|flag| *flag != "-c").collect();
    compile(&[&flags[..], &["-O1", &main, &kernels, &host, "-o", &program]].concat());
    let output = std::process::Command::new(program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// The part of the mutants that a process judges, as the one that started it says.
const PART: &str = "PRISM_TEST_MUTANTS";

/// Mutants of a part. glibc has room for the emulator's variables of each thread
/// (`kernels/host/emulator.cpp`, 24 bytes) in some seventy libraries of a process.
const AT_A_TIME: usize = 33;

#[test]
fn broken_kernels_are_noticed() {
    let mut parts = MUTANTS.chunks(AT_A_TIME);
    if let Ok(part) = std::env::var(PART) {
        return notice(parts.nth(part.parse().unwrap()).unwrap());
    }
    for part in 0..parts.len() {
        let program = std::env::current_exe().unwrap();
        let output = std::process::Command::new(program)
            .args(["--exact", "broken_kernels_are_noticed", "--nocapture"])
            .env(PART, part.to_string())
            .output()
            .unwrap();
        let [out, err] =
            [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap());
        eprintln!("{err}");
        assert!(output.status.success() && out.contains("1 passed"), "part {part}:\n{out}{err}");
    }
}

/// Has mutants built and judged, beside the right text of their kernels.
fn notice(mutants: &[Mutant]) {
    let shared = tempfile::tempdir().unwrap();
    let host = build_host(shared.path());

    // The right text passes, in any order of threads.
    let mut kernels: Vec<&str> = mutants.iter().map(|m| m.kernel).collect();
    kernels.sort();
    kernels.dedup();
    assert!(kernels.len() + mutants.len() < 70, "too many libraries: see AT_A_TIME");
    on_all_cores(&kernels, |kernel| {
        let folder = tempfile::tempdir().unwrap();
        let library = build(folder.path(), &here("kernels"), kernel, &host);
        // Loaded once for all checks. What a library has of each thread's memory, glibc has room
        // for in some seventy of them, and comes by it again only where none was loaded since.
        let _loaded = open(&library, Precision::F32, 0);
        let mut passed = vec![];
        for m in mutants.iter().filter(|m| m.kernel == *kernel) {
            let asked = (m.check, m.precision);
            if !passed.contains(&asked) {
                for (seed, said) in SEEDS.iter().zip(judge(&library, m, folder.path())) {
                    said.unwrap_or_else(|e| panic!("{kernel} as it is, seed {seed}: {e}"));
                }
                passed.push(asked);
            }
        }
    });

    let survivors = on_all_cores(mutants, |m| {
        let folder = tempfile::tempdir().unwrap();
        let kernels = folder.path().join("kernels");
        copy(&kernels, (m.file, m.from, m.to));
        let library = build(folder.path(), &kernels, m.kernel, &host);
        let said: Vec<String> =
            judge(&library, m, folder.path()).into_iter().filter_map(Result::err).collect();
        eprintln!("{}: {:?}", m.what, said.first());
        let noticed = match m.message {
            Some(message) => said.iter().any(|s| {
                s.contains(message)
                    && s.contains("kernel ")
                    && s.contains("block ")
                    && s.contains("thread ")
            }),
            None => !said.is_empty(),
        };
        (!noticed).then_some((m.what, said))
    });
    let survivors: Vec<_> = survivors.into_iter().flatten().collect();
    assert!(survivors.is_empty(), "not noticed: {survivors:#?}");
}
