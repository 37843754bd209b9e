//! A queue in which several keys take turns: one item of each in a round, those of one key in the
//! order in which they came. So an item waits for at most one item of each other key between two of
//! its own, however many another key has.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// Things that wait, and whose they are. One is under way at a time.
pub struct Rounds<K, T> {
    /// Who has something waiting and nothing under way, in the order of their turns.
    turns: VecDeque<K>,
    waiting: HashMap<K, VecDeque<T>>,
    /// Whose is under way.
    under_way: Option<K>,
}

impl<K, T> Default for Rounds<K, T> {
    fn default() -> Rounds<K, T> {
        Rounds { turns: VecDeque::new(), waiting: HashMap::new(), under_way: None }
    }
}

impl<K: Copy + Eq + Hash, T> Rounds<K, T> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.values().map(VecDeque::len).sum()
    }

    /// Adds an item of a key. Where `most` wait already the last of the key with most gives way,
    /// unless that left them with fewer than this one has then: it is not taken itself.
    pub fn add(&mut self, key: K, item: T, most: usize) {
        let own = self.waiting.get(&key).map_or(0, VecDeque::len);
        if self.len() >= most {
            let longest = self.waiting.values_mut().max_by_key(|list| list.len());
            let Some(list) = longest.filter(|list| list.len() > own + 1) else { return };
            list.pop_back();
        }
        self.waiting.entry(key).or_default().push_back(item);
        self.line_up(key);
    }

    /// The next one; none while one is under way.
    pub fn take(&mut self) -> Option<(K, T)> {
        if self.under_way.is_some() {
            return None;
        }
        let key = self.turns.pop_front()?;
        let list = self.waiting.get_mut(&key)?;
        let item = list.pop_front()?;
        if list.is_empty() {
            self.waiting.remove(&key);
        }
        self.under_way = Some(key);
        Some((key, item))
    }

    /// The one that was under way is not any more: whose it is waits for the next turn.
    pub fn over(&mut self) {
        if let Some(key) = self.under_way.take()
            && self.waiting.contains_key(&key)
        {
            self.turns.push_back(key);
        }
    }

    /// One that was taken waits again, before all others of the same.
    pub fn put_back(&mut self, key: K, item: T) {
        self.waiting.entry(key).or_default().push_front(item);
        self.line_up(key);
    }

    /// Lets those go that are not to be kept.
    pub fn retain(&mut self, keeps: impl Fn(&T) -> bool) {
        self.waiting.retain(|_, list| {
            list.retain(&keeps);
            !list.is_empty()
        });
        self.turns.retain(|key| self.waiting.contains_key(key));
    }

    /// Lets all go that wait.
    pub fn clear(&mut self) {
        self.waiting.clear();
        self.turns.clear();
    }

    /// Gives a key that has an item waiting its place in the round.
    fn line_up(&mut self, key: K) {
        if self.under_way != Some(key) && !self.turns.contains(&key) {
            self.turns.push_back(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes one and has it done.
    fn next(rounds: &mut Rounds<char, u32>) -> Option<(char, u32)> {
        let next = rounds.take();
        rounds.over();
        next
    }

    fn rest(rounds: &mut Rounds<char, u32>) -> Vec<(char, u32)> {
        std::iter::from_fn(|| next(rounds)).collect()
    }

    #[test]
    fn one_of_each_is_taken_in_a_round() {
        let mut rounds = Rounds::default();
        for (key, item) in [('a', 1), ('a', 2), ('a', 3), ('b', 1), ('b', 2), ('c', 1)] {
            rounds.add(key, item, 64);
        }
        assert_eq!((rounds.len(), next(&mut rounds)), (6, Some(('a', 1))));
        let round = [('b', 1), ('c', 1), ('a', 2), ('b', 2), ('a', 3)];
        assert_eq!(rest(&mut rounds), round);
        assert!(rounds.len() == 0 && rounds.turns.is_empty() && rounds.waiting.is_empty());
    }

    #[test]
    fn who_comes_while_one_is_under_way_goes_before_the_next_of_the_same() {
        let mut rounds = Rounds::default();
        rounds.add('a', 1, 64);
        rounds.add('a', 2, 64);
        assert_eq!(rounds.take(), Some(('a', 1)));
        assert_eq!(rounds.take(), None);
        // However many more are told meanwhile.
        rounds.add('a', 3, 64);
        rounds.add('b', 1, 64);
        rounds.over();
        assert_eq!(rest(&mut rounds), [('b', 1), ('a', 2), ('a', 3)]);
        // One that is given up had its turn, and stays the first of its own.
        rounds.add('a', 4, 64);
        rounds.add('a', 5, 64);
        rounds.add('b', 2, 64);
        let (key, item) = rounds.take().unwrap();
        rounds.put_back(key, item);
        rounds.over();
        assert_eq!(rest(&mut rounds), [('b', 2), ('a', 4), ('a', 5)]);
    }

    #[test]
    fn who_has_many_makes_room_for_who_has_few() {
        let mut rounds = Rounds::default();
        (0..9).for_each(|item| rounds.add('a', item, 4));
        assert_eq!(rounds.len(), 4);
        (0..9).for_each(|item| rounds.add('b', item, 4));
        assert_eq!(rounds.len(), 4);
        rounds.add('c', 0, 4);
        // The last of two gave way; who has one keeps it.
        rounds.add('d', 0, 4);
        rounds.add('e', 0, 4);
        let mut left = rest(&mut rounds);
        left.sort_unstable();
        assert_eq!(left, [('a', 0), ('b', 0), ('c', 0), ('d', 0)]);
        // What is of no use any more has no turn either.
        (0..4).for_each(|item| rounds.add('a', item, 64));
        rounds.add('b', 1, 64);
        rounds.retain(|item| item % 2 == 0);
        assert_eq!(rest(&mut rounds), [('a', 0), ('a', 2)]);
        rounds.add('a', 1, 64);
        rounds.clear();
        assert_eq!((rounds.len(), rounds.take()), (0, None));
    }
}
