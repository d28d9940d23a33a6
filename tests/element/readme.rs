//! Statements of the README that a test can check. Its Rust program is a doc test, see `src/lib.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use crate::common::programs::{Plugin, Said};
use gst::{glib, prelude::*};
use vlmnarrate_scripted_server::{Server, answers};

const README: &str = include_str!("../../README.md");

fn element(factory: &str) -> gst::Element {
    gst::init().unwrap();
    gstvlmnarrate::plugin_register_static().unwrap();
    gst::ElementFactory::make(factory).build().unwrap()
}

/// Cells of the table rows under the first heading that starts so.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let start = README.find(heading).unwrap();
    README[start..]
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// The default as the README's table writes it: `0 = all` is 0.
fn written(default: &glib::Value) -> String {
    if let Ok(text) = default.get::<Option<String>>() {
        return text.unwrap_or_else(|| "null".into());
    }
    if let Some((_, value)) = glib::EnumValue::from_value(default) {
        return value.nick().into();
    }
    let text = default.transform::<String>().unwrap();
    let text = text.get::<String>().unwrap();
    match text.parse::<f64>() {
        Ok(number) => number.to_string(),
        Err(_) => text.to_lowercase(),
    }
}

#[test]
fn the_property_tables_are_whole_and_true() {
    let names = |element: &gst::Element| {
        let specs = element.list_properties().to_vec().into_iter();
        let own = specs.filter(|spec| spec.owner_type() == element.type_());
        own.map(|spec| (spec.name().to_owned(), spec))
            .collect::<BTreeMap<_, _>>()
    };
    let narrator = names(&element("vlmnarrate"));
    let mut overlay = names(&element("vlmnarrateoverlay"));
    overlay.retain(|name, _| !narrator.contains_key(name));
    for (heading, own) in [
        ("### Properties", narrator),
        ("### On the picture", overlay),
    ] {
        let rows = table(heading);
        assert_eq!(rows.len(), own.len());
        for (name, spec) in own {
            let row = rows.iter().find(|row| row[0] == format!("`{name}`"));
            let row = row.expect(&name);
            if spec.flags().contains(glib::ParamFlags::WRITABLE) {
                let default = row[1].split(" = ").next().unwrap();
                assert_eq!(
                    default.to_lowercase(),
                    written(spec.default_value()).to_lowercase(),
                    "{name}"
                );
            }
        }
    }
}

#[test]
fn the_field_table_is_whole() {
    let element = element("vlmnarrate");
    let bus = gst::Bus::new();
    let pipeline = gst::Pipeline::new();
    let source = gst::ElementFactory::make("videotestsrc")
        .property("num-buffers", 1)
        .build()
        .unwrap();
    let sink = gst::ElementFactory::make("fakesink").build().unwrap();
    pipeline.add_many([&source, &element, &sink]).unwrap();
    gst::Element::link_many([&source, &element, &sink]).unwrap();
    pipeline.set_bus(Some(&bus));
    pipeline.set_state(gst::State::Playing).unwrap();
    let kinds = [gst::MessageType::Element, gst::MessageType::Error];
    let message = bus.timed_pop_filtered(gst::ClockTime::from_seconds(15), &kinds);
    let message = message.unwrap();
    pipeline.set_state(gst::State::Null).unwrap();
    let structure = message.structure().unwrap();
    assert_eq!(structure.name(), "vlmnarrate");
    let sent = structure
        .fields()
        .map(|f| f.to_string())
        .collect::<BTreeSet<_>>();
    let told = table("### The caption")
        .iter()
        .flat_map(|row| row[0].split(", "))
        .map(|name| name.trim_matches('`').to_owned())
        .collect::<BTreeSet<_>>();
    assert_eq!(told, sent);
}

#[test]
fn the_python_program_runs() {
    let program = README.split("```python\n").nth(1).unwrap();
    let program = program.split("```").next().unwrap();
    let plugin = Plugin::new();
    let said = Said::from(plugin.python().args(["-c", program]).output().unwrap());
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(said.out.lines().count(), 3, "{said:?}");
    assert!(said.out.contains("0.00 s  A white ball"), "{said:?}");
}

/// Lines for gst-launch-1.0 in the code blocks of a text, each with what continues it.
fn launch_lines(text: &str) -> Vec<String> {
    let text = text.replace("    /// ", "").replace("\\\n", " ");
    let mut lines = vec![];
    for block in text.split("```").skip(1).step_by(2) {
        let launched = block.lines().filter(|l| l.starts_with("gst-launch-1.0 "));
        lines.extend(launched.map(str::to_owned));
    }
    // Dots stand for what the reader has.
    lines.retain(|line| !line.contains('…'));
    lines
}

/// The line with what is here: a file for the reader's file, no camera and no screen, a server, and an end.
fn with_what_is_here(line: &str, folder: &Path, server: &Server) -> String {
    let line = line.split(" | ").next().unwrap();
    let words = line.split_whitespace().map(|word| match word {
        "autovideosink" => "fakesink".into(),
        "v4l2src" => "videotestsrc is-live=true num-buffers=60".into(),
        "videotestsrc" if !line.contains("num-buffers") => "videotestsrc num-buffers=60".into(),
        _ if word.starts_with("model=") => String::new(),
        _ if word.starts_with("endpoint=") => format!("endpoint={}", server.url()),
        _ if word.starts_with("uri=file:///tmp/") => {
            format!("uri=file://{}", folder.join("in.mp4").display())
        }
        _ => match word.strip_prefix("location=") {
            Some(file) => {
                let name = Path::new(file).file_name().unwrap();
                format!("location={}", folder.join("out").join(name).display())
            }
            None => word.into(),
        },
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn every_recipe_runs_to_its_end() {
    let plugin = Plugin::new();
    let folder = plugin.folder();
    std::fs::create_dir(folder.join("out")).unwrap();
    let sample = format!(
        "gst-launch-1.0 -q videotestsrc pattern=ball num-buffers=45 \
         ! video/x-raw,width=320,height=240,framerate=30/1 ! x264enc ! mp4mux ! filesink location={}",
        folder.join("in.mp4").display()
    );
    let run = |line: &str| {
        let mut command = plugin.command("timeout");
        command.args(["60", "sh", "-c", &format!("exec {line}")]);
        Said::from(command.output().unwrap())
    };
    assert_eq!(run(&sample).status, Some(0));
    let lines = [
        README,
        include_str!("../../src/element/mod.rs"),
        include_str!("../../src/overlay/mod.rs"),
    ];
    let server = Server::start(answers("A room."));
    let lines = Vec::from_iter(lines.into_iter().flat_map(launch_lines));
    assert!(lines.len() >= 9, "{lines:#?}");
    for line in lines {
        let line = with_what_is_here(&line, folder, &server);
        let said = run(&line);
        assert_eq!(said.status, Some(0), "{line}\n{said:?}");
        for file in std::fs::read_dir(folder.join("out")).unwrap() {
            let file = file.unwrap().path();
            assert!(file.metadata().unwrap().len() > 50, "{line}: {file:?}");
            std::fs::remove_file(file).unwrap();
        }
    }
    assert!(server.exchanges().iter().any(|exchange| exchange.is_chat()));
}
