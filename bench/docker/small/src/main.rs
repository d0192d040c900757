//! A program with one unit of each kind: a build script, a proc macro, a library, a program.

fn main() {
    println!("{} {} {}", greeting::greeting(), macros::word!(), include!(concat!(env!("OUT_DIR"), "/number.rs")));
}
