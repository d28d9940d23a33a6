//! The names of all tensors, as the published checkpoints have them.
//!
//! Each constant names a module, whose tensors are `<name>.weight` and, if it has a bias, `<name>.bias`.

/// The token embeddings.
pub(crate) const EMBED_TOKENS: &str = "model.text_model.embed_tokens";
/// The decoder's last norm.
pub(crate) const NORM: &str = "model.text_model.norm";
/// The projection from hidden states to logits, if not tied to the token embeddings.
pub(crate) const LM_HEAD: &str = "lm_head";
/// Prefix of the decoder layers, followed by the number of the layer.
pub(crate) const DECODER_LAYERS: &str = "model.text_model.layers.";

/// The convolution that turns pixels into patch embeddings.
pub(crate) const PATCH_EMBEDDING: &str = "model.vision_model.embeddings.patch_embedding";
/// The position embeddings of the encoder.
pub(crate) const POSITION_EMBEDDING: &str = "model.vision_model.embeddings.position_embedding";
/// The encoder's last norm.
pub(crate) const POST_LAYERNORM: &str = "model.vision_model.post_layernorm";
/// Prefix of the encoder layers, followed by the number of the layer.
pub(crate) const ENCODER_LAYERS: &str = "model.vision_model.encoder.layers.";
/// The connector: the projection from pixel-shuffled patches to the decoder's embeddings.
pub(crate) const CONNECTOR: &str = "model.connector.modality_projection.proj";

/// Modules of a decoder layer, relative to the layer's name.
pub(crate) mod decoder_layer {
    pub(crate) const INPUT_LAYERNORM: &str = "input_layernorm";
    pub(crate) const Q_PROJ: &str = "self_attn.q_proj";
    pub(crate) const K_PROJ: &str = "self_attn.k_proj";
    pub(crate) const V_PROJ: &str = "self_attn.v_proj";
    pub(crate) const O_PROJ: &str = "self_attn.o_proj";
    pub(crate) const POST_ATTENTION_LAYERNORM: &str = "post_attention_layernorm";
    pub(crate) const GATE_PROJ: &str = "mlp.gate_proj";
    pub(crate) const UP_PROJ: &str = "mlp.up_proj";
    pub(crate) const DOWN_PROJ: &str = "mlp.down_proj";
}

/// Modules of an encoder layer, relative to the layer's name.
pub(crate) mod encoder_layer {
    pub(crate) const LAYER_NORM1: &str = "layer_norm1";
    pub(crate) const Q_PROJ: &str = "self_attn.q_proj";
    pub(crate) const K_PROJ: &str = "self_attn.k_proj";
    pub(crate) const V_PROJ: &str = "self_attn.v_proj";
    pub(crate) const OUT_PROJ: &str = "self_attn.out_proj";
    pub(crate) const LAYER_NORM2: &str = "layer_norm2";
    pub(crate) const FC1: &str = "mlp.fc1";
    pub(crate) const FC2: &str = "mlp.fc2";
}

/// Name of a decoder layer by its number.
pub(crate) fn decoder_layer(layer: usize) -> String {
    format!("{DECODER_LAYERS}{layer}")
}

/// Name of an encoder layer by its number.
pub(crate) fn encoder_layer(layer: usize) -> String {
    format!("{ENCODER_LAYERS}{layer}")
}

/// Name of a module's weight tensor.
pub(crate) fn weight(module: &str) -> String {
    format!("{module}.weight")
}
