//! What each namespace has of the store, in memory: its account, and where its least recently used entry may be.
//!
//! Invariant: none of a namespace's `recency` rows is below its head. A head may be too low: the row it was found at is
//! gone. So the namespace with the lowest head has the store's oldest entry only once that was looked at.

use std::collections::{BTreeSet, HashMap};

use super::rows::NamespaceRow;
use crate::namespace::Namespace;

/// One namespace's part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Share {
    /// What its entries are counted as.
    pub(super) stored_bytes: u64,
    /// What uploads into it have reserved.
    pub(super) reserved_bytes: u64,
    /// `None` where nothing of it can be evicted.
    head: Option<u64>,
}

/// All namespaces that have anything.
#[derive(Debug, Default)]
pub(super) struct Shares {
    shares: HashMap<Namespace, Share>,
    /// The heads, lowest first.
    heads: BTreeSet<(u64, Namespace)>,
}

impl Shares {
    /// Begins with what the database says.
    pub(super) fn new(rows: impl IntoIterator<Item = (Namespace, NamespaceRow)>) -> Self {
        let mut shares = Self::default();
        for (namespace, row) in rows {
            shares.set_stored(&namespace, row.stored_bytes);
            shares.set_head(&namespace, Some(row.floor));
        }
        shares
    }

    pub(super) fn get(&self, namespace: &Namespace) -> Share {
        self.shares.get(namespace).copied().unwrap_or_default()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Namespace, &Share)> {
        self.shares.iter()
    }

    /// A namespace's row as it is to be written; `None` where it has nothing.
    pub(super) fn row(&self, namespace: &Namespace, stored_bytes: u64) -> Option<NamespaceRow> {
        let floor = self.get(namespace).head.unwrap_or_default();
        (stored_bytes > 0).then_some(NamespaceRow { stored_bytes, floor })
    }

    /// Goes on with what uploads have reserved.
    pub(super) fn take_reserved(&mut self, before: &Self) {
        for (namespace, share) in before.iter() {
            self.reserve(namespace, share.reserved_bytes);
        }
    }

    pub(super) fn set_stored(&mut self, namespace: &Namespace, stored_bytes: u64) {
        if stored_bytes == 0 {
            self.set_head(namespace, None);
        }
        self.change(namespace, |share| share.stored_bytes = stored_bytes);
    }

    pub(super) fn reserve(&mut self, namespace: &Namespace, bytes: u64) {
        self.change(namespace, |share| share.reserved_bytes = share.reserved_bytes.saturating_add(bytes));
    }

    pub(super) fn release(&mut self, namespace: &Namespace, bytes: u64) {
        self.change(namespace, |share| share.reserved_bytes = share.reserved_bytes.saturating_sub(bytes));
    }

    /// Notes that an entry has got a `recency` row. The first one of a namespace is its head.
    pub(super) fn note_listed(&mut self, namespace: &Namespace, sequence: u64) {
        if self.get(namespace).head.is_none_or(|head| head > sequence) {
            self.set_head(namespace, Some(sequence));
        }
    }

    /// Moves a head to where its row was found; `None` where there is no row.
    pub(super) fn set_head(&mut self, namespace: &Namespace, head: Option<u64>) {
        if let Some(old) = self.get(namespace).head {
            self.heads.remove(&(old, namespace.clone()));
        }
        if let Some(new) = head {
            self.heads.insert((new, namespace.clone()));
        }
        self.change(namespace, |share| share.head = head);
    }

    pub(super) fn head(&self, namespace: &Namespace) -> Option<u64> {
        self.get(namespace).head
    }

    /// The namespace with the lowest head.
    pub(super) fn lowest(&self) -> Option<&Namespace> {
        self.heads.first().map(|(_, namespace)| namespace)
    }

    fn change(&mut self, namespace: &Namespace, change: impl FnOnce(&mut Share)) {
        let share = self.shares.entry(namespace.clone()).or_default();
        change(share);
        // Namespaces come and go with pull requests.
        if *share == Share::default() {
            self.shares.remove(namespace);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_head_comes_first_and_what_has_nothing_is_forgotten() {
        let [a, b] = ["a", "b"].map(|name| name.parse::<Namespace>().unwrap());
        let mut shares = Shares::new([(a.clone(), NamespaceRow { stored_bytes: 10, floor: 5 })]);
        shares.set_stored(&b, 10);
        shares.note_listed(&b, 3);
        shares.note_listed(&b, 7);
        assert_eq!(shares.lowest(), Some(&b));
        shares.set_head(&b, Some(9));
        assert_eq!(shares.lowest(), Some(&a));
        shares.reserve(&a, 4);
        shares.set_stored(&a, 0);
        assert_eq!(shares.lowest(), Some(&b));
        assert_eq!(shares.get(&a).reserved_bytes, 4);
        shares.release(&a, 4);
        shares.set_stored(&b, 0);
        assert_eq!(shares.iter().count(), 0);
        assert_eq!(shares.lowest(), None);
    }
}
