//! The README's promises that a machine can check. Its Rust program is a doc test, see `src/lib.rs`.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::programs::{Plugin, Said};
use gst::{glib, prelude::*};

const README: &str = include_str!("../README.md");

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
