//! What a run keeps in its folder: the log, the state, and the weights as model files.

use crate::model::Weights;
use crate::model::weights::Precision;
use crate::output::write_text;
use crate::train::curves;
use crate::train::state::State;
use serde::Serialize;
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// The run's log, one JSON object per line.
pub(super) struct Log(std::io::BufWriter<std::fs::File>);

impl Log {
    /// Opens the log to continue after `step` steps: later entries, by a run that did not save, are
    /// dropped, and so is that of a validation after the last step if that is still to be made.
    pub(super) fn open(path: &Path, step: usize, unvalidated: bool) -> Result<Log, String> {
        let fail = |e: std::io::Error| format!("{}: {e}", path.display());
        let text = match std::fs::read_to_string(path) {
            _ if step == 0 => String::new(),
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => {
                return Err(format!(
                    "{}: {e}: expected the log of this run up to step {step}; move it away to go on without it",
                    path.display()
                ));
            }
        };
        let is_kept = |l: &&str| {
            logged(l).is_some_and(|(s, validation)| {
                s < step || s == step && !(validation && unvalidated)
            })
        };
        let kept = text.lines().filter(is_kept);
        write_text(path, &kept.map(|l| format!("{l}\n")).collect::<String>())?;
        let file = std::fs::OpenOptions::new().append(true).open(path).map_err(fail)?;
        Ok(Log(std::io::BufWriter::new(file)))
    }

    pub(super) fn write(&mut self, report: &impl Serialize) -> Result<(), String> {
        writeln!(self.0, "{}", json!(report)).map_err(|e| format!("the log: {e}"))
    }

    /// Makes sure that everything written is on the disk.
    fn sync(&mut self) -> Result<(), String> {
        let synced = self.0.flush().and_then(|()| self.0.get_ref().sync_all());
        synced.map_err(|e| format!("the log: {e}"))
    }
}

/// The step of a line of the log, and whether it is a validation's.
fn logged(line: &str) -> Option<(usize, bool)> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    Some((line["step"].as_u64()? as usize, line["validation"].is_array()))
}

/// Checks a state once for all that is made of it, validation and files: if it could not be opened
/// again, none of them is made.
pub(super) fn check(state: &State, out: &Path) -> Result<(), String> {
    state.check_numbers().map_err(|e| format!("{}: {e}", out.display()))
}

/// Writes the results of a run to disk, in the process that writes, of a state that was checked.
/// The log first: it may contain more than the state, which a resumed run drops, but not less.
pub(super) fn keep(state: &State, log: &mut Option<Log>, out: &Path) -> Result<(), String> {
    let Some(log) = log else { return Ok(()) };
    log.sync()?;
    save(state, out)?;
    curves::draw(out)
}

/// Saves the state, and the weights as a model file.
fn save(state: &State, out: &Path) -> Result<(), String> {
    save_weights(state, &out.join("last.safetensors"))?;
    state.write(&out.join("last.state.safetensors"))
}

/// Saves the weights as a model file.
pub(super) fn save_weights(state: &State, path: &Path) -> Result<(), String> {
    let mut weights = current(state)?;
    // Copied back first: within the file's writer a failure could not be reported.
    for tensor in weights.tensors_mut() {
        tensor.try_data().map_err(|e| format!("{}: {e}", path.display()))?;
    }
    weights.save(path, Precision::F32).map_err(|e| e.to_string())
}

/// The weights that are validated and used: their moving average if there is one.
pub(super) fn current(state: &State) -> Result<Weights, String> {
    let list = state.progress.config.tensors();
    let named = list.into_iter().enumerate().map(|(id, (name, shape))| {
        let tensor = match &state.average {
            Some(average) => average[id].reshape(shape),
            None => (*state.weights.get(&name)).clone(),
        };
        (name, tensor)
    });
    Weights::from_tensors(state.progress.config.clone(), named.collect()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::before_any_step;
    use super::*;
    use crate::model::Config;
    use crate::ops::optimizer::AdamW;
    use crate::tensor::Tensor;
    use crate::train::settings::Given;

    #[test]
    fn a_log_that_cannot_be_read_is_no_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let read = || std::fs::read(&path).unwrap();
        // A run without one goes on.
        drop(Log::open(&path, 2, false).unwrap());
        assert_eq!(read(), b"");
        let [one, three] = [1, 3].map(|step| format!("{}\n", json!({ "step": step })));
        std::fs::write(&path, format!("{one}{three}")).unwrap();
        drop(Log::open(&path, 2, false).unwrap());
        assert_eq!(read(), one.as_bytes());
        // A damaged byte.
        let damaged = [one.as_bytes(), b"\xff\n"].concat();
        std::fs::write(&path, &damaged).unwrap();
        let Err(said) = Log::open(&path, 2, false) else { panic!("it was taken for a log") };
        assert!(said.contains("log.jsonl") && said.contains("expected the log"), "{said}");
        assert_eq!(read(), damaged);
        // Of a run that has done nothing yet nothing is kept.
        drop(Log::open(&path, 0, false).unwrap());
        assert_eq!(read(), b"");
    }

    /// A number that nothing could read again is in no file: what was saved before stays, and the
    /// message names the tensor.
    #[test]
    fn numbers_that_are_none_are_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path();
        let settings = Given { ema: Some(0.9), ..Given::default() }.settings();
        let good = || before_any_step(settings.clone(), Weights::hashed(Config::tiny(), "kept"));
        save(&good(), out).unwrap();
        let files = ["last.safetensors", "last.state.safetensors"].map(|name| out.join(name));
        let read = || files.each_ref().map(|file| std::fs::read(file).unwrap());
        let before = read();
        let list = good().progress.config.tensors();
        let (name, shape) = &list[2];
        for (kind, value) in [
            ("weight", f32::INFINITY),
            ("first", f32::NAN),
            ("second", f32::INFINITY),
            ("second", -1.0),
            ("average", f32::NAN),
        ] {
            let mut state = good();
            let mut values = vec![0.5; shape.iter().product()];
            values[1] = value;
            let odd = Tensor::new(shape.clone(), values);
            match kind {
                "weight" => *state.weights.tensors_mut().swap_remove(2) = odd,
                "average" => state.average.as_mut().unwrap()[2] = odd,
                _ => {
                    let mut moments: Vec<[Tensor; 2]> = state.optimizer.moments().to_vec();
                    moments[2][usize::from(kind == "second")] = odd;
                    state.optimizer = AdamW::resume(settings.optimizer(), moments, 0);
                }
            }
            let named = format!("{kind}/{name} is {value} at element 1: the training has diverged");
            for said in [check(&state, out), state.save(&files[1])] {
                let said = said.unwrap_err();
                assert!(said.contains(&named), "{said}");
            }
            assert!(read() == before, "{kind}");
        }
    }
}
