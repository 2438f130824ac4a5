// SPDX-License-Identifier: Apache-2.0
//! Phases drawn as a waterfall: one row a phase, grouped by lane, readable on light and on dark pages.

use std::fmt::Write;

use crate::trace::Phase;

/// Widths and heights in the drawing's units, which are pixels at its natural size.
const WIDTH: f64 = 960.0;
const LABEL_WIDTH: f64 = 300.0;
const RIGHT_MARGIN: f64 = 70.0;
const ROW: f64 = 20.0;
const BAR: f64 = 12.0;
const HEAD: f64 = 56.0;
const LANE_HEAD: f64 = 28.0;

/// One colour a lane, by its place; each is told from both backgrounds.
const COLOURS: [&str; 4] = ["#3b82f6", "#d97706", "#16a34a", "#a855f7"];

/// Draws `phases` under `title`. `marks` are moments with a name, drawn as lines over all lanes.
pub(crate) fn timeline(title: &str, phases: &[Phase], marks: &[(String, f64)]) -> String {
    let mut lanes: Vec<&str> = Vec::new();
    for phase in phases {
        if !lanes.contains(&phase.lane.as_str()) {
            lanes.push(&phase.lane);
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let height = HEAD + lanes.len() as f64 * LANE_HEAD + phases.len() as f64 * ROW + 16.0;
    let ends = phases.iter().map(|phase| phase.end_ms).chain(marks.iter().map(|mark| mark.1));
    let total_ms = ends.fold(1.0, f64::max);
    let x = |ms: f64| LABEL_WIDTH + ms / total_ms * (WIDTH - LABEL_WIDTH - RIGHT_MARGIN);

    let mut svg = String::new();
    let mut add = |line: String| {
        let _ = writeln!(svg, "{line}");
    };
    add(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-label=\"{}\">",
        escape(title)
    ));
    add("<style>text{font:12px system-ui,sans-serif;fill:#1f2328}.h{font-weight:600}.d{fill:#59636e}.g{stroke:#8886}\
         .m{stroke:#dc2626;stroke-dasharray:4 3}@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.d{fill:#9198a1}\
         .m{stroke:#f87171}}</style>"
        .to_owned());
    add(text(8.0, 20.0, "h", title));

    let step_ms = tick(total_ms);
    let mut at_ms = 0.0;
    while at_ms <= total_ms {
        add(vertical("g", x(at_ms), 44.0, height - 8.0));
        add(text(x(at_ms) + 3.0, 40.0, "d", &format!("{at_ms} ms")));
        at_ms += step_ms;
    }
    let mut y = HEAD;
    for (lane, colour) in lanes.iter().zip(COLOURS.iter().cycle()) {
        add(text(8.0, y + 18.0, "h", lane));
        y += LANE_HEAD;
        for phase in phases.iter().filter(|phase| phase.lane == *lane) {
            let (left, right) = (x(phase.begin_ms), x(phase.end_ms));
            add(text(20.0, y + 10.0, "t", &shorten(&phase.name)));
            add(format!(
                "<rect x=\"{left:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\" fill=\"{colour}\"/>",
                (right - left).max(1.0)
            ));
            let took = format!("{:.1}", phase.end_ms - phase.begin_ms);
            add(text(right + 4.0, y + 10.0, "d", &took));
            y += ROW;
        }
    }
    for (name, at_ms) in marks {
        add(vertical("m", x(*at_ms), 24.0, height - 8.0));
        add(format!(
            "<text x=\"{:.1}\" y=\"20\" text-anchor=\"end\">{} {at_ms:.1} ms</text>",
            (x(*at_ms) + RIGHT_MARGIN).min(WIDTH - 4.0),
            escape(name)
        ));
    }
    add("</svg>".to_owned());
    svg
}

/// The distance of grid lines: 1, 2 or 5 times a power of ten, at most twelve of them.
fn tick(total_ms: f64) -> f64 {
    let mut step = 1.0;
    for factor in [2.0, 2.5, 2.0].iter().cycle() {
        if total_ms / step <= 12.0 {
            break;
        }
        step *= factor;
    }
    step
}

fn text(x: f64, y: f64, class: &str, words: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{}</text>", escape(words))
}

fn vertical(class: &str, x: f64, top: f64, bottom: f64) -> String {
    format!("<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>")
}

/// As much of a name as fits beside the bars.
fn shorten(name: &str) -> String {
    const MAX: usize = 42;
    if name.chars().count() <= MAX { name.to_owned() } else { name.chars().take(MAX - 1).chain(['…']).collect() }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(lane: &str, name: &str, begin_ms: f64, end_ms: f64) -> Phase {
        Phase { lane: lane.into(), name: name.into(), begin_ms, end_ms }
    }

    #[test]
    fn each_phase_has_a_bar_and_its_time() {
        let phases = [phase("vmm", "load", 0.0, 4.25), phase("guest", "exec", 4.0, 10.0)];

        let svg = timeline("A start", &phases, &[("first output".into(), 9.0)]);

        assert_eq!(svg.matches("<rect").count(), 2);
        assert!(svg.contains(">4.2<") && svg.contains(">6.0<") && svg.contains("first output 9.0 ms"));
    }

    #[test]
    fn names_cannot_break_the_drawing() {
        let svg = timeline("t", &[phase("g", "<script>\"&", 0.0, 1.0)], &[]);

        assert!(svg.contains("&lt;script&gt;&quot;&amp;"));
    }

    #[test]
    fn grid_lines_are_few_and_round() {
        assert_eq!([tick(9.0), tick(20.0), tick(70.0), tick(130.0)], [1.0, 2.0, 10.0, 20.0]);
    }
}
