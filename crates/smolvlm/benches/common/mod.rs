//! What several benchmarks want to know.

use std::fs;

/// Of the process's memory, such as `VmHWM`, in MiB; `None` where the system doesn't tell.
pub fn memory(field: &str) -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}
