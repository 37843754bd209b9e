//! Which variant of a kernel runs, where there are several: other tiles, or another number of
//! blocks that share a sum.
//!
//! An op that has variants calls [`Cuda::choose`] with the name of the choice, the shape, the
//! variant that its rule of thumb takes and the others. The rule's variant runs, unless a table has
//! another one for that shape and precision. A table is made on request alone
//! ([`Cuda::keep_variants`], `prism tune`), kept in the folder of compiled kernels for one device,
//! its driver and these kernels, and read when a device is opened: what a device chooses never
//! changes while it is open. A table that is damaged, or belongs to something else, is ignored with
//! a warning, and `PRISM_TUNE=0` ignores any.
//!
//! Variants add up in other orders, so their results differ in rounding. For a given table the bits
//! are the same each time.
//!
//! To try variants, a thread runs work within [`Cuda::with_variant`], which has no effect on other
//! threads; the launches that it records ([`Cuda::launches`]) then carry the [`Choice`] that they
//! belong to.

use super::cache::{self, Fnv};
use super::source::{FILES, HEADERS};
use super::{Cuda, CudaError, switch};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The environment variable that switches tables off.
const TUNE: &str = "PRISM_TUNE";

/// A choice between variants, as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What was chosen between: the name of the choice, the precision and the shape, such as
    /// `linear f16 m512n2304k768`.
    pub key: String,
    /// The names of all variants, the rule's first.
    pub variants: Vec<String>,
    /// Which of them ran.
    pub taken: usize,
}

/// A thread that tries variants.
struct Trial {
    device: u64,
    nth: usize,
    /// The choice whose launches are being made.
    open: Option<Arc<Choice>>,
}

thread_local! {
    static TRIAL: RefCell<Option<Trial>> = const { RefCell::new(None) };
}

/// The choice that this thread's launches on a device belong to, if variants are tried.
pub(super) fn open(device: u64) -> Option<Arc<Choice>> {
    TRIAL.with_borrow(|trial| trial.as_ref().filter(|t| t.device == device)?.open.clone())
}

/// What is launched until this is dropped belongs to a choice.
pub(crate) struct Chosen {
    opened: bool,
}

impl Drop for Chosen {
    fn drop(&mut self) {
        if self.opened {
            TRIAL.with_borrow_mut(|trial| {
                if let Some(trial) = trial {
                    trial.open = None;
                }
            });
        }
    }
}

impl Cuda {
    /// The variant to run of the choice `name` for a shape: the `usual` one, which the rule of
    /// thumb takes, or one of `others`. Every launch up to the drop of what is returned beside it
    /// is part of the variant.
    ///
    /// The same shape must have the same `others`. Shapes of token sequences are rounded up to a
    /// power of two, as recordings round them. Within a choice no other is tried.
    pub(crate) fn choose<V: Copy + PartialEq + fmt::Display>(
        &self,
        name: &str,
        shape: fmt::Arguments,
        usual: V,
        others: impl FnOnce() -> Vec<V>,
    ) -> (V, Chosen) {
        let nth = TRIAL.with_borrow(|trial| {
            let trial = trial.as_ref()?;
            (trial.device == self.id() && trial.open.is_none()).then_some(trial.nth)
        });
        let table = &self.0.tuned.table;
        if nth.is_none() && table.0.is_empty() {
            return (usual, Chosen { opened: false });
        }
        let key = format!("{name} {} {shape}", self.products());
        let Some(nth) = nth else {
            let named =
                |name: &String| others().into_iter().find(|variant| variant.to_string() == *name);
            let variant = table.0.get(&key).and_then(named).unwrap_or(usual);
            return (variant, Chosen { opened: false });
        };
        let mut variants = vec![usual];
        for other in others() {
            if !variants.contains(&other) {
                variants.push(other);
            }
        }
        if variants.len() == 1 {
            return (usual, Chosen { opened: false });
        }
        let taken = nth % variants.len();
        let names = variants.iter().map(V::to_string).collect();
        let choice = Arc::new(Choice { key, variants: names, taken });
        TRIAL.with_borrow_mut(|trial| {
            if let Some(trial) = trial {
                trial.open = Some(choice);
            }
        });
        (variants[taken], Chosen { opened: true })
    }

    /// Runs `f` with variant `nth` of every choice that this thread makes on this device, whatever
    /// the table says: the rule's for 0, and of fewer variants the one with the number modulo
    /// theirs. A choice within another is made as usual.
    pub fn with_variant<R>(&self, nth: usize, f: impl FnOnce() -> R) -> R {
        /// Restores what was before, after a panic too.
        struct Back(Option<Trial>);
        impl Drop for Back {
            fn drop(&mut self) {
                let before = self.0.take();
                TRIAL.with_borrow_mut(|trial| *trial = before);
            }
        }
        let trial = Trial { device: self.id(), nth, open: None };
        let _back = Back(TRIAL.with_borrow_mut(|now| now.replace(trial)));
        f()
    }

    /// Keeps the variants of choices for devices like this one that are opened from now on, and
    /// forgets what was kept of choices that are to follow the rule again; this device goes on
    /// choosing as before. Returns the file.
    ///
    /// # Errors
    /// No folder is known to keep it in, or it cannot be written.
    pub fn keep_variants(&self, chosen: &[(String, Option<String>)]) -> Result<PathBuf, CudaError> {
        let place = self.0.tuned.place.as_ref().ok_or_else(|| {
            CudaError::Unavailable(
                "no cache folder for the table of variants: set PRISM_CACHE".into(),
            )
        })?;
        let fail =
            |e: std::io::Error| CudaError::Unavailable(format!("{}: {e}", place.path.display()));
        place.keep(chosen).map_err(fail)?;
        Ok(place.path.clone())
    }

    /// What a person should know about the opening of this device: that a table of variants is not
    /// used, because it is damaged or cannot be read.
    pub fn warning(&self) -> Option<&str> {
        self.0.tuned.warning.as_deref()
    }

    /// Whether `PRISM_TUNE` switches tables of variants off.
    pub fn ignores_tables(&self) -> bool {
        !self.0.tuned.on
    }

    /// A line that says by what this device chooses variants.
    pub(super) fn chooses_by(&self) -> String {
        let Tuned { table, place, warning, on } = &self.0.tuned;
        match place {
            _ if !on => format!("by rule: {TUNE} is off"),
            _ if warning.is_some() => "by rule: the table cannot be used".into(),
            Some(place) if !table.0.is_empty() => {
                format!("{} from {}", table.0.len(), place.path.display())
            }
            _ => "by rule: no table (prism tune)".into(),
        }
    }
}

/// What a device was told of variants when it was opened.
pub(super) struct Tuned {
    table: Table,
    /// Where its table is kept, if a folder is known.
    place: Option<Place>,
    warning: Option<String>,
    /// Whether a table is to be used.
    on: bool,
}

impl Tuned {
    /// No table, and no place for one.
    #[cfg(feature = "emulator")]
    pub(super) fn none() -> Tuned {
        Tuned { table: Table::default(), place: None, warning: None, on: true }
    }

    /// The table of a device that is described so, in the folder of compiled kernels.
    pub(super) fn of(device: &str) -> Result<Tuned, CudaError> {
        Tuned::load(cache::folder().as_deref(), device, std::env::var(TUNE).ok().as_deref())
    }

    /// The table of a device, in a folder, with this value of the environment variable.
    pub(super) fn load(
        folder: Option<&Path>,
        device: &str,
        value: Option<&str>,
    ) -> Result<Tuned, CudaError> {
        let on = switch::of_value(TUNE, value, true)?;
        let place = folder.map(|folder| Place::of(folder, device));
        let loaded = place.as_ref().filter(|_| on).map_or(Ok(Table::default()), Place::load);
        let (table, warning) = match loaded {
            Ok(table) => (table, None),
            Err(why) => (Table::default(), Some(why)),
        };
        Ok(Tuned { table, place, warning, on })
    }
}

/// Chosen variants, by the keys of their choices; choices that are not here follow the rule.
#[derive(Clone, Debug, Default, PartialEq)]
struct Table(BTreeMap<String, String>);

impl Table {
    /// The text of the table: a line that says what it belongs to, and one for each choice.
    fn text(&self, identity: &str) -> String {
        let mut text = format!("{identity}\n");
        for (key, variant) in &self.0 {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{key}: {variant}");
        }
        text
    }

    /// The table of a text; none if it belongs to something else, or is no table.
    fn read(text: &str, identity: &str) -> Option<Table> {
        let mut lines = text.lines();
        lines.next().filter(|line| *line == identity)?;
        let pair = |line: &str| {
            let (key, variant) = line.split_once(": ")?;
            Some((key.to_string(), variant.to_string()))
        };
        lines.map(pair).collect::<Option<_>>().map(Table)
    }
}

/// Where the table of a device is kept, and what says that it is that device's.
struct Place {
    path: PathBuf,
    identity: String,
}

impl Place {
    fn of(folder: &Path, device: &str) -> Place {
        let mut kernels = Fnv::new();
        for (name, text) in FILES.iter().chain(HEADERS) {
            kernels.add(name.as_bytes());
            kernels.add(text.as_bytes());
        }
        let identity = format!(
            "variants for {}, prism {}, kernels {:016x}",
            device.replace(char::is_control, " "),
            env!("CARGO_PKG_VERSION"),
            kernels.0
        );
        let mut name = Fnv::new();
        name.add(identity.as_bytes());
        Place { path: folder.join(format!("variants-{:016x}.table", name.0)), identity }
    }

    /// Changes the table by these choices. What others have kept stays, also if they do so at this
    /// very moment. A table that cannot be read is replaced.
    fn keep(&self, chosen: &[(String, Option<String>)]) -> std::io::Result<()> {
        let _lock = cache::lock(&self.path)?;
        let mut table = self.load().unwrap_or_default();
        for (key, variant) in chosen {
            match variant {
                Some(variant) => table.0.insert(key.clone(), variant.clone()),
                None => table.0.remove(key),
            };
        }
        cache::write(&self.path, table.text(&self.identity).as_bytes())
    }

    /// The table; an empty one if there is none yet, and the reason if it cannot be used.
    fn load(&self) -> Result<Table, String> {
        let unusable = |why: &dyn fmt::Display| {
            format!("the table of variants {} is not used: {why}", self.path.display())
        };
        let bytes = match cache::read(&self.path) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(unusable(&"it is damaged")),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Table::default()),
            Err(e) => return Err(unusable(&e)),
        };
        let text = String::from_utf8(bytes).map_err(|_| unusable(&"it is not text"))?;
        Table::read(&text, &self.identity)
            .ok_or_else(|| unusable(&"it belongs to another device, driver or version"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(pairs: &[(&str, &str)]) -> Table {
        Table(pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    /// Variants are tried by one thread, on one device, one choice at a time.
    #[cfg(feature = "emulator")]
    #[test]
    fn a_choice_within_another_follows_the_rule() {
        use crate::device::{Cpu, DType};
        let cuda = Cuda::emulated(Cpu::new(1).unwrap(), DType::F16, 0);
        let choose = |name: &str| cuda.choose(name, format_args!("n1"), 10, || vec![20, 10, 30]);
        assert_eq!(choose("a").0, 10);
        cuda.with_variant(1, || {
            let (outer, launches) = choose("a");
            let (inner, within) = choose("b");
            drop(within);
            assert_eq!((outer, inner), (20, 10));
            let variants = ["10", "20", "30"].map(String::from).to_vec();
            let expected = Choice { key: "a f16 n1".into(), variants, taken: 1 };
            assert_eq!(open(cuda.id()).as_deref(), Some(&expected));
            assert_eq!(open(cuda.id() + 1), None);
            drop(launches);
            assert_eq!(open(cuda.id()), None);
            assert_eq!(choose("b").0, 20);
            assert_eq!(cuda.with_variant(5, || choose("b").0), 30);
            assert_eq!(choose("b").0, 20);
            let elsewhere = std::thread::scope(|scope| scope.spawn(|| choose("b").0).join());
            assert_eq!(elsewhere.unwrap(), 10);
            // Nothing to choose between.
            let (only, _launches) = cuda.choose("c", format_args!("n1"), 1, || vec![1]);
            assert_eq!((only, open(cuda.id())), (1, None));
        });
        assert_eq!(choose("a").0, 10);
        let failure = cuda.keep_variants(&[]).unwrap_err().to_string();
        assert!(failure.contains("PRISM_CACHE"), "{failure}");
    }

    fn load(folder: &Path, device: &str, value: Option<&str>) -> Tuned {
        Tuned::load(Some(folder), device, value).unwrap()
    }

    #[test]
    fn a_table_is_read_back_by_its_device_alone() {
        let folder = tempfile::tempdir().unwrap();
        let chosen = table(&[("conv3d f16 n1", "k in 2"), ("linear f16 m512", "16 rows, k in 3")]);
        let place = Place::of(folder.path(), "a GPU, driver 1");
        assert_eq!(place.load(), Ok(Table::default()));
        cache::write(&place.path, chosen.text(&place.identity).as_bytes()).unwrap();
        assert_eq!(place.load(), Ok(chosen.clone()));
        for (value, expected) in [(None, &chosen), (Some("0"), &Table::default())] {
            let tuned = load(folder.path(), "a GPU, driver 1", value);
            assert_eq!((&tuned.table, &tuned.warning), (expected, &None), "{value:?}");
        }
        let other = load(folder.path(), "a GPU, driver 2", None);
        assert_eq!((other.table, other.warning), (Table::default(), None));
        let refused = Tuned::load(Some(folder.path()), "a GPU", Some("no")).err().unwrap();
        let words = "PRISM_TUNE is 'no', expected on or off";
        assert!(refused.to_string().ends_with(words), "{refused}");
        assert_eq!(Tuned::load(None, "a GPU", None).unwrap().table, Table::default());
    }

    #[test]
    fn of_those_who_keep_choices_at_once_none_loses_anothers() {
        const EACH: usize = 20;
        let folder = tempfile::tempdir().unwrap();
        let place = Place::of(folder.path(), "a GPU");
        let key = |writer: usize, n: usize| format!("linear f16 m{writer}n{n}");
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let (place, key) = (&place, &key);
                scope.spawn(move || {
                    for n in 0..EACH {
                        // The former goes again with the next.
                        let mut chosen = vec![(key(writer, n), Some("k in 2".to_string()))];
                        chosen.extend((n % 2 == 1).then(|| (key(writer, n - 1), None)));
                        place.keep(&chosen).unwrap();
                    }
                });
            }
        });
        let kept: Vec<String> = place.load().unwrap().0.into_keys().collect();
        let odd = |writer: usize| (1..EACH).step_by(2).map(move |n| (writer, n));
        let mut expected: Vec<String> = (0..4).flat_map(odd).map(|(w, n)| key(w, n)).collect();
        expected.sort();
        assert_eq!(kept, expected);
    }

    /// Under the name of this device's table, but damaged, another device's, or no table.
    #[test]
    fn a_table_that_cannot_be_used_is_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::of(folder.path(), "a GPU");
        let good = table(&[("conv3d f16 n1", "k in 2")]).text(&place.identity);
        let ignored = |reason: &str| {
            let tuned = load(folder.path(), "a GPU", None);
            let warning = tuned.warning.unwrap();
            assert!(tuned.table.0.is_empty() && warning.contains(reason), "{warning}");
            let off = load(folder.path(), "a GPU", Some("0"));
            assert!(off.table.0.is_empty() && off.warning.is_none());
        };
        std::fs::write(&place.path, &good).unwrap();
        ignored("damaged");
        for (text, reason) in [
            (good.replace("a GPU", "another GPU").into_bytes(), "another device"),
            (format!("{good}what is this\n").into_bytes(), "another device"),
            (vec![0xff; 40], "not text"),
        ] {
            cache::write(&place.path, &text).unwrap();
            ignored(reason);
        }
        std::fs::remove_file(&place.path).unwrap();
        std::fs::create_dir(&place.path).unwrap();
        assert!(load(folder.path(), "a GPU", None).warning.is_some());
    }
}
