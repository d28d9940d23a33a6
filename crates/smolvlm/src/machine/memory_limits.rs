//! How much memory the system would let this process have, on Linux: the machine's and that of the control
//! groups around the process, which containers and services have. An allocation beyond it succeeds, and the
//! process is killed when it uses what it was given.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

/// A number of bytes for people.
pub(crate) fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000_000 => format!("{} MB", bytes / 1_000_000),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// What there is, and who says that it is no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) of: Of,
    /// Bytes that may still be taken.
    pub(crate) free: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Of {
    Machine,
    #[cfg(any(feature = "candle-cuda", feature = "metal"))]
    Gpu,
    /// The folder of a control group.
    Group(PathBuf),
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.of {
            Of::Machine => f.write_str("the machine")?,
            #[cfg(any(feature = "candle-cuda", feature = "metal"))]
            Of::Gpu => f.write_str("the GPU")?,
            Of::Group(group) => write!(f, "the control group {}", group.display())?,
        }
        write!(f, " has {} free", bytes(self.free))
    }
}

/// The tightest limit; `None` where no limit is known.
///
/// `root` has `/proc` and `/sys` in it.
pub(crate) fn available(root: &Path) -> Option<Limit> {
    let machine = machine(root).map(|free| Limit {
        of: Of::Machine,
        free,
    });
    let limits = machine.into_iter().chain(groups(root));
    limits.min_by_key(|limit| limit.free)
}

/// What programs can have without killing others: free, or of files that can be read again.
fn machine(root: &Path) -> Option<u64> {
    let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kilobytes = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let free = kilobytes("MemAvailable:")? + kilobytes("SwapFree:").unwrap_or(0);
    Some(free.saturating_mul(1024))
}

/// What each control group around the process has left.
fn groups(root: &Path) -> Vec<Limit> {
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_default();
    let (groups, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let mut left = vec![];
    for line in groups.lines() {
        // `hierarchy:controllers:path`; the second version has no controllers.
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let version = match controllers.split(',').any(|name| name == "memory") {
            true => &V1,
            false if controllers.is_empty() => &V2,
            false => continue,
        };
        let mounts = mounts.lines().filter_map(Mount::parse);
        for mount in mounts.filter(|mount| version.is_at(mount)) {
            // In a namespace the mount may begin inside of the path, or the path outside of the mount.
            let inside = Path::new(path).strip_prefix(mount.root);
            let inside = inside.unwrap_or(Path::new("")).to_owned();
            let top = root.join(mount.point.trim_start_matches('/'));
            let all = inside.ancestors().map(|group| top.join(group));
            left.extend(all.filter_map(|group| {
                let free = version.left(&group)?;
                let group = Path::new("/").join(group.strip_prefix(root).unwrap_or(&group));
                Some(Limit {
                    of: Of::Group(group),
                    free,
                })
            }));
        }
    }
    left
}

/// The parts of a line of mountinfo that matter here.
struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let mut kind = kind.split(' ');
        Some(Self {
            root: place.next()?,
            point: place.next()?,
            kind: kind.next()?,
            options: kind.nth(1)?,
        })
    }
}

/// The files of a version of control groups.
struct Version {
    kind: &'static str,
    /// Of the mount, if it says which controller is there.
    option: Option<&'static str>,
    limits: &'static [&'static str],
    usage: &'static str,
    /// In `memory.stat`: files that can be read again.
    files: [&'static str; 2],
}

const V1: Version = Version {
    kind: "cgroup",
    option: Some("memory"),
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    files: ["total_inactive_file", "total_active_file"],
};

const V2: Version = Version {
    kind: "cgroup2",
    option: None,
    // Beyond the second a process isn't killed, but hardly runs.
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    files: ["inactive_file", "active_file"],
};

impl Version {
    fn is_at(&self, mount: &Mount<'_>) -> bool {
        let has = |option: &str| mount.options.split(',').any(|name| name == option);
        mount.kind == self.kind && self.option.is_none_or(has)
    }

    /// `None` where there is no limit.
    fn left(&self, group: &Path) -> Option<u64> {
        let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        // "max", or no such file, is no limit.
        let limits = self
            .limits
            .iter()
            .filter_map(|name| number(group.join(name)));
        let limit = limits.min()?;
        let usage = number(group.join(self.usage))?;
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let files = stat.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            let bytes = bytes.trim().parse::<u64>().ok()?;
            self.files.contains(&name).then_some(bytes)
        });
        Some(limit.saturating_sub(usage.saturating_sub(files.sum())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// A root with these files in it.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = root.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:       8000000 kB\nMemFree:  1000 kB\nMemAvailable:    3000000 kB\nSwapFree:  1000 kB\n",
    );
    const OF_MACHINE: u64 = 3_001_000 * 1024;

    /// What is free, and who says so.
    fn limit(root: &tempfile::TempDir) -> Option<(u64, String)> {
        let limit = available(root.path())?;
        let says = limit.to_string();
        Some((limit.free, says))
    }

    fn free(root: &tempfile::TempDir) -> Option<u64> {
        limit(root).map(|(free, _)| free)
    }

    const V2_MOUNT: (&str, &str) = (
        "proc/self/mountinfo",
        "25 1 0:22 / /proc rw - proc proc rw\n30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
    );

    #[test]
    fn a_machine_has_what_is_available() {
        let says = "the machine has 3.1 GB free".into();
        assert_eq!(limit(&root(&[MEMINFO])), Some((OF_MACHINE, says)));
        assert_eq!(limit(&root(&[])), None);
        // Older than Linux 3.14.
        let old = [("proc/meminfo", "MemTotal: 8000000 kB\n")];
        assert_eq!(limit(&root(&old)), None);
    }

    #[test]
    fn a_group_has_its_limit_less_what_it_needs() {
        let files = |max, high| {
            root(&[
                MEMINFO,
                V2_MOUNT,
                ("proc/self/cgroup", "0::/system.slice/player.service\n"),
                ("sys/fs/cgroup/system.slice/player.service/memory.max", max),
                (
                    "sys/fs/cgroup/system.slice/player.service/memory.high",
                    high,
                ),
                (
                    "sys/fs/cgroup/system.slice/player.service/memory.current",
                    "300000000\n",
                ),
                (
                    "sys/fs/cgroup/system.slice/player.service/memory.stat",
                    "anon 150000000\ninactive_file 60000000\nactive_file 40000000\n",
                ),
            ])
        };
        let left = |max, high| free(&files(max, high));
        assert_eq!(left("500000000\n", "max\n"), Some(300 * MB));
        assert_eq!(left("500000000\n", "400000000\n"), Some(200 * MB));
        assert_eq!(left("max\n", "max\n"), Some(OF_MACHINE));
        // Lowered below what is in use.
        assert_eq!(left("100000000\n", "max\n"), Some(0));
    }

    #[test]
    fn a_group_around_it_may_have_less() {
        let files = root(&[
            MEMINFO,
            V2_MOUNT,
            ("proc/self/cgroup", "0::/pod/container\n"),
            ("sys/fs/cgroup/pod/memory.max", "700000000\n"),
            ("sys/fs/cgroup/pod/memory.current", "600000000\n"),
            ("sys/fs/cgroup/pod/container/memory.max", "500000000\n"),
            ("sys/fs/cgroup/pod/container/memory.current", "10000000\n"),
        ]);
        let says = "the control group /sys/fs/cgroup/pod has 100 MB free".into();
        assert_eq!(limit(&files), Some((100 * MB, says)));
    }

    #[test]
    fn a_namespace_begins_at_the_mount() {
        for (groups, mount_root) in [
            ("0::/\n", "/"),
            // The mount shows the group itself, whose path is told from outside.
            ("0::/docker/abc\n", "/docker/abc"),
            ("0::/../../other\n", "/"),
        ] {
            let mounts =
                format!("30 23 0:26 {mount_root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
            let files = root(&[
                MEMINFO,
                ("proc/self/mountinfo", &mounts),
                ("proc/self/cgroup", groups),
                ("sys/fs/cgroup/memory.max", "200000000\n"),
                ("sys/fs/cgroup/memory.current", "50000000\n"),
            ]);
            let says = "the control group /sys/fs/cgroup has 150 MB free".into();
            assert_eq!(limit(&files), Some((150 * MB, says)), "{groups}");
        }
    }

    #[test]
    fn the_first_version_says_it_in_other_words() {
        let files = |limit| {
            root(&[
                MEMINFO,
                (
                    "proc/self/mountinfo",
                    "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
                     35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                     41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
                ),
                (
                    "proc/self/cgroup",
                    "4:memory:/app\n3:cpuset:/app\n0::/app\n",
                ),
                ("sys/fs/cgroup/memory/app/memory.limit_in_bytes", limit),
                (
                    "sys/fs/cgroup/memory/app/memory.usage_in_bytes",
                    "100000000\n",
                ),
                (
                    "sys/fs/cgroup/memory/app/memory.stat",
                    "inactive_file 1\ntotal_inactive_file 30000000\ntotal_active_file 20000000\n",
                ),
            ])
        };
        let says = "the control group /sys/fs/cgroup/memory/app has 200 MB free".into();
        assert_eq!(limit(&files("250000000\n")), Some((200 * MB, says)));
        // What it writes for no limit.
        assert_eq!(free(&files("9223372036854771712\n")), Some(OF_MACHINE));
    }
}
