//! `config.json` and `preprocessor_config.json`, parsed and checked before anything is allocated.
//!
//! Both model types (`idefics3`, `smolvlm`) and both layouts are accepted: the published files (`torch_dtype`,
//! `rope_theta`) and those that transformers 5 saves (`dtype`, `rope_parameters`). Missing fields take the defaults of
//! [`Idefics3Config`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/idefics3/configuration_idefics3.py).

use serde::Deserialize;

/// The architecture of a checkpoint, from its `config.json`.
///
/// Mirrors
/// [`Idefics3Config`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/idefics3/configuration_idefics3.py).
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct Config {
    /// `idefics3` or `smolvlm`.
    pub model_type: String,
    /// Pixel-shuffle factor: `scale_factor`² patches become one token.
    #[serde(default = "default_scale_factor")]
    pub scale_factor: usize,
    /// Whether the token embeddings serve as `lm_head` where the weights have none. The key of the same name in
    /// `text_config` is ignored, as in transformers.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Id of the token `<image>`, if the file has it.
    #[serde(default)]
    pub image_token_id: Option<u32>,
    /// The decoder.
    pub text_config: TextConfig,
    /// The vision encoder.
    #[serde(default)]
    pub vision_config: VisionConfig,
}

/// The architecture of the Llama decoder, from `text_config`.
///
/// Mirrors
/// [`LlamaConfig`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/configuration_llama.py).
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct TextConfig {
    /// Values of a token's hidden state.
    pub hidden_size: usize,
    /// Values between the projections of an MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads of a layer.
    pub num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    /// Tokens of the vocabulary, rows of the embeddings.
    pub vocab_size: usize,
    /// Epsilon of each RMS norm.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    #[serde(default = "default_text_act")]
    hidden_act: String,
    /// Tokens of the longest sequence, prompt and answer together.
    #[serde(default = "default_max_position_embeddings")]
    pub max_position_embeddings: usize,
    rope_theta: Option<f64>,
    #[serde(default)]
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    rope_scaling: Option<RopeParameters>,
    /// Whether the projections of attention have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether the projections of the MLP have biases.
    #[serde(default)]
    pub mlp_bias: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

/// The architecture of the SigLIP vision encoder, from `vision_config`.
///
/// Mirrors `Idefics3VisionConfig` in
/// [`configuration_idefics3.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/idefics3/configuration_idefics3.py).
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct VisionConfig {
    /// Values of a patch's hidden state.
    pub hidden_size: usize,
    /// Values between the projections of an MLP.
    pub intermediate_size: usize,
    /// Encoder layers.
    pub num_hidden_layers: usize,
    /// Attention heads of a layer.
    pub num_attention_heads: usize,
    /// Colour channels; only 3 is supported.
    pub num_channels: usize,
    /// Side of the training pictures in pixels, which sets the size of the position embeddings.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Epsilon of each layer norm.
    pub layer_norm_eps: f64,
    hidden_act: String,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1152,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 16,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            layer_norm_eps: 1e-6,
            hidden_act: "gelu_pytorch_tanh".into(),
        }
    }
}

fn default_scale_factor() -> usize {
    2
}

fn default_rms_norm_eps() -> f64 {
    1e-5
}

fn default_text_act() -> String {
    "silu".into()
}

fn default_max_position_embeddings() -> usize {
    2048
}

/// Ten times the largest dimension of the family, and small enough that products of a few dimensions can't overflow: a
/// hostile file must not cause an allocation before the shapes of the weights, which are bounded, are compared.
const MAX_DIM: usize = 1 << 20;
const MAX_LAYERS: usize = 1024;
/// Attention scores of one encoder layer, `heads × patches²`: 1 GB of f32, 20 times what the family takes.
const MAX_SCORES: usize = 1 << 28;

impl Config {
    /// Parses and checks a `config.json`. The error names the key at fault, without the file.
    pub fn from_json(json: &[u8]) -> Result<Self, String> {
        // `model_type` first: for another architecture, "a key is missing" would mislead.
        let value: serde_json::Value = serde_json::from_slice(json).map_err(|e| e.to_string())?;
        match value.get("model_type").and_then(|t| t.as_str()) {
            Some("idefics3" | "smolvlm") => (),
            Some(other) => {
                return Err(format!(
                    "model_type `{other}` is not a SmolVLM architecture (`idefics3`, `smolvlm`)"
                ));
            }
            None => return Err("`model_type` is missing".into()),
        }
        let config: Self = serde_json::from_value(value).map_err(|e| e.to_string())?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let (t, v) = (&self.text_config, &self.vision_config);
        let dims = [
            ("scale_factor", self.scale_factor),
            ("text_config.hidden_size", t.hidden_size),
            ("text_config.intermediate_size", t.intermediate_size),
            ("text_config.num_attention_heads", t.num_attention_heads),
            ("text_config.num_key_value_heads", t.num_key_value_heads()),
            ("text_config.head_dim", t.head_dim()),
            ("text_config.vocab_size", t.vocab_size),
            (
                "text_config.max_position_embeddings",
                t.max_position_embeddings,
            ),
            ("vision_config.hidden_size", v.hidden_size),
            ("vision_config.intermediate_size", v.intermediate_size),
            ("vision_config.num_attention_heads", v.num_attention_heads),
            ("vision_config.image_size", v.image_size),
            ("vision_config.patch_size", v.patch_size),
        ];
        for (key, value) in dims {
            if value == 0 || value > MAX_DIM {
                return Err(format!("`{key}` is {value}, expected 1 to {MAX_DIM}"));
            }
        }
        for (key, value) in [
            ("text_config.num_hidden_layers", t.num_hidden_layers),
            ("vision_config.num_hidden_layers", v.num_hidden_layers),
        ] {
            if value == 0 || value > MAX_LAYERS {
                return Err(format!("`{key}` is {value}, expected 1 to {MAX_LAYERS}"));
            }
        }
        if v.num_channels != 3 {
            return Err(format!(
                "`vision_config.num_channels` is {}, only RGB (3) is supported",
                v.num_channels
            ));
        }
        if v.image_size < v.patch_size {
            return Err("`vision_config.image_size` is smaller than `patch_size`".into());
        }
        if !v.hidden_size.is_multiple_of(v.num_attention_heads) {
            return Err(
                "`vision_config.hidden_size` is not divisible by `num_attention_heads`".into(),
            );
        }
        if !t
            .num_attention_heads
            .is_multiple_of(t.num_key_value_heads())
        {
            return Err(
                "`text_config.num_attention_heads` is not divisible by `num_key_value_heads`"
                    .into(),
            );
        }
        if !t.head_dim().is_multiple_of(2) {
            return Err("`text_config.head_dim` is odd, but rotary embedding needs pairs".into());
        }
        if t.hidden_act != "silu" {
            return Err(format!(
                "`text_config.hidden_act` is `{}`, only `silu` is supported",
                t.hidden_act
            ));
        }
        if v.hidden_act != "gelu_pytorch_tanh" {
            return Err(format!(
                "`vision_config.hidden_act` is `{}`, only `gelu_pytorch_tanh` is supported",
                v.hidden_act
            ));
        }
        for rope in [&t.rope_parameters, &t.rope_scaling].into_iter().flatten() {
            if let Some(kind) = rope.rope_type.as_deref().filter(|kind| *kind != "default") {
                return Err(format!(
                    "rotary embedding of type `{kind}` is not supported, only `default`"
                ));
            }
        }
        if !t.rope_theta().is_finite() || t.rope_theta() <= 0.0 {
            return Err("`text_config.rope_theta` is not a positive number".into());
        }
        Ok(())
    }

    /// Patches along a side of `side` pixels. A remainder is dropped, as the encoder's convolution does
    /// (384 / 14 → 27).
    pub fn patches_per_side(&self, side: usize) -> usize {
        side / self.vision_config.patch_size
    }

    /// Checks that attention over a picture of `side` × `side` pixels stays within [`MAX_SCORES`].
    pub(crate) fn check_side(&self, side: usize) -> Result<(), String> {
        let patches = self.patches_per_side(side).pow(2);
        let scores = patches
            .checked_pow(2)
            .and_then(|pairs| pairs.checked_mul(self.vision_config.num_attention_heads));
        match scores {
            Some(scores) if scores <= MAX_SCORES => Ok(()),
            _ => Err(format!(
                "`max_image_size.longest_edge` is {side}, too large for an encoder with patches of {} pixels",
                self.vision_config.patch_size
            )),
        }
    }

    /// Tokens that a picture of `side` × `side` pixels takes in the prompt.
    pub fn tokens_per_picture(&self, side: usize) -> usize {
        let tokens_per_side = self.patches_per_side(side).div_ceil(self.scale_factor);
        tokens_per_side.saturating_mul(tokens_per_side)
    }
}

impl TextConfig {
    /// Key and value heads of a layer; as many as query heads if the file doesn't say.
    pub fn num_key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Values of a head; `hidden_size / num_attention_heads` if the file doesn't say.
    pub fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or_else(|| self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Base of the rotary position embedding's frequencies; 10,000 if the file doesn't say.
    pub fn rope_theta(&self) -> f64 {
        self.rope_theta
            .or_else(|| self.rope_parameters.as_ref()?.rope_theta)
            .unwrap_or(10_000.0)
    }
}

/// The settings of the image processor, from `preprocessor_config.json`.
///
/// Mirrors the fields that matter here of
/// [`Idefics3ImageProcessor`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/idefics3/image_processing_idefics3.py).
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct PreprocessorConfig {
    /// The longest edge that every picture is first resized to.
    pub size: LongestEdge,
    /// Side of the encoder's input, and of a tile.
    pub max_image_size: LongestEdge,
    /// Mean of each channel, subtracted after rescaling.
    pub image_mean: [f32; 3],
    /// Standard deviation of each channel, divided by after the mean is subtracted.
    pub image_std: [f32; 3],
    /// Factor from bytes to the range of the mean: 1/255.
    pub rescale_factor: f64,
}

/// An edge length of [`PreprocessorConfig`].
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct LongestEdge {
    /// Pixels, 1 to 8192.
    pub longest_edge: usize,
}

impl Default for PreprocessorConfig {
    fn default() -> Self {
        Self {
            size: LongestEdge { longest_edge: 1456 },
            max_image_size: LongestEdge { longest_edge: 364 },
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
            rescale_factor: 1.0 / 255.0,
        }
    }
}

impl PreprocessorConfig {
    /// Parses and checks a `preprocessor_config.json`. The error names the key at fault, without the file.
    pub fn from_json(json: &[u8]) -> Result<Self, String> {
        let config: Self = serde_json::from_slice(json).map_err(|e| e.to_string())?;
        for (key, edge) in [
            ("size", config.size),
            ("max_image_size", config.max_image_size),
        ] {
            if !(1..=8192).contains(&edge.longest_edge) {
                return Err(format!("`{key}.longest_edge` is not within 1 to 8192"));
            }
        }
        if config.image_std.iter().any(|s| !s.is_finite() || *s == 0.0) {
            return Err("`image_std` has a value that is zero or not finite".into());
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHED: &str = r#"{"model_type": "idefics3", "scale_factor": 4, "tie_word_embeddings": false,
        "text_config": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49280, "rope_theta": 100000, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16"},
        "vision_config": {"hidden_size": 768, "image_size": 512, "num_attention_heads": 12, "patch_size": 16}}"#;

    fn with(from: &str, to: &str) -> Result<Config, String> {
        assert!(PUBLISHED.contains(from), "{from}");
        Config::from_json(PUBLISHED.replace(from, to).as_bytes())
    }

    #[test]
    fn defaults_fill_what_published_files_leave_out() {
        let config = Config::from_json(PUBLISHED.as_bytes()).unwrap();
        assert_eq!(config.vision_config.num_hidden_layers, 12);
        assert_eq!(config.vision_config.intermediate_size, 3072);
        assert_eq!(config.text_config.head_dim(), 64);
        assert_eq!(config.text_config.rope_theta(), 100_000.0);
        assert!(!config.tie_word_embeddings);
    }

    #[test]
    fn rope_is_read_as_transformers_5_writes_it() {
        let config = with(
            r#""rope_theta": 100000"#,
            r#""rope_parameters": {"rope_theta": 273768.0, "rope_type": "default"}"#,
        );
        assert_eq!(config.unwrap().text_config.rope_theta(), 273_768.0);
    }

    #[test]
    fn tokens_fall_with_the_side() {
        let config = Config::from_json(PUBLISHED.as_bytes()).unwrap();
        let tokens = [512, 384, 256, 224, 192].map(|side| config.tokens_per_picture(side));
        assert_eq!(tokens, [64, 36, 16, 16, 9]);
    }

    #[test]
    fn what_can_not_be_run_is_named() {
        for (from, to, named) in [
            ("idefics3", "llava", "llava"),
            (r#""hidden_size": 576, "#, "", "hidden_size"),
            (": 30", ": 1000000000", "num_hidden_layers"),
            (
                r#""num_key_value_heads": 3"#,
                r#""num_key_value_heads": 0"#,
                "num_key_value_heads",
            ),
            (
                r#""num_key_value_heads": 3"#,
                r#""num_key_value_heads": 2"#,
                "num_key_value_heads",
            ),
            (": 49280", ": -1", "49280|-1"),
            (
                r#""rope_theta": 100000"#,
                r#""rope_scaling": {"type": "yarn"}"#,
                "yarn",
            ),
        ] {
            let error = with(from, to).unwrap_err();
            assert!(named.split('|').any(|n| error.contains(n)), "{error}");
        }
    }
}
