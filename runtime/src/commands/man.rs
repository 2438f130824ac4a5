// SPDX-License-Identifier: Apache-2.0
//! `bulkhead man`: the manual pages, one a verb, made from the command line's definition. For `make install`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use thiserror::Error;

use super::Outcome;

/// Write the manual pages into a folder
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Where the pages go, as bulkhead.8 and bulkhead-VERB.8
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

#[derive(Debug, Error)]
#[error("cannot write the manual pages into {}", folder.display())]
struct ManError {
    folder: PathBuf,
    source: io::Error,
}

/// Writes them.
pub(crate) fn run(arguments: &Arguments, definition: clap::Command) -> Outcome {
    let folder = &arguments.folder;
    write(folder, definition).map_err(|source| ManError { folder: folder.clone(), source })?;
    Ok(0)
}

fn write(folder: &Path, mut definition: clap::Command) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    definition.build();
    let verbs = definition.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help");
    for verb in verbs.cloned() {
        page(folder, verb)?;
    }
    page(folder, definition)
}

fn page(folder: &Path, command: clap::Command) -> io::Result<()> {
    // The display name of a verb has the program's before it.
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let file = fs::File::create(folder.join(format!("{name}.8")))?;
    clap_mangen::Man::new(command).section("8").render(&mut io::BufWriter::new(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_for_the_program_and_for_each_verb_that_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let definition = clap::Command::new("bulkhead")
            .subcommand(clap::Command::new("run").about("Run it"))
            .subcommand(clap::Command::new("secret").hide(true));

        run(&Arguments { folder: folder.path().join("man8") }, definition).unwrap();

        let mut names: Vec<_> =
            fs::read_dir(folder.path().join("man8")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["bulkhead-run.8", "bulkhead.8"]);
        assert!(fs::read_to_string(folder.path().join("man8/bulkhead-run.8")).unwrap().contains("Run it"));
    }
}
