//! A plain library.

/// What the program says first.
pub fn greeting() -> &'static str {
    "hello"
}
