//! The names in NumPy's pickles: arrays, element types, numbers. They are recognised by name and
//! implemented here; nothing is executed.

use super::MOST;
use super::machine::{Id, Machine, Node};
use super::names::Global;
use crate::challenge::npy::{DType, Item, fortran_place, items_of};

impl Machine<'_> {
    /// The items of a list or tuple.
    fn members(&mut self, id: Id, what: &str) -> Result<Vec<Id>, String> {
        let Node::List(items) = &self.nodes[id] else {
            return Err(format!("its pickle has no list for {what}"));
        };
        let items = items.clone();
        self.spend(items.len())?;
        Ok(items)
    }

    /// The bytes of a string or of bytes.
    fn bytes_of(&self, id: Id) -> usize {
        match &self.nodes[id] {
            Node::Text(text) => text.len(),
            Node::Bytes(bytes) => bytes.len(),
            _ => 0,
        }
    }

    /// Does what one of the known functions would do.
    pub fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.members(arguments, "arguments")?;
        let Node::Global(function) = self.nodes[function] else {
            return Err("its pickle calls something that is not a function".into());
        };
        let cost: usize = arguments.iter().map(|id| self.bytes_of(*id)).sum();
        self.spend(cost)?;
        let of: Vec<&Node> = arguments.iter().map(|id| &self.nodes[*id]).collect();
        let made = match (function, &of[..]) {
            (Global::Reconstruct, [Node::Global(Global::NdArray), ..]) => {
                Node::Array(vec![0], vec![])
            }
            (Global::DType, [Node::Text(text), ..]) => Node::DType(DType::parse(text)?),
            (Global::Scalar, [Node::DType(dtype), Node::Bytes(bytes)]) => match dtype.item(bytes) {
                Some(item) => item.into(),
                None => {
                    return Err(format!(
                        "its pickle has a number of type {} in {} bytes",
                        dtype.name(),
                        bytes.len()
                    ));
                }
            },
            (Global::Encode, [Node::Text(text), Node::Text(encoding)])
                if encoding == "latin1" || encoding == "latin-1" =>
            {
                let bytes: Option<Vec<u8>> =
                    text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
                Node::Bytes(bytes.ok_or("its pickle has bytes above 255")?)
            }
            _ => {
                return Err(format!(
                    "its pickle calls '{}' with arguments that NumPy does not give it",
                    function.name()
                ));
            }
        };
        self.push(made)
    }

    /// Gives an element type its byte order, or an array its shape and items.
    pub fn build(&mut self) -> Result<(), String> {
        let (state, object) = (self.pop()?, self.top()?);
        let state = self.members(state, "the state of an object")?;
        match &self.nodes[object] {
            Node::DType(dtype) => {
                let dtype = *dtype;
                self.nodes[object] = Node::DType(self.ordered(dtype, &state)?);
            }
            Node::Array(..) => {
                let (shape, items) = self.array(&state)?;
                self.nodes[object] = Node::Array(shape, items);
            }
            _ => return Err("its pickle gives a state to an object without one".into()),
        }
        Ok(())
    }

    /// An element type with the state `(version, order, subarray, names, fields, ...)`.
    fn ordered(&self, dtype: DType, state: &[Id]) -> Result<DType, String> {
        let of: Vec<&Node> = state.iter().map(|id| &self.nodes[*id]).collect();
        match &of[..] {
            [_, Node::Text(order), Node::None, Node::None, Node::None, ..] => {
                Ok(dtype.with_order(order))
            }
            _ => Err("its pickle has an element type with fields, expected a plain one".into()),
        }
    }

    /// An array with the state `(version, shape, element type, first axis fastest, items)`.
    fn array(&mut self, state: &[Id]) -> Result<(Vec<usize>, Vec<Id>), String> {
        let &[_, shape, dtype, fortran, data] = state else {
            return Err("its pickle has an array with an unknown state".into());
        };
        let shape = self.members(shape, "a shape")?;
        let side = |id: &Id| match self.nodes[*id] {
            Node::Int(n) => usize::try_from(n)
                .map_err(|_| format!("its pickle has an array with a side of {n}")),
            _ => Err("its pickle has an array with a side that is not a number".to_string()),
        };
        let shape = shape.iter().map(side).collect::<Result<Vec<usize>, String>>()?;
        let Node::DType(dtype) = self.nodes[dtype] else {
            return Err("its pickle has an array without an element type".into());
        };
        let wrong = |got: usize| {
            format!(
                "its pickle has an array of {shape:?} items of {}, but {got} of them",
                dtype.name()
            )
        };
        if dtype.is_object() {
            // Objects are listed with the last axis fastest, whatever the array's own order is.
            let items = self.members(data, "an array's objects")?;
            return if items_of(&shape) == Some(items.len()) {
                Ok((shape, items))
            } else {
                Err(wrong(items.len()))
            };
        }
        self.spend(self.bytes_of(data))?;
        let fortran = matches!(self.nodes[fortran], Node::Bool(true));
        let Node::Bytes(bytes) = &self.nodes[data] else {
            return Err("its pickle has an array of numbers without bytes".into());
        };
        let count = bytes.len() / dtype.size().max(1);
        if items_of(&shape) != Some(count) || count > MOST {
            return Err(wrong(count));
        }
        let item = |at: usize| {
            let place = if fortran { fortran_place(&shape, at) } else { at };
            bytes.get(place * dtype.size()..(place + 1) * dtype.size()).and_then(|b| dtype.item(b))
        };
        let items: Option<Vec<Item>> = (0..count).map(item).collect();
        let items = items.ok_or_else(|| wrong(count))?;
        let ids = items
            .into_iter()
            .map(|item| self.make(item.into()))
            .collect::<Result<Vec<Id>, String>>()?;
        Ok((shape, ids))
    }
}
