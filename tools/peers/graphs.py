"""SmolVLM in a few dozen lines of PyTorch, in a form that other runtimes take: no cache object, no control flow.

Exported from transformers itself the graphs would carry its mask and cache code along. `prepare.py` holds both
modules against transformers on the same weights before it exports them.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Vision(nn.Module):
    """Pixels `[1, 3, side, side]` to features `[tokens, hidden]`."""

    def __init__(self, model, side):
        super().__init__()
        self.embeddings = model.model.vision_model.embeddings
        self.layers = model.model.vision_model.encoder.layers
        self.norm = model.model.vision_model.post_layernorm
        self.projection = model.model.connector.modality_projection.proj
        config = model.config.vision_config
        self.heads = config.num_attention_heads
        self.scale = model.config.scale_factor
        self.grid = side // config.patch_size
        native = config.image_size // config.patch_size
        table = self.embeddings.position_embedding
        bucket = torch.arange(self.grid, device=table.weight.device) * native // self.grid
        ids = (bucket[:, None] * native + bucket[None, :]).flatten()
        self.register_buffer("positions", table(ids).detach())

    def layer(self, layer, x):
        hidden = x.shape[-1]
        y = layer.layer_norm1(x)
        attention = layer.self_attn
        q, k, v = (
            project(y).view(1, -1, self.heads, hidden // self.heads).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, hidden)
        x = x + attention.out_proj(y)
        mlp = layer.mlp
        return x + mlp.fc2(F.gelu(mlp.fc1(layer.layer_norm2(x)), approximate="tanh"))

    def forward(self, pixels):
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = self.layer(layer, x)
        s, tokens, hidden = self.scale, self.grid // self.scale, x.shape[-1]
        x = self.norm(x).view(tokens, s, tokens, s, hidden).permute(0, 2, 1, 3, 4)
        return self.projection(x.reshape(tokens * tokens, s * s * hidden))


class Decoder(nn.Module):
    """Embeddings `[1, n, hidden]` behind `past` tokens to the last one's logits and the keys and values of all n.

    `keys` and `values` are `[layers, kv_heads, past, head_dim]`, `mask` `[n, past + n]` is added to the scores. With
    `at`, the places of the n tokens, keys and values are written there instead, and only the logits come back; without
    a mask they are the first ones.
    """

    def __init__(self, model):
        super().__init__()
        text = model.model.text_model
        self.layers, self.norm, self.head = text.layers, text.norm, model.lm_head
        config = model.config.text_config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim

    def layer(self, layer, x, cos, sin, mask, keys, values, at=None):
        """One layer, which puts its keys and values behind those of before, or among them at the places `at`."""
        n = x.shape[1]

        def turn(x):
            left, right = x.chunk(2, -1)
            return x * cos + torch.cat([-right, left], -1) * sin

        attention = layer.self_attn
        y = layer.input_layernorm(x)
        q = turn(attention.q_proj(y).view(1, n, self.heads, self.head_dim).transpose(1, 2))
        k = turn(attention.k_proj(y).view(1, n, self.kv_heads, self.head_dim).transpose(1, 2))
        v = attention.v_proj(y).view(1, n, self.kv_heads, self.head_dim).transpose(1, 2)
        if at is None:
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        else:
            keys, values = keys.index_copy_(2, at, k), values.index_copy_(2, at, v)
        if mask is None:
            keys, values = k, v
        group = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None)
        x = x + attention.o_proj(y.transpose(1, 2).reshape(1, n, self.heads * self.head_dim))
        return x + layer.mlp(layer.post_attention_layernorm(x)), k, v

    def logits(self, x):
        return self.head(self.norm(x[:, -1]))

    def forward(self, x, cos, sin, mask, keys, values, at=None):
        new_keys, new_values = [], []
        for i, layer in enumerate(self.layers):
            x, k, v = self.layer(layer, x, cos, sin, mask, keys[i : i + 1], values[i : i + 1], at)
            new_keys.append(k)
            new_values.append(v)
        logits = self.logits(x)
        return (logits, torch.cat(new_keys), torch.cat(new_values)) if at is None else logits
