//! A table of properties, each of which is one field of a settings struct.

use std::{ffi::OsString, ops::RangeInclusive, path::PathBuf};

use gst::{glib, prelude::*};

/// The bytes of a string. GLib's strings need not be UTF-8, and `get::<String>()` panics if they aren't.
fn bytes(value: &glib::Value) -> Option<OsString> {
    value.get::<Option<PathBuf>>().ok()?.map(OsString::from)
}

/// A string with replacement characters where it is not UTF-8; empty if there is none.
pub fn lossy(value: &glib::Value) -> String {
    let text = bytes(value).unwrap_or_default();
    text.to_string_lossy().into_owned()
}

/// A string that must be UTF-8.
pub fn utf8(value: &glib::Value) -> Result<Option<String>, NotUtf8> {
    bytes(value)
        .map(|text| text.into_string().map_err(NotUtf8))
        .transpose()
}

/// A string is not UTF-8.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not UTF-8")]
pub struct NotUtf8(OsString);

/// A property whose value is one field of the settings `S`.
pub struct Property<S> {
    pub spec: glib::ParamSpec,
    get: Box<Get<S>>,
    set: Box<Set<S>>,
}

type Get<S> = dyn Fn(&mut S) -> glib::Value + Send + Sync;
type Set<S> = dyn Fn(&mut S, &glib::Value) -> Result<(), NotUtf8> + Send + Sync;

impl<S> Property<S> {
    pub fn find<'t>(table: &'t [Self], name: &str) -> Option<&'t Self> {
        table.iter().find(|p| p.spec.name() == name)
    }

    /// Takes `&mut` because one `fn(&mut S) -> &mut T` serves both reading and writing.
    pub fn get(&self, settings: &mut S) -> glib::Value {
        (self.get)(settings)
    }

    /// # Errors
    ///
    /// [`NotUtf8`]; the setting keeps its value.
    pub fn set(&self, settings: &mut S, value: &glib::Value) -> Result<(), NotUtf8> {
        (self.set)(settings, value)
    }
}

/// The highest state in which the property may change.
#[derive(Clone, Copy)]
pub enum Mutable {
    Ready,
    Playing,
}

impl Mutable {
    fn flags<T: Field>(self) -> glib::ParamFlags {
        let mutable = match self {
            Self::Ready => gst::PARAM_FLAG_MUTABLE_READY,
            Self::Playing if T::CONTROLLABLE => {
                gst::PARAM_FLAG_MUTABLE_PLAYING | gst::PARAM_FLAG_CONTROLLABLE
            }
            Self::Playing => gst::PARAM_FLAG_MUTABLE_PLAYING,
        };
        glib::ParamFlags::READWRITE | mutable
    }
}

/// Arguments of every builder of a `ParamSpec`.
pub struct Texts<'a> {
    name: &'a str,
    nick: &'a str,
    blurb: &'a str,
    flags: glib::ParamFlags,
}

/// A type that can be the field of a property.
pub trait Field: Sized + 'static {
    /// The range of numbers; `()` for other types.
    type Range;

    /// Whether a control binding can drive the property.
    const CONTROLLABLE: bool;

    fn spec(texts: Texts<'_>, range: Self::Range, default: &Self) -> glib::ParamSpec;

    /// Reads a value whose type and range GObject has checked.
    fn read(value: &glib::Value) -> Result<Option<Self>, NotUtf8>;

    fn write(&self) -> glib::Value;
}

macro_rules! field {
    ($type:ty, $controllable:literal, $range:ty, |$name:ident, $bounds:pat_param, $default:ident| $builder:expr) => {
        impl Field for $type {
            type Range = $range;

            const CONTROLLABLE: bool = $controllable;

            fn spec(texts: Texts<'_>, $bounds: $range, $default: &Self) -> glib::ParamSpec {
                let $name = texts.name;
                $builder
                    .nick(texts.nick)
                    .blurb(texts.blurb)
                    .flags(texts.flags)
                    .build()
            }

            fn read(value: &glib::Value) -> Result<Option<Self>, NotUtf8> {
                Ok(value.get().ok())
            }

            fn write(&self) -> glib::Value {
                self.to_value()
            }
        }
    };
    ($type:ty, $spec:ty) => {
        field!(
            $type,
            true,
            RangeInclusive<$type>,
            |name, range, default| {
                <$spec>::builder(name)
                    .minimum(*range.start())
                    .maximum(*range.end())
                    .default_value(*default)
            }
        );
    };
}
field!(u32, glib::ParamSpecUInt);
field!(u64, glib::ParamSpecUInt64);
field!(f64, glib::ParamSpecDouble);
field!(bool, true, (), |name, (), default| {
    glib::ParamSpecBoolean::builder(name).default_value(*default)
});
field!(gst::ClockTime, true, (), |name, (), default| {
    // The largest value stands for "no time".
    glib::ParamSpecUInt64::builder(name)
        .maximum(gst::ClockTime::MAX.nseconds())
        .default_value(default.nseconds())
});

impl Field for Option<String> {
    type Range = ();

    const CONTROLLABLE: bool = false;

    fn spec(texts: Texts<'_>, (): (), default: &Self) -> glib::ParamSpec {
        glib::ParamSpecString::builder(texts.name)
            .default_value(default.as_deref())
            .nick(texts.nick)
            .blurb(texts.blurb)
            .flags(texts.flags)
            .build()
    }

    fn read(value: &glib::Value) -> Result<Option<Self>, NotUtf8> {
        utf8(value).map(Some)
    }

    fn write(&self) -> glib::Value {
        self.to_value()
    }
}

/// A path or an id, which need not be UTF-8.
impl Field for Option<OsString> {
    type Range = ();

    const CONTROLLABLE: bool = false;

    fn spec(texts: Texts<'_>, (): (), default: &Self) -> glib::ParamSpec {
        let default = default.as_ref().map(|text| text.to_string_lossy());
        glib::ParamSpecString::builder(texts.name)
            .default_value(default.as_deref())
            .nick(texts.nick)
            .blurb(texts.blurb)
            .flags(texts.flags)
            .build()
    }

    fn read(value: &glib::Value) -> Result<Option<Self>, NotUtf8> {
        Ok(Some(bytes(value)))
    }

    fn write(&self) -> glib::Value {
        self.as_ref().map(PathBuf::from).to_value()
    }
}

/// An enumeration that can be a property.
pub trait Choice:
    Copy
    + StaticType
    + ToValue
    + for<'v> glib::value::FromValue<'v>
    + glib::translate::FromGlib<i32>
    + glib::translate::IntoGlib<GlibType = i32>
    + 'static
{
}

impl<T: Choice> Field for T {
    type Range = ();

    const CONTROLLABLE: bool = false;

    fn spec(texts: Texts<'_>, (): (), default: &Self) -> glib::ParamSpec {
        glib::ParamSpecEnum::builder_with_default(texts.name, *default)
            .nick(texts.nick)
            .blurb(texts.blurb)
            .flags(texts.flags)
            .build()
    }

    fn read(value: &glib::Value) -> Result<Option<Self>, NotUtf8> {
        Ok(value.get().ok())
    }

    fn write(&self) -> glib::Value {
        self.to_value()
    }
}

/// A row of a table.
pub fn row<S: Default + 'static, T: Field>(
    mutable: Mutable,
    (name, nick): (&str, &str),
    range: T::Range,
    field: fn(&mut S) -> &mut T,
    blurb: &str,
) -> Property<S> {
    let texts = Texts {
        name,
        nick,
        blurb,
        flags: mutable.flags::<T>(),
    };
    Property {
        spec: T::spec(texts, range, field(&mut S::default())),
        get: Box::new(move |settings| field(settings).write()),
        set: Box::new(move |settings, value| {
            if let Some(value) = T::read(value)? {
                *field(settings) = value;
            }
            Ok(())
        }),
    }
}
