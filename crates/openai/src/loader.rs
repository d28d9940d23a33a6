//! From settings to an endpoint and its model.

use std::{env, fmt, fs, io::Read, path::Path, sync::Arc};

use serde_json::{Map, Value};
use ureq::{
    http::{HeaderValue, Uri},
    tls::{Certificate, PemItem, parse_pem},
};
use vlmnarrate_engine::{
    Checkpoint, DType, DeviceKind, EndpointSettings, Engine, EngineLoader, Error, ErrorKind, Found,
    ImageFormat, ImageSize, LoadObserver, ModelSettings, Quantization, Result, Setting,
};

use crate::{dialect::is_smolvlm, endpoint::Endpoint, engine::OpenAi};

/// Longest edge of pictures, in pixels, and the side of a SmolVLM's.
const IMAGE_SIZE: u32 = 512;
/// Bytes of a file with a key or certificates at most.
const MAX_FILE: u64 = 1 << 20;
/// Environment variables that may have the key, the first one first.
const KEY_VARIABLES: [&str; 2] = ["VLMNARRATE_API_KEY", "OPENAI_API_KEY"];

/// The loader of models behind an OpenAI-compatible server.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenAiLoader;

impl EngineLoader for OpenAiLoader {
    fn open(&self, settings: &ModelSettings) -> Result<Found> {
        let endpoint = settings.endpoint.as_ref().ok_or_else(|| {
            let message = "endpoint: it is not set. Set it to the base URL of a server";
            Error::new(ErrorKind::Settings, message)
        })?;
        let model = match settings.model.as_deref().filter(|model| !model.is_empty()) {
            None => None,
            Some(model) => Some(model.to_str().map(str::to_owned).ok_or_else(|| {
                let message = format!(
                    "model: {model:?} is not UTF-8. Set it to a name that the endpoint lists"
                );
                Error::new(ErrorKind::Settings, message)
            })?),
        };
        if endpoint.timeout.is_zero() {
            let message = "endpoint-timeout: 0 leaves no time for an answer. Set it to at least 1 s (1000000000)";
            return Err(Error::new(ErrorKind::Settings, message));
        }
        let options = request_options(endpoint.request_options.as_deref())?;
        let address = Address::new(endpoint)?;
        Ok(Found::Ready(Arc::new(Remote {
            endpoint: Endpoint::shared(address),
            ask: AskSettings {
                options,
                image_format: endpoint.image_format,
                max_requests: endpoint.max_requests,
                timeout: endpoint.timeout,
                has_fallback: endpoint.fallback_model.is_some(),
            },
            ignored: match endpoint.fallback_model {
                // They are the fallback's.
                Some(_) => Vec::new(),
                None => ignored(settings),
            },
            model,
        })))
    }
}

/// How requests are made.
#[derive(Clone, Debug)]
pub(crate) struct AskSettings {
    pub(crate) options: Map<String, Value>,
    pub(crate) image_format: ImageFormat,
    /// 0 for what the server tells.
    pub(crate) max_requests: usize,
    /// How long the server may stay silent.
    pub(crate) timeout: std::time::Duration,
    /// Whether another model answers while the server is away.
    pub(crate) has_fallback: bool,
}

/// Settings of a model in this process, which have no meaning for a server.
fn ignored(settings: &ModelSettings) -> Vec<Setting> {
    let revision = settings.revision.as_deref().unwrap_or("main");
    let has_mmproj = settings
        .mmproj
        .as_ref()
        .is_some_and(|path| !path.is_empty());
    let is_quantized = !matches!(
        settings.quantization,
        Quantization::Auto | Quantization::None
    );
    [
        (settings.device != DeviceKind::Auto, Setting::Device),
        (settings.dtype != DType::Auto, Setting::DType),
        (is_quantized, Setting::Quantization),
        (settings.threads != 0, Setting::Threads),
        (revision != "main", Setting::Revision),
        (has_mmproj, Setting::Mmproj),
    ]
    .into_iter()
    .filter_map(|(is_set, setting)| is_set.then_some(setting))
    .collect()
}

fn request_options(text: Option<&str>) -> Result<Map<String, Value>> {
    let Some(text) = text.filter(|text| !text.trim().is_empty()) else {
        return Ok(Map::new());
    };
    let invalid = |reason: &dyn fmt::Display| {
        let message = format!(
            "request-options: {reason}. Set it to a JSON object, for example {{\"top_k\": 40}}"
        );
        Error::new(ErrorKind::Settings, message)
    };
    let options: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| invalid(&error))?;
    for field in ["messages", "stream"] {
        if options.contains_key(field) {
            return Err(invalid(&format_args!(
                "the field {field:?} is the element's own"
            )));
        }
    }
    Ok(options)
}

/// Where a server is, and how it knows us.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Address {
    /// Without a slash at the end, for messages.
    pub(crate) url: String,
    pub(crate) base: Uri,
    /// Host and port.
    pub(crate) host: String,
    pub(crate) key: Option<HeaderValue>,
    /// PEM of the authorities to trust instead of the built-in ones.
    authorities: Option<Vec<u8>>,
}

impl Address {
    fn new(endpoint: &EndpointSettings) -> Result<Self> {
        let (url, base) = parse_url(&endpoint.url)?;
        let key_file = endpoint.api_key_file.as_deref();
        let key = match key_file.filter(|path| !path.as_os_str().is_empty()) {
            Some(path) => Some(key_from_file(path)?),
            None => key_from_environment()?,
        };
        let ca_file = endpoint.ca_file.as_deref();
        let authorities = ca_file.filter(|path| !path.as_os_str().is_empty());
        let address = Self {
            url,
            host: base
                .authority()
                .map(ToString::to_string)
                .unwrap_or_default(),
            base,
            key,
            authorities: authorities.map(|path| read("ca-file", path)).transpose()?,
        };
        if let (Some(path), Some(certificates)) = (authorities, address.certificates())
            && certificates.is_empty()
        {
            let message = format!(
                "ca-file: {} has no certificate. Set it to a PEM file with -----BEGIN CERTIFICATE-----",
                path.display()
            );
            return Err(Error::new(ErrorKind::OpenRead, message));
        }
        Ok(address)
    }

    /// The certificates of the authorities; those that can't be read are left out.
    pub(crate) fn certificates(&self) -> Option<Vec<Certificate<'static>>> {
        let items = parse_pem(self.authorities.as_deref()?);
        let certificates = items.filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        Some(certificates.collect())
    }
}

fn parse_url(text: &str) -> Result<(String, Uri)> {
    let invalid = |reason: &str| {
        let message = format!(
            "endpoint: {reason}. Set it to the base URL of an OpenAI-compatible server, for example \
             http://localhost:8000/v1"
        );
        Error::new(ErrorKind::Settings, message)
    };
    let url = text.trim().trim_end_matches('/');
    let url = url.strip_suffix("/chat/completions").unwrap_or(url);
    // Before any message that shows the URL.
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = authority.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err(invalid(
            "it has a user or password, which everybody can read in the property. Set the environment variable \
             VLMNARRATE_API_KEY, or api-key-file, instead",
        ));
    }
    if url.contains(['?', '#']) {
        return Err(invalid("it has a query or a fragment"));
    }
    let base =
        Uri::try_from(url).map_err(|error| invalid(&format!("{url:?} is no URL ({error})")))?;
    match (base.scheme_str(), base.host()) {
        (Some("http" | "https"), Some(host)) if !host.is_empty() => Ok((url.to_owned(), base)),
        _ => Err(invalid(&format!(
            "{url:?} does not begin with http:// or https:// and a host"
        ))),
    }
}

fn key_from_file(path: &Path) -> Result<HeaderValue> {
    let bytes = read("api-key-file", path)?;
    let key = String::from_utf8_lossy(&bytes);
    authorization(key.trim(), &format!("api-key-file: {}", path.display()))
}

fn key_from_environment() -> Result<Option<HeaderValue>> {
    for name in KEY_VARIABLES {
        let Some(key) = env::var_os(name).filter(|key| !key.is_empty()) else {
            continue;
        };
        let key = key.to_string_lossy();
        return authorization(key.trim(), &format!("the environment variable {name}")).map(Some);
    }
    Ok(None)
}

fn authorization(key: &str, place: &str) -> Result<HeaderValue> {
    let is_valid = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
    let value = HeaderValue::try_from(format!("Bearer {key}")).ok();
    let mut value = value.filter(|_| is_valid).ok_or_else(|| {
        let message =
            format!("{place} has no API key: one line without spaces. Write the key into it");
        Error::new(ErrorKind::OpenRead, message)
    })?;
    value.set_sensitive(true);
    Ok(value)
}

fn read(property: &str, path: &Path) -> Result<Vec<u8>> {
    let error = |kind, reason: &dyn fmt::Display| {
        Error::new(kind, format!("{property}: {}: {reason}", path.display()))
    };
    let opened = fs::File::open(path);
    let file = opened.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => error(
            ErrorKind::NotFound,
            &"no such file. Set it to the path of a file",
        ),
        _ => error(
            ErrorKind::OpenRead,
            &format_args!("{e}. Check its permissions"),
        ),
    })?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_FILE + 1).read_to_end(&mut bytes);
    read.map_err(|e| error(ErrorKind::OpenRead, &e))?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(error(ErrorKind::OpenRead, &"is larger than 1 MiB")),
        false => Ok(bytes),
    }
}

/// A model behind an endpoint, as far as it is known without a network.
struct Remote {
    endpoint: Arc<Endpoint>,
    /// `None` for the only one that the server has.
    model: Option<String>,
    ask: AskSettings,
    ignored: Vec<Setting>,
}

impl Checkpoint for Remote {
    fn name(&self) -> &str {
        self.model.as_deref().unwrap_or(&self.endpoint.address.url)
    }

    fn image_size(&self) -> ImageSize {
        match self.model.as_deref().is_some_and(is_smolvlm) {
            true => ImageSize::Square(IMAGE_SIZE),
            false => ImageSize::LongestEdge(IMAGE_SIZE),
        }
    }

    fn load(&self, observer: &mut LoadObserver<'_>) -> Result<Box<dyn Engine>> {
        let mut engine = OpenAi::new(
            self.endpoint.clone(),
            self.model.clone(),
            self.ask.clone(),
            &self.ignored,
        );
        engine.connect(&mut || observer(0, 1))?;
        Ok(Box::new(engine))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn open(change: impl FnOnce(&mut EndpointSettings)) -> Result<Found> {
        let mut endpoint = EndpointSettings::new("http://localhost:1/v1");
        change(&mut endpoint);
        let mut settings = ModelSettings::default();
        settings.endpoint = Some(endpoint);
        OpenAiLoader.open(&settings)
    }

    fn refused(change: impl FnOnce(&mut EndpointSettings)) -> String {
        open(change).err().expect("refused").to_string()
    }

    #[test]
    fn a_url_is_cleaned_or_refused() {
        let parsed = |url| {
            parse_url(url)
                .map(|(url, _)| url)
                .map_err(|error| error.to_string())
        };
        for url in [
            "http://h:1/v1",
            "http://h:1/v1/",
            " http://h:1/v1/chat/completions\n",
        ] {
            assert_eq!(parsed(url).as_deref(), Ok("http://h:1/v1"), "{url}");
        }
        assert_eq!(parsed("https://[::1]:1").as_deref(), Ok("https://[::1]:1"));
        for url in [
            "",
            "gpu:8000/v1",
            "ftp://h/v1",
            "http://",
            "http:///v1",
            "http://h/v1?a=b",
            "/v1",
            "http://h h/",
        ] {
            let error = parsed(url).unwrap_err();
            assert!(error.starts_with("endpoint: "), "{error}");
            assert!(error.contains("http://localhost:8000/v1"), "{error}");
        }
        let error = parsed("http://user:pass@h/v1?x").unwrap_err();
        assert!(
            error.contains("api-key-file") && !error.contains("pass@"),
            "{error}"
        );
    }

    #[test]
    fn a_key_file_is_read_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = folder.path().join("key");
            fs::write(&path, text).unwrap();
            path
        };
        let address = |path: PathBuf| {
            let mut endpoint = EndpointSettings::new("http://h/v1");
            endpoint.api_key_file = Some(path);
            Address::new(&endpoint)
        };
        let key = address(file("sk-123\n")).ok().unwrap().key.unwrap();
        assert_eq!(key.as_bytes(), b"Bearer sk-123");
        assert!(!format!("{key:?}").contains("123"));
        for text in ["", "\n", "sk-123 456", "sk-123\nsk-456", "sk-ä123"] {
            let error = address(file(text)).err().unwrap().to_string();
            assert!(
                error.contains("api-key-file") && !error.contains("123"),
                "{error}"
            );
        }
        let missing = refused(|endpoint| endpoint.api_key_file = Some("/no/such/key".into()));
        assert!(
            missing.contains("api-key-file: /no/such/key: no such file"),
            "{missing}"
        );
    }

    #[test]
    fn a_file_of_authorities_has_certificates() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        fs::write(&path, "hello").unwrap();
        let error = refused(|endpoint| endpoint.ca_file = Some(path.clone()));
        assert!(
            error.contains("ca-file") && error.contains("no certificate"),
            "{error}"
        );
        fs::write(&path, vec![0; MAX_FILE as usize + 1]).unwrap();
        let error = refused(|endpoint| endpoint.ca_file = Some(path.clone()));
        assert!(error.contains("larger than 1 MiB"), "{error}");
    }

    #[test]
    fn options_are_an_object_without_what_is_ours() {
        for text in [
            "[1]",
            "{",
            "7",
            r#"{"messages": []}"#,
            r#"{"stream": false}"#,
        ] {
            let error = refused(|endpoint| endpoint.request_options = Some(text.into()));
            assert!(error.starts_with("request-options: "), "{error}");
        }
        assert!(
            open(|endpoint| endpoint.request_options = Some(r#"{"a": {"b": 1}}"#.into())).is_ok()
        );
        assert!(open(|endpoint| endpoint.request_options = Some(" ".into())).is_ok());
    }

    #[test]
    fn a_timeout_leaves_time() {
        let error = refused(|endpoint| endpoint.timeout = std::time::Duration::ZERO);
        assert!(error.starts_with("endpoint-timeout: "), "{error}");
    }

    #[test]
    fn settings_of_a_model_in_this_process_are_named() {
        let mut settings = ModelSettings::default();
        assert_eq!(ignored(&settings), []);
        settings.revision = Some("main".into());
        settings.quantization = Quantization::Auto;
        assert_eq!(ignored(&settings), []);
        settings.device = DeviceKind::Cuda;
        settings.threads = 4;
        assert_eq!(ignored(&settings), [Setting::Device, Setting::Threads]);
    }

    #[test]
    fn elements_of_the_same_address_share_an_endpoint() {
        let shared =
            |url: &str| Endpoint::shared(Address::new(&EndpointSettings::new(url)).ok().unwrap());
        let first = shared("http://localhost:1/v1");
        assert!(Arc::ptr_eq(&first, &shared("http://localhost:1/v1/")));
        assert!(!Arc::ptr_eq(&first, &shared("http://localhost:2/v1")));
    }
}
