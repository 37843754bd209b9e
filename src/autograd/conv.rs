//! Convolutions, instance norms and resampling of maps on the tape.

use super::{Backward, Tape, Var, VarId};
use crate::device::Device;
use crate::ops::conv3d::{self, ConvInput, ConvOutput, Epilogue, PackedConv, Prologue, conv3d};
use crate::ops::decoder_stage::{self, DecoderStage, decoder_stage, skip_map};
use crate::ops::linear;
use crate::ops::norm::{self, ChannelNorm};
use crate::ops::strided::{self, ChannelLayerNorm, PackedTranspose, conv_transpose3d, patch_conv};
use crate::ops::{pointwise, resample};
use crate::tensor::{OpError, Param, Tensor};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The parameters of a 3×3×3 convolution, packed for [`Tape::conv3d`].
pub struct Conv {
    packed: PackedConv,
    weight: Param,
    bias: Option<Param>,
    /// Weights for the backward pass, laid out when first needed.
    mirrored: OnceLock<PackedConv>,
}

impl Conv {
    /// Packs `weight` `[out, in, 3, 3, 3]` and `bias` `[out]` for a device.
    ///
    /// # Errors
    /// As [`PackedConv::new`].
    pub fn new(device: &Device, weight: Param, bias: Option<Param>) -> Result<Conv, OpError> {
        let inputs = weight.map5("conv3d", "weight")?[1];
        let packed = PackedConv::new(device.cpu(), &weight, 0..inputs, bias.as_deref())?;
        Ok(Conv { packed, weight, bias, mirrored: OnceLock::new() })
    }

    /// Bytes of the layouts for the CPU that have been made so far.
    pub fn bytes(&self) -> usize {
        self.packed.bytes()
    }
}

/// The parameters of a transposed convolution, laid out for [`Tape::conv_transpose3d`].
pub struct Transpose {
    packed: PackedTranspose,
    weight: Param,
    bias: Param,
}

impl Transpose {
    /// Lays out `weight` `[in, out, 2, 2, 2]` and `bias` `[out]`.
    ///
    /// # Errors
    /// As [`PackedTranspose::new`].
    pub fn new(weight: Param, bias: Param) -> Result<Transpose, OpError> {
        Ok(Transpose { packed: PackedTranspose::new(&weight, &bias)?, weight, bias })
    }
}

/// The parameters of a decoder stage, composed and packed for [`Tape::skip_map`] and
/// [`Tape::decoder_stage`].
pub struct UpStage {
    stage: DecoderStage,
    deconv: [Param; 2],
    conv: [Param; 2],
    mirrored: OnceLock<decoder_stage::grad::Mirrored>,
    mirrored_skip: OnceLock<PackedConv>,
    /// A number that no other stage of this process has.
    number: u64,
    /// Whether the only reader of its map is an instance norm.
    norm_behind: bool,
}

impl UpStage {
    /// Composes weight and bias of the transposed convolution and of the convolution after it: see
    /// [`DecoderStage::new`].
    ///
    /// # Errors
    /// As [`DecoderStage::new`].
    pub fn new(device: &Device, deconv: [Param; 2], conv: [Param; 2]) -> Result<UpStage, OpError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let stage = DecoderStage::new(device, &deconv[0], &deconv[1], &conv[0], &conv[1])?;
        Ok(UpStage {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            norm_behind: false,
            stage,
            deconv,
            conv,
            mirrored: OnceLock::new(),
            mirrored_skip: OnceLock::new(),
        })
    }

    /// This stage, whose map has an instance norm for its only reader: the norm subtracts the
    /// convolution's bias together with the mean, so the bias gets no gradient.
    pub fn in_front_of_norm(self) -> UpStage {
        UpStage { norm_behind: true, ..self }
    }

    /// Bytes of the layouts for the CPU that have been made so far.
    pub fn bytes(&self) -> usize {
        self.stage.bytes()
    }
}

/// A map with an instance norm and leaky ReLU that its readers apply: [`Tape::instance_norm`] makes
/// it.
///
/// Its entry on the tape is that of the map after norm and leaky ReLU, the activated map.
#[derive(Clone)]
pub struct Normed {
    map: Tensor,
    norm: ChannelNorm,
    id: Option<VarId>,
    /// The map of the voxel of each 2×2×2 that becomes the largest, if nothing is recorded and the
    /// convolution computed it.
    pooled: Option<Tensor>,
}

impl Normed {
    /// The map before its norm.
    pub fn map(&self) -> &Tensor {
        &self.map
    }

    /// The norm.
    pub fn norm(&self) -> &ChannelNorm {
        &self.norm
    }

    /// The activated map as an op's input; other ops may read it as well.
    pub fn input(&self) -> TapeInput {
        self.reading(&self.map)
    }

    /// The activated map as an op's input, max-pooled over 2×2×2 voxels; other ops may read it as
    /// well.
    pub fn pooled(&self) -> TapeInput {
        match &self.pooled {
            Some(map) => self.reading(map),
            None => self.input().max_pooled(),
        }
    }

    fn reading(&self, map: &Tensor) -> TapeInput {
        TapeInput { input: ConvInput::shared(map).normed(&self.norm), ids: [self.id, None] }
    }

    /// The activated map as the input of its last reader, which may use its memory for its output.
    pub fn into_input(self) -> TapeInput {
        let input = ConvInput::owned(self.map).normed(&self.norm);
        TapeInput { input, ids: [self.id, None] }
    }

    /// The values of the activated map, `[n, d, h, w, c]`; nothing is recorded.
    pub fn value(&self, device: &Device) -> Result<Tensor, OpError> {
        norm::apply(device, &self.map, &self.norm, None)
    }
}

/// A [`ConvInput`] on a tape: a map with the operations that an op applies to it on load.
///
/// A tape that is on keeps the input for its backward function, so the map's memory is not used for
/// the output then.
#[derive(Clone)]
pub struct TapeInput {
    input: ConvInput,
    /// The entry of the map, activated if it has a norm, and that of the map that is added.
    ids: [Option<VarId>; 2],
}

impl TapeInput {
    /// A map as it is; other ops may read it as well.
    pub fn shared(map: &Var) -> TapeInput {
        TapeInput { input: ConvInput::shared(map), ids: [map.id, None] }
    }

    /// This input with a map of the same shape added after norm and leaky ReLU, if one is given.
    pub fn plus(self, add: Option<&Var>) -> TapeInput {
        let [id, _] = self.ids;
        let input = self.input.plus(add.map(Var::value));
        TapeInput { input, ids: [id, add.and_then(|a| a.id)] }
    }

    /// This input with the maximum of each 2×2×2 voxels taken after norm and addition.
    pub fn max_pooled(self) -> TapeInput {
        TapeInput { input: self.input.max_pooled(), ..self }
    }

    fn wanted(&self) -> bool {
        self.ids.iter().any(Option::is_some)
    }

    /// Passes the gradient of the loaded value on to what it was loaded from.
    fn give(self, mut gradient: Tensor, back: &mut Backward) -> Result<(), OpError> {
        let [id, add] = self.ids;
        if self.input.prologue.max_pool {
            // A map that is added gets the same gradient, but has another one so far.
            let so_far = if add.is_none() { back.take(id)? } else { None };
            gradient = conv3d::grad::unpool(&back.device, &self.input, &gradient, so_far.as_ref())?;
        }
        if add.is_some() {
            back.add(add, gradient.clone())?;
        }
        back.add(id, gradient)
    }
}

impl<'m> Tape<'m> {
    /// A 3×3×3 convolution: [`conv3d()`].
    ///
    /// If the epilogue asks for sums, the map's only reader must be [`Tape::instance_norm`]: it
    /// subtracts the convolution's bias together with the mean, so the bias gets no gradient. With
    /// the tape on, no pooled map is computed.
    pub fn conv3d(
        &self,
        x: TapeInput,
        conv: &'m Conv,
        epilogue: Epilogue,
    ) -> Result<ConvOutput<Var>, OpError> {
        let saved = self.is_on().then(|| x.clone());
        let epilogue = if self.is_on() { Epilogue { pool: None, ..epilogue } } else { epilogue };
        let norm_behind = epilogue.sums;
        let ConvOutput { map, sums, pooled } =
            conv3d(self.device(), x.input, &conv.packed, epilogue)?;
        let map = self.record_saved(map, saved, |saved| {
            Box::new(move |dy, back| {
                let device = back.device.clone();
                back.form(&conv.weight, |device, so_far| {
                    conv3d::grad::weight_onto(device, &saved.input, &dy, so_far)
                })?;
                // Before a norm it is zero, except for the rounding errors of the sum, which the
                // optimiser would turn into whole steps.
                if let Some(bias) = conv.bias.as_ref().filter(|_| !norm_behind) {
                    back.form(bias, |device, so_far| linear::grad::bias_onto(device, &dy, so_far))?;
                }
                if saved.wanted() {
                    let mirrored = conv
                        .mirrored
                        .get_or_init(|| conv3d::grad::mirrored(device.cpu(), &conv.packed));
                    let dx = conv3d::grad::input(&device, mirrored, &dy)?;
                    saved.give(dx, back)?;
                }
                Ok(())
            })
        });
        Ok(ConvOutput { map, sums, pooled })
    }

    /// Attaches an instance norm and a leaky ReLU of negative slope `slope` to a map that comes
    /// with its sums; its readers apply them.
    ///
    /// # Errors
    /// As [`Sums::instance_norm`](norm::Sums::instance_norm); the map has no sums.
    pub fn instance_norm(
        &self,
        x: ConvOutput<Var>,
        weight: &'m Param,
        bias: &'m Param,
        eps: f64,
        slope: f32,
    ) -> Result<Normed, OpError> {
        let ConvOutput { map, sums: Some(sums), pooled } = x else {
            return Err(OpError::Argument {
                op: "instance_norm",
                message: "its map comes with its sums".into(),
            });
        };
        let norm = sums.instance_norm(weight, bias, eps, slope)?;
        let id = self.record_id(map.shape(), || {
            let (norm, x, x_id) = (norm.clone(), map.value.clone(), map.id);
            Box::new(move |dy, back| {
                let (dx, dw, db) = norm::grad::instance_norm(&back.device.clone(), &x, &norm, dy)?;
                back.param(weight, dw)?;
                back.param(bias, db)?;
                back.add(x_id, dx)
            })
        });
        Ok(Normed { map: map.value, norm, id, pooled })
    }

    /// A normed map written out after norm, leaky ReLU and addition.
    ///
    /// It is for maps with a norm: one without is returned as it is. Pooling is not applied.
    pub fn apply(&self, x: TapeInput) -> Result<Var, OpError> {
        let TapeInput { input: ConvInput { map, prologue }, ids } = x;
        let value = match &prologue.norm {
            Some(norm) => norm::apply(self.device(), &map, norm, prologue.add.as_ref())?,
            None => map,
        };
        Ok(self.record_if(&ids, value, || {
            let [id, add] = ids;
            Box::new(move |dy, back| {
                if add.is_some() {
                    back.add(add, dy.clone())?;
                }
                back.add(id, dy)
            })
        }))
    }

    /// The maximum over 2×2×2 voxels: [`pointwise::max_pool3d`].
    pub fn max_pool3d(&self, x: &Var) -> Result<Var, OpError> {
        let value = pointwise::max_pool3d(self.device(), x)?;
        let saved = TapeInput::shared(x).max_pooled();
        Ok(self.record_if(&[x.id], value, || Box::new(move |dy, back| saved.give(dy, back))))
    }

    /// A convolution whose stride is its kernel's size: [`patch_conv()`].
    pub fn patch_conv(
        &self,
        x: &Var,
        weight: &'m Param,
        bias: Option<&'m Param>,
    ) -> Result<Var, OpError> {
        let value = patch_conv(self.device(), x, weight, bias.map(|b| &**b))?;
        let (x_value, x_id) = (x.value.clone(), x.id);
        Ok(self.record(value, || {
            Box::new(move |dy, back| {
                let device = back.device.clone();
                let edge = weight.shape()[2];
                back.param(weight, strided::grad::patch_weight(&device, &x_value, edge, &dy)?)?;
                if let Some(bias) = bias {
                    back.param(bias, linear::grad::bias(&device, &dy)?)?;
                }
                if x_id.is_some() {
                    back.add(
                        x_id,
                        strided::grad::patch_input(&device, weight, x_value.shape(), &dy)?,
                    )?;
                }
                Ok(())
            })
        }))
    }

    /// A transposed convolution, with a layer norm over channels (weight, bias, epsilon) and GELU
    /// after it if given: [`conv_transpose3d()`].
    pub fn conv_transpose3d(
        &self,
        x: &Var,
        t: &'m Transpose,
        norm: Option<(&'m Param, &'m Param, f32)>,
    ) -> Result<Var, OpError> {
        let behind = norm.map(|(weight, bias, eps)| ChannelLayerNorm { weight, bias, eps });
        let value = conv_transpose3d(self.device(), x, &t.packed, behind)?;
        let (x_value, x_id) = (x.value.clone(), x.id);
        Ok(self.record(value, || {
            Box::new(move |mut dy, back| {
                let device = back.device.clone();
                if let Some((weight, bias, eps)) = norm {
                    // Cheaper to compute again than to keep.
                    let raw = conv_transpose3d(&device, &x_value, &t.packed, None)?;
                    let (dx, dw, db) =
                        norm::grad::layer_norm(&device, &raw, weight, bias, eps, true, &dy)?;
                    back.param(weight, dw)?;
                    back.param(bias, db)?;
                    dy = dx;
                }
                let (dx, dw, db) =
                    strided::grad::conv_transpose3d(&device, &x_value, &t.packed, &dy)?;
                back.param(&t.weight, dw)?;
                back.param(&t.bias, db)?;
                back.add(x_id, dx)
            })
        }))
    }

    /// The part of a decoder stage's output that does not depend on its coarse input:
    /// [`skip_map()`].
    pub fn skip_map(
        &self,
        s: &'m UpStage,
        skip: Option<TapeInput>,
        fine: [usize; 4],
    ) -> Result<Var, OpError> {
        let saved = self.is_on().then(|| skip.clone());
        let value = skip_map(self.device(), &s.stage, skip.map(|x| x.input), fine)?;
        Ok(self.record_saved(value, saved, |saved| {
            Box::new(move |dy, back| {
                let device = back.device.clone();
                let part = saved
                    .as_ref()
                    .map(|saved| conv3d::grad::weight(&device, &saved.input, &dy))
                    .transpose()?;
                let (conv, deconv_bias) = (&s.conv[0], &s.deconv[1]);
                let [of_deconv_bias, of_conv, of_conv_bias] =
                    decoder_stage::grad::biases(&device, &dy, conv, deconv_bias, part.as_ref())?;
                back.param(deconv_bias, of_deconv_bias)?;
                back.param(conv, of_conv)?;
                if !s.norm_behind {
                    back.param(&s.conv[1], of_conv_bias)?;
                }
                if let (Some(saved), Some(conv)) = (saved, s.stage.skip_conv())
                    && saved.wanted()
                {
                    let mirrored =
                        s.mirrored_skip.get_or_init(|| conv3d::grad::mirrored(device.cpu(), conv));
                    let dx = conv3d::grad::input(&device, mirrored, &dy)?;
                    saved.give(dx, back)?;
                }
                Ok(())
            })
        }))
    }

    /// The output of a decoder stage from its coarse input and its [`Tape::skip_map`]:
    /// [`decoder_stage()`].
    pub fn decoder_stage(
        &self,
        s: &'m UpStage,
        x: TapeInput,
        skip: &Var,
    ) -> Result<ConvOutput<Var>, OpError> {
        let ConvOutput { map, sums, pooled } =
            decoder_stage(self.device(), &s.stage, &x.input, skip)?;
        let skip_id = skip.id;
        let map = self.record(map, || {
            Box::new(move |dy, back| {
                let device = back.device.clone();
                let of = [&s.deconv[0], &s.conv[0]];
                back.params.add_composed(s.number, of, |so_far| {
                    decoder_stage::grad::composed_onto(&device, &s.stage, &x.input, &dy, so_far)
                })?;
                if x.wanted() {
                    let mirrored =
                        s.mirrored.get_or_init(|| decoder_stage::grad::mirrored(&device, &s.stage));
                    let dx = decoder_stage::grad::input(&device, mirrored, &dy)?;
                    x.give(dx, back)?;
                }
                back.add(skip_id, dy)
            })
        });
        Ok(ConvOutput { map, sums, pooled })
    }

    /// The mask head, whose weights are computed themselves: [`pointwise::mask_logits`].
    ///
    /// # Errors
    /// As there; `x` has no norm.
    pub fn mask_logits(
        &self,
        x: TapeInput,
        weights: &Var,
        bias: Option<&Var>,
    ) -> Result<Var, OpError> {
        let ConvInput { map, prologue: Prologue { norm: Some(norm), add, .. } } = &x.input else {
            return Err(OpError::Argument {
                op: "mask_logits",
                message: "its map comes with a norm".into(),
            });
        };
        let value = pointwise::mask_logits(
            self.device(),
            map,
            norm,
            add.as_ref(),
            weights,
            bias.map(Var::value),
        )?;
        Ok(self.record(value, || {
            let (w, w_id, b) =
                (weights.value.clone(), weights.id, bias.map(|b| (b.id, b.shape().to_vec())));
            Box::new(move |dy, back| {
                let device = back.device.clone();
                let ConvInput { map, prologue: Prologue { norm, add, .. } } = &x.input;
                let norm = norm.as_ref().expect("checked on the way forward");
                let (dx, dw, db) =
                    pointwise::grad::mask_logits(&device, map, norm, add.as_ref(), &w, &dy)?;
                back.add(w_id, dw.reshape(w.shape()))?;
                if let Some((id, shape)) = b {
                    back.add(id, db.reshape(shape))?;
                }
                x.give(dx, back)
            })
        }))
    }

    /// Halves every spatial axis: [`resample::downsample2_trilinear`].
    pub fn downsample2_trilinear(&self, x: &Var) -> Result<Var, OpError> {
        let x_id = x.id;
        Ok(self.record_if(&[x_id], resample::downsample2_trilinear(self.device(), x)?, || {
            Box::new(move |dy, back| {
                back.add(x_id, resample::grad::downsample2_trilinear(&back.device.clone(), &dy)?)
            })
        }))
    }

    /// Doubles every spatial axis: [`resample::upsample2_trilinear`].
    pub fn upsample2_trilinear(&self, x: &Var) -> Result<Var, OpError> {
        let x_id = x.id;
        Ok(self.record_if(&[x_id], resample::upsample2_trilinear(self.device(), x)?, || {
            Box::new(move |dy, back| {
                back.add(x_id, resample::grad::upsample2_trilinear(&back.device.clone(), &dy)?)
            })
        }))
    }

    /// Quarters every spatial axis: [`resample::downsample4_nearest`].
    pub fn downsample4_nearest(&self, x: &Var) -> Result<Var, OpError> {
        let x_id = x.id;
        Ok(self.record_if(&[x_id], resample::downsample4_nearest(self.device(), x)?, || {
            Box::new(move |dy, back| {
                back.add(x_id, resample::grad::downsample4_nearest(&back.device.clone(), &dy)?)
            })
        }))
    }

    /// `a b + c`, value by value, with a constant `c`: [`pointwise::multiply_add`]. The refiner's
    /// answer is this, from error map, correction and the logits before.
    pub fn multiply_add(&self, a: &Var, b: &Var, c: &Tensor) -> Result<Var, OpError> {
        let value = pointwise::multiply_add(self.device(), a, b, c)?;
        let (ids, values) = ([a.id, b.id], [a.value.clone(), b.value.clone()]);
        Ok(self.record_if(&ids, value, || {
            Box::new(move |dy, back| {
                let times = |t: &Tensor| pointwise::grad::times(&back.device, t, &dy);
                let (da, db) = (times(&values[1])?, times(&values[0])?);
                back.add(ids[0], da)?;
                back.add(ids[1], db)
            })
        }))
    }
}
