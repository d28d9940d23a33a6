//! The properties of the elements as options of the command.
//!
//! The list is read from the element's class, so an option has the name, the range, the default and the words of its
//! property.

use std::{ffi::OsString, fmt::Display, ops::RangeInclusive, path::PathBuf, str::FromStr};

use clap::{
    Arg, ArgMatches, Command, ValueHint,
    builder::{
        OsStringValueParser, PossibleValue, PossibleValuesParser, StyledStr, TypedValueParser,
    },
    parser::ValueSource,
};
use gst::{glib, prelude::*};

use crate::units;

/// The properties that were named on the command line, with their values.
#[derive(Clone, Default)]
pub struct Properties(Vec<(String, Value)>);

/// The value of a property, which may change threads.
#[derive(Clone)]
enum Value {
    /// A string, which need not be UTF-8: it may be a path.
    Text(OsString),
    /// The nick of an enumeration's value.
    Nick(String),
    Bool(bool),
    U32(u32),
    U64(u64),
    F64(f64),
}

impl Properties {
    /// Reads the options that [`add_to`] added for the same class.
    pub fn from_matches(class: glib::Type, matches: &ArgMatches) -> Self {
        let given = |spec: glib::ParamSpec| {
            let name = spec.name();
            // A command need not have them all, and may have an option of its own instead.
            let value = matches.try_get_one::<Value>(name).ok()??.clone();
            let is_given = matches.value_source(name) == Some(ValueSource::CommandLine);
            is_given.then(|| (name.to_owned(), value))
        };
        Self(own(class).into_iter().filter_map(given).collect())
    }

    /// Sets the properties that the element has: one that draws nothing has no font.
    pub fn apply(&self, element: &impl IsA<glib::Object>) {
        let known = |(name, _): &&(String, _)| element.find_property(name).is_some();
        for (name, value) in self.0.iter().filter(known) {
            match value {
                Value::Text(text) => element.set_property(name, PathBuf::from(text)),
                Value::Nick(nick) => element.set_property_from_str(name, nick),
                Value::Bool(value) => element.set_property(name, value),
                Value::U32(value) => element.set_property(name, value),
                Value::U64(value) => element.set_property(name, value),
                Value::F64(value) => element.set_property(name, value),
            }
        }
    }

    /// The text of a property that was named on the command line.
    pub fn text(&self, name: &str) -> Option<String> {
        self.0.iter().find_map(|(given, value)| match value {
            Value::Text(text) if given == name => Some(text.to_string_lossy().into_owned()),
            _ => None,
        })
    }

    /// Whether a property was named on the command line.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(given, _)| given == name)
    }
}

/// The writable properties of a class, without those of its parents.
fn own(class: glib::Type) -> Vec<glib::ParamSpec> {
    let properties =
        glib::object::Class::<glib::Object>::from_type(class).expect("an object's class");
    (properties.list_properties().iter())
        .filter(|spec| spec.owner_type() == class)
        .filter(|spec| spec.flags().contains(glib::ParamFlags::WRITABLE))
        .cloned()
        .collect()
}

/// Adds an option for each writable property of a class that has no option yet.
pub fn add_to(class: glib::Type, command: Command) -> Command {
    add_to_without(class, command, &[])
}

/// The same without some properties, which the command sets itself.
pub fn add_to_without(class: glib::Type, command: Command, without: &[&str]) -> Command {
    let taken: Vec<_> = command
        .get_arguments()
        .map(|arg| arg.get_id().clone())
        .collect();
    let specs = grouped(class);
    let free = specs
        .iter()
        .filter(|(_, spec)| taken.iter().all(|id| id != spec.name()))
        .filter(|(_, spec)| !without.contains(&spec.name()));
    command.args(free.map(|(heading, spec)| option(heading, spec)))
}

/// Options that a short help shows too, in fewer words.
const COMMON: [(&str, &str); 8] = [
    (
        "model",
        "Folder, GGUF file or model on the Hugging Face hub",
    ),
    ("device", "Where the model runs"),
    (
        "endpoint",
        "URL of a server that runs the model: vLLM, llama-server, …",
    ),
    ("prompt", "Prompt for each frame"),
    (
        "image-size",
        "Side in pixels of what the model sees: smaller is faster",
    ),
    ("choices", "Allowed captions, separated by |"),
    ("interval", "Time between described frames"),
    ("frames", "Frames that are described together, as a clip"),
];

/// Heading of what only matters where captions are drawn.
pub const DRAWING: &str = "Drawing";

/// Headings of the help, with the first property of each: a class lists related properties together.
const GROUPS: [(&str, &str); 6] = [
    ("font-desc", DRAWING),
    ("model", "Model"),
    ("api-key-file", "Endpoint"),
    ("prompt", "Captions"),
    ("mode", "Frames"),
    ("detail-prompt", "Messages and requests"),
];

/// The properties of a class with the heading of each.
fn grouped(class: glib::Type) -> Vec<(&'static str, glib::ParamSpec)> {
    let mut heading = "Properties of the element";
    let with_heading = |spec: glib::ParamSpec| {
        if let Some((_, next)) = GROUPS.iter().find(|(first, _)| *first == spec.name()) {
            heading = next;
        }
        (heading, spec)
    };
    own(class).into_iter().map(with_heading).collect()
}

/// The property's blurb in the words of a command line.
fn words(spec: &glib::ParamSpec) -> String {
    let blurb = spec.blurb().unwrap_or_default();
    // Times have units here.
    let blurb = blurb
        .replace(" in nanoseconds", "")
        .replace("Nanoseconds", "Time");
    // Nobody can write null, and what has a default is not null by itself.
    let has_default = matches!(spec.default_value().get::<Option<String>>(), Ok(Some(_)));
    let null = if has_default { "empty =" } else { "not set =" };
    blurb
        .replace("null or empty =", null)
        .replace("null =", null)
}

fn option(heading: &'static str, spec: &glib::ParamSpec) -> Arg {
    let name = spec.name().to_owned();
    let common = COMMON.iter().find(|(common, _)| *common == name);
    let arg = Arg::new(name.clone())
        .long(name)
        .long_help(words(spec))
        .help(common.map_or_else(|| words(spec), |(_, short)| (*short).to_owned()))
        .help_heading(heading)
        .hide_short_help(common.is_none());
    if spec.value_type() == glib::Type::STRING {
        let default = spec.default_value().get::<Option<String>>().ok().flatten();
        return with_default(arg, default)
            .value_name("TEXT")
            .value_hint(match spec.name() {
                "model" | "mmproj" | "fallback-model" | "api-key-file" | "ca-file" => {
                    ValueHint::AnyPath
                }
                _ => ValueHint::Other,
            })
            .value_parser(OsStringValueParser::new().map(Value::Text));
    }
    if let Some(class) = glib::EnumClass::with_type(spec.value_type()) {
        let values = (class.values().iter())
            .map(|value| PossibleValue::new(value.nick().to_owned()).help(meaning(value)));
        let default = glib::EnumValue::from_value(spec.default_value());
        return with_default(arg, default.map(|(_, value)| value.nick().to_owned()))
            .value_name("CHOICE")
            .value_parser(PossibleValuesParser::new(values).map(Value::Nick));
    }
    if let Some(spec) = spec.downcast_ref::<glib::ParamSpecUInt64>() {
        // The largest value stands for "no time", so the range of times ends below it.
        if spec.maximum() == gst::ClockTime::MAX.nseconds() {
            let default = gst::ClockTime::from_nseconds(spec.default_value());
            return with_default(arg, Some(units::written(default)))
                .value_name("TIME")
                .value_parser(|text: &str| {
                    units::time(text).map(|time| Value::U64(time.nseconds()))
                });
        }
        let range = spec.minimum()..=spec.maximum();
        return number(arg, range, spec.default_value(), hexadecimal, Value::U64);
    }
    if let Some(spec) = spec.downcast_ref::<glib::ParamSpecUInt>() {
        let range = spec.minimum()..=spec.maximum();
        let hexadecimal = |text: &str| hexadecimal(text).and_then(|value| value.try_into().ok());
        return number(arg, range, spec.default_value(), hexadecimal, Value::U32);
    }
    if let Some(spec) = spec.downcast_ref::<glib::ParamSpecDouble>() {
        let range = spec.minimum()..=spec.maximum();
        return number(arg, range, spec.default_value(), |_| None, Value::F64);
    }
    let default = spec
        .default_value()
        .get::<bool>()
        .expect("all other properties are switches");
    with_default(arg, Some(default.to_string()))
        .value_name("BOOL")
        .num_args(0..=1)
        .require_equals(true)
        .default_missing_value("true")
        .value_parser(|text: &str| match text {
            "true" | "yes" | "on" | "1" => Ok(Value::Bool(true)),
            "false" | "no" | "off" | "0" => Ok(Value::Bool(false)),
            _ => Err("expected true or false"),
        })
}

/// Shows the default. It is the element's to set, so that it knows what was chosen.
fn with_default(arg: Arg, default: Option<String>) -> Arg {
    let Some(default) = default else {
        return arg;
    };
    let with = |help: Option<&StyledStr>| {
        let help = help.map(ToString::to_string).unwrap_or_default();
        format!("{help} [default: {default}]")
    };
    let (short, long) = (with(arg.get_help()), with(arg.get_long_help()));
    arg.help(short).long_help(long)
}

/// What a value of an enumeration means, without its name in front.
fn meaning(value: &glib::EnumValue) -> String {
    let name = value.name();
    name.split_once(": ")
        .map_or(name, |(_, meaning)| meaning)
        .to_owned()
}

/// An option that takes a number.
fn number<N>(
    arg: Arg,
    range: RangeInclusive<N>,
    default: N,
    hexadecimal: impl Fn(&str) -> Option<N> + Clone + Send + Sync + 'static,
    value: fn(N) -> Value,
) -> Arg
where
    N: FromStr + Display + PartialOrd + Clone + Send + Sync + 'static,
{
    let shown = default.to_string();
    // A colour.
    let shown = match shown.parse::<u32>() {
        Ok(number @ 0x0100_0000..) => format!("{number:#x}"),
        _ => shown,
    };
    with_default(arg, Some(shown))
        .value_name("NUMBER")
        .allow_negative_numbers(true)
        .value_parser(
            move |text: &str| match text.parse().ok().or_else(|| hexadecimal(text)) {
                Some(number) if range.contains(&number) => Ok(value(number)),
                _ => Err(format!(
                    "expected a number from {} to {}",
                    range.start(),
                    range.end()
                )),
            },
        )
}

/// Reads `0xff00ff00`, as colours are written.
fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use gstvlmnarrate::{VlmNarrate, VlmNarrateOverlay};

    use super::*;

    #[test]
    fn options_have_a_heading_and_no_words_of_the_element() {
        gst::init().unwrap();
        let command = add_to(VlmNarrateOverlay::static_type(), Command::new("test"));
        let names: Vec<_> = command
            .get_arguments()
            .map(|arg| arg.get_id().as_str())
            .collect();
        for (name, _) in GROUPS.iter().chain(&COMMON) {
            assert!(names.contains(name), "{name} is no property");
        }
        for arg in command.get_arguments() {
            let heading = arg.get_help_heading().unwrap();
            assert!(GROUPS.iter().any(|(_, group)| *group == heading), "{arg:?}");
            let help = arg.get_long_help().unwrap().to_string();
            for word in ["anosecond", "null"] {
                assert!(!help.contains(word), "{word}: {help}");
            }
        }
        let plain = add_to(VlmNarrate::static_type(), Command::new("test"));
        assert!(
            plain
                .get_arguments()
                .all(|arg| arg.get_help_heading() != Some(DRAWING))
        );
    }
}
