//! Reverse-mode automatic differentiation: a tape that runs the fused [ops](crate::ops) and, if it
//! is on, records for each how its gradient is computed.
//!
//! The network is written once, against [`Tape`]. With the tape off an op is its forward function
//! and nothing else. With it on, every op that has parameters, or that a wanted gradient passes
//! through, leaves a backward function, holding the values it needs; [`Tape::backward`] consumes
//! them last to first, freeing each one's values as it goes. Gradients of parameters accumulate in
//! [`ParamGrads`] over as many tapes as there are. What is not recorded (a [`Var`] made by
//! [`Var::constant`], or anything after [`Var::detach`]) costs nothing in the backward pass.
//!
//! ```
//! use prism::Device;
//! use prism::autograd::{ParamGrads, Tape};
//! use prism::ops::linear::Activation;
//! use prism::tensor::{Param, Tensor};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 1)?;
//! // Parameter 0: a dense layer from two channels to one.
//! let weight = Param::new(Tensor::new([1, 2], vec![3.0, -1.0]), 0);
//!
//! let tape = Tape::on(&device);
//! let x = tape.leaf(Tensor::new([1, 2], vec![2.0, 5.0]));
//! let y = tape.linear(&x, &weight, None, Activation::None, None)?;
//! assert_eq!(y.data(), [1.0]);
//!
//! let mut grads = ParamGrads::new(1);
//! let seed = Tensor::new([1, 1], vec![1.0]);
//! let mut leaves = tape.backward(vec![(&y, seed)], &mut grads)?;
//! assert_eq!(leaves.take(&x).unwrap().data(), [3.0, -1.0]);
//! assert_eq!(grads.get(0).unwrap(), [2.0, 5.0]);
//! # Ok(())
//! # }
//! ```

mod conv;
mod grad_memory;
mod transformer;

pub use conv::{Conv, Normed, TapeInput, Transpose, UpStage};
pub(crate) use grad_memory::{GradMemory, Reached};
pub use transformer::{TokenLayer, TokenRows};

use crate::device::cuda::{Launch, kernels};
use crate::device::{DType, Device};
use crate::memory;
use crate::ops::decoder_stage;
use crate::ops::reduce::add_values;
use crate::tensor::{GRADIENT, OpError, Param, Tensor};
use std::cell::RefCell;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A value in a computation, and its place on the tape if its gradient is wanted.
///
/// It dereferences to the [`Tensor`] of the value; clones share it.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    id: Option<VarId>,
}

/// An entry of a tape.
#[derive(Clone, Copy, Debug)]
struct VarId {
    /// The tape's number, which is unique in this process.
    tape: u64,
    at: usize,
}

impl VarId {
    /// The entry's index on tape number `tape`; an error if it belongs to another tape.
    fn on(self, tape: u64) -> Result<usize, OpError> {
        match self.tape == tape {
            true => Ok(self.at),
            false => Err(OpError::Argument {
                op: "backward",
                message: "a gradient of a value that another tape recorded".into(),
            }),
        }
    }
}

impl Var {
    /// A value whose gradient is not wanted.
    pub fn constant(value: Tensor) -> Var {
        Var { value, id: None }
    }

    /// The value as a constant: no gradient goes back through it to what it was computed from.
    pub fn detach(&self) -> Var {
        Var::constant(self.value.clone())
    }

    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The value under another shape; its gradient goes to this value, in this one's shape.
    ///
    /// # Panics
    /// As [`Tensor::reshape`].
    pub fn reshape(&self, shape: impl Into<Vec<usize>>) -> Var {
        Var { value: self.value.reshape(shape), id: self.id }
    }
}

impl Deref for Var {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.value
    }
}

/// The backward function of an op: given the gradient of its output, adds those of its inputs.
type BackwardFn<'m> = Box<dyn FnOnce(Tensor, &mut Backward) -> Result<(), OpError> + 'm>;

/// A tape: runs ops on a device, and records them if it is on.
///
/// Its methods are the ops of [`crate::ops`], with their shapes and errors, on [`Var`]s instead of
/// tensors; the parameters that they are given must live for `'m`, because backward functions
/// borrow them. A tape is for one thread and for one computation: a new one is made for each.
pub struct Tape<'m> {
    device: Device,
    /// 0 if it is off.
    id: u64,
    nodes: Option<RefCell<Vec<Node<'m>>>>,
}

/// A recorded value's shape, and its backward function unless it is a leaf.
type Node<'m> = (Vec<usize>, Option<BackwardFn<'m>>);

impl<'m> Tape<'m> {
    /// A tape that records nothing: inference.
    pub fn off(device: &Device) -> Tape<'m> {
        Tape { device: device.clone(), id: 0, nodes: None }
    }

    /// A tape that records.
    pub fn on(device: &Device) -> Tape<'m> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Tape {
            device: device.clone(),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            nodes: Some(RefCell::default()),
        }
    }

    /// The device that the ops run on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether the tape records.
    pub fn is_on(&self) -> bool {
        self.nodes.is_some()
    }

    /// A value whose gradient is wanted, an input of the computation; [`Tape::backward`] returns
    /// its gradient. With the tape off, a constant.
    pub fn leaf(&self, value: Tensor) -> Var {
        let id = self.nodes.as_ref().map(|nodes| self.push(nodes, (value.shape().to_vec(), None)));
        Var { value, id }
    }

    /// A parameter as a value, under the shape `shape`.
    ///
    /// # Panics
    /// As [`Tensor::reshape`].
    pub fn param(&self, param: &'m Param, shape: impl Into<Vec<usize>>) -> Var {
        self.record(param.reshape(shape), || {
            Box::new(move |gradient, back| back.param(param, gradient))
        })
    }

    /// Records the backward function of an op that gave `value`, if the tape is on.
    fn record(&self, value: Tensor, backward: impl FnOnce() -> BackwardFn<'m>) -> Var {
        let id = self.record_id(value.shape(), backward);
        Var { value, id }
    }

    /// Records the backward function of an op that consumed its input: `saved` is what the function
    /// keeps of that input, present if the tape is on.
    fn record_saved<S>(
        &self,
        value: Tensor,
        saved: Option<S>,
        backward: impl FnOnce(S) -> BackwardFn<'m>,
    ) -> Var {
        match saved {
            Some(saved) => self.record(value, || backward(saved)),
            None => Var::constant(value),
        }
    }

    fn record_id(
        &self,
        shape: &[usize],
        backward: impl FnOnce() -> BackwardFn<'m>,
    ) -> Option<VarId> {
        self.nodes.as_ref().map(|nodes| self.push(nodes, (shape.to_vec(), Some(backward()))))
    }

    fn push(&self, nodes: &RefCell<Vec<Node<'m>>>, node: Node<'m>) -> VarId {
        let mut nodes = nodes.borrow_mut();
        nodes.push(node);
        VarId { tape: self.id, at: nodes.len() - 1 }
    }

    /// Records the backward function of an op without parameters, if one of its inputs wants a
    /// gradient.
    fn record_if(
        &self,
        inputs: &[Option<VarId>],
        value: Tensor,
        backward: impl FnOnce() -> BackwardFn<'m>,
    ) -> Var {
        if inputs.iter().all(Option::is_none) {
            Var::constant(value)
        } else {
            self.record(value, backward)
        }
    }

    /// Computes gradients: adds those of parameters to `params`, and returns those of leaves.
    ///
    /// `seeds` are values that this tape recorded, each with the gradient of the loss with respect
    /// to it; of values that were not recorded they are ignored. With the tape off, there are no
    /// gradients.
    ///
    /// # Errors
    /// A seed is a value of another tape, `params` has too few parameters, or the device fails.
    ///
    /// # Panics
    /// If a seed has not as many values as its value.
    pub fn backward(
        self,
        seeds: Vec<(&Var, Tensor)>,
        params: &mut ParamGrads,
    ) -> Result<LeafGrads, OpError> {
        let device = self.device.clone();
        let leaves = self.backward_unsettled(seeds, params)?;
        params.settle(&device)?;
        Ok(leaves)
    }

    /// Computes gradients as [`Tape::backward`] does, as one of several backward passes through the
    /// same parameters: after the last one, [`ParamGrads::settle`] must be called.
    pub(crate) fn backward_unsettled(
        self,
        seeds: Vec<(&Var, Tensor)>,
        params: &mut ParamGrads,
    ) -> Result<LeafGrads, OpError> {
        self.backward_watched(seeds, params, |_| Ok(()))
    }

    /// Computes gradients as [`Tape::backward_unsettled`] does; `reached` is called after each op's
    /// gradient.
    pub(crate) fn backward_watched(
        self,
        seeds: Vec<(&Var, Tensor)>,
        params: &mut ParamGrads,
        mut reached: impl FnMut(&mut ParamGrads) -> Result<(), OpError>,
    ) -> Result<LeafGrads, OpError> {
        let nodes = self.nodes.map(RefCell::into_inner).unwrap_or_default();
        let mut back =
            Backward { device: self.device, tape: self.id, vars: vec![None; nodes.len()], params };
        for (var, gradient) in seeds {
            back.add(var.id, gradient.reshape(var.value.shape()))?;
        }
        for (at, (shape, backward)) in nodes.into_iter().enumerate().rev() {
            let Some(backward) = backward else { continue };
            // Readers may have seen the value under another shape. No other code holds it then, so
            // the backward function may take its memory.
            if let Some(gradient) = back.vars[at].take().map(|g| g.reshape(shape)) {
                backward(gradient, &mut back)?;
                reached(back.params)?;
            }
        }
        Ok(LeafGrads { tape: back.tape, vars: back.vars })
    }
}

/// The gradients of leaves that [`Tape::backward`] computed.
pub struct LeafGrads {
    tape: u64,
    vars: Vec<Option<Tensor>>,
}

impl LeafGrads {
    /// Takes the gradient of a leaf, in its shape; none if no seed depended on it, or if it was
    /// taken before.
    ///
    /// # Panics
    /// If it is a leaf of another tape.
    pub fn take(&mut self, leaf: &Var) -> Option<Tensor> {
        let VarId { tape, at } = leaf.id?;
        assert_eq!(tape, self.tape, "the gradient of another tape's leaf");
        self.vars.get_mut(at)?.take().map(|g| g.reshape(leaf.value.shape()))
    }
}

/// The state of a backward pass.
struct Backward<'p> {
    device: Device,
    tape: u64,
    vars: Vec<Option<Tensor>>,
    params: &'p mut ParamGrads,
}

impl Backward<'_> {
    /// Adds to the gradient of a value that this tape recorded; does nothing if none is wanted.
    fn add(&mut self, id: Option<VarId>, gradient: Tensor) -> Result<(), OpError> {
        match id {
            Some(id) => add_to(&self.device, &mut self.vars[id.on(self.tape)?], gradient),
            None => Ok(()),
        }
    }

    /// Takes the gradient so far of a value away, if it has one: for an op that forms the sum with
    /// it, and returns that by [`Backward::add`].
    fn take(&mut self, id: Option<VarId>) -> Result<Option<Tensor>, OpError> {
        match id {
            Some(id) => Ok(self.vars[id.on(self.tape)?].take()),
            None => Ok(None),
        }
    }

    /// Adds to the gradient of a parameter: `form` is given the gradient so far, if there is one,
    /// and returns the sum, or otherwise a new gradient. Does nothing if the parameter is not
    /// trained.
    fn form(
        &mut self,
        param: &Param,
        form: impl FnOnce(&Device, Option<Tensor>) -> Result<Tensor, OpError>,
    ) -> Result<(), OpError> {
        let Some(id) = param.id() else { return Ok(()) };
        match self.params.take_own(id).or_else(|| self.params.begun(id)) {
            Some(so_far) => {
                let sum = form(&self.device, Some(so_far))?;
                self.params.touched.push(id);
                self.params.put(id, Some(sum));
                Ok(())
            }
            None => self.params.add(id, form(&self.device, None)?),
        }
    }

    /// Adds to the gradient of a parameter a gradient of any shape; does nothing if the parameter
    /// is not trained.
    fn param(&mut self, param: &Param, gradient: impl Into<Tensor>) -> Result<(), OpError> {
        match param.id() {
            Some(id) => self.params.add(id, gradient.into()),
            None => Ok(()),
        }
    }
}

/// Adds `part` to a sum of gradients, in place if the sum has no other owner.
pub(crate) fn add_to(
    device: &Device,
    sum: &mut Option<Tensor>,
    part: Tensor,
) -> Result<(), OpError> {
    *sum = Some(match sum.take() {
        None => part,
        Some(mut sum) => match sum.get_mut() {
            Some(values) => {
                add_values(device.cpu(), values, part.try_data()?);
                sum
            }
            None => crate::ops::pointwise::add(device, &sum, &part.reshape(sum.shape()))?,
        },
    });
    Ok(())
}

/// The gradients of a network's parameters by their [numbers](Param::id), added up over backward
/// passes in float32, on the device where they were computed.
#[derive(Default)]
pub struct ParamGrads {
    sums: Vec<Option<Tensor>>,
    /// The parameters whose gradients changed since the last call of `touched`.
    touched: Vec<usize>,
    /// Sums that wait for the rest of their backward pass.
    composed: Vec<Composed>,
    /// Stages whose sums have been taken further, where that is noted. They hold the parameters,
    /// which an optimiser changes in place only while nothing else does.
    settled: Option<Vec<Settled>>,
    /// Where sums are, if recorded work adds to them too.
    memory: Option<Arc<GradMemory>>,
}

/// A stage whose sum has been taken further: its number, its parameters, and the sum's shape.
type Settled = (u64, [Param; 2], Vec<usize>);

/// A sum of gradients of the weights that a decoder stage composed of two parameters. The backward
/// pass from there is linear, and costs as much as a whole iteration, so it is done once, with the
/// sum.
struct Composed {
    /// The stage's number.
    stage: u64,
    gradient: Tensor,
    /// Weights of the deconvolution and of the convolution.
    of: [Param; 2],
}

impl ParamGrads {
    /// No gradients yet, for `count` parameters.
    pub fn new(count: usize) -> ParamGrads {
        ParamGrads { sums: vec![None; count], ..ParamGrads::default() }
    }

    /// [`ParamGrads::new`] that notes which stages' sums are taken further, for
    /// [`GradMemory::like`].
    pub(crate) fn noting(count: usize) -> ParamGrads {
        ParamGrads { settled: Some(vec![]), ..ParamGrads::new(count) }
    }

    /// Adds `gradient`, of as many values as the parameter, to the gradient of parameter `id`.
    ///
    /// # Errors
    /// The list has no such parameter, or the device fails.
    pub fn add(&mut self, id: usize, gradient: Tensor) -> Result<(), OpError> {
        let (count, begun) = (self.sums.len(), self.begun(id));
        let Some(slot) = self.sums.get_mut(id) else {
            let message = format!("a gradient of parameter {id}, and the list ends before {count}");
            return Err(OpError::Argument { op: "backward", message });
        };
        self.touched.push(id);
        *slot = Some(match slot.take().or(begun) {
            None => gradient,
            Some(sum) => accumulate(sum, gradient)?,
        });
        Ok(())
    }

    /// The sum of parameter `id` to which nothing has been added, if it has memory of its own.
    fn begun(&self, id: usize) -> Option<Tensor> {
        let nothing = self.sums.get(id)?.is_none();
        self.memory.as_ref().filter(|_| nothing)?.sum(id)
    }

    /// Takes parameter `id`'s gradient away if it is on a device and has no other owner: for code
    /// that adds to it there, and returns it by [`ParamGrads::add`].
    fn take_own(&mut self, id: usize) -> Option<Tensor> {
        let slot = self.sums.get_mut(id)?;
        if slot.as_mut().is_some_and(is_own) { slot.take() } else { None }
    }

    /// Adds to the gradient of what stage number `stage` composed of the weights of a deconvolution
    /// and of a convolution; theirs follow with [`ParamGrads::settle`]. `form` is given the
    /// gradient so far, if there is one, and returns the sum, or otherwise a new gradient.
    fn add_composed(
        &mut self,
        stage: u64,
        of: [&Param; 2],
        form: impl FnOnce(Option<Tensor>) -> Result<Tensor, OpError>,
    ) -> Result<(), OpError> {
        let at = self.composed.iter().position(|known| known.stage == stage);
        let gradient = match at.map(|at| self.composed.remove(at).gradient) {
            None => form(self.memory.as_ref().and_then(|memory| memory.composed(stage)))?,
            Some(mut sum) => match is_own(&mut sum) {
                true => form(Some(sum))?,
                false => accumulate(sum, form(None)?)?,
            },
        };
        let known = Composed { stage, gradient, of: of.map(Clone::clone) };
        self.composed.insert(at.unwrap_or(self.composed.len()), known);
        Ok(())
    }

    /// Computes the gradients of weights that a decoder stage composed, from the gradients of the
    /// composed weights, which wait here until then.
    ///
    /// [`Tape::backward`] does so itself. It is left to the caller after
    /// [`run_item_sharing`](crate::train::step::run_item_sharing), to be done once, after the last
    /// of several items.
    ///
    /// # Errors
    /// The list has no such parameters, or the device fails.
    pub fn settle(&mut self, device: &Device) -> Result<(), OpError> {
        for Composed { stage, gradient, of } in std::mem::take(&mut self.composed) {
            let [deconv, conv] = &of;
            let gradients = decoder_stage::grad::weights(device, &gradient, deconv, conv)?;
            for (param, gradient) in of.iter().zip(gradients) {
                param.id().map_or(Ok(()), |id| self.add(id, gradient))?;
            }
            if let Some(settled) = &mut self.settled {
                settled.push((stage, of, gradient.shape().to_vec()));
            }
        }
        Ok(())
    }

    /// Adds all gradients of another list of the same parameters.
    ///
    /// # Errors
    /// It has more parameters than this list, or the device fails.
    pub fn add_all(&mut self, other: ParamGrads) -> Result<(), OpError> {
        for Composed { stage, gradient, of } in other.composed {
            self.add_composed(stage, of.each_ref(), |so_far| match so_far {
                Some(sum) => accumulate(sum, gradient),
                None => Ok(gradient),
            })?;
        }
        other
            .sums
            .into_iter()
            .enumerate()
            .try_for_each(|(id, gradient)| gradient.map_or(Ok(()), |g| self.add(id, g)))
    }

    /// The values of the gradient of parameter `id`, in row-major order; none if it has no
    /// gradient.
    ///
    /// # Panics
    /// As [`Tensor::data`].
    pub fn get(&self, id: usize) -> Option<&[f32]> {
        self.tensor(id).map(Tensor::data)
    }

    /// The gradient of parameter `id`, on the device where it was computed; none if it has no
    /// gradient. Its values are in the parameter's order, its shape may be another one.
    pub fn tensor(&self, id: usize) -> Option<&Tensor> {
        self.sums.get(id)?.as_ref()
    }

    /// Takes parameter `id`'s gradient away.
    pub(crate) fn take(&mut self, id: usize) -> Option<Tensor> {
        self.sums.get_mut(id)?.take()
    }

    /// Replaces parameter `id`'s gradient.
    pub(crate) fn put(&mut self, id: usize, gradient: Option<Tensor>) {
        self.sums[id] = gradient;
    }

    /// The parameters whose gradients were added to since the last call.
    pub(crate) fn touched(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.touched)
    }

    /// Bytes of all gradients.
    pub fn bytes(&self) -> usize {
        self.sums.iter().flatten().map(|g| g.len() * 4).sum()
    }
}

/// Whether it is on a device, in float32, and has no other owner.
fn is_own(sum: &mut Tensor) -> bool {
    sum.device_type() == Some(DType::F32) && sum.is_unique()
}

/// The sum of two gradients of one parameter, in float32.
fn accumulate(mut sum: Tensor, part: Tensor) -> Result<Tensor, OpError> {
    if let Some(cuda) = sum.cuda() {
        let n = sum.len();
        let (so_far, from) =
            (sum.to_device(&cuda, DType::F32)?, part.to_device(&cuda, DType::F32)?);
        // Memory that has other owners, or is of another type, stays as it is.
        let to = if is_own(&mut sum) { so_far.clone() } else { cuda.allocate(n, DType::F32)? };
        cuda.launch(
            kernels::ADD_F32,
            Launch::per_vector(4, n, n).with_cost(n, 12 * n),
            kernels::AddArgs {
                a: (&so_far).into(),
                b: (&from).into(),
                y: (&to).into(),
                count: n.into(),
                period: n.into(),
            },
        )?;
        return Ok(Tensor::from_device(sum.shape(), to, DType::F32));
    }
    match sum.get_mut() {
        Some(values) => values.iter_mut().zip(part.try_data()?).for_each(|(s, g)| *s += g),
        None => {
            let both = sum.try_data()?.iter().zip(part.try_data()?);
            sum = Tensor::new(sum.shape(), memory::collected(GRADIENT, both.map(|(s, g)| s + g)))
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Several backward passes through a stage's composition, whose last part is done once, give
    /// the same as separate passes.
    #[test]
    fn ways_back_through_a_composition_are_gone_together() {
        let device = Device::open("cpu", 2).unwrap();
        // Small whole numbers, whose sums are exact.
        let whole = |shape: &[usize], seed: usize| {
            let count: usize = shape.iter().product();
            Tensor::new(
                shape,
                (0..count).map(|i| ((i * 7919 + seed * 131) % 9) as f32 - 4.0).collect(),
            )
        };
        let param = |id: usize, shape: &[usize]| Param::new(whole(shape, id), id);
        let stage = UpStage::new(
            &device,
            [param(0, &[6, 3, 2, 2, 2]), param(1, &[3])],
            [param(2, &[5, 3, 3, 3, 3]), param(3, &[5])],
        )
        .unwrap();
        let back = |seed: usize, together: bool, grads: &mut ParamGrads| {
            let tape = Tape::on(&device);
            let x = tape.leaf(whole(&[1, 2, 3, 2, 6], seed));
            let skip = tape.skip_map(&stage, None, [1, 4, 6, 4]).unwrap();
            let y = tape.decoder_stage(&stage, TapeInput::shared(&x), &skip).unwrap().map;
            let seeds = vec![(&y, whole(y.shape(), seed + 1))];
            let gone = match together {
                true => tape.backward_unsettled(seeds, grads),
                false => tape.backward(seeds, grads),
            };
            gone.unwrap();
        };
        let [mut apart, mut together, mut other] = [(); 3].map(|()| ParamGrads::new(4));
        [4, 6, 8].into_iter().for_each(|seed| back(seed, false, &mut apart));
        [4, 6].into_iter().for_each(|seed| back(seed, true, &mut together));
        assert!(together.get(0).is_none() && together.composed.len() == 1);
        back(8, true, &mut other);
        together.add_all(other).unwrap();
        together.settle(&device).unwrap();
        for id in 0..4 {
            let gradient = together.get(id).unwrap();
            assert_eq!(gradient, apart.get(id).unwrap(), "parameter {id}");
            assert!(gradient.iter().any(|g| *g != 0.0), "parameter {id}");
        }
    }

    /// Sums are computed where gradients are, in float32, whatever type these come in and whatever
    /// else owns them.
    #[cfg(feature = "emulator")]
    #[test]
    fn gradients_are_added_up_on_their_device() {
        use crate::device::{Cpu, Cuda};
        let cuda = Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0);
        let filled = |dtype: DType, value: f32| {
            let memory = Tensor::from(vec![value; 9]).to_device(&cuda, dtype).unwrap();
            Tensor::from_device([9], memory, dtype)
        };
        for dtype in [DType::F16, DType::F32] {
            let (first, second) = (filled(dtype, 1.5), filled(dtype, 2.0));
            let mut grads = ParamGrads::new(1);
            let before = cuda.transfers();
            for gradient in [&first, &second, &second] {
                grads.add(0, gradient.clone()).unwrap();
            }
            assert_eq!(cuda.transfers(), before, "{dtype}: it took the way over the host");
            let sum = grads.tensor(0).unwrap();
            assert_eq!((sum.device_type(), sum.data()), (Some(DType::F32), &[5.5; 9][..]));
            assert_eq!((first.data(), second.data()), (&[1.5; 9][..], &[2.0; 9][..]));
        }
    }
}
