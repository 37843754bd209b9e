//! The sources of samples: synthetic series and lists of cases, mixed by share, each sample a
//! function of its place in the run.

use super::cache::Cache;
use super::cases::{Case, DataError, Loaded, Split, TargetLabel, list};
use super::sample::{Augmentation, Sample, centred, random};
use super::synth;
use crate::memory::{self, Charge};
use crate::model::Config;
use crate::prompt::simulate::generator;
use crate::sync::locked;
use crate::volume::{Modality, Volume};
use rand::RngExt;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

/// A decoded case. If it was to be kept, it counts against the budget for as long as anyone holds
/// it.
struct Decoded {
    image: Volume,
    label: Vec<u8>,
    charge: Charge,
}

impl Decoded {
    fn bytes(&self) -> u64 {
        (self.image.array().bytes() + self.label.len()) as u64
    }

    /// Whether only the list of those that are kept holds it.
    fn is_idle(case: &Arc<Decoded>) -> bool {
        Arc::strong_count(case) == 1
    }
}

/// What a decoded case is made from: scan, label image, volume and the modality that its dataset
/// states. Its name is its own only within its dataset.
type Key = (PathBuf, PathBuf, Option<usize>, Option<&'static str>);

fn key_of(case: &Case) -> Key {
    let modality = case.modality.map(Modality::name);
    (case.image.clone(), case.label.clone(), case.volume, modality)
}

/// The most bytes of decoded cases that are kept, however large the budget of memory.
const CACHE: u64 = 4 << 30;

/// The most bytes of decoded cases that are kept: a quarter of the budget at most. Cases that do
/// not fit are read again.
pub(crate) fn most_kept() -> u64 {
    CACHE.min(memory::limit() / 4)
}

/// Decoded cases.
///
/// They are given up where memory is short. So no memory is asked for while they are locked.
type Kept = Mutex<BTreeMap<Key, Arc<Decoded>>>;

/// The decoded cases of all pools.
static ALL_KEPT: Mutex<Vec<Weak<Kept>>> = Mutex::new(vec![]);

/// Room for decoded cases, which are given up if memory is short.
fn kept() -> Arc<Kept> {
    memory::before_refusal(give_up);
    let kept = Arc::<Kept>::default();
    let mut all = locked(&ALL_KEPT);
    all.retain(|kept| kept.strong_count() > 0);
    all.push(Arc::downgrade(&kept));
    kept
}

/// Gives up decoded cases of all pools; as [`give_up_of`].
fn give_up(lacking: u64) -> bool {
    let all: Vec<Arc<Kept>> = locked(&ALL_KEPT).iter().filter_map(Weak::upgrade).collect();
    give_up_of(&all, lacking)
}

/// Gives up decoded cases that are not in use at present, one after another, until they took as
/// many bytes as are lacking; none, if all of them take less. Whether it gave up any. They are read
/// again when they are needed.
fn give_up_of(all: &[Arc<Kept>], lacking: u64) -> bool {
    // No thread begins to use one that is locked. All are locked in the same order everywhere.
    let mut all: Vec<_> = all.iter().map(|kept| locked(kept)).collect();
    let cases = all.iter().flat_map(|kept| kept.values());
    let idle: u64 = cases.filter(|case| Decoded::is_idle(case)).map(|case| case.bytes()).sum();
    if idle < lacking {
        return false;
    }
    let mut gone = 0;
    for kept in &mut all {
        kept.retain(|_, case| {
            let goes = gone < lacking && Decoded::is_idle(case);
            gone += if goes { case.bytes() } else { 0 };
            !goes
        });
    }
    gone > 0
}

/// The largest share of a source: sums of such numbers stay finite.
const MOST_SHARE: f64 = 1e6;

/// One source of samples.
enum Source {
    Synth(u64),
    Cases(Vec<Case>),
}

/// A mixture of sources, one part of a split.
pub struct Pool {
    sources: Vec<(Source, f64)>,
    target: TargetLabel,
    /// Decoded cases.
    cache: Arc<Kept>,
    /// Resampled cases on disk.
    disk: Option<Cache>,
    /// The names of cases that could not be used, and why.
    skipped: Mutex<BTreeMap<Key, (String, String)>>,
    /// What was odd about files.
    warnings: Mutex<BTreeSet<String>>,
    /// What cases were taken to be.
    modalities: Mutex<BTreeMap<Key, &'static str>>,
    /// The cases that were decoded.
    decoded: Mutex<BTreeSet<Key>>,
}

/// Seeds of validation series are separate from those of training.
const VALIDATION: u64 = 0x76_61_6c;

/// A pool to train from and one to validate on.
pub struct Pools {
    /// To learn from.
    pub train: Pool,
    /// To choose the best checkpoint by.
    pub validation: Pool,
    /// The split of each list of cases, by the name under which it was given.
    pub splits: Vec<(String, Split)>,
}

impl Pools {
    /// Opens the sources that `data` names, separated by commas: `synth:SEED` for synthetic scans,
    /// or the path of a dataset ([`list`]). `shares`, one number for each, are the weights with
    /// which they are drawn from; none for equal ones.
    ///
    /// Real cases are split by the file `split`, otherwise by `seed`. With `disk`, a folder and a
    /// spacing in mm, cases are resampled once and kept there. `channel` picks one of scans that
    /// have several.
    ///
    /// # Errors
    /// A source, the split or the shares cannot be used.
    pub fn open(
        data: &str,
        shares: &str,
        target: &TargetLabel,
        channel: Option<usize>,
        split: Option<&Path>,
        disk: Option<(&Path, f64)>,
        seed: u64,
    ) -> Result<Pools, DataError> {
        let here = Path::new(data);
        let names: Vec<&str> = data.split(',').map(str::trim).filter(|n| !n.is_empty()).collect();
        let shares: Vec<f64> = match shares.trim() {
            "" => vec![1.0; names.len()],
            text => {
                let parsed: Option<Vec<f64>> = text
                    .split(',')
                    .map(|v| v.trim().parse().ok().filter(|v: &f64| (0.0..=MOST_SHARE).contains(v)))
                    .collect();
                parsed.filter(|p| p.len() == names.len()).ok_or_else(|| {
                    DataError::new(
                        here,
                        format!(
                            "shares '{text}': expected a number from 0 to {MOST_SHARE} for each of {}",
                            names.len()
                        ),
                    )
                })?
            }
        };
        if names.is_empty() || shares.iter().sum::<f64>() <= 0.0 {
            return Err(DataError::new(here, "no data to sample from"));
        }
        let (mut train, mut validation, mut splits) = (vec![], vec![], vec![]);
        for (name, share) in names.into_iter().zip(shares) {
            if let Some(text) = name.strip_prefix("synth:") {
                let seed = text.parse().map_err(|_| {
                    DataError::new(Path::new(name), "expected synth:SEED, a whole number")
                })?;
                train.push((Source::Synth(seed), share));
                validation.push((Source::Synth(seed ^ VALIDATION), share));
                continue;
            }
            let cases = list(Path::new(name), channel)?;
            let split = match split {
                Some(path) => Split::read(path, &cases)?,
                None => Split::by_seed(&cases, seed),
            };
            train.push((Source::Cases(Split::select(&cases, &split.train)), share));
            let held = Split::select(&cases, &split.validation);
            if !held.is_empty() {
                validation.push((Source::Cases(held), share));
            }
            splits.push((name.to_string(), split));
        }
        let pool = |sources: Vec<(Source, f64)>| Pool {
            sources,
            target: target.clone(),
            cache: kept(),
            disk: disk.map(|(folder, spacing)| Cache::new(folder, spacing, target.clone())),
            skipped: Mutex::default(),
            warnings: Mutex::default(),
            modalities: Mutex::default(),
            decoded: Mutex::default(),
        };
        Ok(Pools { train: pool(train), validation: pool(validation), splits })
    }
}

impl Pool {
    /// The training sample of item `item` of step `step`. A case that cannot be used is remembered
    /// ([`Pool::skipped`]), and another one is drawn.
    ///
    /// # Errors
    /// None of 64 cases that were drawn can be used; a case that was read before cannot be read
    /// again.
    pub fn draw(
        &self,
        config: &Config,
        a: &Augmentation,
        seed: u64,
        step: u64,
        item: u64,
    ) -> Result<Sample, DataError> {
        self.draw_at(config, a, [seed, step, item], true)
    }

    /// The sample that [`Pool::draw`] returns for a seed, a step and an item. Unless `passes_over`
    /// is set, no other case is drawn for one that is refused memory.
    ///
    /// # Errors
    /// Those of [`Pool::draw`]; a case is refused memory, which [`DataError::refused`] says.
    pub(crate) fn draw_at(
        &self,
        config: &Config,
        a: &Augmentation,
        [seed, step, item]: [u64; 3],
        passes_over: bool,
    ) -> Result<Sample, DataError> {
        for attempt in 0..64 {
            let mut rng = generator(seed, &[1, step, item, attempt]);
            let total: f64 = self.sources.iter().map(|s| s.1).sum();
            let mut at = rng.random_range(0.0..total);
            let source = self.sources.iter().find(|s| {
                at -= s.1;
                at < 0.0
            });
            let sample = match &source.unwrap_or(&self.sources[0]).0 {
                Source::Synth(series) => {
                    let index = rng.random::<u64>();
                    let scan = synth::generate(*series, index);
                    random(
                        &mut rng,
                        config,
                        a,
                        &format!("synth:{series}/{index}"),
                        &scan.image,
                        &scan.label,
                    )
                }
                Source::Cases(cases) if cases.is_empty() => None,
                Source::Cases(cases) => {
                    let case = &cases[rng.random_range(0..cases.len())];
                    match self.load(case) {
                        Ok(loaded) => {
                            random(&mut rng, config, a, &case.name, &loaded.image, &loaded.label)
                        }
                        Err(e) if e.refused && !passes_over => return Err(e),
                        // What is learned does not depend on which cases were given up.
                        Err(e) if locked(&self.decoded).contains(&key_of(case)) => return Err(e),
                        Err(e) => {
                            self.pass_over(case, &e);
                            None
                        }
                    }
                }
            };
            if let Some(sample) = sample {
                return Ok(sample);
            }
        }
        let why: Vec<String> =
            self.skipped().into_iter().map(|(name, why)| format!("{name}: {why}")).collect();
        Err(DataError::new(
            Path::new("data"),
            format!("no usable case was found in 64 attempts; {}", why.join("; ")),
        ))
    }

    /// The `count` samples to validate on, always the same: real cases first, then synthetic ones.
    /// None if `stops` became true before the last of them was begun.
    pub fn fixed(
        &self,
        config: &Config,
        count: usize,
        stops: &dyn Fn() -> bool,
    ) -> Option<Vec<Sample>> {
        let mut samples = vec![];
        let cases = self.sources.iter().flat_map(|(source, _)| match source {
            Source::Cases(cases) => cases.as_slice(),
            Source::Synth(_) => &[],
        });
        for case in cases {
            // No more are read, and held, than are needed.
            if samples.len() == count {
                break;
            }
            if stops() {
                return None;
            }
            // It is needed this once: what is kept is for training.
            let loaded = self.decode(case).inspect_err(|e| self.pass_over(case, e)).ok();
            samples.extend(loaded.and_then(|l| centred(config, &case.name, &l.0, &l.1)));
        }
        let series: Vec<u64> = self
            .sources
            .iter()
            .filter_map(|s| if let Source::Synth(seed) = s.0 { Some(seed) } else { None })
            .collect();
        let mut index = 0;
        while samples.len() < count && !series.is_empty() && index < 4 * count as u64 {
            if stops() {
                return None;
            }
            let scan = synth::generate(series[index as usize % series.len()], index);
            samples.extend(centred(config, &format!("synth/{index}"), &scan.image, &scan.label));
            index += 1;
        }
        Some(samples)
    }

    /// A case, decoded and kept for the next time, if there is room for it.
    fn load(&self, case: &Case) -> Result<Arc<Decoded>, DataError> {
        let key = key_of(case);
        let found = locked(&self.cache).get(&key).cloned();
        if let Some(found) = found {
            return Ok(found);
        }
        let (image, label) = self.decode(case)?;
        let mut loaded = Decoded { image, label, charge: Charge::default() };
        let size = loaded.bytes();
        let has_room = |kept: &BTreeMap<Key, Arc<Decoded>>| {
            kept.values().map(|case| case.bytes()).sum::<u64>() + size <= most_kept()
        };
        // Asking for what is not there would have others give up what they keep: as much again
        // stays free.
        let fits = 2 * size <= memory::left() && has_room(&locked(&self.cache));
        let counted = fits && loaded.charge.grow::<u8>("a decoded case", size as usize).is_ok();
        let loaded = Arc::new(loaded);
        // Other threads may have filled it meanwhile.
        let mut kept = locked(&self.cache);
        if counted && has_room(&kept) {
            kept.insert(key, loaded.clone());
        }
        Ok(loaded)
    }

    /// A case, from the disk's cache or from its files.
    fn decode(&self, case: &Case) -> Result<(Volume, Vec<u8>), DataError> {
        let kept = self.disk.as_ref().and_then(|disk| disk.get(case));
        let loaded = match kept.filter(|kept| kept.mask.contains(&1)) {
            Some(kept) => {
                self.note(&kept);
                kept
            }
            None => self.read(case)?,
        };
        locked(&self.decoded).insert(key_of(case));
        Ok((loaded.image, loaded.mask))
    }

    /// Reads a case from its files; resampled, and kept on disk, if that is wanted.
    fn read(&self, case: &Case) -> Result<Loaded, DataError> {
        let mut loaded = case.read(&self.target)?;
        // Decided once per case, not once per sample.
        let modality =
            loaded.image.description.modality.unwrap_or_else(|| Modality::of(&loaded.image).0);
        loaded.image.description.modality = Some(modality);
        locked(&self.modalities).insert(key_of(case), modality.name());
        self.note(&loaded);
        match &self.disk {
            Some(disk) => disk.put(case, loaded),
            None => Ok(loaded),
        }
    }

    /// Remembers what was odd about a case's files.
    fn note(&self, loaded: &Loaded) {
        locked(&self.warnings).extend(loaded.warnings.iter().cloned());
    }

    /// Remembers a case that cannot be used.
    fn pass_over(&self, case: &Case, why: &DataError) {
        locked(&self.skipped).insert(key_of(case), (case.name.clone(), why.to_string()));
    }

    /// What was odd about the files read so far, and how it was interpreted.
    pub fn warnings(&self) -> Vec<String> {
        locked(&self.warnings).iter().cloned().collect()
    }

    /// The numbers of cases read so far that were taken to be a CT, an MR or a PET.
    pub fn modalities(&self) -> Vec<(&'static str, usize)> {
        let mut counts = BTreeMap::new();
        for name in locked(&self.modalities).values() {
            *counts.entry(*name).or_insert(0) += 1;
        }
        counts.into_iter().collect()
    }

    /// Cases that could not be used so far, by name, and why.
    pub fn skipped(&self) -> Vec<(String, String)> {
        let mut named: Vec<(String, String)> = locked(&self.skipped).values().cloned().collect();
        named.sort();
        named
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list of one case, called `c1`, whose scan has the value `v` everywhere.
    fn one_case(folder: &Path, name: &str, v: u8) -> String {
        let header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: 4 4 4\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n\n";
        let file = |end: &str, voxels: [u8; 64]| {
            let file = format!("{name}-{end}.nrrd");
            std::fs::write(folder.join(&file), [header.as_bytes(), &voxels].concat()).unwrap();
            file
        };
        let mut mask = [0; 64];
        mask[usize::from(v)] = 1;
        let (image, label) = (file("image", [v; 64]), file("label", mask));
        let list = folder.join(name).with_extension("csv");
        std::fs::write(&list, format!("image,label,name\n{image},{label},c1\n")).unwrap();
        list.display().to_string()
    }

    #[test]
    fn cases_of_the_same_name_in_two_datasets_are_two() {
        let folder = tempfile::tempdir().unwrap();
        let data = [("a", 5), ("b", 9)].map(|(name, v)| one_case(folder.path(), name, v)).join(",");
        let pools = Pools::open(&data, "", &TargetLabel::Any, None, None, None, 0).unwrap();
        let case = |n: usize| match &pools.train.sources[n].0 {
            Source::Cases(cases) => &cases[0],
            Source::Synth(_) => panic!("of a list"),
        };
        assert_eq!(case(0).name, case(1).name);
        // Read, then found.
        for _ in 0..2 {
            for (n, v) in [(0, 5u8), (1, 9)] {
                let loaded = pools.train.load(case(n)).unwrap();
                assert_eq!(loaded.image.at([0; 3]), f32::from(v));
            }
        }
        (0..2).for_each(|n| pools.train.pass_over(case(n), &DataError::new(Path::new("x"), "y")));
        let skipped = pools.train.skipped();
        assert!(skipped.len() == 2 && skipped.iter().all(|s| s.0 == "c1"), "{skipped:?}");
    }

    /// A pool of one case, `a`, in a folder, and that case.
    fn pool_of_one(folder: &Path) -> (Pool, Case) {
        let data = one_case(folder, "a", 5);
        let case = list(Path::new(&data), None).unwrap().remove(0);
        let pools = Pools::open(&data, "", &TargetLabel::Any, None, None, None, 0).unwrap();
        (pools.train, case)
    }

    #[test]
    fn cases_are_given_up_one_after_another_and_none_that_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let (pool, case) = pool_of_one(folder.path());
        // Not among those that are given up for others.
        let kept = Arc::<Kept>::default();
        let keep = |name: &str| {
            let (image, label) = pool.decode(&case).unwrap();
            let decoded = Arc::new(Decoded { image, label, charge: Charge::default() });
            let key = (PathBuf::from(name), PathBuf::new(), None, None);
            locked(&kept).insert(key, decoded.clone());
            decoded
        };
        let bytes = keep("a").bytes();
        let in_use = keep("b");
        drop(keep("c"));
        let all = [kept.clone()];
        let given_up = |lacking: u64| (give_up_of(&all, lacking), locked(&kept).len());
        // All that are idle would not be enough.
        assert_eq!(given_up(2 * bytes + 1), (false, 3));
        assert_eq!(given_up(1), (true, 2));
        assert_eq!(given_up(bytes), (true, 1));
        assert_eq!(given_up(1), (false, 1));
        drop(in_use);
        assert_eq!(given_up(bytes), (true, 0));
        assert_eq!(given_up(1), (false, 0));
    }

    #[test]
    fn a_case_that_is_read_again_is_counted_once_and_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let (pool, case) = pool_of_one(folder.path());
        // Not kept in memory.
        for _ in 0..2 {
            pool.decode(&case).unwrap();
        }
        let counts = pool.modalities();
        assert!(counts.len() == 1 && counts[0].1 == 1, "{counts:?}");
        std::fs::remove_file(&case.label).unwrap();
        let drawn = pool.draw(&Config::tiny(), &Augmentation::default(), 0, 0, 0);
        let why = drawn.expect_err("its label is gone").to_string();
        assert!(why.contains("a-label.nrrd") && !why.contains("64 attempts"), "{why}");
        assert!(pool.skipped().is_empty());
    }

    /// A case that memory is refused for is passed over only by who says so: what is learned from
    /// does not depend on how much memory was left at a time.
    #[test]
    fn another_case_is_drawn_for_lack_of_memory_only_if_that_is_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        // At 1 mm it has more voxels than any memory.
        let header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: 20 20 20\nspace directions: (90000,0,0) (0,90000,0) (0,0,90000)\nencoding: raw\n\n";
        let voxels: Vec<u8> = (0..20 * 20 * 20).map(|v| u8::from(v > 4000)).collect();
        for name in ["wide.nrrd", "label.nrrd"] {
            std::fs::write(at(name), [header.as_bytes(), &voxels].concat()).unwrap();
        }
        std::fs::write(at("one.csv"), "image,label\nwide.nrrd,label.nrrd\n").unwrap();
        let (data, cache) = (at("one.csv").display().to_string(), at("cache"));
        let disk = Some((&*cache, 1.0));
        let pools = Pools::open(&data, "", &TargetLabel::Any, None, None, disk, 0).unwrap();
        let (config, a) = (Config::tiny(), Augmentation::default());
        let draw = |passes_over: bool| {
            let drawn = pools.train.draw_at(&config, &a, [0, 0, 0], passes_over);
            drawn.expect_err("no memory has room for it")
        };
        let why = draw(false);
        assert!(why.refused && pools.train.skipped().is_empty(), "{why}");
        assert!(why.to_string().contains("wide.nrrd: resampled at 1 mm: out of memory"), "{why}");
        let why = draw(true);
        assert!(why.to_string().contains("no usable case was found in 64 attempts"), "{why}");
        assert!(!why.refused && pools.train.skipped().len() == 1, "{why}");
    }

    /// What was odd about files is told by every run that learns from them, from the cache too.
    #[test]
    fn a_case_from_the_cache_comes_with_the_warnings_of_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: 20 20 20\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n\n";
        // Two labels, which are joined.
        let voxels: Vec<u8> = (0..20 * 20 * 20).map(|v| (v / 3000) as u8).collect();
        for name in ["scan.nrrd", "label.nrrd"] {
            std::fs::write(at(name), [header.as_bytes(), &voxels].concat()).unwrap();
        }
        std::fs::write(at("one.csv"), "image,label\nscan.nrrd,label.nrrd\n").unwrap();
        let (data, cache) = (at("one.csv").display().to_string(), at("cache"));
        let case = list(&at("one.csv"), None).unwrap().remove(0);
        let run = || {
            let disk = Some((&*cache, 2.0));
            let pools = Pools::open(&data, "", &TargetLabel::Any, None, None, disk, 0).unwrap();
            pools.train.load(&case).unwrap();
            pools.train.warnings()
        };
        let first = run();
        let told = |w: &String| w.contains("label.nrrd: it holds several labels");
        assert!(first.iter().any(told), "{first:?}");
        // A label that is none any more, though as long and as old: the case can only come from
        // the cache.
        let label = std::fs::File::options().write(true).open(at("label.nrrd")).unwrap();
        let time = label.metadata().unwrap().modified().unwrap();
        std::fs::write(at("label.nrrd"), vec![b'x'; header.len() + voxels.len()]).unwrap();
        label.set_modified(time).unwrap();
        assert_eq!(run(), first);
    }
}
