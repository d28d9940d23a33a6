//! Properties as one table: each row shows one field of a struct of settings.

use std::ops::RangeInclusive;

use gst::{glib, prelude::*};

/// A property that shows one field of `S`.
pub struct Property<S> {
    pub spec: glib::ParamSpec,
    get: Box<Get<S>>,
    set: Box<Set<S>>,
}

type Get<S> = dyn Fn(&mut S) -> glib::Value + Send + Sync;
type Set<S> = dyn Fn(&mut S, &glib::Value) + Send + Sync;

impl<S> Property<S> {
    pub fn find<'t>(table: &'t [Self], name: &str) -> Option<&'t Self> {
        table.iter().find(|p| p.spec.name() == name)
    }

    /// Takes `&mut` for no better reason than that a table of `fn(&mut S) -> &mut T` serves
    /// reading and writing alike.
    pub fn get(&self, settings: &mut S) -> glib::Value {
        (self.get)(settings)
    }

    pub fn set(&self, settings: &mut S, value: &glib::Value) {
        (self.set)(settings, value);
    }
}

/// The highest state in which a change is heeded.
#[derive(Clone, Copy)]
pub enum Mutable {
    Ready,
    Playing,
}

impl Mutable {
    fn flags(self) -> glib::ParamFlags {
        glib::ParamFlags::READWRITE
            | match self {
                Self::Ready => gst::PARAM_FLAG_MUTABLE_READY,
                Self::Playing => gst::PARAM_FLAG_MUTABLE_PLAYING,
            }
    }
}

/// What a property's name, nick, blurb and flags have in common.
pub struct Texts<'a> {
    name: &'a str,
    nick: &'a str,
    blurb: &'a str,
    flags: glib::ParamFlags,
}

/// A type of field that can be a property.
pub trait Field: ToValue + for<'v> glib::value::FromValue<'v> + 'static {
    /// Numbers have one.
    type Range;

    fn spec(texts: Texts<'_>, range: Self::Range, default: &Self) -> glib::ParamSpec;
}

macro_rules! field {
    ($type:ty, $range:ty, |$name:ident, $bounds:pat_param, $default:ident| $builder:expr) => {
        impl Field for $type {
            type Range = $range;

            fn spec(texts: Texts<'_>, $bounds: $range, $default: &Self) -> glib::ParamSpec {
                let $name = texts.name;
                $builder
                    .nick(texts.nick)
                    .blurb(texts.blurb)
                    .flags(texts.flags)
                    .build()
            }
        }
    };
    ($type:ty, $spec:ty) => {
        field!($type, RangeInclusive<$type>, |name, range, default| {
            <$spec>::builder(name)
                .minimum(*range.start())
                .maximum(*range.end())
                .default_value(*default)
        });
    };
}
field!(u32, glib::ParamSpecUInt);
field!(u64, glib::ParamSpecUInt64);
field!(f64, glib::ParamSpecDouble);
field!(bool, (), |name, (), default| {
    glib::ParamSpecBoolean::builder(name).default_value(*default)
});
field!(Option<String>, (), |name, (), default| {
    glib::ParamSpecString::builder(name).default_value(default.as_deref())
});
field!(gst::ClockTime, (), |name, (), default| {
    // The largest value stands for "no time".
    glib::ParamSpecUInt64::builder(name)
        .maximum(gst::ClockTime::MAX.nseconds())
        .default_value(default.nseconds())
});

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

    fn spec(texts: Texts<'_>, (): (), default: &Self) -> glib::ParamSpec {
        glib::ParamSpecEnum::builder_with_default(texts.name, *default)
            .nick(texts.nick)
            .blurb(texts.blurb)
            .flags(texts.flags)
            .build()
    }
}

/// One row of a table.
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
        flags: mutable.flags(),
    };
    Property {
        spec: T::spec(texts, range, field(&mut S::default())),
        get: Box::new(move |settings| field(settings).to_value()),
        set: Box::new(move |settings, value| {
            // GObject has checked type and range.
            if let Ok(value) = value.get() {
                *field(settings) = value;
            }
        }),
    }
}
