//! The names of GGUF tensors in the original checkpoint.

use crate::families::idefics3::{
    config::Config,
    names::{self, decoder_layer, encoder_layer, weight},
};

/// The number of heads of a tensor whose rows `LlamaModel.permute` of the converter permuted, else `None`.
///
/// RoPE of llama.cpp rotates neighbouring values of a head, that of transformers a value of each half: the converter
/// interleaves the halves of query and key heads.
pub(crate) fn permuted_heads(name: &str, config: &Config) -> Option<usize> {
    let c = &config.text_config;
    let (_, module) = name.strip_prefix(names::DECODER_LAYERS)?.split_once('.')?;
    match module.rsplit_once('.')?.0 {
        decoder_layer::Q_PROJ => Some(c.num_attention_heads),
        decoder_layer::K_PROJ => Some(c.num_key_value_heads()),
        _ => None,
    }
}

/// The original name of a tensor of the text model; `None` if SmolVLM has no such tensor.
pub(crate) fn decoder_name(name: &str) -> Option<String> {
    const LAYER: [(&str, &str); 9] = [
        ("attn_norm", decoder_layer::INPUT_LAYERNORM),
        ("attn_q", decoder_layer::Q_PROJ),
        ("attn_k", decoder_layer::K_PROJ),
        ("attn_v", decoder_layer::V_PROJ),
        ("attn_output", decoder_layer::O_PROJ),
        ("ffn_norm", decoder_layer::POST_ATTENTION_LAYERNORM),
        ("ffn_gate", decoder_layer::GATE_PROJ),
        ("ffn_up", decoder_layer::UP_PROJ),
        ("ffn_down", decoder_layer::DOWN_PROJ),
    ];
    Some(match name {
        "token_embd.weight" => weight(names::EMBED_TOKENS),
        "output_norm.weight" => weight(names::NORM),
        "output.weight" => weight(names::LM_HEAD),
        name => layer_name(name, "blk.", names::DECODER_LAYERS, &LAYER)?,
    })
}

/// The original name of a tensor of the mmproj file; `None` if SmolVLM has no such tensor. `swapped` exchanges `ffn_up`
/// and `ffn_down`.
pub(crate) fn encoder_name(name: &str, swapped: bool) -> Option<String> {
    const LAYER: [(&str, &str); 8] = [
        ("ln1", encoder_layer::LAYER_NORM1),
        ("attn_q", encoder_layer::Q_PROJ),
        ("attn_k", encoder_layer::K_PROJ),
        ("attn_v", encoder_layer::V_PROJ),
        ("attn_out", encoder_layer::OUT_PROJ),
        ("ln2", encoder_layer::LAYER_NORM2),
        ("ffn_up", encoder_layer::FC1),
        ("ffn_down", encoder_layer::FC2),
    ];
    if let Some(kind) = name.strip_prefix("v.post_ln.") {
        return Some(format!("{}.{kind}", names::POST_LAYERNORM));
    }
    if let Some(kind) = name.strip_prefix("v.patch_embd.") {
        return Some(format!("{}.{kind}", names::PATCH_EMBEDDING));
    }
    let layer = |name: &str| layer_name(name, "v.blk.", names::ENCODER_LAYERS, &LAYER);
    Some(match name {
        "v.position_embd.weight" => weight(names::POSITION_EMBEDDING),
        "mm.model.fc.weight" => weight(names::CONNECTOR),
        name if swapped && name.contains(".ffn_up.") => layer(&name.replace("_up.", "_down."))?,
        name if swapped && name.contains(".ffn_down.") => layer(&name.replace("_down.", "_up."))?,
        name => layer(name)?,
    })
}

/// Renames a tensor of a layer: `blk.0.attn_q.weight` to `model.text_model.layers.0.self_attn.q_proj.weight`.
fn layer_name(name: &str, from: &str, to: &str, modules: &[(&str, &str)]) -> Option<String> {
    let mut parts = name.strip_prefix(from)?.split('.');
    let (layer, module, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let layer: usize = layer.parse().ok()?;
    let (_, module) = modules.iter().find(|(stored, _)| *stored == module)?;
    (parts.next().is_none()).then(|| format!("{to}{layer}.{module}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_checkpoint() {
        for (stored, name) in [
            ("token_embd.weight", "model.text_model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("output_norm.weight", "model.text_model.norm.weight"),
            (
                "blk.29.attn_output.weight",
                "model.text_model.layers.29.self_attn.o_proj.weight",
            ),
            (
                "blk.0.ffn_norm.weight",
                "model.text_model.layers.0.post_attention_layernorm.weight",
            ),
        ] {
            assert_eq!(decoder_name(stored).as_deref(), Some(name));
        }
        for stored in [
            "rope_freqs.weight",
            "blk.x.attn_q.weight",
            "blk.0.attn_q.weight.x",
            "v.post_ln.bias",
        ] {
            assert_eq!(decoder_name(stored), None, "{stored}");
        }
        let fc1 = "model.vision_model.encoder.layers.3.mlp.fc1.bias";
        assert_eq!(
            encoder_name("v.blk.3.ffn_up.bias", false).as_deref(),
            Some(fc1)
        );
        assert_eq!(
            encoder_name("v.blk.3.ffn_down.bias", true).as_deref(),
            Some(fc1)
        );
        assert_eq!(encoder_name("mm.model.mlp.0.weight", false), None);
    }
}
