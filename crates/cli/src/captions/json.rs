//! A caption as a JSON object, with the fields of the element's message.

use gst::{ClockTime, glib};
use serde_json::{Map, Number, Value};

/// Fields whose value may be "no time", which is null.
const TIMES: [&str; 6] = [
    "timestamp",
    "stream-time",
    "running-time",
    "duration",
    "first-timestamp",
    "arrival-time",
];

/// The message's structure as an object, with its fields in their order.
pub fn object(structure: &gst::StructureRef) -> Value {
    let fields = structure.iter().map(|(name, value)| {
        let none = TIMES.contains(&name.as_str())
            && value
                .get::<u64>()
                .is_ok_and(|time| time > ClockTime::MAX.nseconds());
        (
            name.to_string(),
            if none { Value::Null } else { json(value) },
        )
    });
    Value::Object(fields.collect::<Map<_, _>>())
}

fn json(value: &glib::Value) -> Value {
    if let Ok(text) = value.get::<Option<String>>() {
        return text.map_or(Value::Null, Value::String);
    }
    if let Ok(flag) = value.get::<bool>() {
        return Value::Bool(flag);
    }
    if let Ok(number) = value.get::<f64>() {
        return Number::from_f64(number).map_or(Value::Null, Value::Number);
    }
    if let Ok(number) = value.get::<u64>() {
        return Value::Number(number.into());
    }
    if let Ok(number) = value.get::<u32>() {
        return Value::Number(number.into());
    }
    Value::Null
}
