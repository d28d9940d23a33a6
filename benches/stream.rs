//! Cost of the element for the stream while its model is always busy:
//! `cargo bench --bench stream [-- MODEL]`
//!
//! First table: live video is pushed at 60 frames per second, of which every 30th is described. For each size and
//! format, the time of a push, of frames that pass and of frames that are sampled, beside that of `identity`. The two
//! elements alternate within one run. A frame is late if its push returns after the next frame is due. Allocations are
//! counted on the streaming thread, those of GStreamer's C code included.
//!
//! Second table: a live 1080p30 H.264 decode with the element behind it, beside one with `identity`: frames that came
//! too late at the sink.
//!
//! MODEL is a folder. Without it, the model is an endless computation on all cores.

#![expect(
    unsafe_code,
    reason = "an allocator that counts, and clocks of threads"
)]

use std::{
    cell::Cell,
    error::Error,
    ops::ControlFlow,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use gst::{ClockTime, prelude::*};
use gstvlmnarrate::VlmNarrate;
use gstvlmnarrate::engine::{
    Answer, Checkpoint, Engine, EngineInfo, EngineLoader, Event, Found, LoadObserver,
    ModelSettings, Observer, Request,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Counts allocations per thread in `malloc`, which both Rust and GLib call.
mod allocations {
    use super::Cell;
    use std::ffi::{c_int, c_void};

    thread_local! {
        static COUNT: Cell<u64> = const { Cell::new(0) };
    }

    pub fn count() -> u64 {
        COUNT.get()
    }

    fn add_one() {
        // Fails while the thread exits.
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
    }

    unsafe extern "C" {
        fn __libc_malloc(size: usize) -> *mut c_void;
        fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
        fn __libc_realloc(memory: *mut c_void, size: usize) -> *mut c_void;
        fn __libc_memalign(align: usize, size: usize) -> *mut c_void;
    }

    // SAFETY: each calls glibc's own after counting; a `const` thread-local without a destructor does not allocate.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
        add_one();
        unsafe { __libc_malloc(size) }
    }
    #[unsafe(no_mangle)]
    unsafe extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
        add_one();
        unsafe { __libc_calloc(count, size) }
    }
    #[unsafe(no_mangle)]
    unsafe extern "C" fn realloc(memory: *mut c_void, size: usize) -> *mut c_void {
        add_one();
        unsafe { __libc_realloc(memory, size) }
    }
    #[unsafe(no_mangle)]
    unsafe extern "C" fn posix_memalign(
        memory: *mut *mut c_void,
        align: usize,
        size: usize,
    ) -> c_int {
        add_one();
        unsafe {
            let allocated = __libc_memalign(align, size);
            if allocated.is_null() {
                return libc::ENOMEM;
            }
            *memory = allocated;
        }
        0
    }
}

/// An engine that uses all its threads and never finishes.
struct Busy {
    threads: usize,
}

impl EngineLoader for Busy {
    fn open(
        &self,
        settings: &ModelSettings,
    ) -> std::result::Result<Found, gstvlmnarrate::engine::Error> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads = if settings.threads == 0 {
            cores
        } else {
            settings.threads
        };
        Ok(Found::Ready(Arc::new(Busy { threads })))
    }
}

impl Checkpoint for Busy {
    fn name(&self) -> &str {
        "busy"
    }

    fn image_size(&self) -> gstvlmnarrate::engine::ImageSize {
        gstvlmnarrate::engine::ImageSize::Square(512)
    }

    fn check_image_size(&self, _: u32) -> std::result::Result<(), gstvlmnarrate::engine::Error> {
        Ok(())
    }

    fn load(
        &self,
        _: &mut LoadObserver<'_>,
    ) -> std::result::Result<Box<dyn Engine>, gstvlmnarrate::engine::Error> {
        Ok(Box::new(Busy {
            threads: self.threads,
        }))
    }
}

impl Engine for Busy {
    fn info(&self) -> EngineInfo {
        EngineInfo::default()
    }

    fn describe(
        &mut self,
        _: &Request<'_>,
        watch: &mut Observer<'_>,
    ) -> std::result::Result<Answer, gstvlmnarrate::engine::Error> {
        // Layers of 10 ms, with weights that exceed the caches.
        let weights = vec![1f32; 16 << 20];
        let layer = |part: &[f32]| {
            let end = Instant::now() + Duration::from_millis(10);
            let mut sum = 0f32;
            for chunk in part.chunks(1 << 14).cycle() {
                sum += chunk.iter().map(|w| w * sum).sum::<f32>();
                if Instant::now() >= end {
                    return std::hint::black_box(sum);
                }
            }
            sum
        };
        loop {
            thread::scope(|scope| {
                for part in weights.chunks(weights.len() / self.threads) {
                    scope.spawn(|| layer(part));
                }
            });
            if watch(Event::Layer) == ControlFlow::Break(()) {
                return Err(gstvlmnarrate::engine::Error::cancelled());
            }
        }
    }
}

fn narrator(model: Option<&str>) -> Result<VlmNarrate> {
    let element = gst::ElementFactory::make("vlmnarrate").build()?;
    let narrator = element.downcast::<VlmNarrate>().expect("the element");
    match model {
        Some(model) => narrator.set_property("model", model),
        None => narrator.set_engine_loader(Busy { threads: 0 }),
    }
    narrator.set_property_from_str("mode", "live");
    Ok(narrator)
}

const PERIOD: Duration = Duration::from_nanos(1_000_000_000 / 60);
/// One of so many frames is described.
const EVERY_NTH: u64 = 30;
const FRAMES: u64 = 900;

/// An element between a pad that pushes buffers and one that drops them.
struct Line {
    element: gst::Element,
    src: gst::Pad,
    _sink: gst::Pad,
    pool: gst::BufferPool,
}

impl Line {
    fn new(element: gst::Element, info: &gst_video::VideoInfo) -> Result<Self> {
        let src = gst::Pad::new(gst::PadDirection::Src);
        let sink = gst::Pad::builder(gst::PadDirection::Sink)
            .chain_function(|_, _, _| Ok(gst::FlowSuccess::Ok))
            .event_function(|_, _, _| true)
            .build();
        src.link(&element.static_pad("sink").ok_or("no sink pad")?)?;
        element
            .static_pad("src")
            .ok_or("no source pad")?
            .link(&sink)?;
        for pad in [&src, &sink] {
            pad.set_active(true)?;
        }
        element.set_state(gst::State::Playing)?;
        let caps = info.to_caps()?;
        src.push_event(gst::event::StreamStart::new("bench"));
        src.push_event(gst::event::Caps::new(&caps));
        let segment = gst::FormattedSegment::<ClockTime>::new();
        src.push_event(gst::event::Segment::new(&segment));
        let pool = gst_video::VideoBufferPool::new();
        let mut config = pool.config();
        config.set_params(Some(&caps), info.size() as u32, 4, 0);
        pool.set_config(config)?;
        pool.set_active(true)?;
        Ok(Self {
            element,
            src,
            _sink: sink,
            pool: pool.upcast(),
        })
    }

    /// Pushes frame `number`. Returns the time and the number of allocations.
    fn push(&self, number: u64) -> Result<(Duration, u64)> {
        let mut buffer = self.pool.acquire_buffer(None)?;
        let writable = buffer.get_mut().ok_or("shared")?;
        writable.set_pts(ClockTime::try_from(PERIOD * number as u32)?);
        // In the cache, as after a decoder.
        writable.map_writable()?.fill(number as u8);
        let (start, before) = (Instant::now(), allocations::count());
        self.src.push(buffer)?;
        Ok((start.elapsed(), allocations::count() - before))
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.element.set_state(gst::State::Null);
        let _ = self.pool.set_active(false);
    }
}

#[derive(Default)]
struct Times(Vec<Duration>, Vec<u64>);

impl Times {
    fn add(&mut self, (time, allocations): (Duration, u64)) {
        self.0.push(time);
        self.1.push(allocations);
    }

    /// `p50 | p99 | max | allocations`, times in microseconds.
    fn row(&mut self) -> String {
        self.0.sort();
        self.1.sort();
        let at = |q: f64| ((self.0.len() - 1) as f64 * q) as usize;
        let us = |q| self.0[at(q)].as_secs_f64() * 1e6;
        format!(
            "{:.1} | {:.1} | {:.1} | {}",
            us(0.5),
            us(0.99),
            us(1.0),
            self.1[at(0.5)]
        )
    }
}

fn pushes(model: Option<&str>) -> Result<()> {
    println!(
        "| frames | | p50 µs | p99 µs | max µs | allocations | late |\n|---|---|---|---|---|---|---|"
    );
    for (height, width) in [(1080, 1920), (2160, 3840)] {
        for format in [gst_video::VideoFormat::Nv12, gst_video::VideoFormat::Rgb] {
            let info = gst_video::VideoInfo::builder(format, width, height)
                .fps(gst::Fraction::new(60, 1))
                .build()?;
            let narrator = narrator(model)?;
            narrator.set_property("interval", ClockTime::try_from(PERIOD * EVERY_NTH as u32)?);
            let loaded = narrator.clone();
            let lines = [
                Line::new(gst::ElementFactory::make("identity").build()?, &info)?,
                Line::new(narrator.upcast(), &info)?,
            ];
            // Until the model is loaded and busy.
            while loaded
                .property::<gst::Structure>("stats")
                .get::<u64>("sampled")?
                == 0
            {
                lines[1].push(0)?;
                thread::sleep(PERIOD);
            }
            let [mut identity, mut passed, mut sampled] = <[Times; 3]>::default();
            let mut late = [0, 0];
            let mut due = Instant::now();
            for number in EVERY_NTH..FRAMES + EVERY_NTH {
                // Alternately, so that both see the same load.
                for (which, line) in lines.iter().enumerate() {
                    due += PERIOD;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    let cost = line.push(number)?;
                    late[which] += u32::from(cost.0 > PERIOD);
                    match which {
                        0 => identity.add(cost),
                        _ if number % EVERY_NTH == 0 => sampled.add(cost),
                        _ => passed.add(cost),
                    }
                }
            }
            let name = format!("{height}p {format}");
            println!("| {name} | identity | {} | {} |", identity.row(), late[0]);
            println!("| {name} | passed | {} | {} |", passed.row(), late[1]);
            println!("| {name} | sampled | {} | |", sampled.row());
        }
    }
    Ok(())
}

const SECONDS: u32 = 20;

/// CPU time of this process.
fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a whole timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Numbers of frames that the sink renders in time and drops.
fn decode(file: &str, behind: gst::Element) -> Result<(u64, u64)> {
    let line = format!(
        "filesrc location={file} ! h264parse ! avdec_h264 max-threads=1 name=decode
         ! queue max-size-buffers=2 max-size-time=0 max-size-bytes=0 name=behind
         fakesink name=sink sync=true qos=false max-lateness=33000000"
    );
    let pipeline = gst::parse::launch(&line)?
        .downcast::<gst::Pipeline>()
        .map_err(|_| "no pipeline")?;
    let named = |name| pipeline.by_name(name).ok_or("missing");
    let (before, sink) = (named("behind")?, named("sink")?);
    pipeline.add(&behind)?;
    gst::Element::link_many([&before, &behind, &sink])?;
    pipeline.set_state(gst::State::Playing)?;
    let bus = pipeline.bus().ok_or("no bus")?;
    let message = bus.timed_pop_filtered(
        ClockTime::from_seconds(u64::from(4 * SECONDS)),
        &[gst::MessageType::Eos, gst::MessageType::Error],
    );
    let stats = sink.property::<gst::Structure>("stats");
    pipeline.set_state(gst::State::Null)?;
    match message.as_ref().map(|m| m.view()) {
        Some(gst::MessageView::Eos(_)) => {}
        Some(gst::MessageView::Error(error)) => return Err(error.error().into()),
        _ => return Err("the decode did not end".into()),
    }
    Ok((stats.get("rendered")?, stats.get("dropped")?))
}

fn decodes(model: Option<&str>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("live.h264");
    let file = file.to_str().ok_or("a folder with an odd name")?;
    let make = gst::parse::launch(&format!(
        "videotestsrc pattern=zone-plate kx2=20 ky2=20 kt=3 num-buffers={} ! video/x-raw,format=I420,width=1920,height=1080,framerate=30/1
         ! x264enc speed-preset=veryfast bitrate=8000 ! filesink location={file}",
        30 * SECONDS
    ))?;
    make.set_state(gst::State::Playing)?;
    let bus = make.bus().ok_or("no bus")?;
    bus.timed_pop_filtered(None, &[gst::MessageType::Eos, gst::MessageType::Error]);
    make.set_state(gst::State::Null)?;

    println!("| live 1080p30 decode | shown | too late |\n|---|---|---|");
    for _ in 0..2 {
        let before = processor_time();
        let (shown, late) = decode(file, gst::ElementFactory::make("identity").build()?)?;
        let cores = (processor_time() - before).as_secs_f64() / f64::from(SECONDS);
        println!("| identity ({cores:.2} cores) | {shown} | {late} |");
        for nice in [0u32, 5, 10] {
            let narrator = narrator(model)?;
            narrator.set_property("nice", nice);
            narrator.set_property("interval", ClockTime::ZERO);
            let (shown, late) = decode(file, narrator.upcast())?;
            println!("| vlmnarrate nice={nice} | {shown} | {late} |");
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let model = std::env::args()
        .skip(1)
        .find(|argument| argument != "--bench");
    gst::init()?;
    gstvlmnarrate::plugin_register_static()?;
    pushes(model.as_deref())?;
    println!();
    decodes(model.as_deref())
}
