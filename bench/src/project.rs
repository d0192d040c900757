//! Small workspaces whose programs print what they were built from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

/// A workspace in a directory.
#[derive(Debug, Clone)]
pub struct Project {
    /// The workspace's root.
    pub root: PathBuf,
}

impl Project {
    /// A workspace of three packages: `app` (a program) uses `middle`, which uses `leaf`. `leaf` includes
    /// a text file, reads `LEAF_SETTING` with `option_env!`, and gives one warning.
    ///
    /// # Errors
    /// Where the files cannot be written.
    pub fn three_crates(root: &Path) -> anyhow::Result<Self> {
        let project = Self { root: root.to_owned() };
        project.write(
            "Cargo.toml",
            "[workspace]\nmembers = [\"app\", \"middle\", \"leaf\"]\nresolver = \"3\"\n",
        )?;
        project.package("leaf", &[])?;
        project.package("middle", &["leaf"])?;
        project.package("app", &["middle"])?;
        project.write("leaf/src/text.txt", "one")?;
        project.write(
            "leaf/src/lib.rs",
            "pub fn text() -> String {\n    let unused = 1;\n    \
             format!(\"{} {}\", include_str!(\"text.txt\"), option_env!(\"LEAF_SETTING\").unwrap_or(\"unset\"))\n}\n",
        )?;
        project.write(
            "middle/src/lib.rs",
            "pub fn text() -> String { format!(\"middle {}\", leaf::text()) }\n",
        )?;
        project.write("app/src/main.rs", "fn main() { println!(\"app {}\", middle::text()); }\n")?;
        Ok(project)
    }

    /// Writes a file below the root.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let path = self.root.join(name);
        fs::create_dir_all(path.parent().context("a file has a parent")?)?;
        fs::write(path, content)?;
        Ok(())
    }

    /// Writes a package's manifest; its sources are still to be written.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn package(&self, name: &str, dependencies: &[&str]) -> anyhow::Result<()> {
        let list: String =
            dependencies.iter().map(|other| format!("{other} = {{ path = \"../{other}\" }}\n")).collect();
        self.write(
            &format!("{name}/Cargo.toml"),
            &format!(
                "[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[dependencies]\n{list}"
            ),
        )
    }

    /// Copies the sources to another place.
    ///
    /// # Errors
    /// Where they cannot be copied.
    pub fn copy_to(&self, root: &Path) -> anyhow::Result<Self> {
        self.wipe()?;
        fs::create_dir_all(root.parent().context("a root has a parent")?)?;
        let status = Command::new("cp").arg("-r").arg(&self.root).arg(root).status()?;
        anyhow::ensure!(status.success(), "the project could not be copied");
        Ok(Self { root: root.to_owned() })
    }

    /// Removes the target directory.
    ///
    /// # Errors
    /// Where it is there and cannot be removed.
    pub fn wipe(&self) -> anyhow::Result<()> {
        match fs::remove_dir_all(self.root.join("target")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The libraries and proc macros that were compiled.
    ///
    /// # Errors
    /// Where nothing was.
    pub fn compiled_libraries(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut libraries = Vec::new();
        for entry in fs::read_dir(self.root.join("target/debug/deps"))? {
            let path = entry?.path();
            let extension = path.extension().unwrap_or_default();
            if ["rlib", "rmeta", "so"].iter().any(|kind| extension == *kind) {
                libraries.push(path);
            }
        }
        Ok(libraries)
    }

    /// Runs the program `app` and returns what it prints.
    ///
    /// # Errors
    /// Where it is not there or fails.
    pub fn run_app(&self) -> anyhow::Result<String> {
        let output =
            Command::new(self.root.join("target/debug/app")).output().context("the built program")?;
        anyhow::ensure!(output.status.success(), "the built program failed");
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }
}
