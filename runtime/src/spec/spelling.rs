// SPDX-License-Identifier: Apache-2.0
//! Words that the parser of configurations has otherwise than the specification.

use std::borrow::Cow;

use oci_spec::runtime::Spec;
use serde::Deserialize;

/// Flags of `process.scheduler`: as the specification has them, and as the parser does.
const FLAGS: [(&str, &str); 2] =
    [("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"), ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN")];

/// What is looked for before anything is parsed a second time.
const FLAG: &str = "SCHED_FLAG_";
const MONITORING: [&str; 2] = ["enableCMT", "enableMBM"];

#[derive(Deserialize)]
struct Config<'a> {
    #[serde(borrow)]
    process: Option<Process<'a>>,
}

#[derive(Deserialize)]
struct Process<'a> {
    #[serde(borrow)]
    scheduler: Option<Scheduler<'a>>,
}

#[derive(Deserialize)]
struct Scheduler<'a> {
    /// Parts of the text itself.
    #[serde(borrow, default)]
    flags: Vec<&'a str>,
}

/// A configuration as the parser spells it. What is wrong with it is left to the parser to tell.
pub(super) fn of_config(text: &[u8]) -> Cow<'_, [u8]> {
    respell(text, |text| serde_json::from_slice::<Config<'_>>(text).ok()?.process)
}

/// The same of a process alone.
pub(super) fn of_process(text: &[u8]) -> Cow<'_, [u8]> {
    respell(text, |text| serde_json::from_slice(text).ok())
}

fn respell<'a>(text: &'a [u8], process: impl FnOnce(&'a [u8]) -> Option<Process<'a>>) -> Cow<'a, [u8]> {
    if !contains(text, FLAG) {
        return text.into();
    }
    let flags = process(text).and_then(|process| process.scheduler).map(|scheduler| scheduler.flags);
    let mut respelled = text.to_vec();
    // The last one first, so that those before it stay where they are.
    for flag in flags.unwrap_or_default().into_iter().rev() {
        if let Some((_, spelling)) = FLAGS.iter().find(|(known, _)| *known == flag) {
            let start = flag.as_ptr().addr() - text.as_ptr().addr();
            respelled.splice(start..start + flag.len(), spelling.bytes());
        }
    }
    respelled.into()
}

/// Adds to a configuration what the parser has not understood of its text.
pub(super) fn complete(spec: &mut Spec, text: &[u8]) {
    #[derive(Deserialize)]
    struct Config {
        linux: Option<Linux>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Linux {
        intel_rdt: Option<IntelRdt>,
    }
    #[derive(Deserialize)]
    struct IntelRdt {
        #[serde(default, rename = "enableCMT")]
        enable_cmt: bool,
        #[serde(default, rename = "enableMBM")]
        enable_mbm: bool,
    }
    if !MONITORING.iter().any(|word| contains(text, word)) {
        return;
    }
    let config = serde_json::from_slice::<Config>(text).ok();
    let asked = config.and_then(|config| config.linux?.intel_rdt).is_some_and(|rdt| rdt.enable_cmt || rdt.enable_mbm);
    let rdt = spec.linux_mut().as_mut().and_then(|linux| linux.intel_rdt_mut().as_mut());
    if let Some(rdt) = rdt.filter(|_| asked) {
        rdt.set_enable_monitoring(Some(true));
    }
}

fn contains(text: &[u8], word: &str) -> bool {
    // What is no text is refused by the parser.
    str::from_utf8(text).is_ok_and(|text| text.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn respelled(text: &str) -> String {
        String::from_utf8(of_config(text.as_bytes()).into_owned()).unwrap()
    }

    #[test]
    fn flags_of_the_scheduler_are_respelled_and_nothing_else_is() {
        let text = |overrun: &str, reset: &str| {
            format!(
                r#"{{"process": {{"args": ["SCHED_FLAG_RESET_ON_FORK"], "scheduler": {{"policy": "SCHED_OTHER",
                "flags": ["{overrun}", "SCHED_FLAG_RECLAIM", "{reset}"]}}}}}}"#
            )
        };

        let config = respelled(&text("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RESET_ON_FORK"));

        assert_eq!(config, text("SCHED_FLAG_D_L_OVERRUN", "SCHED_RESET_ON_FORK"));
        let process = br#"{"scheduler": {"flags": ["SCHED_FLAG_RESET_ON_FORK"]}}"#;
        assert_eq!(*of_process(process), *br#"{"scheduler": {"flags": ["SCHED_RESET_ON_FORK"]}}"#);
    }

    #[test]
    fn what_cannot_be_parsed_is_left_as_it_is() {
        for text in ["SCHED_FLAG_", r#"{"process": {"scheduler": {"flags": ["SCHED_FLAG_DL_OVERRUN", 1]}}}"#, "{}"] {
            assert_eq!(respelled(text), text);
        }
    }

    #[test]
    fn monitoring_is_asked_for_by_its_older_names() {
        let asked = |field: &str, value: bool| {
            let text = format!(r#"{{"ociVersion": "1.0.2", "linux": {{"intelRdt": {{"{field}": {value}}}}}}}"#);
            let mut spec = serde_json::from_str(&text).unwrap();
            complete(&mut spec, text.as_bytes());
            spec.linux().as_ref().unwrap().intel_rdt().as_ref().unwrap().enable_monitoring() == &Some(true)
        };

        assert!(asked("enableCMT", true) && asked("enableMBM", true));
        assert!(!asked("enableCMT", false) && !asked("enableOther", true));
    }
}
