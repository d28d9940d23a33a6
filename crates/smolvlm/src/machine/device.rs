//! The devices of this machine.

use std::{
    fs::File,
    io::{BufRead, BufReader},
};

use vlmnarrate_engine::Remedy;

use crate::error::Error;

/// An error of the device.
pub(crate) fn device_error(reason: impl Into<String>, remedy: Remedy) -> Error {
    Error::NoDevice {
        reason: reason.into(),
        remedy,
    }
}

/// What a model runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// `cpu`, `cuda` or `metal`.
    pub kind: &'static str,
    /// Of the processor or the GPU.
    pub name: String,
    /// Bytes that the device has in all, a CPU those of the machine; 0 where it is not known.
    pub memory: u64,
}

impl DeviceInfo {
    pub(crate) fn cpu() -> Self {
        let memory = field_of("/proc/meminfo", "MemTotal");
        let kibibytes = memory.and_then(|memory| memory.trim_end_matches(" kB").parse().ok());
        Self {
            kind: "cpu",
            name: field_of("/proc/cpuinfo", "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.into()),
            memory: kibibytes.map_or(0, |kibibytes: u64| kibibytes << 10),
        }
    }
}

/// The value of a key in one of Linux' descriptions of the machine.
fn field_of(path: &str, key: &str) -> Option<String> {
    let lines = BufReader::new(File::open(path).ok()?).lines();
    lines.map_while(|line| line.ok()).find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_always_a_cpu() {
        let info = DeviceInfo::cpu();
        assert_eq!(info.kind, "cpu");
        assert!(!info.name.is_empty());
        #[cfg(target_os = "linux")]
        assert!(info.memory > 64 << 20, "{info:?}");
    }
}
