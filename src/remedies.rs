//! What to do about an engine's error, in the words of properties.

use vlmnarrate_engine::{Error, Remedy, Setting};

/// The error with its remedy in words, where it has one.
pub(crate) fn worded(error: Error) -> Error {
    let Some(words) = error.remedy.and_then(words) else {
        return error;
    };
    let message = format!("{error}. {words}");
    Error::new(error.kind, message)
}

fn words(remedy: Remedy) -> Option<&'static str> {
    Some(match remedy {
        Remedy::SmallerRequest => "Lower frames, image-size or max-tokens",
        Remedy::ShorterRequest => "Lower frames, image-size or max-tokens, or shorten the prompt",
        Remedy::Cpu => "Or set device=cpu",
        Remedy::AnyDevice => "Or set device=auto",
        Remedy::WiderDType => {
            "With dtype=f16 its values may be too large: set dtype=bf16 or dtype=f32. With those its weights are broken: \
             download it again"
        }
        _ => return None,
    })
}

/// What an engine ignores, in the words of properties.
pub(crate) fn ignored(setting: Setting) -> String {
    let property = match setting {
        Setting::Temperature => "temperature",
        Setting::TopP => "top-p",
        Setting::TopK => "top-k",
        Setting::MinP => "min-p",
        Setting::RepetitionPenalty => "repetition-penalty",
        Setting::Seed => "seed",
        Setting::Device => "device",
        Setting::DType => "dtype",
        Setting::Quantization => "quantization",
        Setting::Threads => "threads",
        Setting::Revision => "revision",
        Setting::Mmproj => "mmproj",
        Setting::Choices => {
            return "choices: the endpoint does not hold its model to them. Captions that are none of them are left out"
                .into();
        }
        Setting::NoImageSplitting => {
            return "image-splitting: the endpoint splits pictures into tiles although it is off, which takes many times \
                    as long. Start vLLM with --mm-processor-kwargs '{\"do_image_splitting\": false}'"
                .into();
        }
        _ => "a property",
    };
    format!("{property}: the endpoint ignores it")
}

#[cfg(test)]
mod tests {
    use vlmnarrate_engine::ErrorKind;

    use super::*;

    #[test]
    fn an_error_ends_with_its_remedy() {
        let error = Error::new(ErrorKind::Settings, "device: none");
        assert_eq!(worded(error.clone()), error);
        let worded = worded(error.with_remedy(Remedy::AnyDevice));
        assert_eq!(worded.to_string(), "device: none. Or set device=auto");
        assert_eq!((worded.kind, worded.remedy), (ErrorKind::Settings, None));
    }

    #[test]
    fn a_remedy_names_properties() {
        for (remedy, names) in [
            (
                Remedy::SmallerRequest,
                &["frames", "image-size", "max-tokens"][..],
            ),
            (Remedy::ShorterRequest, &["max-tokens", "prompt"]),
            (Remedy::Cpu, &["device=cpu"]),
            (Remedy::AnyDevice, &["device=auto"]),
            (
                Remedy::WiderDType,
                &["dtype=f16", "dtype=bf16", "dtype=f32"],
            ),
        ] {
            let words = words(remedy).unwrap();
            assert!(names.iter().all(|name| words.contains(name)), "{words}");
        }
    }
}
