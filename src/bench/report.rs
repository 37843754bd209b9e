//! The roofline table: each op's time compared with what the machine's ceilings allow.

use super::Ceilings;
use crate::device::profile::OpRecord;
use std::fmt::Write;
use std::time::Duration;

/// Ops of one kind and size.
struct Row {
    /// The op.
    op: &'static str,
    /// The sizes of the op's inputs.
    problem: String,
    /// The number of times that it ran.
    count: usize,
    /// The total time.
    time: Duration,
    /// The total operations.
    flops: f64,
    /// The total bytes.
    bytes: f64,
}

impl Row {
    /// The least time that the ceilings allow, in seconds.
    fn floor(&self, ceilings: &Ceilings) -> f64 {
        (self.flops / ceilings.flops).max(self.bytes / ceilings.bytes)
    }
}

/// Groups ops of one kind and size, the longest first.
fn rows(seen: &[OpRecord]) -> Vec<Row> {
    let mut rows: Vec<Row> = vec![];
    for s in seen {
        let found = rows.iter().position(|r| (r.op, &r.problem) == (s.op, &s.problem));
        let at = found.unwrap_or_else(|| {
            rows.push(Row {
                op: s.op,
                problem: s.problem.clone(),
                count: 0,
                time: Duration::ZERO,
                flops: 0.0,
                bytes: 0.0,
            });
            rows.len() - 1
        });
        let row = &mut rows[at];
        row.count += 1;
        row.time += s.time;
        row.flops += s.flops;
        row.bytes += s.bytes;
    }
    rows.sort_by_key(|r| std::cmp::Reverse(r.time));
    rows
}

/// A Markdown table of recorded ops, those of one kind and size in one line, the longest first:
/// their work, their time, and what the ceilings would allow.
///
/// Ops below one percent of the total time are combined in one line.
pub fn table(seen: &[OpRecord], ceilings: &Ceilings) -> String {
    let rows = rows(seen);
    let whole: Duration = rows.iter().map(|r| r.time).sum();
    let mut text = String::from(
        "| op | problem | times | GFLOP | MB | ms | share | % of FMA rate | % of bandwidth | ms at the ceilings |\n",
    );
    text += "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|\n";
    let mut line = |r: &Row| {
        let seconds = r.time.as_secs_f64().max(1e-9);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.2} | {:.0} | {:.1} | {:.1} % | {:.0} | {:.0} | {:.1} |",
            r.op,
            r.problem,
            r.count,
            r.flops / 1e9,
            r.bytes / 1e6,
            seconds * 1e3,
            100.0 * seconds / whole.as_secs_f64().max(1e-9),
            100.0 * r.flops / seconds / ceilings.flops,
            100.0 * r.bytes / seconds / ceilings.bytes,
            r.floor(ceilings) * 1e3,
        );
    };
    let sum = |op, rows: &[&Row]| Row {
        op,
        problem: String::new(),
        count: rows.iter().map(|r| r.count).sum(),
        time: rows.iter().map(|r| r.time).sum(),
        flops: rows.iter().map(|r| r.flops).sum(),
        bytes: rows.iter().map(|r| r.bytes).sum(),
    };
    let (large, small): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|r| r.time >= whole / 100);
    large.iter().for_each(|r| line(r));
    if !small.is_empty() {
        line(&sum("everything below 1 %", &small));
    }
    let floor: f64 = rows.iter().map(|r| r.floor(ceilings)).sum();
    line(&sum("**all**", &rows.iter().collect::<Vec<_>>()));
    let _ = writeln!(text, "\nSum of the ops' times at the ceilings: {:.1} ms.", floor * 1e3);
    text
}
