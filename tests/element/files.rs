//! Files that `uridecodebin` opens pass through, and the demo model describes them.

use crate::common::{Log, TIMEOUT};
use gst::prelude::*;

/// Runs a pipeline to its end; panics on an error. `vlmnarrate` runs the embedded model.
#[track_caller]
fn run(description: &str) -> crate::common::Heard {
    crate::common::init();
    let pipeline = gst::parse::launch(description).expect(description);
    let log = Log::of(&pipeline);
    pipeline.set_state(gst::State::Playing).unwrap();
    let heard = log.wait(|heard| heard.eos || !heard.errors.is_empty());
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(heard.errors.is_empty(), "{description}: {:?}", heard.errors);
    heard
}

/// Encodes two seconds of a red screen, narrates the file, and wants every caption to say so.
#[track_caller]
fn narrate(name: &str, caps: &str, encode: &str, captions: usize) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(name);
    run(&format!(
        "videotestsrc pattern=red num-buffers=20 ! video/x-raw,{caps} ! {encode} ! filesink location={}",
        file.display()
    ));
    let heard = run(&format!(
        "uridecodebin uri=file://{} ! vlmnarrate ! fakesink",
        file.display()
    ));
    assert_eq!(
        heard.texts(),
        vec!["A solid red screen."; captions],
        "{name}"
    );
}

#[test]
fn h264_with_sound() {
    let sound = "audiotestsrc num-buffers=100 ! audioconvert ! avenc_aac ! queue ! mux.";
    narrate(
        "sound.mp4",
        "format=I420,width=640,height=360,framerate=10/1",
        &format!("x264enc ! queue ! mux. {sound} mp4mux name=mux"),
        2,
    );
}

#[test]
fn h264_4_2_2() {
    narrate(
        "422.mkv",
        "format=Y42B,width=320,height=240,framerate=10/1",
        "x264enc ! video/x-h264,profile=high-4:2:2 ! matroskamux",
        2,
    );
}

#[test]
fn vp9_of_an_odd_size() {
    narrate(
        "odd.webm",
        "format=I420,width=321,height=241,framerate=10/1",
        "vp9enc deadline=1 cpu-used=8 ! webmmux",
        2,
    );
}

#[test]
fn motion_jpeg() {
    narrate(
        "jpeg.avi",
        "format=I420,width=176,height=144,framerate=10/1",
        "jpegenc ! avimux",
        2,
    );
}

#[test]
fn interlaced_in_a_transport_stream() {
    narrate(
        "interlaced.ts",
        "format=I420,width=720,height=576,framerate=50/1",
        "interlace field-pattern=1:1 ! x264enc interlaced=true ! mpegtsmux",
        1,
    );
}

/// A picture has framerate 0/1 and no duration.
#[test]
fn a_still_picture() {
    narrate(
        "still.png",
        "format=RGB,width=101,height=33,framerate=0/1",
        "identity eos-after=2 ! pngenc snapshot=true",
        1,
    );
}

/// 50 frames a second of full HD, and one that is a few pixels wide.
#[test]
fn large_and_tiny() {
    for (size, framerate) in [
        ("width=1920,height=1080", "50/1"),
        ("width=16,height=2", "10/1"),
    ] {
        narrate(
            "size.mkv",
            &format!("format=I420,{size},framerate={framerate}"),
            "avenc_ffv1 ! matroskamux",
            if framerate == "50/1" { 1 } else { 2 },
        );
    }
}

#[test]
fn a_file_that_ends_in_the_middle_is_narrated_up_to_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cut.mkv");
    run(&format!(
        "videotestsrc pattern=red num-buffers=50 ! video/x-raw,width=320,height=240,framerate=10/1
         ! x264enc ! matroskamux ! filesink location={}",
        file.display()
    ));
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let pipeline = gst::parse::launch(&format!(
        "uridecodebin uri=file://{} ! vlmnarrate ! fakesink",
        file.display()
    ));
    let pipeline = pipeline.unwrap();
    let log = Log::of(&pipeline);
    pipeline.set_state(gst::State::Playing).unwrap();
    let heard = log.wait(|heard| heard.eos || !heard.errors.is_empty());
    let (state, ..) = pipeline.state(TIMEOUT);
    assert!(state.is_ok() || !heard.errors.is_empty());
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(heard.texts().contains(&"A solid red screen."), "{heard:?}");
}
