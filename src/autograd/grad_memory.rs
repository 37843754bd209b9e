//! Memory in which recorded backward passes add up the gradients of parameters.

use super::{Composed, ParamGrads};
use crate::device::cuda::Memory;
use crate::device::{Cuda, DType};
use crate::tensor::{OpError, Param, Tensor};
use std::sync::Arc;

/// Sums begin at multiples of this many floats.
const ALIGN: usize = 64;

/// Memory for the gradients of a network's parameters on a CUDA device: at the same addresses in
/// every step, because recorded work adds to it. A step begins with negative zeros there, to which
/// a first gradient is added without a change of any bit.
pub(crate) struct GradMemory {
    cuda: Cuda,
    all: Arc<Memory>,
    zeros: Arc<Memory>,
    /// The place of each parameter's sum, if it has one.
    sums: Vec<Option<Place>>,
    composed: Vec<(u64, [Param; 2], Place)>,
}

/// Where a sum is.
struct Place {
    byte: usize,
    shape: Vec<usize>,
}

/// The sums that a piece of recorded work adds to: the numbers of parameters, and those of composed
/// weights in their memory's list.
pub(crate) struct Reached {
    sums: Vec<usize>,
    composed: Vec<usize>,
}

impl GradMemory {
    /// Memory for the sums that a step of the network has: those of `grads`, settled or not.
    pub(crate) fn like(cuda: &Cuda, grads: &ParamGrads) -> Result<GradMemory, OpError> {
        let mut bytes = 0;
        let mut place = |shape: &[usize]| {
            let (byte, count) = (bytes, shape.iter().product::<usize>());
            bytes += 4 * count.next_multiple_of(ALIGN);
            Place { byte, shape: shape.to_vec() }
        };
        let mut sums = vec![];
        for sum in &grads.sums {
            sums.push(sum.as_ref().map(|sum| place(sum.shape())));
        }
        let mut composed = vec![];
        for Composed { stage, gradient, of } in &grads.composed {
            composed.push((*stage, of.clone(), place(gradient.shape())));
        }
        for (stage, of, shape) in grads.settled.iter().flatten() {
            if !composed.iter().any(|known: &(u64, _, _)| known.0 == *stage) {
                composed.push((*stage, of.clone(), place(shape)));
            }
        }
        let [all, zeros] = [cuda.allocate_bytes(bytes)?, cuda.allocate_bytes(bytes)?];
        cuda.upload_written(&zeros, bytes, |to| {
            to.as_chunks_mut::<4>().0.fill((-0.0f32).to_ne_bytes());
        })?;
        Ok(GradMemory { cuda: cuda.clone(), all, zeros, sums, composed })
    }

    /// Forgets what was added up.
    pub(crate) fn clear(&self) -> Result<(), OpError> {
        Ok(self.cuda.copy(&self.zeros, 0, &self.all, 0, self.all.bytes())?)
    }

    fn place(&self, id: usize) -> Option<&Place> {
        self.sums.get(id)?.as_ref()
    }

    /// The sum of parameter `id`, if it has one here.
    pub(super) fn sum(&self, id: usize) -> Option<Tensor> {
        self.place(id).map(|place| self.at(place))
    }

    /// The sum of the gradients of what a stage composed, if it has one here.
    pub(super) fn composed(&self, stage: u64) -> Option<Tensor> {
        self.composed.iter().find(|known| known.0 == stage).map(|(_, _, place)| self.at(place))
    }

    fn at(&self, place: &Place) -> Tensor {
        let count: usize = place.shape.iter().product();
        let memory = self.all.part(place.byte, 4 * count);
        Tensor::from_device(place.shape.clone(), memory, DType::F32)
    }

    /// Whether a sum is in the place that it has here.
    fn keeps(&self, place: &Place, sum: &Tensor) -> Result<bool, OpError> {
        let count: usize = place.shape.iter().product();
        let address = self.all.address() + place.byte as u64;
        Ok(sum.is_f32_on(&self.cuda)
            && sum.len() == count
            && sum.to_device(&self.cuda, DType::F32)?.address() == address)
    }
}

fn elsewhere(what: &str) -> OpError {
    let message = format!("{what} is not in the memory that recorded work adds to");
    OpError::Argument { op: "backward", message }
}

impl ParamGrads {
    /// No gradients yet; their sums will be in `memory`, as far as that has a place for them.
    pub(crate) fn within(memory: &Arc<GradMemory>) -> ParamGrads {
        let count = memory.sums.len();
        ParamGrads { memory: Some(memory.clone()), ..ParamGrads::new(count) }
    }

    /// Whether recorded work adds to these sums.
    pub(crate) fn is_within(&self, memory: &Arc<GradMemory>) -> bool {
        self.memory.as_ref().is_some_and(|own| Arc::ptr_eq(own, memory))
    }

    /// The sums that were added to.
    ///
    /// # Errors
    /// Not all of them are in the memory that recorded work adds to.
    pub(crate) fn reached(&self) -> Result<Reached, OpError> {
        let Some(memory) = &self.memory else { return Err(elsewhere("no gradient")) };
        let mut reached = Reached { sums: vec![], composed: vec![] };
        for (id, sum) in self.sums.iter().enumerate() {
            let Some(sum) = sum else { continue };
            match memory.place(id) {
                Some(place) if memory.keeps(place, sum)? => reached.sums.push(id),
                _ => return Err(elsewhere(&format!("the gradient of parameter {id}"))),
            }
        }
        for Composed { stage, gradient, .. } in &self.composed {
            let at = memory.composed.iter().position(|known| known.0 == *stage);
            match at {
                Some(at) if memory.keeps(&memory.composed[at].2, gradient)? => {
                    reached.composed.push(at);
                }
                _ => return Err(elsewhere("the gradient of composed weights")),
            }
        }
        Ok(reached)
    }

    /// Takes note of what recorded work added.
    ///
    /// # Errors
    /// A sum has left the memory to which it was added.
    pub(crate) fn replayed(&mut self, reached: &Reached) -> Result<(), OpError> {
        let Some(memory) = self.memory.clone() else { return Err(elsewhere("no gradient")) };
        for &id in &reached.sums {
            let what = || elsewhere(&format!("the gradient of parameter {id}"));
            let place = memory.place(id).ok_or_else(what)?;
            let so_far = self.sums[id].as_ref().map(|sum| memory.keeps(place, sum)).transpose()?;
            match so_far {
                Some(true) => {}
                Some(false) => return Err(what()),
                None => self.put(id, Some(memory.at(place))),
            }
            self.touched.push(id);
        }
        for &at in &reached.composed {
            let (stage, of, place) = &memory.composed[at];
            let known = self.composed.iter().find(|known| known.stage == *stage);
            match known.map(|known| memory.keeps(place, &known.gradient)).transpose()? {
                Some(true) => {}
                Some(false) => return Err(elsewhere("the gradient of composed weights")),
                None => {
                    let gradient = memory.at(place);
                    self.composed.push(Composed { stage: *stage, gradient, of: of.clone() });
                }
            }
        }
        Ok(())
    }
}
