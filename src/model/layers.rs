//! Parts that several places of the network share: convolution with norm, channel LayerNorm, small
//! dense stacks.

use super::weights::Weights;
use crate::autograd::{Conv, Normed, Tape, TapeInput, TokenLayer, Var};
use crate::device::Device;
use crate::ops::conv3d::{ConvOutput, Epilogue};
use crate::ops::linear::Activation;
use crate::tensor::{OpError, Param, Tensor};

/// Negative slope of the network's leaky ReLUs.
const SLOPE: f32 = 0.1;
/// Added to the variance by instance norms, and by layer norms of the two-way transformer.
pub const EPS: f64 = 1e-5;
/// Added to the variance by the layer norms of the image encoder and of the dense prompt.
pub const ENCODER_EPS: f32 = 1e-6;

/// Instance norm's weight and bias.
pub struct InstanceNorm(Param, Param);

impl InstanceNorm {
    pub fn load(w: &Weights, at: &str) -> InstanceNorm {
        InstanceNorm(w.get(&format!("{at}.weight")), w.get(&format!("{at}.bias")))
    }

    /// Attaches the norm over a map's sums, and the leaky ReLU after it.
    pub fn over<'m>(&'m self, tape: &Tape<'m>, output: ConvOutput<Var>) -> Result<Normed, OpError> {
        tape.instance_norm(output, &self.0, &self.1, EPS, SLOPE)
    }
}

/// How a convolution's result is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Every voxel.
    Plain,
    /// The largest of each 2×2×2 voxels.
    Pools,
}

/// 3×3×3 convolution, instance norm, leaky ReLU.
pub struct ConvNorm {
    conv: Conv,
    norm: InstanceNorm,
}

impl ConvNorm {
    /// Loads `{at}.conv` and `{at}.adn.N`.
    pub fn load(device: &Device, w: &Weights, at: &str) -> Result<ConvNorm, OpError> {
        let conv = Conv::new(
            device,
            w.get(&format!("{at}.conv.weight")),
            Some(w.get(&format!("{at}.conv.bias"))),
        )?;
        Ok(ConvNorm { conv, norm: InstanceNorm::load(w, &format!("{at}.adn.N")) })
    }

    pub fn run<'m>(
        &'m self,
        tape: &Tape<'m>,
        x: TapeInput,
        reader: Reader,
    ) -> Result<Normed, OpError> {
        let InstanceNorm(weight, _) = &self.norm;
        let pool: Option<&Tensor> = match reader {
            Reader::Pools => Some(weight),
            Reader::Plain => None,
        };
        self.norm.over(tape, tape.conv3d(x, &self.conv, Epilogue { sums: true, pool })?)
    }

    pub fn bytes(&self) -> usize {
        self.conv.bytes()
    }
}

/// A layer norm's weight and bias.
pub struct LayerNorm {
    pub weight: Param,
    pub bias: Param,
    pub eps: f32,
}

impl LayerNorm {
    pub fn load(w: &Weights, at: &str, eps: f32) -> LayerNorm {
        LayerNorm {
            weight: w.get(&format!("{at}.weight")),
            bias: w.get(&format!("{at}.bias")),
            eps,
        }
    }

    pub fn run<'m>(&'m self, tape: &Tape<'m>, x: &Var) -> Result<Var, OpError> {
        tape.layer_norm(x, &self.weight, &self.bias, self.eps, false)
    }

    /// Weight, bias and epsilon.
    pub fn parts(&self) -> (&Param, &Param, f32) {
        (&self.weight, &self.bias, self.eps)
    }

    /// The norm, then GELU.
    pub fn gelu<'m>(&'m self, tape: &Tape<'m>, x: &Var) -> Result<Var, OpError> {
        tape.layer_norm(x, &self.weight, &self.bias, self.eps, true)
    }
}

/// A dense layer's weight and bias.
pub struct Linear(pub Param, pub Param);

impl Linear {
    pub fn load(w: &Weights, at: &str) -> Linear {
        Linear(w.get(&format!("{at}.weight")), w.get(&format!("{at}.bias")))
    }

    /// This layer as one of several layers of the same rows.
    pub fn layer(&self) -> TokenLayer<'_> {
        TokenLayer { weight: &self.0, bias: &self.1, added: false }
    }
}

/// Dense layers with ReLU between them.
pub struct Mlp(Vec<Linear>);

impl Mlp {
    /// Loads `{at}.layers.0` to `.2`.
    pub fn load(w: &Weights, at: &str) -> Mlp {
        Mlp((0..3).map(|i| Linear::load(w, &format!("{at}.layers.{i}"))).collect())
    }

    /// Several such stacks, each applied to a row of its own: layer by layer.
    pub fn run_rows<'m>(
        mlps: &[&'m Mlp],
        tape: &Tape<'m>,
        mut rows: Vec<Var>,
    ) -> Result<Vec<Var>, OpError> {
        let depth = mlps.first().map_or(0, |mlp| mlp.0.len());
        for i in 0..depth {
            let act = if i + 1 == depth { Activation::None } else { Activation::Relu };
            let mut layers: Vec<(&Var, &'m Param, &'m Param)> = vec![];
            for (x, mlp) in rows.iter().zip(mlps) {
                let Linear(weight, bias) = &mlp.0[i];
                layers.push((x, weight, bias));
            }
            rows = tape.row_linears(&layers, act)?;
        }
        Ok(rows)
    }
}

/// What the network is about to do, for the function that paces it ([`Observer::paced`]).
#[derive(Clone, Copy)]
pub enum Part<'a> {
    /// An op of encoding a patch.
    Encoding,
    /// An op of an interaction.
    Answering,
    /// Nothing: another thread makes what is needed, until this function says that it has finished.
    Elsewhere(&'a dyn Fn() -> bool),
    /// Nothing, and it holds no memory, for it was refused some. If others hold some, the function
    /// may wait until none of them does, and then returns true; false if that would change nothing.
    Alone,
}

/// Watches the network at work: its progress, which it may cancel; its intermediate results, for
/// verification and debugging; or it paces the network. [`Observer::none`] costs nothing.
///
/// Its function is called on the thread that runs the network, between ops.
pub struct Observer<'a>(Watch<'a>);

/// The function that an observer calls.
enum Watch<'a> {
    Nobody,
    Results(&'a mut dyn FnMut(&str, &Tensor)),
    Steps(&'a mut dyn FnMut(usize, &str) -> bool, Told),
    /// Paces the network: the part of the work that is being done stands beside the function.
    Pace(&'a mut dyn FnMut(Part<'_>) -> bool, Part<'static>),
}

/// The stages that were done, and those that were told.
#[derive(Default)]
struct Told {
    /// How many are done at present: fewer than before when something is done again.
    done: usize,
    /// The most that were done at any time, and the name of the last of them.
    most: usize,
    last: String,
    /// How many were done to encode patches that are kept: in this attempt, and in those before as
    /// far as this one has not met these patches.
    kept: [usize; 2],
}

impl<'a> Observer<'a> {
    /// An observer that does nothing.
    pub fn none() -> Observer<'a> {
        Observer(Watch::Nobody)
    }

    /// Calls `f(name, tensor)` with the result of every stage, such as `image_embedding` or
    /// `refined`; maps are channels last. On a CUDA device the network then runs op by op, which
    /// takes longer.
    pub fn new(f: &'a mut dyn FnMut(&str, &Tensor)) -> Observer<'a> {
        Observer(Watch::Results(f))
    }

    /// Calls `f(done, name)` as each stage is done: how many are done, and the last one's name
    /// ([`super::Model::steps`] tells how many there are). If it returns false, the work ends with
    /// [`OpError::Cancelled`]. What is done again, because memory was refused, is not told again:
    /// `f` is called with what it was told last, so that it can still end the work. A CUDA device
    /// does all of encoding, and all of an interaction, as one step.
    pub fn steps(f: &'a mut dyn FnMut(usize, &str) -> bool) -> Observer<'a> {
        Observer(Watch::Steps(f, Told::default()))
    }

    /// Calls `f` before each of the network's ops, on the thread that runs them. It may wait there
    /// while other threads use the device: only memory is held. If it returns false, the work ends
    /// with [`OpError::Cancelled`]. On a CUDA device all of encoding, and all of an interaction, is
    /// one op. It is also asked where memory was refused ([`Part::Alone`]).
    pub fn paced(f: &'a mut dyn FnMut(Part<'_>) -> bool) -> Observer<'a> {
        Observer(Watch::Pace(f, Part::Answering))
    }

    /// Sets what is done from here on.
    pub(crate) fn begin(&mut self, part: Part<'static>) -> Result<(), OpError> {
        if let Watch::Pace(_, now) = &mut self.0 {
            *now = part;
        }
        self.between()
    }

    /// Called between two ops: the pacing function may wait here, or end the work.
    pub(super) fn between(&mut self) -> Result<(), OpError> {
        match &mut self.0 {
            Watch::Pace(f, now) => goes_on(f(*now)),
            _ => Ok(()),
        }
    }

    /// Waits for what another thread makes, if the observer can wait; otherwise returns false.
    pub(crate) fn elsewhere(&mut self, is_over: &dyn Fn() -> bool) -> Result<bool, OpError> {
        match &mut self.0 {
            Watch::Pace(f, _) => goes_on(f(Part::Elsewhere(is_over))).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Where memory was refused, and none is held: waits until no other work holds any, if the
    /// observer can wait for that. False if that would change nothing.
    ///
    /// # Errors
    /// [`OpError::Cancelled`] if the work is to end.
    pub(crate) fn alone(&mut self) -> Result<bool, OpError> {
        let Watch::Pace(f, _) = &mut self.0 else { return Ok(false) };
        if f(Part::Alone) {
            return Ok(true);
        }
        // It may also have been told to end.
        goes_on(f(Part::Answering)).map(|()| false)
    }

    /// How many stages are done, for [`Observer::again`].
    pub(crate) fn done(&self) -> usize {
        match &self.0 {
            Watch::Steps(_, told) => told.done,
            _ => 0,
        }
    }

    /// What was done after so many stages is done again from there on.
    pub(crate) fn again(&mut self, done: usize) {
        if let Watch::Steps(_, told) = &mut self.0 {
            told.done = done;
            told.kept = [0, told.kept[0] + told.kept[1]];
        }
    }

    /// So many stages need not be done again: the patch that they encoded is kept.
    pub(crate) fn keep(&mut self, stages: usize) {
        if let Watch::Steps(_, told) = &mut self.0 {
            told.kept[0] += stages;
        }
    }

    /// A patch is there, which it takes so many stages to encode: they count as done if an attempt
    /// before did them.
    pub(crate) fn skip(&mut self, stages: usize) {
        if let Watch::Steps(_, told) = &mut self.0
            && told.kept[1] >= stages
        {
            told.kept = [told.kept[0] + stages, told.kept[1] - stages];
            told.done += stages;
        }
    }

    /// Whether the observer wants results.
    pub(super) fn wants_results(&self) -> bool {
        matches!(self.0, Watch::Results(_))
    }

    pub(super) fn see(
        &mut self,
        name: &str,
        value: impl FnOnce() -> Result<Tensor, OpError>,
    ) -> Result<(), OpError> {
        match &mut self.0 {
            Watch::Nobody => {}
            Watch::Results(f) => f(name, &value()?),
            Watch::Steps(f, told) => {
                told.done += 1;
                if told.done > told.most {
                    told.most = told.done;
                    told.last = name.to_string();
                }
                goes_on(f(told.most, &told.last))?
            }
            Watch::Pace(f, now) => goes_on(f(*now))?,
        }
        Ok(())
    }
}

/// An error unless the work is to go on.
fn goes_on(does: bool) -> Result<(), OpError> {
    if does { Ok(()) } else { Err(OpError::Cancelled) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_that_are_done_again_are_told_as_the_last_one() {
        let mut told = vec![];
        let mut note = |done: usize, name: &str| {
            told.push((done, name.to_string()));
            true
        };
        let mut observer = Observer::steps(&mut note);
        let see = |observer: &mut Observer, names: [&str; 2]| {
            for name in names {
                observer.see(name, || unreachable!("only progress is watched")).unwrap();
            }
        };
        // A patch is encoded and kept, and memory refused behind it: the second attempt finds it.
        see(&mut observer, ["encoded", "joined"]);
        observer.keep(2);
        see(&mut observer, ["tokens", "masks"]);
        observer.again(0);
        observer.skip(2);
        see(&mut observer, ["tokens", "masks"]);
        // So does the third one, and another patch was there from the beginning.
        observer.again(0);
        observer.skip(2);
        observer.skip(2);
        see(&mut observer, ["tokens", "masks"]);
        see(&mut observer, ["refined", "answered"]);
        let numbers: Vec<usize> = told.iter().map(|(done, _)| *done).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 4, 4, 4, 4, 5, 6]);
        assert_eq!(told[6].1, "masks");
    }
}
