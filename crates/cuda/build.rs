//! Compiles the kernels with nvcc into a fatbin, which is embedded in the library.

use std::{env, fs, process::Command};

const KERNELS: &str = "kernels";

/// Machine code for Ampere and Ada (8.x) and for Hopper (9.0), and PTX for later GPUs.
const TARGETS: [&str; 3] = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_80,code=compute_80",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let files = fs::read_dir(KERNELS).expect("the package has its kernels");
    let paths = files.flatten().map(|file| file.path());
    for path in paths.filter(|path| path.extension().is_some_and(|e| e == "cu" || e == "cuh")) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    for name in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = env::var("OUT_DIR").expect("cargo sets it");
    // There is no compiler where docs.rs makes the pages, and nothing is run.
    if env::var_os("DOCS_RS").is_some() {
        println!("cargo:rustc-env=VLMNARRATE_CUDA_TOOLKIT=0");
        fs::write(format!("{out}/kernels.fatbin"), "").expect("the folder can be written");
        return;
    }
    let nvcc = nvcc();
    let version = Command::new(&nvcc).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let Some(version) = version.as_deref().ok().and_then(release) else {
        panic!(
            "`{nvcc} --version` prints no CUDA release. vlmnarrate-cuda needs NVIDIA's compiler: set NVCC or CUDA_HOME, or \
             run `tools/cuda/toolkit.sh cargo build …`, which downloads the compiler"
        );
    };
    println!("cargo:rustc-env=VLMNARRATE_CUDA_TOOLKIT={version}");
    let compiled = Command::new(&nvcc)
        .args(["-std=c++17", "-O3", "-fatbin", "--threads=0", "-I", KERNELS])
        .args(TARGETS)
        .args(["-o", &format!("{out}/kernels.fatbin")])
        .arg(format!("{KERNELS}/kernels.cu"))
        .status();
    assert!(
        compiled.is_ok_and(|status| status.success()),
        "{nvcc} could not compile {KERNELS}/kernels.cu, see its messages above"
    );
}

fn nvcc() -> String {
    let given = env::var("NVCC").ok();
    let home = env::var("CUDA_HOME")
        .ok()
        .map(|home| format!("{home}/bin/nvcc"));
    let usual = "/usr/local/cuda/bin/nvcc".to_owned();
    let is_there = |path: &String| fs::exists(path).unwrap_or(false);
    given
        .or(home.filter(is_there))
        .or(on_path("nvcc"))
        .or(Some(usual).filter(is_there))
        .unwrap_or_else(|| "nvcc".into())
}

fn on_path(program: &str) -> Option<String> {
    let path = env::var_os("PATH")?;
    let found = env::split_paths(&path).map(|folder| folder.join(program));
    let found = found.into_iter().find(|path| path.exists())?;
    Some(found.to_string_lossy().into_owned())
}

/// The release in `… release 13.0, …` as the driver encodes it: 13000.
fn release(version: &str) -> Option<u32> {
    let (_, release) = version.split_once("release ")?;
    let (release, _) = release.split_once(',')?;
    let (major, minor) = release.split_once('.')?;
    Some(major.parse::<u32>().ok()? * 1000 + minor.parse::<u32>().ok()? * 10)
}
