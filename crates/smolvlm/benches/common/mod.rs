//! Shared by several benchmarks.

use std::fs;

/// A value of `/proc/self/status` such as `VmHWM`, in MiB; `None` if unknown.
pub fn memory(field: &str) -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}
