//! Clients and servers written by others, run by Python in the versions that `tests/clients` pins.
#![allow(dead_code)]

use super::common::{here, skipped};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Python with the packages of a list, `tests/clients/NAME.txt`, for the script beside it.
pub struct Python {
    name: &'static str,
    packages: PathBuf,
}

impl Python {
    /// Fetches the packages if they are missing or differ; none, with a message, if they cannot be
    /// fetched. `import` is what must work with them.
    pub fn with(name: &'static str, import: &str) -> Option<Python> {
        let required = std::env::var_os("PRISM_TEST_TOOLS").is_some_and(|v| v == "required");
        let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("client-{name}"));
        let python = Python { name, packages };
        if !python.is_there(import) {
            python.fetch();
        }
        if !python.is_there(import) {
            let why =
                format!("what {} names cannot be had on this machine", python.list().display());
            assert!(!required, "{why}");
            skipped(&why);
            return None;
        }
        Some(python)
    }

    fn list(&self) -> PathBuf {
        here("tests/clients").join(format!("{}.txt", self.name))
    }

    /// The list that was fetched completely, stored beside its packages.
    fn fetched(&self) -> PathBuf {
        self.packages.join("fetched.txt")
    }

    fn is_there(&self, import: &str) -> bool {
        let list = std::fs::read(self.list()).unwrap();
        std::fs::read(self.fetched()).is_ok_and(|fetched| fetched == list)
            && self.run(&["-c", import]).is_some_and(|out| out.status.success())
    }

    fn fetch(&self) {
        // What is there was fetched from another list, by another Python, or only in part.
        let _ = std::fs::remove_dir_all(&self.packages);
        let (list, to) = (self.list(), self.packages.to_str().unwrap());
        let quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        let pinned = ["--no-deps", "--target", to, "--requirement", list.to_str().unwrap()];
        let done = self.run(&[&quiet[..], &pinned[..]].concat());
        if done.is_some_and(|out| out.status.success()) {
            std::fs::copy(&list, self.fetched()).unwrap();
        }
    }

    fn run(&self, args: &[&str]) -> Option<Output> {
        let mut command = Command::new("python3");
        // The server is local, whatever proxy is between this machine and others.
        command.args(args).env("PYTHONPATH", &self.packages).env("NO_PROXY", "127.0.0.1");
        command.output().ok()
    }

    /// Runs the script with arguments, the address of a server first.
    #[track_caller]
    pub fn all_is_well(&self, args: &[&str]) {
        let script = here("tests/clients").join(format!("{}.py", self.name));
        let out = self.run(&[&[script.to_str().unwrap()][..], args].concat()).unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success() && said.ends_with("all is well\n"), "{said}{error}");
    }
}
