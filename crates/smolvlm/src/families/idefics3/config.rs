//! What `config.json` and `preprocessor_config.json` say, checked before anything is allocated.
//!
//! Both model types (`idefics3`, `smolvlm`) and both ways of writing them are read: the published
//! files (`torch_dtype`, `rope_theta`) and those that transformers 5 saves (`dtype`,
//! `rope_parameters`). Missing fields take the defaults of
//! [`Idefics3Config`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/idefics3/configuration_idefics3.py).

use serde::Deserialize;

/// Shape of one SmolVLM checkpoint.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    pub model_type: String,
    /// Side, in patches, of the square that pixel shuffle folds into one token.
    #[serde(default = "default_scale_factor")]
    pub scale_factor: usize,
    /// Whether a missing `lm_head` is the embedding table; the decoder's own key does not count.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub image_token_id: Option<u32>,
    pub text_config: TextConfig,
    #[serde(default)]
    pub vision_config: VisionConfig,
}

/// The Llama decoder.
#[derive(Debug, Clone, Deserialize)]
pub struct TextConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    pub vocab_size: usize,
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    #[serde(default = "default_text_act")]
    hidden_act: String,
    #[serde(default = "default_max_position_embeddings")]
    pub max_position_embeddings: usize,
    rope_theta: Option<f64>,
    #[serde(default)]
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    rope_scaling: Option<RopeParameters>,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

/// The SigLIP vision encoder.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_channels: usize,
    /// Side in pixels of the pictures seen in training; fixes the position table.
    pub image_size: usize,
    pub patch_size: usize,
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

/// Larger than any dimension of the family by an order of magnitude, and small enough that products
/// of a few of them can't overflow: a hostile file must not make us allocate before the weights'
/// own (bounded) shapes are compared.
const MAX_DIM: usize = 1 << 20;
const MAX_LAYERS: usize = 1024;
/// Of the encoder's attention, which weighs each patch against each: 1 GB, 20 times what the family takes.
const MAX_SCORES: usize = 1 << 28;

impl Config {
    /// Parses and checks; the error says which key is at fault.
    pub fn from_json(json: &[u8]) -> Result<Self, String> {
        // A plain look first, so that another architecture is named as such and not as a missing key.
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
                "`vision_config.hidden_size` does not divide by `num_attention_heads`".into(),
            );
        }
        if !t
            .num_attention_heads
            .is_multiple_of(t.num_key_value_heads())
        {
            return Err(
                "`text_config.num_attention_heads` does not divide by `num_key_value_heads`".into(),
            );
        }
        if !t.head_dim().is_multiple_of(2) {
            return Err("`text_config.head_dim` is odd, rotary embedding needs pairs".into());
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

    /// Patches per side of a square picture of `side` pixels; a remainder is left out, as the
    /// reference's convolution does (384 / 14 → 27).
    pub fn patches_per_side(&self, side: usize) -> usize {
        side / self.vision_config.patch_size
    }

    /// Whether the encoder's attention stays within reason for squares of `side` pixels.
    pub(crate) fn check_side(&self, side: usize) -> Result<(), String> {
        let patches = self.patches_per_side(side).pow(2);
        let scores = patches
            .checked_pow(2)
            .and_then(|pairs| pairs.checked_mul(self.vision_config.num_attention_heads));
        match scores {
            Some(scores) if scores <= MAX_SCORES => Ok(()),
            _ => Err(format!(
                "`max_image_size.longest_edge` is {side}, too much for an encoder with patches of {} pixels",
                self.vision_config.patch_size
            )),
        }
    }

    /// Tokens that one square picture of `side` pixels takes in the prompt.
    pub fn tokens_per_picture(&self, side: usize) -> usize {
        let folded = self.patches_per_side(side).div_ceil(self.scale_factor);
        folded.saturating_mul(folded)
    }
}

impl TextConfig {
    pub fn num_key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or_else(|| self.hidden_size / self.num_attention_heads.max(1))
    }

    pub fn rope_theta(&self) -> f64 {
        self.rope_theta
            .or_else(|| self.rope_parameters.as_ref()?.rope_theta)
            .unwrap_or(10_000.0)
    }
}

/// How the reference turns pictures into pixel values.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct PreprocessorConfig {
    /// The longest edge that every picture is first resized to.
    pub size: LongestEdge,
    /// Side of the encoder's square.
    pub max_image_size: LongestEdge,
    pub image_mean: [f32; 3],
    pub image_std: [f32; 3],
    pub rescale_factor: f64,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub struct LongestEdge {
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
    /// Parses and checks; the error says which key is at fault.
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
            return Err("`image_std` holds a zero or no number".into());
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
