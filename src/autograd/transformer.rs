//! Dense layers, attention and pointwise ops on the tape.

use super::{Backward, Tape, Var, VarId};
use crate::device::{DType, Device};
use crate::memory;
use crate::ops::attention::{
    self, Attended, TwoWayWeights, ValidKeys, VitWeights, attend_heads, attend_windows,
};
use crate::ops::linear::{self, Activation, linear};
use crate::ops::{norm, pointwise, rows, tokens};
use crate::tensor::{GRADIENT, OpError, Param, Tensor};

/// The input of [`Tape::token_linear`]: rows of tokens, with a layer norm to apply, and something
/// to add for some layers. See [`tokens::Rows`].
#[derive(Clone, Copy)]
pub struct TokenRows<'v, 'm> {
    /// The rows, `[t, c]`.
    pub x: &'v Var,
    /// The weight `[c]`, bias `[c]` and epsilon of a layer norm to apply to them.
    pub norm: Option<(&'m Param, &'m Param, f32)>,
    /// What is added after the norm for layers that are [`added`](TokenLayer::added), `[t, c]`.
    pub add: Option<&'v Var>,
}

impl<'v> TokenRows<'v, '_> {
    /// Rows without a norm, to which nothing is added.
    pub fn plain(x: &'v Var) -> Self {
        TokenRows { x, norm: None, add: None }
    }
}

/// A dense layer of [`Tape::token_linear`].
#[derive(Clone, Copy)]
pub struct TokenLayer<'m> {
    /// The weight, `[n, c]`.
    pub weight: &'m Param,
    /// The bias, `[n]`.
    pub bias: &'m Param,
    /// Whether [`TokenRows::add`] is added to its input.
    pub added: bool,
}

impl<'m> Tape<'m> {
    /// A dense layer, `act(x wᵀ + b) + residual`: [`linear()`].
    pub fn linear(
        &self,
        x: &Var,
        weight: &'m Param,
        bias: Option<&'m Param>,
        act: Activation,
        residual: Option<&Var>,
    ) -> Result<Var, OpError> {
        let device = self.device();
        let given = residual.map(Var::value);
        if !self.is_on() {
            return Ok(Var::constant(linear(device, x, weight, bias.map(|b| &**b), act, given)?));
        }
        // GELU's gradient needs its input; for a ReLU its output is enough, before the residual is
        // added.
        let inner = if act == Activation::Gelu { Activation::None } else { act };
        let split = act != Activation::None;
        let y =
            linear(device, x, weight, bias.map(|b| &**b), inner, if split { None } else { given })?;
        let mut value =
            if act == Activation::Gelu { pointwise::gelu(device, &y)? } else { y.clone() };
        if let (true, Some(residual)) = (split, given) {
            value = pointwise::add(device, &value, residual)?;
        }
        let (saved, x_value, x_id, residual_id) =
            (split.then_some(y), x.value.clone(), x.id, residual.and_then(|r| r.id));
        Ok(self.record(value, || {
            Box::new(move |dy, back| {
                let device = back.device.clone();
                if residual_id.is_some() {
                    back.add(residual_id, dy.clone())?;
                }
                let dy = match saved {
                    Some(saved) => linear::grad::activation(&device, act, &saved, &dy)?,
                    None => dy,
                };
                back.form(weight, |device, so_far| {
                    linear::grad::weight_onto(device, &x_value, &dy, so_far)
                })?;
                if let Some(bias) = bias {
                    back.form(bias, |device, so_far| linear::grad::bias_onto(device, &dy, so_far))?;
                }
                if x_id.is_some() {
                    let so_far = back.take(x_id)?;
                    let dx = linear::grad::input_onto(&device, weight, &dy, so_far.as_ref())?;
                    back.add(x_id, dx.reshape(x_value.shape()))?;
                }
                Ok(())
            })
        }))
    }

    /// The MLP of a transformer block with its norm and residual: [`linear::mlp`].
    pub fn mlp(
        &self,
        x: &Var,
        norm: (&'m Param, &'m Param, f32),
        first: (&'m Param, &'m Param),
        second: (&'m Param, &'m Param),
    ) -> Result<Var, OpError> {
        if !self.is_on() {
            return Ok(Var::constant(linear::mlp(
                self.device(),
                x,
                (norm.0, norm.1, norm.2),
                (first.0, first.1),
                (second.0, second.1),
            )?));
        }
        let normed = self.layer_norm(x, norm.0, norm.1, norm.2, false)?;
        let hidden = self.linear(&normed, first.0, Some(first.1), Activation::Gelu, None)?;
        self.linear(&hidden, second.0, Some(second.1), Activation::None, Some(x))
    }

    /// Layer norm over the last axis, then GELU if `gelu` is set: [`norm::layer_norm`].
    pub fn layer_norm(
        &self,
        x: &Var,
        weight: &'m Param,
        bias: &'m Param,
        eps: f32,
        gelu: bool,
    ) -> Result<Var, OpError> {
        let value = norm::layer_norm(self.device(), x, weight, bias, eps, gelu)?;
        let (x_value, x_id) = (x.value.clone(), x.id);
        Ok(self.record(value, || {
            Box::new(move |dy, back| {
                let device = back.device.clone();
                let (so_far, norm) = (back.take(x_id)?, (&**weight, &**bias, eps));
                let so_far = so_far.as_ref();
                let (dx, dw, db) =
                    norm::grad::layer_norm_onto(&device, &x_value, norm, gelu, &dy, so_far)?;
                back.param(weight, dw)?;
                back.param(bias, db)?;
                back.add(x_id, dx)
            })
        }))
    }

    /// The sum of two values, the second repeated over leading axes if it is shorter:
    /// [`pointwise::add`].
    pub fn add(&self, a: &Var, b: &Var) -> Result<Var, OpError> {
        let value = pointwise::add(self.device(), a, b)?;
        let (a_id, b_id, b_shape) = (a.id, b.id, b.shape().to_vec());
        Ok(self.record_if(&[a_id, b_id], value, || {
            Box::new(move |dy, back| {
                if b_id.is_some() {
                    back.add(b_id, fold(&dy, &b_shape)?)?;
                }
                back.add(a_id, dy)
            })
        }))
    }

    /// The sum of a value and a parameter, which is repeated over leading axes if it is shorter.
    pub fn add_param(&self, a: &Var, b: &'m Param) -> Result<Var, OpError> {
        let value = pointwise::add(self.device(), a, b)?;
        let a_id = a.id;
        Ok(self.record(value, || {
            Box::new(move |dy, back| {
                back.param(b, fold(&dy, b.shape())?)?;
                back.add(a_id, dy)
            })
        }))
    }

    /// The GELU of each value: [`pointwise::gelu`].
    pub fn gelu(&self, x: &Var) -> Result<Var, OpError> {
        let (x_value, x_id) = (x.value.clone(), x.id);
        Ok(self.record_if(&[x_id], pointwise::gelu(self.device(), x)?, || {
            Box::new(move |dy, back| {
                let dx = linear::grad::activation(&back.device, Activation::Gelu, &x_value, &dy)?;
                back.add(x_id, dx)
            })
        }))
    }

    /// The logistic function of each value: [`pointwise::sigmoid`].
    pub fn sigmoid(&self, x: &Var) -> Result<Var, OpError> {
        let value = pointwise::sigmoid(self.device(), x)?;
        let (y, x_id) = (value.clone(), x.id);
        let backward = move |dy: Tensor, back: &mut Backward| {
            back.add(x_id, pointwise::grad::sigmoid(&back.device.clone(), &y, &dy)?)
        };
        Ok(self.record_if(&[x_id], value, || Box::new(backward)))
    }

    /// Softmax over the last axis: [`pointwise::softmax`].
    pub fn softmax(&self, x: &Var) -> Result<Var, OpError> {
        let value = pointwise::softmax(self.device(), x)?;
        let (y, x_id) = (value.clone(), x.id);
        Ok(self.record_if(&[x_id], value, || {
            Box::new(move |dy, back| {
                back.add(x_id, pointwise::grad::softmax(&back.device.clone(), &y, &dy)?)
            })
        }))
    }

    /// Rows `from..from + count` of a matrix `[t, c]`, `[count, c]`. With the tape off they may
    /// share the memory of `x`: [`rows::view`].
    pub fn rows(&self, x: &Var, from: usize, count: usize) -> Result<Var, OpError> {
        if !self.is_on() {
            return Ok(Var::constant(rows::view(self.device(), x, from, count)?));
        }
        let value = rows::narrow(self.device(), x, from, count)?;
        let (x_id, shape) = (x.id, x.shape().to_vec());
        let backward = move |dy: Tensor, back: &mut Backward| {
            back.add(x_id, rows::narrow_gradient(&back.device.clone(), &dy, &shape, from)?)
        };
        Ok(self.record_if(&[x_id], value, || Box::new(backward)))
    }

    /// Concatenates matrices `[t, c]` along their rows: [`rows::concat`].
    pub fn concat(&self, parts: &[Var]) -> Result<Var, OpError> {
        let value = rows::concat(self.device(), &parts.iter().map(Var::value).collect::<Vec<_>>())?;
        let places: Vec<(Option<VarId>, usize)> = parts.iter().map(|p| (p.id, p.rows())).collect();
        let ids: Vec<Option<VarId>> = places.iter().map(|p| p.0).collect();
        Ok(self.record_if(&ids, value, || {
            Box::new(move |dy, back| {
                let mut at = 0;
                for (id, count) in places {
                    let part = rows::narrow(&back.device.clone(), &dy, at, count)?;
                    back.add(id, part)?;
                    at += count;
                }
                Ok(())
            })
        }))
    }

    /// Embeddings added to constant rows: row `r` of the result `[t, c]` is row `r` of `base` `[t,
    /// c]` plus row `rows[r].1` of the parameter `rows[r].0`, a matrix with `c` columns.
    ///
    /// The gradient of a row goes to that row of its parameter.
    ///
    /// # Errors
    /// There are not as many `rows` as `base` has, or a parameter has no such row.
    pub fn embed(&self, base: Tensor, rows: Vec<(&'m Param, usize)>) -> Result<Var, OpError> {
        let c = base.channels();
        base.expect_shape("embed", "base", &[rows.len(), c])?;
        if let Device::Cuda(cuda) = self.device()
            && rows.iter().all(|(param, _)| param.device_type() == Some(DType::F32))
        {
            let list: Vec<(&Tensor, usize)> = rows.iter().map(|(p, row)| (&***p, *row)).collect();
            let value = rows::embed(cuda, &base, &list)?;
            let cuda = cuda.clone();
            return Ok(self.record(value, || {
                Box::new(move |dy, back| {
                    // Each parameter once, in the order in which they appear.
                    let mut params: Vec<&Param> = vec![];
                    let mut places = vec![];
                    for (param, row) in rows {
                        let known = params.iter().position(|known| std::ptr::eq(*known, param));
                        places.push((known.unwrap_or(params.len()), row));
                        if known.is_none() {
                            params.push(param);
                        }
                    }
                    let values: Vec<&Tensor> = params.iter().map(|param| &***param).collect();
                    let gradients = rows::embed_gradient(&cuda, &dy, &values, &places)?;
                    params.iter().zip(gradients).try_for_each(|(param, g)| back.param(param, g))
                })
            }));
        }
        let mut base = base;
        for (out, (param, row)) in base.make_mut().chunks_exact_mut(c).zip(&rows) {
            let from = param.try_data()?.get(row * c..(row + 1) * c);
            let from = from.ok_or_else(|| {
                param.shape_error("embed", "parameter", format!("at least {} rows of {c}", row + 1))
            })?;
            out.iter_mut().zip(from).for_each(|(o, p)| *o += p);
        }
        Ok(self.record(base, || {
            Box::new(move |dy, back| {
                for (g, (param, row)) in dy.try_data()?.chunks_exact(c).zip(rows) {
                    let mut whole: Vec<f32> = memory::zeroed(GRADIENT, param.len());
                    whole[row * c..(row + 1) * c].copy_from_slice(g);
                    back.param(param, whole)?;
                }
                Ok(())
            })
        }))
    }

    /// Several dense layers of the same rows, `act(input wᵀ + b) + residual` of each; also returns
    /// the rows after their norm.
    ///
    /// With the tape off this is [`tokens::linears`] where the device has it, otherwise separate
    /// ops.
    pub fn token_linear<const N: usize>(
        &self,
        rows: TokenRows<'_, 'm>,
        layers: [TokenLayer<'m>; N],
        act: Activation,
        residual: Option<&Var>,
    ) -> Result<([Var; N], Var), OpError> {
        let TokenRows { x, norm, add } = rows;
        if !self.is_on() {
            let norm: Option<(&Tensor, &Tensor, f32)> = norm.map(|(w, b, eps)| (&**w, &**b, eps));
            let rows = tokens::Rows { x, norm, add: add.map(Var::value) };
            let list = layers.map(|TokenLayer { weight, bias, added }| tokens::Layer {
                weight,
                bias,
                added,
            });
            let made = tokens::linears(self.device(), rows, &list, act, residual.map(Var::value))?;
            if let Some((made, normed)) = made {
                let made = made.into_iter().map(Var::constant);
                return Ok((each(made), Var::constant(normed)));
            }
        }
        let normed = match norm {
            Some((weight, bias, eps)) => self.layer_norm(x, weight, bias, eps, false)?,
            None => x.clone(),
        };
        let sum = add.filter(|_| layers.iter().any(|layer| layer.added));
        let sum = sum.map(|add| self.add(&normed, add)).transpose()?;
        let made = layers.iter().map(|layer| {
            let x = sum.as_ref().filter(|_| layer.added).unwrap_or(&normed);
            self.linear(x, layer.weight, Some(layer.bias), act, residual)
        });
        let made = made.collect::<Result<Vec<_>, _>>()?;
        Ok((each(made.into_iter()), normed))
    }

    /// Attention of projected queries `q` `[t, width]` to keys `k` and values `v` `[m, width]`, and
    /// the dense layer after it with its residual.
    ///
    /// With the tape off this is [`tokens::attention`] where the device has it, otherwise separate
    /// ops. Keys and values that are not valid have gradients of zeros.
    pub fn token_attention(
        &self,
        heads: usize,
        [q, k, v]: [&Var; 3],
        valid: ValidKeys,
        (weight, bias): (&'m Param, &'m Param),
        residual: Option<&Var>,
    ) -> Result<Var, OpError> {
        let device = self.device();
        if !self.is_on() {
            let (given, after) = ([q, k, v].map(Var::value), residual.map(Var::value));
            let made = tokens::attention(device, heads, given, valid, (weight, bias), after)?;
            if let Some(made) = made {
                return Ok(Var::constant(made));
            }
        }
        let attended = attend_heads(device, heads, q, k, v, valid)?;
        let ids = [q.id, k.id, v.id];
        let attended = self.record_if(&ids, attended, || {
            let (values, valid) = ([q, k, v].map(|t| t.value.clone()), valid.cloned());
            Box::new(move |dy, back| {
                let (device, [q, k, v]) = (back.device.clone(), &values);
                let valid = valid.as_ref();
                let grads =
                    attention::grad::two_way_attention(&device, heads, q, k, v, valid, &dy)?;
                ids.into_iter().zip(grads).try_for_each(|(id, g)| back.add(id, g))
            })
        });
        let layer = TokenLayer { weight, bias, added: false };
        let rows = TokenRows::plain(&attended);
        let ([y], _) = self.token_linear(rows, [layer], Activation::None, residual)?;
        Ok(y)
    }

    /// Attention of `q` `[t, c]` to keys `k` and values `v` `[m, c]` with its four projections,
    /// plus `residual` `[t, c]` if given.
    pub fn two_way_attention(
        &self,
        w: &'m TwoWayWeights,
        q: &Var,
        (k, v, valid): (&Var, &Var, ValidKeys),
        residual: Option<&Var>,
    ) -> Result<Var, OpError> {
        let project = |x: &Var, (weight, bias): &'m (Param, Param)| {
            self.linear(x, weight, Some(bias), Activation::None, None)
        };
        let (q, k, v) = (project(q, &w.q)?, project(k, &w.k)?, project(v, &w.v)?);
        self.token_attention(w.heads, [&q, &k, &v], valid, (&w.out.0, &w.out.1), residual)
    }

    /// Several dense layers of one row each, `act(row wᵀ + b)`, from the row, weight and bias of
    /// each.
    ///
    /// With the tape off this is [`tokens::row_linears`] where the device has it, otherwise
    /// separate ops.
    pub fn row_linears(
        &self,
        layers: &[(&Var, &'m Param, &'m Param)],
        act: Activation,
    ) -> Result<Vec<Var>, OpError> {
        if !self.is_on() {
            let list: Vec<(&Tensor, &Tensor, &Tensor)> =
                layers.iter().map(|(x, weight, bias)| (x.value(), &***weight, &***bias)).collect();
            if let Some(made) = tokens::row_linears(self.device(), &list, act)? {
                return Ok(made.into_iter().map(Var::constant).collect());
            }
        }
        let each = layers.iter().map(|&(x, w, bias)| self.linear(x, w, Some(bias), act, None));
        each.collect()
    }

    /// The image encoder's attention: [`attention::vit_attention`].
    pub fn vit_attention(
        &self,
        w: &'m VitWeights,
        x: &Var,
        residual: Option<&Var>,
    ) -> Result<Var, OpError> {
        if !self.is_on() {
            let value = attention::vit_attention(self.device(), w, x, residual.map(Var::value))?;
            return Ok(Var::constant(value));
        }
        let attended: Attended = attend_windows(self.device(), w, x)?;
        let grid = attended.to_grid(attended.heads.clone()).reshape(x.shape());
        let (x_value, x_id) = (x.value.clone(), x.id);
        let heads = self.record(grid, || {
            Box::new(move |dy, back| {
                let device = back.device.clone();
                let flat = [attended.qkv.rows(), x_value.channels()];
                let grads = attention::grad::vit_attention(
                    &device,
                    w,
                    &attended,
                    &attended.from_grid(&dy.reshape(flat)),
                )?;
                let x = attended.from_grid(&x_value.reshape(flat));
                back.param(&w.qkv.0, linear::grad::weight(&device, &x, &grads.qkv)?)?;
                back.param(&w.qkv.1, linear::grad::bias(&device, &grads.qkv)?)?;
                back.param(&w.qkv.1, grads.padding)?;
                w.rel_pos.iter().zip(grads.rel_pos).try_for_each(|(p, g)| back.param(p, g))?;
                let dx = attended.to_grid(linear::grad::input(&device, &w.qkv.0, &grads.qkv)?);
                back.add(x_id, dx.reshape(x_value.shape()))
            })
        });
        self.linear(&heads, &w.proj.0, Some(&w.proj.1), Activation::None, residual)
    }
}

/// The values of a list of `N`.
fn each<const N: usize>(mut list: impl Iterator<Item = Var>) -> [Var; N] {
    std::array::from_fn(|_| list.next().expect("as many as there are layers"))
}

/// Sums leading repetitions so that `shape` remains.
fn fold(dy: &Tensor, shape: &[usize]) -> Result<Tensor, OpError> {
    let len: usize = shape.iter().product();
    if dy.len() == len {
        return Ok(dy.reshape(shape));
    }
    let mut sum: Vec<f32> = memory::zeroed(GRADIENT, len);
    for part in dy.try_data()?.chunks_exact(len) {
        sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
    }
    Ok(Tensor::new(shape, sum))
}
