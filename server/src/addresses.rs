//! How many connections each address has, so that one client cannot take all of them.
//!
//! The addresses of one IPv6 network of 64 bits count as one. Loopback is not counted: there is a proxy, or a test.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Connections by address. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Addresses {
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
    limit: usize,
}

/// One connection; counted until it is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    addresses: Addresses,
    address: Option<IpAddr>,
}

impl Addresses {
    /// At most so many connections from an address.
    pub(crate) fn new(limit: usize) -> Self {
        Self { counts: Arc::default(), limit }
    }

    /// Counts a connection; `None` where the address has too many.
    pub(crate) fn admit(&self, address: IpAddr) -> Option<Counted> {
        let address = network(address);
        if let Some(address) = address {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(address).or_default();
            if *count >= self.limit {
                return None;
            }
            *count += 1;
        }
        Some(Counted { addresses: self.clone(), address })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let Some(address) = self.address else { return };
        let mut counts = self.addresses.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&address);
            }
        }
    }
}

/// What an address is counted as, if it is.
fn network(address: IpAddr) -> Option<IpAddr> {
    match address.to_canonical() {
        address if address.is_loopback() => None,
        IpAddr::V6(address) => Some(IpAddr::V6((u128::from(address) >> 64 << 64).into())),
        address => Some(address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_only_so_many_connections() {
        let addresses = Addresses::new(2);
        let admit = |address: &str| addresses.admit(address.parse().unwrap());
        let first = admit("192.0.2.1").unwrap();
        let _second = admit("::ffff:192.0.2.1").unwrap();
        assert!(admit("192.0.2.1").is_none());
        let _other = admit("192.0.2.2").unwrap();
        drop(first);
        let _third = admit("192.0.2.1").unwrap();
        let _network = (admit("2001:db8::1").unwrap(), admit("2001:db8::2").unwrap());
        assert!(admit("2001:db8::3").is_none() && admit("2001:db8:0:1::3").is_some());
        for _ in 0..10 {
            std::mem::forget(admit("127.0.0.1").unwrap());
            std::mem::forget(admit("::1").unwrap());
        }
        assert_eq!(addresses.counts.lock().unwrap().len(), 3);
    }
}
