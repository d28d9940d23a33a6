//! The memory of a caption is estimated before it is needed, because a failed allocation ends the process. This file
//! has one test, because memory is counted for the whole process.

#![expect(unsafe_code, reason = "an allocator that counts")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ops::ControlFlow,
    path::Path,
    ptr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use vlmnarrate_engine::{DType, Picture, Quantization, Request};
use vlmnarrate_smolvlm::{Checkpoint, Error, LoadOptions, Model, Source};

const MB: usize = 1_000_000;

static USED: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// Allocations of at least so many megabytes only probe for memory and don't count in the peak.
static PROBE_SIZE: AtomicUsize = AtomicUsize::new(usize::MAX);

/// An allocator that gives [`LIMIT`] bytes at most.
struct Limited;

#[global_allocator]
static MEMORY: Limited = Limited;

// SAFETY: it hands on what the system gives, or nothing.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let size = layout.size();
        let used = USED.fetch_add(size, Relaxed) + size;
        if used > LIMIT.load(Relaxed) {
            USED.fetch_sub(size, Relaxed);
            return ptr::null_mut();
        }
        if size / MB != PROBE_SIZE.load(Relaxed) {
            PEAK.fetch_max(used, Relaxed);
        }
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Runs with a limit beside what is held already.
fn with<T>(megabytes: usize, run: impl FnOnce() -> T) -> T {
    LIMIT.store(USED.load(Relaxed) + megabytes * MB, Relaxed);
    let result = run();
    LIMIT.store(usize::MAX, Relaxed);
    result
}

/// Estimated and measured memory of a request, in megabytes.
#[track_caller]
fn costs(model: &Model, pictures: &[&Picture], whole_frames: bool) -> (usize, usize) {
    let mut request = Request::new(pictures, "What is seen here?");
    request.whole_frames = whole_frames;
    request.max_tokens = 5;
    let describe = || {
        let mut session = model.session();
        model.describe(&mut session, &request, &mut |_| ControlFlow::Continue(()))
    };
    let Err(Error::Memory { megabytes, .. }) = with(4, describe) else {
        panic!("there was more than enough");
    };
    let asked = megabytes as usize;
    // The estimate is at least 32 MiB.
    let limit = asked.max(33);
    PROBE_SIZE.store(limit, Relaxed);
    let before = USED.load(Relaxed);
    PEAK.store(before, Relaxed);
    // The estimate is rounded down, and the prompt is already in memory.
    with(limit + 2, describe).expect("as much as was asked for");
    (asked, (PEAK.load(Relaxed) - before) / MB)
}

#[test]
fn a_caption_takes_no_more_than_it_asked_for() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference/smolvlm-256m");
    let path = folder.to_str().expect("a path in UTF-8");
    let small = Source::parse(Some(path.as_ref()), None).expect("a folder");
    let picture = |side: u32| Picture::new(side, side, vec![99; (3 * side * side) as usize]);
    let (large, native) = (picture(512).unwrap(), picture(256).unwrap());
    for (source, picture) in [(small, &large), (Source::Demo, &native)] {
        let checkpoint = Checkpoint::open(&source).unwrap();
        for (dtype, quantization) in [
            (DType::F32, Quantization::None),
            (DType::Bf16, Quantization::None),
            (DType::F32, Quantization::Q8_0),
        ] {
            let mut options = LoadOptions::default();
            options.dtype = dtype;
            options.quantization = quantization;
            options.threads = 2;
            let go_on = &mut |_, _| ControlFlow::Continue(());
            let model = Model::load(&checkpoint, &options, go_on).unwrap();
            for (pictures, splitting) in [(1, false), (6, false), (1, true)] {
                let pictures = vec![picture; pictures];
                let (asked, taken) = costs(&model, &pictures, splitting);
                println!(
                    "{dtype:?} {quantization:?} {} {splitting}: {taken} of {asked} MB",
                    pictures.len()
                );
                // A much too high estimate would refuse possible requests.
                assert!(asked < 30 + 3 * taken, "{taken} of {asked} MB");
            }
        }
    }
}
