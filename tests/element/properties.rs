//! Properties, statistics, and the output of `gst-inspect-1.0`.

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf, time::Duration};

use crate::common::{Fake, Pipeline, harness, ms};
use gst::{glib, prelude::*};
use gstvlmnarrate::engine::DeviceKind;

const READY: [&str; 19] = [
    "model",
    "mmproj",
    "revision",
    "device",
    "dtype",
    "quantization",
    "threads",
    "nice",
    "endpoint",
    "api-key-file",
    "ca-file",
    "request-options",
    "image-format",
    "image-quality",
    "max-requests",
    "endpoint-timeout",
    "fallback-model",
    "mode",
    "merge-captions",
];

const PLAYING: [&str; 27] = [
    "prompt",
    "system-prompt",
    "image-size",
    "image-splitting",
    "max-tokens",
    "temperature",
    "top-p",
    "top-k",
    "min-p",
    "repetition-penalty",
    "seed",
    "stop-strings",
    "choices",
    "deadline",
    "interval",
    "frames",
    "every-nth",
    "scene-threshold",
    "expire",
    "detail-prompt",
    "detail-max-tokens",
    "detail-image-splitting",
    "drain-timeout",
    "post-messages",
    "post-repeated",
    "attach-meta",
    "partial-captions",
];

#[test]
fn every_property_is_documented_and_says_when_it_may_change() {
    let element = crate::common::narrator(&Fake::new());
    let specs = element.list_properties();
    let own: Vec<_> = specs
        .iter()
        .filter(|spec| spec.owner_type() == element.type_())
        .collect();
    assert_eq!(own.len(), READY.len() + PLAYING.len() + 2);
    for spec in own {
        let name = spec.name();
        assert!(
            spec.nick() != name && !spec.nick().is_empty(),
            "nick of {name}"
        );
        assert!(
            spec.blurb().is_some_and(|blurb| blurb.len() > 15),
            "blurb of {name}"
        );
        let flags = spec.flags();
        assert_eq!(
            flags.contains(gst::PARAM_FLAG_MUTABLE_READY),
            READY.contains(&name)
        );
        assert_eq!(
            flags.contains(gst::PARAM_FLAG_MUTABLE_PLAYING),
            PLAYING.contains(&name)
        );
        let read_only = ["caption", "stats"].contains(&name);
        assert_eq!(
            flags.contains(glib::ParamFlags::WRITABLE),
            !read_only,
            "{name}"
        );
    }
}

#[test]
fn defaults_are_the_contracts() {
    let element = crate::common::narrator(&Fake::new());
    assert_eq!(element.property::<Option<String>>("model"), None);
    assert_eq!(element.property::<Option<String>>("mmproj"), None);
    assert_eq!(element.property::<String>("revision"), "main");
    assert_eq!(element.property::<u32>("threads"), 0);
    assert_eq!(element.property::<u32>("nice"), 5);
    assert_eq!(element.property::<Option<String>>("endpoint"), None);
    assert_eq!(element.property::<u32>("image-quality"), 85);
    assert_eq!(element.property::<u32>("max-requests"), 0);
    assert_eq!(element.property::<u64>("endpoint-timeout"), 120_000_000_000);
    assert_eq!(element.property::<u64>("deadline"), 0);
    assert_eq!(
        element.property::<String>("prompt"),
        "Describe this frame in one sentence."
    );
    assert_eq!(element.property::<Option<String>>("system-prompt"), None);
    assert_eq!(element.property::<u32>("image-size"), 0);
    assert_eq!(element.property::<u32>("max-tokens"), 20);
    assert_eq!(element.property::<f64>("temperature"), 0.0);
    assert_eq!(
        element.property::<gst::ClockTime>("interval"),
        gst::ClockTime::SECOND
    );
    assert_eq!(element.property::<u32>("frames"), 1);
    assert_eq!(element.property::<u32>("every-nth"), 1);
    assert_eq!(element.property::<f64>("scene-threshold"), 0.0);
    assert_eq!(element.property::<u32>("detail-max-tokens"), 50);
    assert_eq!(
        element.property::<gst::ClockTime>("drain-timeout"),
        10 * gst::ClockTime::SECOND
    );
    assert!(element.property::<bool>("post-messages"));
    assert!(element.property::<bool>("post-repeated"));
    assert!(element.property::<bool>("attach-meta"));
    assert!(!element.property::<bool>("partial-captions"));
    assert_eq!(element.property::<Option<String>>("caption"), None);
}

#[test]
fn enums_have_the_names_that_bindings_see() {
    let element = crate::common::narrator(&Fake::new());
    for (property, type_, nicks) in [
        (
            "mode",
            "GstVlmNarrateMode",
            &["auto", "live", "recorded"][..],
        ),
        (
            "device",
            "GstVlmNarrateDevice",
            &["auto", "cpu", "cuda", "metal"],
        ),
        (
            "dtype",
            "GstVlmNarrateDType",
            &["auto", "f32", "bf16", "f16"],
        ),
    ] {
        let spec = element.find_property(property).unwrap();
        assert_eq!(spec.value_type().name(), type_);
        let class = glib::EnumClass::with_type(spec.value_type()).unwrap();
        let found: Vec<_> = class.values().iter().map(|value| value.nick()).collect();
        assert_eq!(found, nicks);
    }
}

#[test]
fn the_element_introduces_itself() {
    crate::common::init();
    let factory = gst::ElementFactory::find("vlmnarrate").unwrap();
    assert_eq!(factory.longname(), "VLM Video Narrator");
    assert_eq!(factory.klass(), "Filter/Analyzer/Video");
    assert_eq!(factory.rank(), gst::Rank::NONE);
    assert_eq!(factory.element_type().name(), "GstVlmNarrate");
    let templates = factory.static_pad_templates();
    let names: Vec<_> = templates.iter().map(|t| t.name_template()).collect();
    assert_eq!(names, ["sink", "src", "text_src"]);
}

#[test]
fn stats_count_and_measure() {
    let fake = Fake::slow(Duration::from_millis(20));
    fake.plan().text = Some("one two three".into());
    fake.plan().fails_at = Some(3);
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=50 ! video/x-raw,framerate=10/1
         ! vlmnarrate name=n ! fakesink",
        &fake,
    );
    pipeline.run_to_eos();
    let stats = pipeline.narrator.property::<gst::Structure>("stats");
    let count = |name: &str| stats.get::<u64>(name).unwrap();
    assert_eq!(count("frames"), 50);
    assert_eq!(count("sampled"), 5);
    assert_eq!(count("captions"), 4);
    assert_eq!(count("errors"), 1);
    assert_eq!((count("dropped"), count("unchanged")), (0, 0));
    for stage in [
        "queue",
        "preprocess",
        "vision",
        "prefill",
        "decode",
        "total",
    ] {
        assert!(
            count(&format!("{stage}-p50")) <= count(&format!("{stage}-p95")),
            "{stage}"
        );
    }
    assert!(count("vision-p50") >= 20_000_000, "{stats}");
    assert!(count("total-p50") >= count("vision-p50"), "{stats}");
    assert_eq!(
        (count("prefill-p50"), count("decode-p95")),
        (20_000, 30_000)
    );
    let rate = stats.get::<f64>("tokens-per-second").unwrap();
    assert!((rate - 6.0 / 30e-6).abs() < 1.0, "{rate}");
    // From the start each time.
    fake.plan().fails_at = None;
    pipeline.run_to_eos();
    let stats = pipeline.narrator.property::<gst::Structure>("stats");
    assert_eq!(stats.get::<u64>("frames"), Ok(50));
    assert_eq!(stats.get::<u64>("errors"), Ok(0));
}

#[test]
fn stats_know_the_device_while_a_model_is_loaded() {
    let element = crate::common::narrator(&Fake::new());
    let is_on = |device: &str, name: &str, memory: u64| {
        let stats = element.property::<gst::Structure>("stats");
        let weights = (
            stats.get::<&str>("dtype"),
            stats.get::<&str>("quantization"),
        );
        let is_none = weights == (Ok(""), Ok("")) && stats.get::<u64>("weights-memory") == Ok(0);
        let is_some =
            weights == (Ok("f64"), Ok("q1-0")) && stats.get::<u64>("weights-memory") == Ok(9);
        (if device.is_empty() { is_none } else { is_some })
            && stats.get::<&str>("device") == Ok(device)
            && stats.get::<&str>("device-name") == Ok(name)
            && stats.get::<u64>("device-memory") == Ok(memory)
    };
    assert!(is_on("", "", 0));
    element.set_state(gst::State::Ready).unwrap();
    crate::common::engine::wait_for(|| is_on("none", "a device", 1 << 40));
    element.set_state(gst::State::Null).unwrap();
    assert!(is_on("", "", 0));
}

#[test]
fn the_device_goes_to_the_engine() {
    let fake = Fake::new();
    let element = crate::common::narrator(&fake);
    for (nick, kind) in [
        ("metal", DeviceKind::Metal),
        ("cuda", DeviceKind::Cuda),
        ("cpu", DeviceKind::Cpu),
        ("auto", DeviceKind::Auto),
    ] {
        element.set_property_from_str("device", nick);
        let device = element.property_value("device");
        let (_, value) = glib::EnumValue::from_value(&device).unwrap();
        assert_eq!(value.nick(), nick);
        element.set_state(gst::State::Ready).unwrap();
        element.set_state(gst::State::Null).unwrap();
        assert_eq!(fake.loads().last().unwrap().device, kind);
    }
}

#[test]
fn interval_may_change_while_playing() {
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";
    let (mut harness, narrator, log) = harness(&Fake::new(), caps);
    let mut push = |range: std::ops::Range<u64>| {
        for i in range {
            harness
                .push_and_pull(crate::common::buffer(64, 0, ms(100 * i)))
                .unwrap();
        }
        log.heard().timestamps()
    };
    assert_eq!(push(0..12), [ms(0), ms(1000)]);
    narrator.set_property("interval", ms(300));
    assert_eq!(push(12..17), [ms(1200), ms(1500)]);
    narrator.set_property("every-nth", 2u32);
    assert_eq!(push(17..31), [ms(1800), ms(2400), ms(3000)]);
}

/// A string as C has it, whatever its bytes.
fn latin1() -> glib::Value {
    let text = OsString::from_vec(b"caf\xe9".to_vec());
    let value = PathBuf::from(text).to_value();
    assert_eq!(value.type_(), glib::Type::STRING);
    value
}

#[test]
fn text_that_is_not_utf8_changes_nothing_and_is_told_of() {
    crate::common::init();
    for name in ["vlmnarrate", "vlmnarrateoverlay"] {
        let element = gst::ElementFactory::make(name).build().unwrap();
        let log = crate::common::Log::of(&element);
        let specs = element.list_properties();
        let texts = specs.iter().filter(|spec| {
            let is_text = glib::ParamSpec::value_type(spec) == glib::Type::STRING;
            let is_ours = spec.owner_type() == element.type_();
            is_text && is_ours && spec.flags().contains(glib::ParamFlags::WRITABLE)
        });
        let mut told = 0;
        let paths = [
            "model",
            "mmproj",
            "api-key-file",
            "ca-file",
            "fallback-model",
        ];
        for spec in texts.filter(|spec| !paths.contains(&spec.name())) {
            let before = element.property::<Option<String>>(spec.name());
            element.set_property_from_value(spec.name(), &latin1());
            let after = element.property::<Option<String>>(spec.name());
            assert_eq!(before, after, "{}", spec.name());
            let warnings = log.heard().warnings;
            assert_eq!(warnings.len(), 1, "{}: {warnings:?}", spec.name());
            assert!(warnings[0].starts_with(spec.name()), "{warnings:?}");
            told += 1;
        }
        assert!(told >= 6, "{name}: {told}");

        element.set_state(gst::State::Ready).unwrap();
        let id = element.emit_by_name_with_values("describe-now", &[latin1(), 0u32.to_value()]);
        assert_eq!(id.unwrap().get(), Ok(0u32));
        let warnings = log.wait(|heard| !heard.warnings.is_empty()).warnings;
        assert!(
            warnings.iter().all(|w| w.contains("not UTF-8")),
            "{warnings:?}"
        );
        element.set_state(gst::State::Null).unwrap();
    }
}

/// Names of elements, pads and streams are not always ours to choose.
#[test]
fn a_name_that_is_not_utf8_is_narrated_too() {
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";
    let (mut harness, narrator, log) = harness(&Fake::new(), caps);
    narrator.set_property_from_value("name", &latin1());
    let text = narrator.request_pad_simple("text_src").unwrap();
    harness.push(crate::common::buffer(64, 0, ms(0))).unwrap();
    assert_eq!(log.heard().captions[0].element, "caf\u{fffd}");
    drop(text);
}

#[test]
fn numbers_that_may_change_while_playing_follow_a_curve() {
    use gst_controller::prelude::*;
    crate::common::init();
    for name in ["vlmnarrate", "vlmnarrateoverlay"] {
        let element = gst::ElementFactory::make(name).build().unwrap();
        for spec in element.list_properties().iter() {
            let flags = spec.flags();
            let number = [
                glib::Type::U32,
                glib::Type::U64,
                glib::Type::F64,
                glib::Type::BOOL,
            ];
            let expected = number.contains(&spec.value_type())
                && flags.contains(gst::PARAM_FLAG_MUTABLE_PLAYING);
            let controllable = flags.contains(gst::PARAM_FLAG_CONTROLLABLE);
            if spec.owner_type() == element.type_() {
                assert_eq!(controllable, expected, "{}", spec.name());
            }
        }

        // 10 tokens in the first second, 20 from then on.
        let curve = gst_controller::InterpolationControlSource::new();
        curve.set_mode(gst_controller::InterpolationMode::None);
        curve.set(gst::ClockTime::ZERO, 10.0);
        curve.set(gst::ClockTime::SECOND, 20.0);
        let binding =
            gst_controller::DirectControlBinding::new_absolute(&element, "max-tokens", &curve);
        element.add_control_binding(&binding).unwrap();

        let fake = Fake::new();
        let narrator = match element.clone().downcast::<gstvlmnarrate::VlmNarrate>() {
            Ok(narrator) => narrator,
            Err(element) => {
                let bin = element.downcast::<gstvlmnarrate::VlmNarrateOverlay>();
                bin.unwrap().narrator().clone()
            }
        };
        narrator.set_engine_loader(fake.clone());
        narrator.set_property_from_str("mode", "recorded");
        let mut harness = gst_check::Harness::with_element(&element, Some("sink"), Some("src"));
        harness.set_src_caps_str("video/x-raw,format=RGB,width=8,height=8,framerate=10/1");
        harness.play();
        for at in [0, 1000, 2000] {
            harness
                .push(crate::common::buffer(8 * 24, 0, ms(at)))
                .unwrap();
        }
        let lengths = fake
            .requests()
            .into_iter()
            .map(|request| request.max_tokens);
        assert_eq!(Vec::from_iter(lengths), [10, 20, 20], "{name}");
    }
}

/// A folder has whatever name the disk gives it.
#[test]
fn a_model_may_be_in_a_folder_whose_name_is_not_utf8() {
    let fake = Fake::new();
    let narrator = crate::common::narrator(&fake);
    narrator.set_property_from_value("model", &latin1());
    let back = narrator.property_value("model").get::<PathBuf>().unwrap();
    assert_eq!(back.into_os_string().into_vec(), b"caf\xe9");
    narrator.set_state(gst::State::Ready).unwrap();
    let model = fake.loads()[0].model.clone().unwrap();
    assert_eq!(model.into_vec(), b"caf\xe9");
    narrator.set_state(gst::State::Null).unwrap();

    // A real one.
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join(OsString::from_vec(b"caf\xe9".to_vec()));
    std::fs::create_dir(&model).unwrap();
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for file in std::fs::read_dir(demo).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let narrator = gst::ElementFactory::make("vlmnarrate").build().unwrap();
    let log = crate::common::Log::of(&narrator);
    narrator.set_property_from_value("model", &model.to_value());
    narrator.set_state(gst::State::Ready).unwrap();
    let loaded = log.wait(|heard| heard.progress.len() >= 2 || !heard.errors.is_empty());
    assert_eq!(loaded.errors.len(), 0, "{loaded:?}");
    narrator.set_state(gst::State::Null).unwrap();
}
