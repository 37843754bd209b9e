//! The model that a command uses: the one it was given, otherwise the first that is found.

use super::{Failure, note, warn};
use crate::checksum;
use crate::model::Weights;
use crate::model::weights::WeightsError;
use clap::Args;
use std::fmt;
use std::path::{Path, PathBuf};

/// The small model, in a program that was built with it.
#[cfg(feature = "model")]
const BUILT_IN: Option<&[u8]> = Some(include_bytes!("../../models/small.safetensors"));
#[cfg(not(feature = "model"))]
const BUILT_IN: Option<&[u8]> = None;

/// The variable that names a model.
const VARIABLE: &str = "PRISM_MODEL";
/// The path of the small model in prism's repository, where it is also looked for.
const SMALL: &str = "models/small.safetensors";

#[derive(Args)]
pub struct ModelArgs {
    /// Model file (.safetensors) [default: the file named by the variable PRISM_MODEL; else the
    /// small model, if it is built into the program; else models/small.safetensors beside the
    /// program or in the working directory]
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
}

/// A model that a command uses.
#[derive(Debug, PartialEq)]
pub enum Chosen {
    File(PathBuf),
    BuiltIn(&'static [u8]),
}

impl ModelArgs {
    /// The model; if it was not named, a line on standard error says which it is.
    pub fn choose(&self) -> Result<Chosen, Failure> {
        let variable = std::env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        let beside =
            std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join(SMALL)));
        let places: Vec<PathBuf> = beside.into_iter().chain([SMALL.into()]).collect();
        let chosen =
            choose(self.model.clone(), variable, BUILT_IN, &places).map_err(Failure::Usage)?;
        if self.model.is_none() {
            note(&format!("model: {chosen}"));
        }
        Ok(chosen)
    }
}

/// The given model, otherwise the variable's, otherwise the built-in one, otherwise the first of
/// `places` that is a file.
fn choose(
    given: Option<PathBuf>,
    variable: Option<PathBuf>,
    built_in: Option<&'static [u8]>,
    places: &[PathBuf],
) -> Result<Chosen, String> {
    let named = given.or(variable).map(Chosen::File).or(built_in.map(Chosen::BuiltIn));
    named.or_else(|| places.iter().find(|p| p.is_file()).cloned().map(Chosen::File)).ok_or_else(|| {
        format!(
            "no model: give --model FILE or the variable {VARIABLE}, or put {SMALL} beside the program or in the working directory. \
             prism's repository has the small model there; 'cargo install --path . --locked --features model' builds it into the program"
        )
    })
}

impl Chosen {
    /// Reads it, and warns if it carries no hash.
    pub fn open(&self) -> Result<Weights, WeightsError> {
        let weights = self.read()?;
        weights.warning(self).iter().for_each(|w| warn(w));
        Ok(weights)
    }

    /// Reads it, and leaves a warning to the caller.
    pub fn read(&self) -> Result<Weights, WeightsError> {
        match self {
            Chosen::File(path) => Weights::open(path),
            Chosen::BuiltIn(bytes) => Weights::from_bytes(bytes),
        }
    }

    /// The path of the model, if it is a file.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Chosen::File(path) => Some(path),
            Chosen::BuiltIn(_) => None,
        }
    }

    /// The hash of its bytes, as hexadecimal text.
    pub fn hash(&self) -> Result<String, Failure> {
        match self {
            Chosen::File(path) => checksum::of_file(path)
                .map_err(|e| Failure::Failed(format!("{}: {e}", path.display()))),
            Chosen::BuiltIn(bytes) => Ok(blake3::hash(bytes).to_string()),
        }
    }
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Chosen::File(path) => write!(f, "{}", path.display()),
            Chosen::BuiltIn(_) => f.write_str("the small model built into the program"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_the_one_given_or_named_or_built_in_or_found() {
        let folder = tempfile::tempdir().unwrap();
        let (absent, there) = (folder.path().join("absent"), folder.path().join("there"));
        std::fs::write(&there, "a model").unwrap();
        let file = |name: &str| Some(PathBuf::from(name));
        let built_in: Option<&'static [u8]> = Some(b"a model");
        let places = [absent.clone(), there.clone()];
        assert_eq!(
            choose(file("given"), file("named"), built_in, &places),
            Ok(Chosen::File("given".into()))
        );
        assert_eq!(
            choose(None, file("named"), built_in, &places),
            Ok(Chosen::File("named".into()))
        );
        assert_eq!(choose(None, None, built_in, &places), Ok(Chosen::BuiltIn(b"a model")));
        assert_eq!(choose(None, None, None, &places), Ok(Chosen::File(there.clone())));
        // For results that are keyed by its hash, the same bytes are the same model.
        assert_eq!(Chosen::File(there).hash().ok(), Chosen::BuiltIn(b"a model").hash().ok());
        let message = choose(None, None, None, &[absent]).unwrap_err();
        assert!(
            [VARIABLE, "--model", SMALL, "--features model"]
                .iter()
                .all(|way| message.contains(way)),
            "{message}"
        );
    }
}
