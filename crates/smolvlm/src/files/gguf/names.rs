//! The names that tensors had before llama.cpp's converter gave them its own.

use crate::families::idefics3::config::Config;

/// The rotary embedding of llama.cpp turns neighbours where the reference's turns the halves of a head:
/// for it, the rows of these were put in pairs.
pub(crate) fn paired_heads(name: &str, config: &Config) -> Option<usize> {
    let c = &config.text_config;
    match name
        .strip_prefix("model.text_model.layers.")?
        .split('.')
        .nth(2)?
    {
        "q_proj" => Some(c.num_attention_heads),
        "k_proj" => Some(c.num_key_value_heads()),
        _ => None,
    }
}

pub(crate) fn decoder_name(name: &str) -> Option<String> {
    const LAYER: [(&str, &str); 9] = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    Some(match name {
        "token_embd.weight" => "model.text_model.embed_tokens.weight".into(),
        "output_norm.weight" => "model.text_model.norm.weight".into(),
        "output.weight" => "lm_head.weight".into(),
        name => layer_name(name, "blk.", "model.text_model.layers.", &LAYER)?,
    })
}

pub(crate) fn encoder_name(name: &str, swapped: bool) -> Option<String> {
    const LAYER: [(&str, &str); 8] = [
        ("ln1", "layer_norm1"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_out", "self_attn.out_proj"),
        ("ln2", "layer_norm2"),
        ("ffn_up", "mlp.fc1"),
        ("ffn_down", "mlp.fc2"),
    ];
    if let Some(kind) = name.strip_prefix("v.post_ln.") {
        return Some(format!("model.vision_model.post_layernorm.{kind}"));
    }
    if let Some(kind) = name.strip_prefix("v.patch_embd.") {
        return Some(format!(
            "model.vision_model.embeddings.patch_embedding.{kind}"
        ));
    }
    let layer =
        |name: &str| layer_name(name, "v.blk.", "model.vision_model.encoder.layers.", &LAYER);
    Some(match name {
        "v.position_embd.weight" => {
            "model.vision_model.embeddings.position_embedding.weight".into()
        }
        "mm.model.fc.weight" => "model.connector.modality_projection.proj.weight".into(),
        name if swapped && name.contains(".ffn_up.") => layer(&name.replace("_up.", "_down."))?,
        name if swapped && name.contains(".ffn_down.") => layer(&name.replace("_down.", "_up."))?,
        name => layer(name)?,
    })
}

/// `blk.0.attn_q.weight` as `model.text_model.layers.0.self_attn.q_proj.weight`.
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
