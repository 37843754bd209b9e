//! Runs of the program, as its users type them.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// Flags that make a training one short step.
pub const ONE_STEP: &str = "--epochs 1 --steps 1 --batch 1 --iterations 1 --validation-cases 0";

/// A command of the program with its arguments.
#[derive(Debug)]
pub struct Run(pub Command);

/// `prism WORDS`.
pub fn prism(words: &str) -> Run {
    Run(Command::new(env!("CARGO_BIN_EXE_prism"))).with(words)
}

/// `prism segment`: a mask of an image by a model.
pub fn segment(model: &Path, image: &Path, mask: &Path) -> Run {
    prism("segment").file("-m", model).file("-i", image).file("-o", mask)
}

/// `prism eval`: results of a model on data, in a folder.
pub fn eval(model: &Path, data: &Path, out: &Path) -> Run {
    prism("eval").file("-m", model).file("-d", data).file("-o", out)
}

/// `prism train`: a run in a folder, starting from a model.
pub fn train(init: &Path, out: &Path) -> Run {
    prism("train").file("--init", init).file("--out", out)
}

/// `prism simulate`: prompts for a labelled image, in a folder.
pub fn simulate(image: &Path, label: &Path, out: &Path) -> Run {
    prism("simulate").file("-i", image).file("-l", label).file("-o", out)
}

/// `prism metrics`: how a mask compares with the truth.
pub fn metrics(truth: &Path, prediction: &Path) -> Run {
    prism("metrics").file("--truth", truth).file("--prediction", prediction)
}

impl Run {
    /// Adds arguments that are separated by blanks.
    pub fn with(mut self, words: &str) -> Run {
        self.0.args(words.split_whitespace());
        self
    }

    /// Adds one argument, which may have blanks in it.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Run {
        self.0.arg(argument);
        self
    }

    /// Adds a flag and the file that it names.
    pub fn file(self, flag: &str, file: impl AsRef<OsStr>) -> Run {
        self.arg(flag).arg(file)
    }

    /// Runs it to its end.
    pub fn output(&mut self) -> Output {
        self.0.output().unwrap()
    }

    /// Starts it; its output is captured.
    pub fn start(&mut self) -> Child {
        self.0.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}
