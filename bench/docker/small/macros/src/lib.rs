//! A proc macro, which is built after the library.

/// A string.
#[proc_macro]
pub fn word(_: proc_macro::TokenStream) -> proc_macro::TokenStream {
    format!("\"from a macro\" /* after {} */", greeting::greeting()).parse().unwrap()
}
