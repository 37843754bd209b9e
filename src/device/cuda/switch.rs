//! Environment variables that switch a feature of the CUDA engine on or off.

use super::CudaError;

/// Whether an environment variable leaves the feature that it names switched on.
///
/// # Errors
/// Its value says neither.
pub(super) fn is_on(name: &str) -> Result<bool, CudaError> {
    of_value(name, std::env::var(name).ok().as_deref(), true)
}

/// Whether an environment variable switches the feature on that it names.
///
/// # Errors
/// Its value says neither.
pub(super) fn is_asked_for(name: &str) -> Result<bool, CudaError> {
    of_value(name, std::env::var(name).ok().as_deref(), false)
}

/// Whether a feature is on, given the value of the environment variable that names it, and whether
/// it is on where there is none.
///
/// # Errors
/// The value says neither.
pub(super) fn of_value(
    name: &str,
    value: Option<&str>,
    otherwise: bool,
) -> Result<bool, CudaError> {
    match value {
        None | Some("") => Ok(otherwise),
        Some("on" | "1") => Ok(true),
        Some("off" | "0") => Ok(false),
        Some(other) => {
            Err(CudaError::Unavailable(format!("{name} is '{other}', expected on or off")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_on_or_off() {
        let values = [None, Some(""), Some("on"), Some("1"), Some("off"), Some("0")];
        let all = |otherwise| values.map(|v| of_value("PRISM_A", v, otherwise).unwrap());
        assert_eq!(all(true), [true, true, true, true, false, false]);
        assert_eq!(all(false), [false, false, true, true, false, false]);
        let failure = of_value("PRISM_A", Some("no"), true).unwrap_err().to_string();
        assert!(failure.ends_with("PRISM_A is 'no', expected on or off"), "{failure}");
    }
}
