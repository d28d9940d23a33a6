"""The demo model's shape: configuration files in the official form, and initial weights that train."""

import copy
import math

import torch
from torch import nn

CONFIG = {
    "architectures": ["SmolVLMForConditionalGeneration"],
    "image_token_id": 658,
    "model_type": "smolvlm",
    "pad_token_id": 2,
    "scale_factor": 4,
    "text_config": {
        "architectures": ["VLlama3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 659,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 352,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 660,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vision_config": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "image_size": 256,
        "intermediate_size": 256,
        "layer_norm_eps": 1e-06,
        "model_type": "smolvlm_vision",
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "patch_size": 16,
        "tie_word_embeddings": False,
    },
    "vocab_size": 660,
}


def build(config=CONFIG):
    """The model in float32. Transformers' own initial weights (0.02) hardly train at this size: these do."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    model = SmolVLMForConditionalGeneration(SmolVLMConfig(**config)).float()
    layers = {
        "vision_model": config["vision_config"]["num_hidden_layers"],
        "text_model": config["text_config"]["num_hidden_layers"],
    }
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            std = module.weight[0].numel() ** -0.5
            if name.endswith(("out_proj", "o_proj", "fc2", "down_proj")):  # what is added to the residual stream
                std /= math.sqrt(2 * layers[name.split(".")[1]])
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.model.text_model.embed_tokens.weight, std=0.5)
    with torch.no_grad():
        position = model.model.vision_model.embeddings.position_embedding.weight
        position.copy_(0.5 * sin_cos(int(position.shape[0] ** 0.5), position.shape[1]))
    return model


def with_vocabulary(state, old, new):
    """Weights for another tokenizer: rows of tokens that both know are kept, the others are means of those rows."""
    state = dict(state)
    for name in ("model.text_model.embed_tokens.weight", "lm_head.weight"):
        rows = [old.get(token) for token, _ in sorted(new.items(), key=lambda item: item[1])]
        mean = state[name].float().mean(0)
        state[name] = torch.stack([mean if row is None else state[name][row].float() for row in rows])
    return state


def sin_cos(side, width):
    """[side*side, width]: half of the width for the row, half for the column."""
    quarter = width // 4
    frequency = math.pi / 2 * (2 * side) ** -torch.linspace(0, 1, quarter)  # from a quarter turn a patch down
    angle = torch.arange(side)[:, None] * frequency
    one = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = one.repeat_interleave(side, 0), one.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def attention(module, query, key, value, attention_mask, scaling, **options):
    """Attention in plain products: backward, in bfloat16 on a CPU, several times as fast as the fused one."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query * scaling) @ key.transpose(-1, -2)
    if module.is_causal:
        length = query.shape[-2]
        scores = scores + torch.full((length, length), -1e4, dtype=scores.dtype).triu(1)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def in_bfloat16(model):
    """A copy for fast training steps: its weights are copied from the float32 ones before each."""
    from transformers import AttentionInterface

    AttentionInterface.register("plain_products", attention)
    fast = copy.deepcopy(model).bfloat16()
    fast.set_attn_implementation("plain_products")
    return fast


def features(model, pixels):
    """Picture tokens [pictures, 16, text width] of normalized pixels at the trained size."""
    vision = model.model.vision_model
    n, patch = len(pixels), vision.embeddings.patch_embedding
    side, p = pixels.shape[-1] // vision.patch_size, vision.patch_size
    x = pixels.view(n, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, 3 * p * p)
    x = nn.functional.linear(x, patch.weight.flatten(1), patch.bias)
    x = vision.encoder(
        inputs_embeds=x + vision.embeddings.position_embedding.weight, attention_mask=None
    ).last_hidden_state
    return model.model.connector(vision.post_layernorm(x))


def states(model, image, ids):
    """What the decoder has after each layer, embeddings first; `image` overwrites those of <image>."""
    x = model.model.text_model.embed_tokens(ids)
    x = x.masked_scatter((ids == model.config.image_token_id)[..., None], image.to(x.dtype))
    return model.model.text_model(inputs_embeds=x, use_cache=False, output_hidden_states=True).hidden_states


def logits(model, image, ids, last):
    """Logits of the `last` final positions."""
    return model.lm_head(states(model, image, ids)[-1][:, -last:])


@torch.no_grad()
def mark_places(model, code=60.0, gain=20.0):
    """Lets each picture token say where in the picture it is, in two directions that the trained layers hardly hear.

    Training forgets the position embeddings: the decoder tells thirds by the order of the tokens. To see a short way
    it needs the place itself, as a value that can be compared between frames.
    """
    vision, text = model.model.vision_model, model.model.text_model
    patch = vision.embeddings.position_embedding.weight
    project = model.model.connector.modality_projection.proj.weight
    readers = [
        linear.weight * norm.weight
        for layer in vision.encoder.layers
        for norm, linears in (
            (layer.layer_norm1, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.layer_norm2, [layer.mlp.fc1]),
        )
        for linear in linears
    ]
    inside = quietest([*readers, project.view(-1, patch.shape[1])])
    readers = [
        linear.weight * norm.weight
        for layer in text.layers
        for norm, linears in (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        )
        for linear in linears
    ]
    outside = quietest([*readers, model.lm_head.weight * text.norm.weight])
    side = round(len(patch) ** 0.5)
    place = (torch.arange(side) + 0.5) / side - 0.5
    patch += code * torch.stack([place.repeat(side), place.repeat_interleave(side)], 1) @ inside
    slots = project.shape[1] // patch.shape[1]
    project += gain / slots * (outside.T @ inside).repeat(1, slots)
    return outside


def quietest(readers):
    """The two directions of their input to which these weights answer least."""
    scaled = torch.cat([w * len(w) ** 0.5 / w.norm() for w in readers])
    return torch.linalg.svd(scaled, full_matrices=False)[2][-2:]
