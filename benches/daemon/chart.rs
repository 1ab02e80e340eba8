//! The picture: latencies by percentile, and the rate over time of a cache that is full.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;

use crate::driver::{Run, TICK};
use crate::table::{Sample, Table};

const WIDTH: f64 = 860.0;
const PANEL: f64 = 300.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 40.0;
/// Colours that stay apart for who does not see all of them.
const COLOURS: [&str; 6] = ["#0072b2", "#999999", "#56b4e9", "#d55e00", "#cc79a7", "#009e73"];

/// An axis from `low` to `high`, by its logarithm or not.
struct Axis {
    low: f64,
    high: f64,
    is_log: bool,
}

impl Axis {
    /// Where a value lies, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let map = |value: f64| if self.is_log { value.max(self.low).ln() } else { value };
        ((map(value) - map(self.low)) / (map(self.high) - map(self.low))).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.is_log {
            let first = self.low.log10().ceil() as i32;
            return (first..=self.high.log10().floor() as i32).map(|n| 10f64.powi(n)).collect();
        }
        let step = 10f64.powf((self.high - self.low).log10().floor());
        let step = if (self.high - self.low) / step < 4.0 { step / 2.0 } else { step };
        (0..20).map(|n| self.low + f64::from(n) * step).take_while(|tick| *tick <= self.high).collect()
    }
}

struct Line<'a> {
    name: &'a str,
    points: Vec<(f64, f64)>,
}

/// One chart of lines at `top`; `across` are the labels of its horizontal axis.
fn panel(
    svg: &mut String,
    top: f64,
    title: &str,
    axes: (&Axis, &Axis),
    across: &[(f64, String)],
    lines: &[Line<'_>],
) -> std::fmt::Result {
    let (across_axis, up) = axes;
    let (width, height) = (WIDTH - LEFT - RIGHT, PANEL - TOP - BOTTOM);
    let x = |value: f64| LEFT + width * across_axis.place(value);
    let y = |value: f64| top + TOP + height * (1.0 - up.place(value));
    writeln!(svg, r#"<text x="{LEFT}" y="{}" font-weight="bold">{title}</text>"#, top + TOP - 14.0)?;
    for tick in up.ticks() {
        let at = y(tick);
        writeln!(svg, r##"<path d="M{LEFT} {at:.1}H{:.1}" stroke="#ddd"/>"##, LEFT + width)?;
        writeln!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{tick}</text>"#, LEFT - 6.0, at + 4.0)?;
    }
    for (value, label) in across {
        let at = top + PANEL - BOTTOM + 18.0;
        writeln!(svg, r#"<text x="{:.1}" y="{at}" text-anchor="middle">{label}</text>"#, x(*value))?;
    }
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<String> =
            line.points.iter().map(|(a, b)| format!("{:.1},{:.1}", x(*a), y(*b))).collect();
        writeln!(
            svg,
            r#"<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{}"/>"#,
            points.join(" ")
        )?;
        let Some((_, last)) = line.points.last() else { continue };
        writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" fill="{colour}">{}</text>"#,
            LEFT + width + 8.0,
            y(*last) + 4.0,
            line.name
        )?;
    }
    Ok(())
}

fn median(samples: &[Sample], pick: impl Fn(&Sample) -> f64) -> f64 {
    crate::table::spread(samples.iter().map(pick)).1
}

/// Latencies of a workload, by server.
fn latencies(svg: &mut String, top: f64, table: &Table, work: &str) -> std::fmt::Result {
    let names = table.servers(work);
    let lines: Vec<Line<'_>> = names
        .iter()
        .filter_map(|name| {
            let samples = table.get(work, name)?;
            let points = vec![
                (0.0, median(samples, |s| s.p50_us)),
                (1.0, median(samples, |s| s.p99_us)),
                (2.0, median(samples, |s| s.p999_us)),
            ];
            Some(Line { name, points })
        })
        .collect();
    let most = lines.iter().flat_map(|line| &line.points).map(|(_, us)| *us).fold(10.0, f64::max);
    let axes =
        (&Axis { low: 0.0, high: 2.0, is_log: false }, &Axis { low: 0.5, high: most * 1.2, is_log: true });
    let labels = [(0.0, "50 %".to_owned()), (1.0, "99 %".to_owned()), (2.0, "99.9 %".to_owned())];
    panel(svg, top, &format!("latency in µs: {work}"), axes, &labels, &lines)
}

/// Requests a second over time.
fn rates(svg: &mut String, top: f64, runs: &[(&str, Run)]) -> std::fmt::Result {
    /// Points to draw for each server at most.
    const POINTS: usize = 200;
    let lines: Vec<Line<'_>> = runs
        .iter()
        .map(|(name, run)| {
            let wide = run.ticks.len().div_ceil(POINTS).max(1);
            let seconds = TICK.as_secs_f64() * wide as f64;
            let points = run.ticks.chunks_exact(wide).enumerate().map(|(n, ticks)| {
                let count: u64 = ticks.iter().map(|count| u64::from(*count)).sum();
                (n as f64 * seconds, count as f64 / seconds / 1e3)
            });
            Line { name, points: points.collect() }
        })
        .collect();
    let most = |pick: fn(&(f64, f64)) -> f64| {
        lines.iter().flat_map(|line| &line.points).map(pick).fold(0.1, f64::max)
    };
    let (time, rate) = (most(|p| p.0), most(|p| p.1));
    let across = Axis { low: 0.0, high: time, is_log: false };
    let labels: Vec<_> = across.ticks().into_iter().map(|tick| (tick, format!("{tick:.1} s"))).collect();
    let up = Axis { low: 0.0, high: rate, is_log: false };
    panel(
        svg,
        top,
        "thousand random 4 KiB writes a second, three times the cache without a pause",
        (&across, &up),
        &labels,
        &lines,
    )
}

/// Writes the picture.
pub fn write(path: &Path, table: &Table, full: &[(&str, Run)]) -> io::Result<()> {
    let mut body = String::new();
    let works = ["write 4 KiB, depth 1", "hit 4 KiB, depth 1"];
    let drawn = works
        .iter()
        .enumerate()
        .try_for_each(|(n, work)| latencies(&mut body, n as f64 * PANEL, table, work));
    drawn.and_then(|()| rates(&mut body, works.len() as f64 * PANEL, full)).map_err(io::Error::other)?;
    let height = PANEL * (works.len() + 1) as f64;
    let svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">
<rect width="100%" height="100%" fill="white"/>
{body}</svg>
"#
    );
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    fs::write(path, svg)
}
