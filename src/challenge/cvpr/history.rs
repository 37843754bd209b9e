//! The prompts of a case: boxes, clicks, and the order in which the clicks were made.

use crate::challenge::npy::{Array, Item};
use crate::challenge::npz::Npz;
use crate::challenge::pickle::{self, Value};
use crate::message::shortened;
use crate::volume::VolumeError;

/// The names of a box's sides, by axes i, j, k (x, y, z). Along x and y it is the box of the
/// object's middle slice; the object may extend beyond it in others.
const SIDES: [[&str; 2]; 3] =
    [["z_mid_x_min", "z_mid_x_max"], ["z_mid_y_min", "z_mid_y_max"], ["z_min", "z_max"]];

/// The items of an array of objects; none if the file has no such array.
pub fn objects(file: &mut Npz, key: &str) -> Result<Vec<Value>, VolumeError> {
    if !file.has(key) {
        return Ok(vec![]);
    }
    let array = file.array(key)?;
    let value = array
        .pickle()
        .ok_or_else(|| "expected an array of objects".to_string())
        .and_then(pickle::load);
    match value.map_err(|e| file.fail(key, &e))? {
        Value::Array { items, .. } | Value::List(items) => Ok(items),
        other => Ok(vec![other]),
    }
}

/// For each class the kinds of its clicks, none where it was perfect. The array is of strings if no
/// class ever was, otherwise of objects.
pub fn order(file: &mut Npz) -> Result<Vec<Vec<Option<String>>>, VolumeError> {
    if !file.has("clicks_order") {
        return Ok(vec![]);
    }
    let array = file.array("clicks_order")?;
    kinds(&array).map_err(|e| file.fail("clicks_order", &e))
}

fn kinds(array: &Array) -> Result<Vec<Vec<Option<String>>>, String> {
    let kind = |value: &Value| match value {
        Value::None => Ok(None),
        Value::Text(text) => Ok(Some(text.clone())),
        other => Err(format!("has an item {}, expected 'fg', 'bg' or None", brief(other))),
    };
    let row = |values: &[Value]| values.iter().map(kind).collect::<Result<Vec<_>, String>>();
    let (shape, flat) = match array.pickle() {
        None => {
            let text = |item: Item| match item {
                Item::Text(text) => Ok(Some(text)),
                _ => Err("has an item that is not text, expected 'fg' or 'bg'".into()),
            };
            (
                array.shape.clone(),
                array.items()?.into_iter().map(text).collect::<Result<Vec<_>, String>>()?,
            )
        }
        Some(bytes) => match pickle::load(bytes)? {
            // Separate rows, if they do not have the same length.
            Value::Array { items, .. } | Value::List(items)
                if items.iter().any(|item| item.items().is_some()) =>
            {
                return items.iter().map(|item| row(item.items().unwrap_or_default())).collect();
            }
            Value::Array { shape, items } => (shape, row(&items)?),
            Value::List(items) => (vec![items.len()], row(&items)?),
            other => return Err(format!("is {}, expected a list for each class", brief(&other))),
        },
    };
    // One axis is the history of one class.
    let length = shape.last().copied().unwrap_or_default().max(1);
    Ok(flat.chunks(length).map(<[_]>::to_vec).collect())
}

/// A value as Python writes it if it is short, otherwise its kind: for an error.
fn brief(value: &Value) -> String {
    match value {
        Value::List(items) if (1..=4).contains(&items.len()) => {
            format!("[{}]", items.iter().map(kind_of).collect::<Vec<_>>().join(", "))
        }
        other => kind_of(other),
    }
}

/// A value within another, in a few words.
fn kind_of(value: &Value) -> String {
    match value {
        Value::None => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Int(n) => n.to_string(),
        Value::Float(v) => format!("{v:?}"),
        Value::Text(text) => format!("'{}'", shortened(text, 40)),
        Value::Bytes(bytes) => format!("{} bytes", bytes.len()),
        Value::List(items) => format!("a list of {}", items.len()),
        Value::Dict(pairs) => format!("a dictionary of {}", pairs.len()),
        Value::Array { items, .. } => format!("an array of {}", items.len()),
    }
}

/// The voxel `[i, j, k]` of a click `[z, y, x]`.
fn voxel(click: &Value, size: [usize; 3]) -> Result<[usize; 3], String> {
    let numbers: Option<Vec<i64>> =
        click.items().and_then(|items| items.iter().map(Value::int).collect());
    let Some(&[z, y, x]) = numbers.as_deref() else {
        return Err(format!(
            "{} is not a click: expected three whole numbers: z, y, x",
            brief(click)
        ));
    };
    let at = [x, y, z].map(|c| usize::try_from(c).unwrap_or(usize::MAX));
    if (0..3).any(|a| at[a] >= size[a]) {
        return Err(format!(
            "the click at z, y, x = {z}, {y}, {x} lies outside the image of {}, {}, {} voxels",
            size[2], size[1], size[0]
        ));
    }
    Ok(at)
}

/// The clicks of a class `{'fg': [...], 'bg': [...]}` in the order in which they were made. Those
/// missing from the order come last.
pub fn history(
    clicks: &Value,
    order: Option<&[Option<String>]>,
    size: [usize; 3],
) -> Result<Vec<([usize; 3], bool)>, String> {
    let list = |key: &str| -> Result<Vec<[usize; 3]>, String> {
        let given = clicks
            .get(key)
            .ok_or_else(|| format!("has no '{key}', expected lists 'fg' and 'bg'"))?;
        let items = given.items().ok_or_else(|| format!("its '{key}' is not a list"))?;
        items.iter().map(|click| voxel(click, size)).collect()
    };
    let (fg, bg) = (list("fg")?, list("bg")?);
    let (mut on, mut off) = (fg.into_iter().map(|v| (v, true)), bg.into_iter().map(|v| (v, false)));
    let mut all = vec![];
    // A step at which the class was perfect has no click.
    for kind in order.into_iter().flatten().flatten() {
        let next = match kind.as_str() {
            "fg" => on.next(),
            "bg" => off.next(),
            other => return Err(format!("'clicks_order' has '{other}', expected 'fg' or 'bg'")),
        };
        all.push(
            next.ok_or_else(|| format!("'clicks_order' has more '{kind}' than there are clicks"))?,
        );
    }
    all.extend(on.chain(off));
    Ok(all)
}

/// The box of a class, limited to the image; none if the class has none.
pub fn bounds(given: &Value, size: [usize; 3]) -> Result<Option<[usize; 6]>, String> {
    if *given == Value::None {
        return Ok(None);
    }
    let mut bounds = [0; 6];
    for (a, names) in SIDES.iter().enumerate() {
        let side = |name: &str| {
            given
                .get(name)
                .and_then(Value::int)
                .ok_or_else(|| format!("its box has no whole number '{name}'"))
        };
        let (low, high) = (side(names[0])?, side(names[1])?);
        let end = usize::try_from(high.saturating_add(1)).unwrap_or(0).min(size[a]);
        let start = usize::try_from(low.max(0)).unwrap_or(usize::MAX);
        if start >= end {
            let [from, to] = names;
            return Err(format!(
                "its box contains no voxel: '{from}' is {low}, '{to}' is {high}, the image has {} voxels there",
                size[a]
            ));
        }
        (bounds[a], bounds[a + 3]) = (start, end);
    }
    Ok(Some(bounds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_told_as_it_was_written_and_not_at_length() {
        let text = |text: &str| Value::Text(text.into());
        let short = Value::List(vec![Value::Int(1), text("x"), Value::List(vec![Value::None])]);
        assert_eq!(brief(&short), "[1, 'x', a list of 1]");
        assert_eq!(brief(&Value::List(vec![Value::Bool(true); 5])), "a list of 5");
        assert_eq!(brief(&text(&"y".repeat(100))), format!("'{}...'", "y".repeat(40)));
    }
}
