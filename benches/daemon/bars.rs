//! The bars: what is asked of the daemon, in figures of the same rounds.

use crate::servers::{CLOUD_HYPERVISOR, COPY, NULL, OURS, QEMU};
use crate::table::{Bar, Sample, Table};
use crate::work;

fn rate(sample: &Sample) -> f64 {
    sample.rate
}

fn p50(sample: &Sample) -> f64 {
    sample.p50_us
}

fn cpu(sample: &Sample) -> f64 {
    sample.cpu_us
}

/// At least so many times the other's figure.
fn at_least(table: &Table, work: &str, other: &str, figure: (&str, fn(&Sample) -> f64), wanted: f64) -> Bar {
    let found = table.ratio(work, OURS, other, figure.1);
    Bar { what: format!("{work}: {} over that of {other}", figure.0), found, wanted, is_limit: false }
}

fn at_most(table: &Table, work: &str, other: &str, figure: (&str, fn(&Sample) -> f64), wanted: f64) -> Bar {
    Bar { is_limit: true, ..at_least(table, work, other, figure, wanted) }
}

/// Microseconds above the null server at the median.
fn above_null(table: &Table, work: &str) -> Bar {
    let (ours, null) = (table.get(work, OURS), table.get(work, NULL));
    let found = ours.zip(null).map(|(ours, null)| {
        crate::table::spread(ours.iter().zip(null).map(|(ours, null)| ours.p50_us - null.p50_us))
    });
    Bar { what: format!("{work}: p50 above {NULL}, µs"), found, wanted: 1.5, is_limit: true }
}

/// Prints every bar, and what became of it.
pub fn print(memory: &Table, disk: &Table, slow: Option<&Table>) {
    println!("\nbars (median of the rounds' ratios, least and most)");
    let mut bars = Vec::new();
    let (rate, p50, cpu) = (
        ("rate", rate as fn(&Sample) -> f64),
        ("p50", p50 as fn(&Sample) -> f64),
        ("cpu", cpu as fn(&Sample) -> f64),
    );
    for kind in ["write", "hit"] {
        let (one, many) = (format!("{kind} 4 KiB, depth 1"), format!("{kind} 4 KiB, depth 32"));
        let notified = format!("{many}, notified");
        bars.push(above_null(memory, &one));
        bars.push(at_least(memory, &many, COPY, rate, 0.75));
        bars.push(at_least(memory, &many, QEMU, rate, 4.0));
        bars.push(at_least(memory, &many, CLOUD_HYPERVISOR, rate, 2.0));
        bars.push(at_most(memory, &one, QEMU, p50, 0.4));
        bars.push(at_most(memory, &many, QEMU, cpu, 0.25));
        bars.push(at_least(memory, &notified, QEMU, rate, 4.0));
    }
    for work in work::ON_DISK {
        bars.push(at_least(disk, work.name, QEMU, rate, 10.0));
    }
    for work in work::ON_SLOW_DISK {
        if let Some(slow) = slow {
            bars.push(at_least(slow, work.name, QEMU, rate, 0.97));
        }
    }
    bars.iter().for_each(Bar::print);
}
