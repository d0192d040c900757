//! A program whose output depends on something that a cache may overlook, and the proof that cachec does not.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::tier::{confuse_actions, forget_inputs};
use crate::{Build, Machine, Project};

/// Prints what the proc macro of [`Case::with_macro`] yields.
pub const PRINT_MADE: &str = "fn main() { println!(\"{}\", maker::made!()); }\n";

/// See the module.
#[derive(Debug)]
pub struct Case {
    /// Where it is built; with a local tier.
    pub machine: Machine,
    /// A package `app`, and what it depends on.
    pub project: Project,
    directory: TempDir,
}

impl Case {
    /// A workspace with a program `app` whose source this is, depending on the packages named.
    ///
    /// # Errors
    /// Where the files cannot be written.
    pub fn new(app: &str, dependencies: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let project = Project { root: directory.path().join("checkout") };
        project.write(
            "Cargo.toml",
            "[workspace]\nmembers = [\"*\"]\nexclude = [\"target\", \".git\"]\nresolver = \"3\"\n",
        )?;
        project.package("app", dependencies)?;
        project.write("app/src/main.rs", app)?;
        Ok(Self { machine: Machine::new()?, project, directory })
    }

    /// Adds a proc macro `made` in a package `maker`, whose body yields the text of a string literal.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_macro(self, body: &str) -> Result<Self> {
        self.project.write(
            "maker/Cargo.toml",
            "[package]\nname = \"maker\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[lib]\nproc-macro = true\n",
        )?;
        let source = format!(
            "use proc_macro::TokenStream;\n#[proc_macro]\npub fn made(_: TokenStream) -> TokenStream {{\n    \
             let text: String = {{ {body} }};\n    format!(\"{{text:?}}\").parse().unwrap()\n}}\n"
        );
        self.project.write("maker/src/lib.rs", &source)?;
        Ok(self)
    }

    /// A path outside of the workspace.
    #[must_use]
    pub fn outside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Builds from nothing, and waits until all is stored.
    ///
    /// # Errors
    /// Where cargo cannot be started or fails.
    pub fn build(&self) -> Result<Build> {
        self.project.wipe()?;
        let build = self.machine.cargo(&self.project.root, &["build"])?;
        ensure!(build.success, "{}", build.stderr);
        self.machine.cachec(&self.project.root, &["flush"])?;
        Ok(build)
    }

    /// Proves that an input counts: the same hits, a changed one misses, and with it taken out of the stored result
    /// the stale program appears. `forgotten` is a part of its name.
    ///
    /// # Errors
    /// As [`Self::build`], and where one of these does not hold.
    pub fn prove(
        mut self,
        before: &str,
        change: impl FnOnce(&Self) -> Result<()>,
        after: &str,
        forgotten: &str,
    ) -> Result<()> {
        self.build()?;
        assert_eq!(self.project.run_app()?, before);
        let same = self.build()?;
        assert!(same.compiled.is_empty(), "the same inputs are compiled again: {:?}", same.compiled);
        assert_eq!(self.project.run_app()?, before);

        let (tier, forged) = (self.machine.path("tier"), self.machine.path("forged"));
        assert!(Command::new("cp").arg("-r").args([&tier, &forged]).status()?.success());
        let named = |input: &cachec_protocol::Input| String::from_utf8_lossy(&input.name).contains(forgotten);
        assert!(forget_inputs(&forged, named)? > 0, "no stored result knows {forgotten}");

        change(&self)?;
        let changed = self.build()?;
        assert!(!changed.compiled.is_empty(), "the change was not noticed");
        assert_eq!(self.project.run_app()?, after);

        self.machine.set("CACHEC_DIR", forged.to_string_lossy());
        self.build()?;
        assert_eq!(
            self.project.run_app()?,
            before,
            "the negative control: without the input, the stale program"
        );
        Ok(())
    }

    /// Proves that something counts that is known before any file is read: `set` sets it one way or the other, and
    /// `show` shows what came of a build. With one action key for both, the stale output appears.
    ///
    /// # Errors
    /// As [`Self::prove`].
    pub fn prove_key(
        mut self,
        set: impl Fn(&mut Self, bool) -> Result<()>,
        show: impl Fn(&Self, &Build) -> Result<String>,
        shown: [&str; 2],
    ) -> Result<()> {
        let (forged, changed_tier) = (self.machine.path("forged"), self.machine.path("changed"));
        let mut build_in = |tier: &str, changed: bool| -> Result<(Build, String)> {
            let tier = self.machine.path(tier);
            self.machine.set("CACHEC_DIR", tier.to_string_lossy());
            set(&mut self, changed)?;
            let build = self.build()?;
            let text = show(&self, &build)?;
            Ok((build, text))
        };
        for (tier, changed) in [("tier", false), ("changed", true), ("tier", true), ("forged", false)] {
            let (build, text) = build_in(tier, changed)?;
            assert_eq!(text, shown[usize::from(changed)], "in {tier}");
            assert!(!build.compiled.is_empty(), "restored what was never built, in {tier}");
        }
        for changed in [false, true] {
            let (build, text) = build_in("tier", changed)?;
            assert!(build.compiled.is_empty(), "the same is compiled again: {:?}", build.compiled);
            assert_eq!(text, shown[usize::from(changed)], "restored");
        }
        // The compiler of these tests is a script outside of any toolchain, and so an input besides.
        forget_inputs(&forged, |input| input.name.ends_with(b"/bin/rustc"))?;
        ensure!(confuse_actions(&forged, &changed_tier)? > 0, "no action to confuse");
        let (_, text) = build_in("forged", true)?;
        assert_eq!(text, shown[0], "the negative control: with one key for both, the stale output");
        Ok(())
    }
}
