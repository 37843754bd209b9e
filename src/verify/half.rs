//! The tolerance of 16 bits: the peer's own error in them, measured by `benches/peer/half.py`,
//! relative to which results in 16 bits are judged.

use super::Check;
use crate::device::DType;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

/// The relative error that passes whatever the peer's error is.
const BOUND: f64 = 2e-2;

/// By case, element type and quantity.
type Measured = BTreeMap<String, BTreeMap<String, BTreeMap<String, f64>>>;

fn measured() -> &'static Measured {
    static ALL: OnceLock<Measured> = OnceLock::new();
    ALL.get_or_init(|| serde_json::from_str(include_str!("half.json")).unwrap_or_default())
}

/// The share of a case's gradients that may exceed their bounds: where rounding to 16 bits changes
/// the sign of a rectifier's input, the peer's error in that parameter is no guide. They are
/// counted, and the median bounds all of them.
const CHANCE: f64 = 0.01;

/// The quantity that stands for all gradients together.
pub const MEDIAN: &str = "grad.(median)";

/// A parameter's name without its numbers: the peer's largest error among layers of the same kind
/// is used for each, because a single gradient's error is random.
fn kind(quantity: &str) -> String {
    let mut out = String::new();
    for c in quantity.chars() {
        match c {
            '0'..='9' if out.ends_with('*') => {}
            '0'..='9' => out.push('*'),
            c => out.push(c),
        }
    }
    out
}

/// The peer's error in `quantity` of `case`. For sessions and gradients that were not measured it
/// is the least of those that were, and for the stages before the masks that of the masks.
fn peer(case: &str, dtype: DType, quantity: &str) -> f64 {
    let dtype = dtype.to_string();
    let of = |case: &BTreeMap<String, BTreeMap<String, f64>>| {
        case.get(&dtype).cloned().unwrap_or_default()
    };
    let quantity = quantity.split(" (").next().unwrap_or_default().trim_end_matches(".l2");
    if case.starts_with("gradient") {
        let quantity = kind(quantity);
        let of_all = measured()
            .iter()
            .filter(|(name, _)| name.starts_with("gradient"))
            .filter_map(|(_, case)| of(case).get(&quantity).copied());
        return measured()
            .get(case)
            .map_or_else(|| of_all.min_by(f64::total_cmp), |case| of(case).get(&quantity).copied())
            .unwrap_or(0.0);
    }
    if !case.starts_with("session") {
        return measured()
            .get(case)
            .and_then(|case| of(case).get(quantity).copied())
            .unwrap_or(0.0);
    }
    let (part, stage) = quantity.split_once('.').unwrap_or(("", quantity));
    let stage = match stage {
        "refined" | "error_map" => "refined",
        "mask_bits" => stage,
        _ => "masks",
    };
    let least = |errors: &BTreeMap<String, f64>, at: &dyn Fn(&str) -> bool| {
        errors.iter().filter(|(name, _)| at(name)).map(|(_, e)| *e).min_by(f64::total_cmp)
    };
    let behind = |name: &str| name.ends_with(&format!(".{stage}"));
    let here = |name: &str| name == format!("{part}.{stage}") || (part == "encode" && behind(name));
    let known = measured().get(case).and_then(|case| least(&of(case), &here));
    let sessions = measured().iter().filter(|(name, _)| name.starts_with("session"));
    known
        .or_else(|| {
            sessions.filter_map(|(_, case)| least(&of(case), &behind)).min_by(f64::total_cmp)
        })
        .unwrap_or(0.0)
}

/// Widens the tolerances of a case's checks to what 16 bits allow.
pub fn widen(path: &Path, dtype: DType, checks: &mut Vec<Check>) {
    let case = path.file_stem().unwrap_or_default().to_string_lossy();
    for check in checks.iter_mut() {
        let bound = if check.relative { BOUND } else { check.tolerance };
        if bound > 0.0 {
            // That half of all errors are larger is not random.
            let margin = if check.quantity == MEDIAN { 1.5 } else { 4.0 };
            check.tolerance =
                check.tolerance.max(bound).max(margin * peer(&case, dtype, &check.quantity));
        }
    }
    let is_gradient =
        |check: &Check| check.quantity.starts_with("grad.") && check.quantity != MEDIAN;
    let beyond = |check: &Check| is_gradient(check) && !check.passed();
    let all = checks.iter().filter(|c| is_gradient(c)).count();
    if all > 0 && case.starts_with("gradient") {
        let share = checks.iter().filter(|c| beyond(c)).count() as f64 / all as f64;
        if share <= CHANCE {
            checks.retain(|c| !beyond(c));
        }
        checks.push(Check::within("grad.(beyond its bound)", share, CHANCE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_is_found() {
        let f16 = |case, quantity| peer(case, DType::F16, quantity);
        assert_eq!(f16("session_32", "iter2.refined.l2"), 0.0325);
        assert_eq!(f16("session_32", "iter2.mask_bits (1 - Dice)"), 0.00817);
        assert_eq!(f16("session_32", "iter3.u4"), 0.00351);
        assert_eq!(f16("session_32", "encode.block0"), 0.00351);
        assert_eq!(f16("session_64", "iter9.refined"), 0.0163);
        assert_eq!(f16("instance_norm_offset", "out.0"), 0.801);
        assert_eq!(f16("conv3d_k3", "out.0"), 0.0);
        assert_eq!(peer("session_32", DType::F32, "iter2.refined"), 0.0);
    }
}
