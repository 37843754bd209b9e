//! Showing what is being done, and how long it takes.

use crate::cli::quiet;
use crate::message;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Shows on a terminal what is being done, and remembers how long each stage took.
pub(super) struct Stages {
    pub(super) bar: ProgressBar,
    pub(super) done: Vec<(&'static str, f64)>,
    start: Instant,
}

impl Stages {
    pub(super) fn new() -> Stages {
        let bar = if quiet() { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        bar.set_style(
            ProgressStyle::with_template("{spinner} {msg} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner()),
        );
        // It takes a thread, which would be wasted without a terminal to show it on.
        if std::io::stderr().is_terminal() && !quiet() {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Stages { bar, done: vec![], start: Instant::now() }
    }

    pub(super) fn begin(&mut self, what: String) {
        self.bar.set_message(message::shown(&what).into_owned());
        self.start = Instant::now();
    }

    pub(super) fn end(&mut self, name: &'static str) {
        self.add(name, self.start.elapsed());
    }

    pub(super) fn add(&mut self, name: &'static str, time: Duration) {
        match self.done.iter_mut().find(|(n, _)| *n == name) {
            Some((_, sum)) => *sum += time.as_secs_f64(),
            None => self.done.push((name, time.as_secs_f64())),
        }
    }

    /// Adds the times of several stages, each to the stage of its name.
    pub(super) fn add_all<const N: usize>(
        &mut self,
        names: [&'static str; N],
        times: [Duration; N],
    ) {
        names.into_iter().zip(times).for_each(|(name, time)| self.add(name, time));
    }
}
