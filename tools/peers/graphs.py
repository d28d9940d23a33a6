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
        bucket = torch.arange(self.grid) * native // self.grid
        ids = (bucket[:, None] * native + bucket[None, :]).flatten()
        self.register_buffer("positions", self.embeddings.position_embedding(ids).detach())

    def forward(self, pixels):
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.positions
        n, hidden = self.grid * self.grid, x.shape[-1]
        for layer in self.layers:
            y = layer.layer_norm1(x)
            attention = layer.self_attn
            q, k, v = (
                project(y).view(1, n, self.heads, -1).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, n, hidden)
            x = x + attention.out_proj(y)
            mlp = layer.mlp
            x = x + mlp.fc2(F.gelu(mlp.fc1(layer.layer_norm2(x)), approximate="tanh"))
        s, tokens = self.scale, self.grid // self.scale
        x = self.norm(x).view(tokens, s, tokens, s, hidden).permute(0, 2, 1, 3, 4)
        return self.projection(x.reshape(tokens * tokens, s * s * hidden))


class Decoder(nn.Module):
    """Embeddings `[1, n, hidden]` behind `past` tokens to the last one's logits and the keys and values of all n.

    `keys` and `values` are `[layers, kv_heads, past, head_dim]`, `mask` `[n, past + n]` is added to the scores.
    """

    def __init__(self, model):
        super().__init__()
        text = model.model.text_model
        self.layers, self.norm, self.head = text.layers, text.norm, model.lm_head
        config = model.config.text_config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim

    def forward(self, x, cos, sin, mask, keys, values):
        n = x.shape[1]

        def turn(x):
            left, right = x.chunk(2, -1)
            return x * cos + torch.cat([-right, left], -1) * sin

        new_keys, new_values = [], []
        for i, layer in enumerate(self.layers):
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            q = turn(attention.q_proj(y).view(1, n, self.heads, self.head_dim).transpose(1, 2))
            k = turn(attention.k_proj(y).view(1, n, self.kv_heads, self.head_dim).transpose(1, 2))
            v = attention.v_proj(y).view(1, n, self.kv_heads, self.head_dim).transpose(1, 2)
            new_keys.append(k)
            new_values.append(v)
            k, v = torch.cat([keys[i : i + 1], k], 2), torch.cat([values[i : i + 1], v], 2)
            group = self.heads // self.kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + attention.o_proj(y.transpose(1, 2).reshape(1, n, self.heads * self.head_dim))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = self.head(self.norm(x[:, -1]))
        return logits, torch.cat(new_keys), torch.cat(new_values)
