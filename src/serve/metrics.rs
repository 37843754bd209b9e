//! A server's counters, in the format of Prometheus.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The upper ends of the buckets of clicks, in seconds.
const BUCKETS: [f64; 10] = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];

/// The counters.
#[derive(Default)]
pub struct Metrics {
    /// Clicks by the time they took: one counter per bucket, the last for all that took longer.
    clicks: [AtomicU64; BUCKETS.len() + 1],
    micros: AtomicU64,
    requests: AtomicU64,
    failures: AtomicU64,
}

/// Values read when they are asked for.
pub struct Gauges {
    pub leases: usize,
    pub sessions: usize,
    pub scans: usize,
    /// Scans that are being sent, or read from the DICOM folder, for each of which a place is kept.
    pub arriving: usize,
    pub waiting: usize,
    /// Predictions paused between two ops of the network.
    pub paused: usize,
    pub used: u64,
    pub limit: u64,
    /// Patches of all scans that were encoded, and those of them that were dropped.
    pub encoded: u64,
    pub dropped: u64,
    /// The number of times that an encoding waited while a later click was answered.
    pub overtaken: u64,
}

impl Metrics {
    /// Counts a click that was answered.
    pub fn click(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|b| seconds <= *b).unwrap_or(BUCKETS.len());
        self.clicks[bucket].fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(took.as_micros() as u64, Ordering::Relaxed);
    }

    /// Counts a request that was answered, with a failure or without.
    pub fn request(&self, failed: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.failures.fetch_add(u64::from(failed), Ordering::Relaxed);
    }

    /// The text of all metrics.
    pub fn text(&self, now: &Gauges) -> String {
        let mut text = String::new();
        let mut put = |name: &str, kind: &str, help: &str, value: u64| {
            let _ = write!(
                text,
                "# HELP prism_{name} {help}\n# TYPE prism_{name} {kind}\nprism_{name} {value}\n"
            );
        };
        put("leases", "gauge", "Open leases of the nnInteractive protocol", now.leases as u64);
        let help =
            "Open sessions of the ITK-SNAP and MONAI Label protocols, and DICOM series in use";
        put("sessions", "gauge", help, now.sessions as u64);
        put("scans", "gauge", "Open scans of prism's own API", now.scans as u64);
        put("arriving", "gauge", "Scans being uploaded or read", now.arriving as u64);
        put("waiting", "gauge", "Requests waiting to start", now.waiting as u64);
        let help = "Predictions paused between two ops of the network";
        put("paused", "gauge", help, now.paused as u64);
        put("memory_used_bytes", "gauge", "Bytes of the memory budget in use", now.used);
        put("memory_limit_bytes", "gauge", "Memory budget in bytes", now.limit);
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        put("requests_total", "counter", "Requests answered", load(&self.requests));
        put("failures_total", "counter", "Requests answered with an error", load(&self.failures));
        put("encodings_total", "counter", "Patches encoded", now.encoded);
        let help = "Encoded patches dropped after use for lack of memory";
        put("encodings_dropped_total", "counter", help, now.dropped);
        let help = "Number of times a later click overtook an encoding";
        put("encodings_overtaken_total", "counter", help, now.overtaken);
        let name = "prism_click_seconds";
        let _ = write!(
            text,
            "# HELP {name} Time from a click or another prompt to its answer\n# TYPE {name} histogram\n"
        );
        let mut sum = 0;
        for (count, end) in self.clicks.iter().zip(BUCKETS) {
            sum += load(count);
            let _ = writeln!(text, "{name}_bucket{{le=\"{end}\"}} {sum}");
        }
        sum += load(&self.clicks[BUCKETS.len()]);
        let seconds = load(&self.micros) as f64 / 1e6;
        let _ = write!(
            text,
            "{name}_bucket{{le=\"+Inf\"}} {sum}\n{name}_sum {seconds}\n{name}_count {sum}\n"
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_all_that_took_no_longer() {
        let metrics = Metrics::default();
        for ms in [10, 60, 60, 70_000] {
            metrics.click(Duration::from_millis(ms));
        }
        metrics.request(true);
        metrics.request(false);
        let now = Gauges {
            leases: 1,
            sessions: 6,
            scans: 2,
            arriving: 7,
            waiting: 3,
            paused: 8,
            used: 4,
            limit: 5,
            encoded: 7,
            dropped: 2,
            overtaken: 9,
        };
        let text = metrics.text(&now);
        for line in [
            "prism_leases 1",
            "prism_sessions 6",
            "prism_scans 2",
            "prism_arriving 7",
            "prism_waiting 3",
            "prism_paused 8",
            "prism_requests_total 2",
            "prism_failures_total 1",
            "prism_encodings_total 7",
            "prism_encodings_dropped_total 2",
            "prism_encodings_overtaken_total 9",
            "prism_click_seconds_bucket{le=\"0.05\"} 1",
            "prism_click_seconds_bucket{le=\"0.1\"} 3",
            "prism_click_seconds_bucket{le=\"60\"} 3",
            "prism_click_seconds_bucket{le=\"+Inf\"} 4",
            "prism_click_seconds_sum 70.13",
            "prism_click_seconds_count 4",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
