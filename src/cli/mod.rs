//! The program's commands. Results go to standard output, progress and complaints to standard
//! error; exit codes are 0 done, 1 failed, 2 usage, 128 + n ended by the signal n.

mod bench;
mod challenge;
mod completions;
mod convert;
mod eval;
mod info;
mod man;
mod model;
mod objects;
mod segment;
#[cfg(feature = "serve")]
mod serve;
mod signals;
mod simulate;
mod synth;
mod train;
mod tune;
mod verify;

use crate::device::{Device, Precision, processors};
use crate::memory;
use crate::message;
use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};
use indicatif::ProgressBar;
use signals::on_interrupt;
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Parser)]
#[command(name = "prism", version, about, long_about = None, max_term_width = 100)]
struct Cli {
    /// Memory budget for scans, weights and results, such as 8G; a command that needs more fails
    /// [default: the memory of the machine]
    #[arg(long, global = true, value_name = "SIZE", value_parser = crate::memory::size_of_text)]
    memory: Option<u64>,
    /// Print only results, warnings and errors: no progress, no summary of what was done
    #[arg(short, long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

// What the program does; of each command its arguments say what it is. A comment here would take
// the place of theirs, and `--help` would be no longer than `-h`.
#[derive(Subcommand)]
enum Command {
    Segment(Box<segment::Segment>),
    #[cfg(feature = "serve")]
    Serve(Box<serve::Serve>),
    Challenge(challenge::Challenge),
    Info(info::Info),
    Convert(convert::Convert),
    Weights(convert::HashedWeights),
    Eval(Box<eval::Eval>),
    Metrics(eval::Metrics),
    Simulate(simulate::Simulate),
    Synth(synth::Synth),
    Train(Box<train::Train>),
    Bench(bench::Bench),
    Tune(tune::Tune),
    Verify(verify::Verify),
    Completions(completions::Completions),
    Man(man::Man),
}

/// Where to compute; what is absent has its default.
#[derive(Args, Clone)]
struct DeviceArgs {
    /// Device to compute on: cpu, cuda or cuda:N [default: cpu]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Element type of feature maps on a CUDA device, or of products on the CPU (f32, or bf16 with
    /// AVX512-BF16); tf32 and ieee are float32 with other ways to multiply; sums are always float32
    /// [default: f32]
    #[arg(long, value_name = "TYPE")]
    precision: Option<Precision>,
    /// Number of threads, at most one per processor [default: one per processor]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl DeviceArgs {
    /// These arguments for process `local` of this machine: the GPU with that number, unless
    /// another was selected.
    fn of(&self, local: usize) -> DeviceArgs {
        let device =
            if self.name() == "cuda" { Some(format!("cuda:{local}")) } else { self.device.clone() };
        DeviceArgs { device, ..*self }
    }

    fn name(&self) -> &str {
        self.device.as_deref().unwrap_or("cpu")
    }

    fn precision(&self) -> Precision {
        self.precision.unwrap_or(Precision::F32)
    }

    /// The number of threads, or 0 for as many as there are processors.
    fn threads(&self) -> usize {
        self.threads.unwrap_or(0)
    }

    fn open(&self) -> Result<Device, Failure> {
        // Resampling of volumes, which does not use a device, runs on the process's own threads.
        let most = processors();
        let asked = self.threads();
        if asked > most {
            warn(&format!("{asked} threads were requested: {most} are used, one per processor"));
        }
        let threads = if asked == 0 { most } else { asked.min(most) };
        start(threads)?;
        let device = Device::open_as(self.name(), asked, self.precision())?;
        if let Device::Cuda(cuda) = &device
            && let Some(text) = cuda.warning()
        {
            warn(text);
        }
        Ok(device)
    }
}

/// Parses a number between `least` and `most`, both included.
fn number(least: u64, most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(least..=most)
}

/// Why a command ended: a failure (exit code 1) or wrong usage (2).
enum Failure {
    Failed(String),
    Usage(String),
    /// Standard output was closed by its reader.
    ClosedOutput,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Failure {
        Failure::Failed(e.to_string())
    }
}

/// Starts the process's own threads, on which volumes are read, resampled and compared; 0 for one
/// per processor.
fn start(threads: usize) -> Result<(), Failure> {
    // Given a number, the pool ignores the variable RAYON_NUM_THREADS, whose value has no bounds.
    let threads = if threads == 0 { processors() } else { threads };
    let started = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    // An error without a source means that they already run.
    match started.as_ref().err().and_then(Error::source) {
        Some(source) => Err(Failure::Failed(format!("cannot start threads: {source}"))),
        None => Ok(()),
    }
}

/// Writes to standard output, as [`message::shown`].
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(message::shown(text).as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Err(Failure::ClosedOutput),
        Err(e) => Err(Failure::Failed(format!("cannot write to standard output: {e}"))),
    }
}

/// A report as JSON, for [`print`]. Control characters that JSON allows in strings are escaped in
/// the way of JSON: a JSON reader does not know how [`message::shown`] writes them.
fn pretty(report: &serde_json::Value) -> String {
    let mut text = String::new();
    for c in format!("{report:#}\n").chars() {
        match c {
            '\u{7f}'..='\u{9f}' => text += &format!("\\u{:04x}", u32::from(c)),
            c => text.push(c),
        }
    }
    text
}

/// A warning on standard error.
fn warn(text: &str) {
    let _ = writeln!(std::io::stderr(), "warning: {}", message::shown(text));
}

/// A line on standard error that is not a warning; omitted with --quiet.
fn note(text: &str) {
    if !quiet() {
        let _ = writeln!(std::io::stderr(), "{}", message::shown(text));
    }
}

/// A line on standard output about what was done, if the result is elsewhere; omitted with --quiet.
fn say(text: &str) -> Result<(), Failure> {
    if quiet() { Ok(()) } else { print(text) }
}

/// A bar on standard error; hidden with --quiet.
fn progress(length: u64) -> ProgressBar {
    if quiet() { ProgressBar::hidden() } else { ProgressBar::new(length) }
}

/// Whether --quiet was given.
fn quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

static QUIET: AtomicBool = AtomicBool::new(false);

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    signals::listen();
    crate::input::keep_inputs();
    let cli = Cli::parse();
    QUIET.store(cli.quiet, Ordering::Relaxed);
    if let Some(bytes) = cli.memory {
        memory::set_limit(bytes);
    }
    // If memory is refused, the command is given up, and no partial output stays.
    let result = crate::tensor::caught(|| Ok(run(cli.command))).unwrap_or_else(|e| Err(e.into()));
    let (text, code) = match result {
        Ok(()) | Err(Failure::ClosedOutput) => return ExitCode::SUCCESS,
        Err(Failure::Failed(m)) => (m, 1),
        Err(Failure::Usage(m)) => (m, 2),
    };
    if !text.is_empty() {
        let _ = writeln!(std::io::stderr(), "error: {}", message::shown(&text));
    }
    ExitCode::from(code)
}

fn run(command: Command) -> Result<(), Failure> {
    // The other commands start as many as they are told to use.
    use Command::{Convert, Info, Metrics, Simulate, Synth, Weights};
    if let Info(_) | Convert(_) | Weights(_) | Metrics(_) | Simulate(_) | Synth(_) = command {
        start(0)?;
    }
    match command {
        Command::Segment(c) => c.run(),
        Command::Info(c) => c.run(),
        Command::Convert(c) => c.run(),
        Command::Weights(c) => c.run(),
        Command::Eval(c) => c.run(),
        Command::Metrics(c) => c.run(),
        Command::Simulate(c) => c.run(),
        Command::Synth(c) => c.run(),
        Command::Train(c) => c.run(),
        Command::Bench(c) => c.run(),
        Command::Tune(c) => c.run(),
        #[cfg(feature = "serve")]
        Command::Serve(c) => c.run(),
        Command::Challenge(c) => c.run(),
        Command::Verify(c) => c.run(),
        Command::Completions(c) => c.run(),
        Command::Man(c) => c.run(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn reports_are_json_and_send_no_control_characters() {
        let report = serde_json::json!({ "größe\u{9b}1m": "a\u{7f}b\u{1b}[2J\r\n\tc\\\"" });
        let text = pretty(&report);
        assert!(text.contains("größe\\u009b1m") && text.contains("a\\u007fb"), "{text}");
        assert_eq!(message::shown(&text), text);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), report);
    }

    #[test]
    fn flags_that_mean_the_same_are_called_the_same() {
        Cli::command().debug_assert();
        let meanings: [(char, &[&str]); 7] = [
            ('c', &["config"]),
            ('d', &["data"]),
            ('i', &["image", "input"]),
            ('l', &["label", "truth"]),
            ('m', &["model"]),
            ('o', &["output", "out"]),
            ('p', &["prediction"]),
        ];
        for command in Cli::command().get_subcommands() {
            for flag in command.get_arguments().filter(|a| a.get_long().is_some()) {
                let (name, long, short) =
                    (command.get_name(), flag.get_long().unwrap_or_default(), flag.get_short());
                let meant = meanings
                    .iter()
                    .find(|(_, longs)| longs.contains(&long))
                    .map(|(short, _)| *short);
                if let Some(short) = short {
                    assert_eq!(meant, Some(short), "prism {name} --{long}");
                }
                // A training's model is the name of a network.
                if let (Some(meant), false) = (meant, long == "model") {
                    assert_eq!(short, Some(meant), "prism {name} --{long}");
                }
            }
        }
    }

    /// Flags whose values or defaults differ between commands. docs/commands.md lists them, with
    /// the reasons.
    const EXCEPTIONS: [&str; 14] = [
        "box-growth",
        "channel",
        "data",
        "device",
        "modality",
        "model",
        "network",
        "output",
        "points",
        "preset",
        "scribble-limit",
        "seed",
        "split",
        "target",
    ];

    /// What a flag's help calls its value, the values if they are a few, and the default: clap's,
    /// or that of the text.
    fn value_of(flag: &clap::Arg) -> (String, Vec<String>, String) {
        let names = flag.get_value_names().unwrap_or_default();
        let named: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
        let given = flag.get_default_values().iter().map(|value| value.to_string_lossy());
        let given: Vec<_> = given.collect();
        let help = flag.get_help().map(|help| help.to_string()).unwrap_or_default();
        let told = help.split_once("[default: ").map_or("", |(_, rest)| rest.trim_end_matches(']'));
        let default = if given.is_empty() { told.to_string() } else { given.join(",") };
        let possible = flag.get_possible_values();
        let possible = possible.iter().map(|value| value.get_name().to_string()).collect();
        (named.join(" "), possible, default)
    }

    #[test]
    fn flags_of_one_name_take_the_same_values_and_have_the_same_default() {
        // Every name of a flag, with each kind of value and the commands that take it.
        let mut flags = BTreeMap::<String, BTreeMap<_, Vec<String>>>::new();
        for command in Cli::command().get_subcommands() {
            for flag in command.get_arguments() {
                for long in flag.get_long_and_visible_aliases().unwrap_or_default() {
                    let alike = flags.entry(long.to_string()).or_default();
                    alike.entry(value_of(flag)).or_default().push(command.get_name().to_string());
                }
            }
        }
        assert!(flags.len() > 90, "only {} flags were found", flags.len());
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let document = std::fs::read_to_string(root.join("docs/commands.md")).unwrap();
        // The flags in the first column of the table, below its head.
        let rows = document.split_once(" Exceptions:\n\n").unwrap().1.lines().skip(2);
        let rows = rows.take_while(|row| row.starts_with('|'));
        let columns = rows.filter_map(|row| row.split('|').nth(1));
        let listed: BTreeSet<&str> = columns
            .flat_map(|column| column.split('`').filter_map(|part| part.strip_prefix("--")))
            .collect();
        assert_eq!(listed, BTreeSet::from(EXCEPTIONS), "the exceptions in docs/commands.md");
        for (name, kinds) in &flags {
            if EXCEPTIONS.contains(&name.as_str()) {
                assert!(kinds.len() > 1, "--{name} is alike everywhere: take it out of EXCEPTIONS");
            } else {
                assert_eq!(kinds.len(), 1, "--{name}: values, default and commands: {kinds:?}");
            }
        }
        for name in EXCEPTIONS {
            assert!(flags.contains_key(name), "no command has --{name}: take it out of EXCEPTIONS");
        }
    }

    #[test]
    fn each_spelling_is_understood() {
        for line in [
            "segment -i a -o b -q --point 1,2,3 --channel 1",
            "--quiet segment --image a --output b --point 1,2,3 --volume 1",
            "info a --channel 1",
            "eval -d a -o b --volume 1",
            "train -d synth:1 -o run --volume 1",
            "train --data synth:1 --output run",
            "train --data synth:1 --out run",
            "metrics -l a -p b",
            "metrics --label a --prediction b",
            "metrics --truth a --prediction b",
            "simulate -i a --truth b -o c",
            "simulate -i a -l b -o c --mask d",
            "simulate -i a -l b -o c --prediction d",
            "simulate -i a -l b -o c -p d",
            "convert a b --network small",
            "convert a b --config c.json",
            "weights --salt a -o b --network small",
            "weights --salt a -o b --config c.json",
            "train -d synth:1 -o run --network base",
            "train -d synth:1 -o run --model base",
            "bench -m small",
            "bench --suite a --save b",
            "bench --suite a --json b",
            "verify a --save b",
            "verify a --json b",
        ] {
            let parsed = Cli::try_parse_from(std::iter::once("prism").chain(line.split(' ')));
            assert!(
                parsed.is_ok(),
                "prism {line}: {}",
                parsed.err().map_or(String::new(), |e| e.to_string())
            );
            assert_eq!(parsed.is_ok_and(|cli| cli.quiet), line.contains("-q"), "prism {line}");
        }
    }
}
