//! The exchange of a step's gradients: they are added up over all processes while they are still
//! being computed.
//!
//! Parameters are grouped into buckets in an order that is the same in every process: first those
//! that the backward pass through the encoder does not change, then the others from the encoder's
//! end to its beginning, as that pass reaches them. A bucket is sent once all of its gradients are
//! final and the one before it was sent; on a GPU its sum runs in parallel with the rest of the
//! backward pass.

use super::peers::{Peers, op_error};
use crate::autograd::ParamGrads;
use crate::device::cuda::Memory;
use crate::device::{Cuda, DType, Device};
use crate::memory;
use crate::model::Config;
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// The fewest values of a bucket: 32 MB.
const BUCKET: usize = 8 << 20;

/// The name of the sums of gradients in refusals of memory.
const GRADIENTS: &str = "sums of gradients";

/// The order in which a network's gradients are exchanged, in groups that are sent together.
pub struct Buckets {
    lists: Vec<Vec<usize>>,
    shapes: Vec<Vec<usize>>,
}

impl Buckets {
    /// The buckets of a network's parameters.
    pub fn new(config: &Config) -> Buckets {
        Buckets::of(config, BUCKET)
    }

    fn of(config: &Config, least: usize) -> Buckets {
        let tensors = config.tensors();
        let mut lists =
            vec![(0..tensors.len()).filter(|&id| !late(&tensors[id].0)).collect::<Vec<_>>()];
        let (mut list, mut values) = (vec![], 0);
        for (id, (name, shape)) in tensors.iter().enumerate().rev() {
            if !late(name) {
                continue;
            }
            list.push(id);
            values += shape.iter().product::<usize>();
            if values >= least {
                lists.push(std::mem::take(&mut list));
                values = 0;
            }
        }
        lists.push(list);
        lists.retain(|l| !l.is_empty());
        Buckets { lists, shapes: tensors.into_iter().map(|(_, shape)| shape).collect() }
    }
}

/// Whether the backward pass through the encoder computes this parameter's gradient, or a part of
/// it: that of the encoder's own parameters, and of those of a decoder stage from which its skip
/// map is made. A bias before a norm has no gradient: a bucket that waited for it would wait until
/// the end.
fn late(name: &str) -> bool {
    let of_skip_map = [".upsample.deconv.bias", ".convs.conv_0.conv.weight"];
    name.starts_with("image_encoder.") && !name.ends_with(".conv.bias")
        || name.starts_with("mask_decoder.decoder.")
            && of_skip_map.iter().any(|end| name.ends_with(end))
}

/// The exchange of one step's gradients.
pub struct Exchange<'a> {
    peers: &'a Peers,
    device: &'a Device,
    buckets: &'a Buckets,
    /// The number of buckets that were sent.
    sent: usize,
    last: Vec<bool>,
    /// Which parameters were in the buckets that were sent.
    gone: Vec<bool>,
    /// Which parameters have a gradient in this process.
    here: Vec<f32>,
}

impl<'a> Exchange<'a> {
    /// An exchange in which nothing has been sent yet.
    pub fn new(peers: &'a Peers, device: &'a Device, buckets: &'a Buckets) -> Exchange<'a> {
        let count = buckets.shapes.len();
        Exchange {
            peers,
            device,
            buckets,
            sent: 0,
            last: vec![false; count],
            gone: vec![false; count],
            here: vec![0.0; count],
        }
    }

    /// Whether other processes have been sent something, or wait for it: then the step cannot be
    /// begun again.
    pub fn has_begun(&self) -> bool {
        self.sent > 0 && (self.peers.world() > 1 || self.peers.group(self.device).is_some())
    }

    /// Sends the first bucket. To be called once the backward passes of all iterations of this
    /// step's last item are done: only the encoder's gradients still change.
    ///
    /// # Errors
    /// Another process is lost, or the device fails.
    pub fn interactions_done(&mut self, grads: &mut ParamGrads) -> Result<(), OpError> {
        grads.touched();
        self.send(grads)
    }

    /// Sends the buckets that are final. To be called after each op of the backward pass through
    /// the last item's encoder: what it has added to does not change any more.
    ///
    /// # Errors
    /// Another process is lost, the device fails, or a gradient changed that was sent already.
    pub fn encoder_reached(&mut self, grads: &mut ParamGrads) -> Result<(), OpError> {
        for id in grads.touched() {
            if self.gone[id] {
                let message = format!("a gradient of parameter {id}, whose sum is already formed");
                return Err(OpError::Argument { op: "exchange", message });
            }
            self.last[id] = true;
        }
        while self
            .buckets
            .lists
            .get(self.sent)
            .is_some_and(|list| list.iter().all(|&id| self.last[id]))
        {
            self.send(grads)?;
        }
        Ok(())
    }

    /// Sends the rest, and waits for the sums, which replace the gradients in `grads`. To be called
    /// when all gradients are final. A parameter has none afterwards if it has none in any process.
    ///
    /// # Errors
    /// Another process is lost, or the device fails.
    pub fn finish(mut self, grads: &mut ParamGrads) -> Result<(), String> {
        let fail = |e: OpError| e.to_string();
        while self.sent < self.buckets.lists.len() {
            self.send(grads).map_err(fail)?;
        }
        if let Some(cuda) = self.peers.group(self.device) {
            cuda.finish_group_sums().map_err(|e| e.to_string())?;
        }
        self.peers.sum(&mut self.here)?;
        (0..self.here.len()).filter(|&id| self.here[id] == 0.0).for_each(|id| grads.put(id, None));
        Ok(())
    }

    fn send(&mut self, grads: &mut ParamGrads) -> Result<(), OpError> {
        let list = &self.buckets.lists[self.sent];
        self.sent += 1;
        list.iter().for_each(|&id| self.gone[id] = true);
        if self.peers.world() == 1 && self.peers.group(self.device).is_none() {
            list.iter()
                .for_each(|&id| self.here[id] = f32::from(u8::from(grads.tensor(id).is_some())));
            return Ok(());
        }
        let shape = |id: usize| self.buckets.shapes[id].clone();
        for &id in list {
            self.here[id] = f32::from(u8::from(grads.tensor(id).is_some()));
        }
        if let Some(cuda) = self.peers.group(self.device) {
            let arrays = list
                .iter()
                .map(|&id| own(cuda, grads.take(id), shape(id).iter().product()))
                .collect::<Result<Vec<_>, _>>()?;
            cuda.sum_over_group(&arrays)?;
            for (&id, memory) in list.iter().zip(arrays) {
                grads.put(id, Some(Tensor::from_device(shape(id), memory, DType::F32)));
            }
            return Ok(());
        }
        let length = |id: usize| self.buckets.shapes[id].iter().product::<usize>();
        let mut values = memory::zeroed::<f32>(GRADIENTS, list.iter().map(|&id| length(id)).sum());
        let mut at = 0;
        for &id in list {
            if let Some(gradient) = grads.tensor(id) {
                values[at..at + length(id)].copy_from_slice(gradient.try_data()?);
            }
            at += length(id);
        }
        self.peers.sum(&mut values).map_err(op_error)?;
        let mut at = 0;
        for &id in list {
            let gradient = memory::copied(GRADIENTS, &values[at..at + length(id)]);
            grads.put(id, Some(Tensor::new(shape(id), gradient)));
            at += length(id);
        }
        Ok(())
    }
}

/// A gradient's values in memory that a sum may overwrite; zeros if there is none.
fn own(cuda: &Cuda, gradient: Option<Tensor>, count: usize) -> Result<Arc<Memory>, OpError> {
    let Some(mut gradient) = gradient else {
        let memory = cuda.allocate(count, DType::F32)?;
        cuda.clear(&memory)?;
        return Ok(memory);
    };
    if gradient.device_type() == Some(DType::F32) && gradient.is_unique() {
        return Ok(gradient.to_device(cuda, DType::F32)?);
    }
    let (from, to) = (gradient.to_device(cuda, DType::F32)?, cuda.allocate(count, DType::F32)?);
    cuda.copy(&from, 0, &to, 0, count * 4)?;
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Encoder, Model, PatchPrompts, Weights};
    use crate::ops::loss::{KERNEL, Target};
    use crate::train::step::{LossWeights, Rerun, Round, Share, run_item_sharing};

    #[test]
    fn every_parameter_is_in_one_bucket() {
        let config = Config::preset("base").unwrap();
        let buckets = Buckets::new(&config);
        let mut all: Vec<usize> = buckets.lists.iter().flatten().copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..config.tensors().len()).collect::<Vec<_>>());
        // The encoder's 95 million values are in several buckets, so that their sums do not wait
        // for the last.
        assert!((8..20).contains(&buckets.lists.len()), "{}", buckets.lists.len());
    }

    /// All buckets are sent during the backward pass through the encoder, the last by its last
    /// step, and each with all the gradients that its parameters get.
    #[test]
    fn buckets_are_sent_while_the_encoder_goes_back() {
        let device = Device::open("cpu", 2).unwrap();
        for encoder in [Encoder::Hybrid, Encoder::Vit, Encoder::Cnn] {
            let config = Config { encoder, ..Config::tiny() };
            let (s, names) = (config.patch, config.tensors());
            let model = Model::new(&device, &Weights::hashed(config.clone(), "buckets")).unwrap();
            let image: Vec<f32> =
                (0..s * s * s).map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect();
            let label = image.iter().map(|v| f32::from(u8::from(*v > 0.0))).collect();
            let target = Target::new(&device, label, [s; 3], KERNEL).unwrap();
            let share = Share {
                weights: LossWeights::default(),
                iterations: 1,
                batch: 1,
                recompute: Rerun::Fast,
                scale: 1.0,
            };
            // One parameter per bucket: none is hidden by others.
            let (peers, buckets) = (Peers::alone(), Buckets::of(&config, 1));
            let mut exchange = Exchange::new(&peers, &device, &buckets);
            let mut grads = ParamGrads::new(names.len());
            let prompt = |_: usize, _: Option<&Tensor>| {
                let points = vec![([9, 9, 9], true), ([20, 11, 7], false)];
                Ok(Some(Round::from(PatchPrompts { points, bounds: None })))
            };
            let image = Tensor::new([s; 3], image);
            let shared = (&mut grads, Some(&mut exchange));
            run_item_sharing(&device, &model, &image, &target, share, shared, prompt).unwrap();
            let waits = buckets.lists.get(exchange.sent).map(|list| &names[list[0]].0);
            assert_eq!(waits, None, "{encoder:?}: what comes behind waits for it");
            for (id, (name, _)) in names.iter().enumerate() {
                let here = exchange.here[id] == 1.0;
                assert_eq!(here, grads.tensor(id).is_some(), "{encoder:?}: {name}");
            }
        }
    }
}
