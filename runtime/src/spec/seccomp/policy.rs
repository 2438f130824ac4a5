// SPDX-License-Identifier: Apache-2.0
//! The configuration of a filter, checked, in the words of seccomp(2).

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompFilterFlag as Flag,
    LinuxSeccompOperator as Operator, LinuxSyscall,
};

use super::arch::Interface;
use crate::spec::error::FieldError;

/// The errno that an action answers if the configuration says none, as in the specification.
const DEFAULT_ERRNO: u32 = libc::EPERM.unsigned_abs();

/// The largest that the kernel passes on (`MAX_ERRNO`).
const MAX_ERRNO: u32 = 4095;

/// Arguments of a system call.
const ARGUMENTS: usize = 6;

/// A filter, as asked for.
#[derive(Debug)]
pub(crate) struct Policy {
    /// `SECCOMP_RET_*` with its data.
    pub(crate) default_action: u32,
    /// What a system call answers that is newer than all that are named; `None` for the default action.
    pub(crate) newer_action: Option<u32>,
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) rules: Vec<Rule>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub(crate) flags: u32,
}

/// What to do at some system calls.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) names: Vec<String>,
    pub(crate) action: u32,
    /// Any of these suffices; empty if there are no conditions.
    pub(crate) alternatives: Vec<Vec<Condition>>,
}

/// One comparison of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Condition {
    /// 0 to 5.
    pub(crate) argument: u8,
    pub(crate) test: Test,
    /// Whether it is met if the test fails.
    pub(crate) negated: bool,
    pub(crate) value: u64,
    /// The bits of the argument that an `Equal` looks at.
    pub(crate) mask: u64,
}

/// The three comparisons that, with their opposites, make all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Test {
    Equal,
    Greater,
    GreaterOrEqual,
}

impl Policy {
    pub(crate) fn translate(seccomp: &LinuxSeccomp) -> Result<Self, FieldError> {
        if let Some(path) = seccomp.listener_path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
            let what = format!("a listener on the host ({}) for system calls of a guest", path.display());
            return Err(FieldError::unsupported("linux.seccomp.listenerPath", what));
        }
        if seccomp.listener_metadata().as_ref().is_some_and(|text| !text.is_empty()) {
            let what = "it belongs to linux.seccomp.listenerPath";
            return Err(FieldError::unsupported("linux.seccomp.listenerMetadata", what));
        }
        let default = seccomp.default_action();
        let default_action =
            action(default, seccomp.default_errno_ret(), ("linux.seccomp.", "defaultAction", "defaultErrnoRet"))?;
        let passes = matches!(default, Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace);
        let newer_action = (!passes).then_some(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs());
        let rules = seccomp.syscalls().as_deref().unwrap_or_default();
        let rules = rules.iter().enumerate().map(|(index, rule)| Rule::translate(index, rule));
        // The interface of the guest's programs is always there.
        let mut interfaces = vec![Interface::X86_64];
        for interface in seccomp.architectures().iter().flatten().filter_map(|arch| Interface::from_oci(*arch)) {
            if !interfaces.contains(&interface) {
                interfaces.push(interface);
            }
        }
        Ok(Self {
            default_action,
            newer_action,
            interfaces,
            rules: rules.collect::<Result<_, _>>()?,
            flags: flags(seccomp.flags().as_deref())?,
        })
    }

    /// The names that mean nothing in any of the interfaces.
    pub(crate) fn unknown_names(&self) -> impl Iterator<Item = &str> {
        let known = |name: &str| self.interfaces.iter().any(|interface| interface.number(name).is_some());
        self.rules.iter().flat_map(|rule| &rule.names).map(String::as_str).filter(move |name| !known(name))
    }
}

impl Rule {
    fn translate(index: usize, rule: &LinuxSyscall) -> Result<Self, FieldError> {
        let prefix = format!("linux.seccomp.syscalls[{index}].");
        if rule.names().is_empty() {
            return Err(FieldError::missing(format!("{prefix}names"), "they say which system calls the rule is for"));
        }
        let conditions = rule.args().as_deref().unwrap_or_default().iter().enumerate();
        let conditions: Vec<Condition> = conditions
            .map(|(arg, condition)| Condition::translate(condition, || format!("{prefix}args[{arg}].index")))
            .collect::<Result<_, _>>()?;
        let twice = (0..)
            .zip(&conditions)
            .any(|(index, one): (usize, _)| conditions[..index].iter().any(|earlier| earlier.argument == one.argument));
        let alternatives = match conditions.len() {
            0 => Vec::new(),
            _ if twice => conditions.into_iter().map(|condition| vec![condition]).collect(),
            _ => vec![conditions],
        };
        let action = action(rule.action(), rule.errno_ret(), (&prefix, "action", "errnoRet"))?;
        Ok(Self { names: rule.names().clone(), action, alternatives })
    }
}

impl Condition {
    fn translate(arg: &LinuxSeccompArg, field: impl FnOnce() -> String) -> Result<Self, FieldError> {
        let argument = u8::try_from(arg.index()).ok().filter(|index| usize::from(*index) < ARGUMENTS);
        let argument = argument.ok_or_else(|| FieldError::invalid(field(), arg.index(), "from 0 to 5"))?;
        let (test, negated) = match arg.op() {
            Operator::ScmpCmpEq | Operator::ScmpCmpMaskedEq => (Test::Equal, false),
            Operator::ScmpCmpNe => (Test::Equal, true),
            Operator::ScmpCmpGt => (Test::Greater, false),
            Operator::ScmpCmpLe => (Test::Greater, true),
            Operator::ScmpCmpGe => (Test::GreaterOrEqual, false),
            Operator::ScmpCmpLt => (Test::GreaterOrEqual, true),
        };
        // Of a masked comparison, the first value is the mask.
        let (value, mask) = match arg.op() {
            Operator::ScmpCmpMaskedEq => (arg.value_two().unwrap_or(0), arg.value()),
            _ => (arg.value(), u64::MAX),
        };
        Ok(Self { argument, test, negated, value, mask })
    }
}

/// The kernel's word for an action. `fields`: what stands before the names, the action's name, its errno's.
fn action(action: Action, errno: Option<u32>, fields: (&str, &str, &str)) -> Result<u32, FieldError> {
    let (prefix, action_field, errno_field) = fields;
    let with_errno = |base: u32| match errno.unwrap_or(DEFAULT_ERRNO) {
        errno @ 0..=MAX_ERRNO => Ok(base | errno),
        errno => Err(FieldError::invalid(format!("{prefix}{errno_field}"), errno, format!("from 0 to {MAX_ERRNO}"))),
    };
    let base = match action {
        Action::ScmpActErrno => return with_errno(libc::SECCOMP_RET_ERRNO),
        Action::ScmpActTrace => return with_errno(libc::SECCOMP_RET_TRACE),
        Action::ScmpActKill | Action::ScmpActKillThread => libc::SECCOMP_RET_KILL_THREAD,
        Action::ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        Action::ScmpActTrap => libc::SECCOMP_RET_TRAP,
        Action::ScmpActLog => libc::SECCOMP_RET_LOG,
        Action::ScmpActAllow => libc::SECCOMP_RET_ALLOW,
        Action::ScmpActNotify => {
            let what = "SCMP_ACT_NOTIFY: a process of the host cannot answer system calls of a guest";
            return Err(FieldError::unsupported(format!("{prefix}{action_field}"), what));
        }
    };
    match errno {
        Some(errno) => {
            let expected = "possible: only SCMP_ACT_ERRNO and SCMP_ACT_TRACE have one";
            Err(FieldError::invalid(format!("{prefix}{errno_field}"), errno, expected))
        }
        None => Ok(base),
    }
}

/// The flags for seccomp(2). Without a list, speculation is left as it is, as runc does; with one, even an empty one, it
/// says all.
fn flags(flags: Option<&[Flag]>) -> Result<u32, FieldError> {
    let Some(flags) = flags else { return Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32) };
    let mut bits = 0;
    for (index, flag) in flags.iter().enumerate() {
        bits |= match flag {
            // The process has one thread when the filter is installed.
            Flag::SeccompFilterFlagTsync => 0,
            Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG as u32,
            Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32,
            Flag::SeccompFilterFlagWaitKillableRecv => {
                let field = format!("linux.seccomp.flags[{index}]");
                let what = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV belongs to SCMP_ACT_NOTIFY";
                return Err(FieldError::unsupported(field, what));
            }
        };
    }
    Ok(bits)
}
