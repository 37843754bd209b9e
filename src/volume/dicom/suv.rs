//! From activities of a PET scan to standardised uptake values by body weight (SUV bw), if the tags
//! allow it: as the QIBA profile of FDG-PET/CT computes them, without manufacturers' private tags.

use super::tags::{self, DataSet, Tag};

/// What a file says of the tracer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Uptake {
    units: String,
    /// The moment to which decay is corrected.
    correction: String,
    corrected: String,
    /// Kg.
    weight: Option<f64>,
    /// Bq.
    dose: Option<f64>,
    /// Seconds.
    half_life: Option<f64>,
    /// Seconds since some day; whether the day was given.
    injected: Option<(f64, bool)>,
    series: Option<f64>,
    acquired: Option<f64>,
}

const DAY: f64 = 86_400.0;

/// The day of a date `YYYYMMDD`, or `YYYY.MM.DD` as it was written in the past.
fn day(text: &str) -> Option<f64> {
    let digits: String = text.chars().filter(|c| *c != '.').take(8).collect();
    if digits.len() != 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number = |range: std::ops::Range<usize>| digits[range].parse::<i64>().ok();
    let (y, m, d) = (number(0..4)?, number(4..6)?, number(6..8)?);
    // Years begin in March, so that a leap day is the last.
    let (y, m) = if m > 2 { (y, m - 3) } else { (y - 1, m + 9) };
    Some((365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + d) as f64)
}

/// Seconds of a time `HHMMSS.FFFFFF`, the end of which may be missing.
fn clock(text: &str) -> Option<f64> {
    let digits: String = text.trim().chars().filter(|c| *c != ':').collect();
    let part = |from: usize, to: usize| -> Option<f64> {
        match digits.get(from..digits.len().min(to)) {
            None | Some("") => Some(0.0),
            Some(text) => text.parse().ok(),
        }
    };
    if digits.len() < 2 {
        return None;
    }
    let (h, m, s) = (part(0, 2)?, part(2, 4)?, part(4, 13)?);
    ((0.0..24.0).contains(&h) && (0.0..60.0).contains(&m) && (0.0..61.0).contains(&s))
        .then_some(3600.0 * h + 60.0 * m + s)
}

/// Seconds of a date and a time.
fn moment(tags: &DataSet, date: Tag, time: Tag) -> Option<f64> {
    Some(DAY * day(&tags.text(date)?)? + clock(&tags.text(time)?)?)
}

/// What a file says of the tracer.
pub fn uptake(tags: &DataSet) -> Uptake {
    let number =
        |set: &DataSet, tag| -> Option<f64> { set.number(tag).ok().flatten().filter(|n| *n > 0.0) };
    let tracer = tags.item(tags::RADIOPHARMACEUTICAL).ok().flatten();
    let of_tracer = |tag| tracer.as_ref().and_then(|t| number(t, tag));
    let text = |tag| tracer.as_ref().and_then(|t| t.text(tag));
    let series = moment(tags, tags::SERIES_DATE, tags::SERIES_TIME);
    let whole = text(tags::START_DATE_TIME).and_then(|t| {
        let time = t.get(8..)?.split(['+', '-', '&']).next()?.to_string();
        Some((DAY * day(&t)? + clock(&time)?, true))
    });
    // Without a day it is assumed to be the series'.
    let injected = whole.or_else(|| {
        let today = DAY * day(&tags.text(tags::SERIES_DATE)?)?;
        Some((today + clock(&text(tags::START_TIME)?)?, false))
    });
    Uptake {
        units: tags.text(tags::UNITS).unwrap_or_default(),
        correction: tags.text(tags::DECAY_CORRECTION).unwrap_or_default(),
        corrected: tags.text(tags::CORRECTED_IMAGE).unwrap_or_default(),
        weight: number(tags, tags::PATIENT_WEIGHT),
        dose: of_tracer(tags::TOTAL_DOSE),
        half_life: of_tracer(tags::HALF_LIFE),
        injected,
        series,
        acquired: moment(tags, tags::ACQUISITION_DATE, tags::ACQUISITION_TIME),
    }
}

/// The factor that turns values into SUV bw, from what all files of a series say.
///
/// # Errors
/// The tags do not allow it, with the reason.
pub fn factor<'a>(said: impl Iterator<Item = &'a Uptake> + Clone) -> Result<f64, String> {
    let Some(first) = said.clone().next() else {
        return Err("its files have no dose information".into());
    };
    let alike = |other: &Uptake| {
        (&other.units, &other.correction, other.weight, other.dose, other.half_life)
            == (&first.units, &first.correction, first.weight, first.dose, first.half_life)
    };
    if !said.clone().all(alike) {
        return Err("its files differ in units, weight, dose or half-life".into());
    }
    match first.units.as_str() {
        "GML" => return Ok(1.0),
        "BQML" => {}
        other => {
            return Err(format!("its {} is '{other}', expected BQML or GML", tags::UNITS));
        }
    }
    let missing = |tag: Tag| format!("its {tag} is missing or not above 0");
    let weight = first.weight.ok_or_else(|| missing(tags::PATIENT_WEIGHT))?;
    let dose = first.dose.ok_or_else(|| missing(tags::TOTAL_DOSE))?;
    if dose < 1e5 {
        return Err(format!("its {} is {dose}, expected Bq", tags::TOTAL_DOSE));
    }
    if !first.corrected.split('\\').any(|c| c.trim() == "DECY") {
        return Err(format!(
            "its {} is '{}', expected it to contain DECY",
            tags::CORRECTED_IMAGE,
            first.corrected
        ));
    }
    let left = match first.correction.as_str() {
        "ADMIN" => dose,
        "START" => {
            let half_life = first.half_life.ok_or_else(|| missing(tags::HALF_LIFE))?;
            let (injected, dated) = first.injected.ok_or_else(|| missing(tags::START_TIME))?;
            // If a series was made later than its images, the first of these gives the time.
            let earliest = said.filter_map(|u| u.acquired).reduce(f64::min);
            let start = match (first.series, earliest) {
                (Some(series), Some(earliest)) => series.min(earliest),
                (Some(one), None) | (None, Some(one)) => one,
                (None, None) => return Err(missing(tags::SERIES_TIME)),
            };
            let mut waited = start - injected;
            if waited < 0.0 && !dated {
                waited += DAY;
            }
            if !(0.0..=10.0 * half_life).contains(&waited) {
                return Err(format!(
                    "{waited} s passed from injection to scan, expected 0 to ten half-lives of {half_life} s"
                ));
            }
            dose * (-waited / half_life).exp2()
        }
        other => {
            return Err(format!(
                "its {} is '{other}', expected START or ADMIN",
                tags::DECAY_CORRECTION
            ));
        }
    };
    Ok(weight * 1000.0 / left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracer_that_half_decayed_counts_twice() {
        let said = Uptake {
            units: "BQML".into(),
            correction: "START".into(),
            corrected: "ATTN\\DECY".into(),
            weight: Some(80.0),
            dose: Some(2e8),
            half_life: Some(6000.0),
            injected: Some((1000.0, true)),
            series: Some(7000.0),
            acquired: Some(7100.0),
        };
        let near =
            |f: Result<f64, String>, expected: f64| (f.unwrap() / expected - 1.0).abs() < 1e-12;
        assert!(near(factor([&said].into_iter()), 8e-4));
        let admin = Uptake { correction: "ADMIN".into(), ..said.clone() };
        assert!(near(factor([&admin].into_iter()), 4e-4));
        let error = factor([&Uptake { weight: None, ..said.clone() }].into_iter()).unwrap_err();
        assert!(error.contains("PatientWeight (0010,1030)"), "{error}");
        let late = Uptake { injected: Some((7200.0, true)), ..said };
        assert!(factor([&late].into_iter()).is_err());
    }

    #[test]
    fn times_are_read_as_dicom_writes_them() {
        assert_eq!(clock("093015.25"), Some(34_215.25));
        assert_eq!((clock("09"), clock("0930")), (Some(32_400.0), Some(34_200.0)));
        assert_eq!((clock("9"), clock("250000"), clock("aa")), (None, None, None));
        let apart = |a: &str, b: &str| day(b).unwrap() - day(a).unwrap();
        assert_eq!((apart("20240228", "20240301"), apart("20231231", "20240101")), (2.0, 1.0));
        assert_eq!((day("2024.02.28"), day("2024")), (day("20240228"), None));
    }
}
