// SPDX-License-Identifier: Apache-2.0
//! Finds the program and executes it; where that fails, says why in the words that container users know.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use rustix::fs::{Access, AtFlags, CWD, accessat};

use crate::container::{Failure, Stage};

/// What the kernel reads of a script's first line.
const SCRIPT_LINE_LEN: u64 = 256;

/// Program header that names a loader.
const SEGMENT_INTERPRETER: u32 = 3;

/// The program that `name` means: as it is if it has a slash, else the first executable file of that name in PATH.
pub(crate) fn find(name: &CStr, env: &[CString]) -> Result<CString, Failure> {
    let bytes = name.to_bytes();
    if bytes.contains(&b'/') {
        return check_executable(OsStr::from_bytes(bytes).as_ref())
            .map(|()| name.to_owned())
            .map_err(|error| refused(name, &error));
    }
    let path = env.iter().rev().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH=")).unwrap_or_default();
    let mut unusable = None;
    // A relative part of PATH is no place to look for programs in.
    for directory in path.split(|byte| *byte == b':').filter(|part| part.first() == Some(&b'/')) {
        let candidate = [directory, b"/", bytes].concat();
        match check_executable(OsStr::from_bytes(&candidate).as_ref()) {
            Ok(()) => return CString::new(candidate).map_err(|error| refused(name, &error.into())),
            Err(error) if is_absent(&error) => {}
            // There may be one all the same.
            Err(error) => unusable = Some(error),
        }
    }
    match unusable {
        Some(error) => Err(refused(name, &error)),
        None => Err(Failure::explained(
            Stage::ProgramNotFound,
            format!("exec: {}: executable file not found in $PATH", quoted(name)),
        )),
    }
}

/// Whether there is no such program in a directory of PATH.
fn is_absent(error: &io::Error) -> bool {
    let absent = [libc::ENOENT, libc::ENOTDIR, libc::EISDIR, libc::ENAMETOOLONG, libc::ELOOP];
    error.raw_os_error().is_some_and(|errno| absent.contains(&errno))
}

fn quoted(name: &CStr) -> String {
    format!("\"{}\"", name.to_string_lossy())
}

fn check_executable(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if metadata.mode() & 0o111 == 0 {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    Ok(accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)?)
}

/// The failure of a program that was refused before it was executed.
fn refused(name: &CStr, error: &io::Error) -> Failure {
    let reason = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => {
            let reason = reason_text(error);
            let text = format!("exec: {}: stat {}: {reason}", quoted(name), name.to_string_lossy());
            return Failure::explained(Stage::ProgramNotFound, text);
        }
        _ => reason_text(error),
    };
    Failure::explained(Stage::ProgramNotExecutable, format!("exec: {}: {reason}", quoted(name)))
}

/// The system's words for an error, in lower case and without the number, as other runtimes print them.
fn reason_text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => Errno::from_raw(errno).desc().to_lowercase(),
        None => error.to_string(),
    }
}

/// Executes `program`. Returns only if that failed.
pub(crate) fn execute(program: &CStr, args: &[CString], env: &[CString]) -> Failure {
    match nix::unistd::execve(program, args, env) {
        Ok(never) => match never {},
        Err(errno) => explain(program, errno),
    }
}

/// Why the kernel would not execute a program that is there and has the right permissions.
fn explain(program: &CStr, errno: Errno) -> Failure {
    let name = program.to_string_lossy();
    let error = io::Error::from(errno);
    if errno == Errno::ENOENT {
        // Engines look for these words.
        let reason = reason_text(&error);
        let text = match interpreter(Path::new(OsStr::from_bytes(program.to_bytes()))) {
            Some(Interpreter::Script(interpreter)) => {
                format!("exec {name}: its interpreter \"{interpreter}\": {reason}")
            }
            Some(Interpreter::Loader(loader)) => format!("exec {name}: its loader \"{loader}\": {reason}"),
            None => format!("exec {name}: {reason}"),
        };
        return Failure::explained(Stage::ProgramNotFound, text);
    }
    Failure::explained(Stage::ProgramNotExecutable, format!("exec {name}: {}", reason_text(&error)))
}

/// The other file that a program needs to be executed.
#[derive(Debug, PartialEq, Eq)]
enum Interpreter {
    Script(String),
    Loader(String),
}

fn interpreter(program: &Path) -> Option<Interpreter> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(program).ok()?;
    let mut start = Vec::new();
    // Program headers lie right behind the ELF header in what linkers make.
    file.take(16 * SCRIPT_LINE_LEN).read_to_end(&mut start).ok()?;
    script_interpreter(&start).map(Interpreter::Script).or_else(|| elf_loader(&start).map(Interpreter::Loader))
}

fn script_interpreter(start: &[u8]) -> Option<String> {
    let line = start.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let line = String::from_utf8_lossy(line);
    line.split_ascii_whitespace().next().map(str::to_owned)
}

/// The loader's path in the first bytes of a little-endian 64-bit ELF program.
fn elf_loader(start: &[u8]) -> Option<String> {
    let number = |offset: usize, len: usize| -> Option<usize> {
        let bytes = start.get(offset..offset.checked_add(len)?)?;
        let value = bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    start.strip_prefix(b"\x7fELF\x02\x01")?;
    let (table, entry_len, entries) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..entries {
        let header = table.checked_add(index.checked_mul(entry_len)?)?;
        if number(header, 4)? == SEGMENT_INTERPRETER as usize {
            let (offset, len) = (number(header.checked_add(8)?, 8)?, number(header.checked_add(32)?, 8)?);
            let path = start.get(offset..offset.checked_add(len)?)?;
            return Some(CStr::from_bytes_until_nul(path).ok()?.to_string_lossy().into_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn c(text: &str) -> CString {
        CString::new(text).unwrap()
    }

    /// A folder with an executable `tool`, a plain `data` and a directory `folder`.
    fn folder() -> (tempfile::TempDir, PathBuf, [CString; 1]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        std::fs::write(path.join("tool"), "#!/missing/interpreter -x\n").unwrap();
        std::fs::set_permissions(path.join("tool"), PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::write(path.join("data"), "").unwrap();
        std::fs::create_dir(path.join("folder")).unwrap();
        let env = [c(&format!("PATH=/nonexistent:{}", path.display()))];
        (folder, path, env)
    }

    #[test]
    fn name_is_looked_up_in_the_containers_path() {
        let (_folder, path, env) = folder();
        assert_eq!(find(c"tool", &env).unwrap(), c(path.join("tool").to_str().unwrap()));
    }

    #[test]
    fn missing_names_are_not_found() {
        let (_folder, path, env) = folder();
        let failure = find(c"nothing", &env).unwrap_err();
        assert_eq!(failure.stage, Stage::ProgramNotFound);
        assert_eq!(failure.to_string(), "exec: \"nothing\": executable file not found in $PATH");
        assert_eq!(find(c"tool", &[]).unwrap_err().stage, Stage::ProgramNotFound);

        let missing = path.join("nothing").display().to_string();
        let failure = find(&c(&missing), &env).unwrap_err();
        assert_eq!(failure.stage, Stage::ProgramNotFound);
        assert_eq!(failure.to_string(), format!("exec: \"{missing}\": stat {missing}: no such file or directory"));
    }

    #[test]
    fn name_that_cannot_be_looked_up_is_not_taken_for_missing() {
        let (_folder, path, env) = folder();
        std::os::unix::fs::symlink("looped", path.join("looped")).unwrap();
        for name in ["looped", &"n".repeat(300)] {
            assert_eq!(find(&c(name), &env).unwrap_err().stage, Stage::ProgramNotFound, "{name}");
        }
        for errno in [libc::ENFILE, libc::EIO, libc::ENOMEM, libc::EACCES] {
            assert!(!is_absent(&io::Error::from_raw_os_error(errno)), "{errno}");
        }
    }

    #[test]
    fn files_and_folders_that_cannot_be_executed_are_told_apart() {
        let (_folder, path, env) = folder();
        for (name, reason) in [("data", "permission denied"), ("folder", "is a directory")] {
            let whole = path.join(name).display().to_string();
            let failure = find(&c(&whole), &env).unwrap_err();
            assert_eq!(failure.stage, Stage::ProgramNotExecutable);
            assert_eq!(failure.to_string(), format!("exec: \"{whole}\": {reason}"));
        }
        assert_eq!(find(c"data", &env).unwrap_err().stage, Stage::ProgramNotExecutable);
    }

    #[test]
    fn missing_interpreter_is_named() {
        let (_folder, path, _env) = folder();
        let program = c(path.join("tool").to_str().unwrap());
        let failure = explain(&program, Errno::ENOENT);
        assert_eq!(failure.stage, Stage::ProgramNotFound);
        let words = "its interpreter \"/missing/interpreter\": no such file or directory";
        assert!(failure.to_string().ends_with(words), "{failure}");
    }

    #[test]
    fn unknown_format_cannot_be_executed() {
        let failure = explain(c"/x", Errno::ENOEXEC);
        assert_eq!(failure.stage, Stage::ProgramNotExecutable);
        assert_eq!(failure.to_string(), "exec /x: exec format error");
    }

    #[test]
    fn loader_is_read_from_a_dynamic_program_and_from_no_nonsense() {
        let mut program = std::fs::read("/proc/self/exe").unwrap();
        program.truncate(4096);
        if let Some(loader) = elf_loader(&program) {
            assert!(loader.starts_with('/'), "{loader}");
        }
        for len in 0..program.len().min(1024) {
            elf_loader(&program[..len]);
        }
        program[32..40].fill(0xff);
        assert_eq!(elf_loader(&program), None);
    }
}
