"""A slow, obvious masked transformer: one example, one reader, one writer at a time, straight from the equation.

Independent of fastcircuit.models: it reads the Hugging Face modules itself and keeps every activation by name.
"""

import math

import torch


def oracle_logits(hf_model, graph, edge, node, clean_ids, corrupted=None, output_bias="split"):
    """Logits ``[S, V]`` of one prompt ``clean_ids`` ``[S]``.

    Args:
        edge: mask of every edge in ``graph.edges`` order; node: mask of every writer.
        corrupted: what removed edges carry: token ids ``[S]`` (interchange), a dict of writer outputs, or "zero".
    """
    z = {pair: edge[i] * node[graph.writer_id(pair[0])] for i, pair in enumerate(graph.edges)}
    ones = dict.fromkeys(graph.edges, torch.tensor(1.0, dtype=edge.dtype))
    if isinstance(corrupted, torch.Tensor):
        corrupted = _run(hf_model, graph, ones, corrupted, None, "split")[0]
    return _run(hf_model, graph, z, clean_ids, corrupted, output_bias)[1]


def writer_outputs(hf_model, graph, ids):
    """Every writer's output on ``ids``, by name."""
    ones = dict.fromkeys(graph.edges, torch.tensor(1.0, dtype=hf_model.dtype))
    return _run(hf_model, graph, ones, ids, None, "split")[0]


def _run(model, graph, z, ids, corrupted, output_bias):
    parts = {"gpt2": _Gpt2, "tracr": _Tracr}.get(model.config.model_type, _Llama)(model)
    written = dict(parts.embeds(ids, graph.embedding_nodes))
    always = 0 if graph.embedding_nodes != "none" else sum(written.pop(name) for name in list(written))
    zero = corrupted == "zero" if isinstance(corrupted, str) else False
    kept_bias = 0

    incoming = {reader: [] for reader in graph.readers}
    for (writer, reader), value in z.items():
        incoming[reader].append((writer, value))

    def read(reader):
        x = always + kept_bias
        for writer, value in incoming[reader]:
            alternative = 0 if zero or corrupted is None else corrupted[writer]
            x = x + value * written[writer] + (1 - value) * alternative
        return x + torch.zeros(len(ids), model.config.hidden_size, dtype=model.dtype)

    group = graph.num_heads // graph.num_kv_heads
    for layer in range(graph.num_layers):
        outputs = {}
        for head in range(graph.num_heads):
            out = parts.head(
                layer,
                head,
                head // group,
                read(f"a{layer}.h{head}.q"),
                read(f"a{layer}.h{head // group}.k"),
                read(f"a{layer}.h{head // group}.v"),
            )
            bias = parts.output_bias(layer)
            outputs[f"a{layer}.h{head}"] = out if zero and output_bias == "kept" else out + bias / graph.num_heads
        if zero and output_bias == "kept":
            kept_bias = kept_bias + parts.output_bias(layer)
        written.update(outputs)
        written[f"m{layer}"] = parts.mlp(layer, read(f"m{layer}"))
    return written, parts.unembed(read("resid_post"))


def _attend(query, key, value, scale, window, causal=True):
    out = []
    for i in range(len(query)):
        seen = slice(0 if window is None else max(0, i - window + 1), i + 1 if causal else None)
        scores = (key[seen] @ query[i]) * scale
        out.append(torch.softmax(scores, 0) @ value[seen])
    return torch.stack(out)


class _Gpt2:
    def __init__(self, model):
        self.body, self.model = model.transformer, model

    def embeds(self, ids, convention):
        token, position = self.body.wte.weight[ids], self.body.wpe.weight[: len(ids)]
        if convention == "joint":
            return [("embeds", token + position)]
        return [("tok_embeds", token), ("pos_embeds", position)]

    def head(self, layer, head, _, x_query, x_key, x_value):
        block = self.body.h[layer]
        width, size = block.attn.head_dim, self.model.config.hidden_size
        columns = slice(head * width, (head + 1) * width)
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        projected = [
            block.ln_1(x) @ weight[:, part * size : (part + 1) * size][:, columns]
            + bias[part * size : (part + 1) * size][columns]
            for part, x in enumerate((x_query, x_key, x_value))
        ]
        scale = 1 / math.sqrt(width)
        if self.model.config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        return _attend(*projected, scale, None) @ block.attn.c_proj.weight[columns]

    def output_bias(self, layer):
        return self.body.h[layer].attn.c_proj.bias

    def mlp(self, layer, x):
        block = self.body.h[layer]
        return block.mlp(block.ln_2(x))

    def unembed(self, x):
        return self.model.lm_head(self.body.ln_f(x))


class _Llama:
    def __init__(self, model):
        self.body, self.model = model.model, model

    def embeds(self, ids, convention):
        return [("embeds", self.body.embed_tokens.weight[ids])]

    @staticmethod
    def _norm(module, x):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    def _linear(self, layer, x, head, width):
        rows = slice(head * width, (head + 1) * width)
        y = x @ layer.weight[rows].T
        return y if layer.bias is None else y + layer.bias[rows]

    def _rotate(self, x):
        cos, sin = self.body.rotary_emb(x, torch.arange(len(x))[None])
        half = x.shape[-1] // 2
        swapped = torch.cat((-x[:, half:], x[:, :half]), -1)
        return x * cos[0] + swapped * sin[0]

    def head(self, layer, head, kv_head, x_query, x_key, x_value):
        block = self.body.layers[layer]
        attention, norm = block.self_attn, block.input_layernorm
        width = attention.head_dim
        query = self._rotate(self._linear(attention.q_proj, self._norm(norm, x_query), head, width))
        key = self._rotate(self._linear(attention.k_proj, self._norm(norm, x_key), kv_head, width))
        value = self._linear(attention.v_proj, self._norm(norm, x_value), kv_head, width)
        out = _attend(query, key, value, 1 / math.sqrt(width), self._window(layer))
        return out @ attention.o_proj.weight[:, head * width : (head + 1) * width].T

    def _window(self, layer):
        config = self.model.config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            return None
        return getattr(config, "sliding_window", None)

    def output_bias(self, layer):
        bias = self.body.layers[layer].self_attn.o_proj.bias
        return torch.zeros(self.model.config.hidden_size, dtype=self.model.dtype) if bias is None else bias

    def mlp(self, layer, x):
        block = self.body.layers[layer]
        return block.mlp(self._norm(block.post_attention_layernorm, x))

    def unembed(self, x):
        return self.model.lm_head(self._norm(self.body.norm, x))


class _Tracr:
    def __init__(self, model):
        self.model = model

    def embeds(self, ids, convention):
        token, position = self.model.tok_embed.weight[ids], self.model.pos_embed.weight[: len(ids)]
        if convention == "joint":
            return [("embeds", token + position)]
        return [("tok_embeds", token), ("pos_embeds", position)]

    def head(self, layer, head, _, *reads):
        attention, width = self.model.blocks[layer].attention, self.model.config.head_dim
        rows = slice(head * width, (head + 1) * width)
        projections = (attention.query, attention.key, attention.value)
        projected = [x @ part.weight[rows].T + part.bias[rows] for part, x in zip(projections, reads, strict=True)]
        out = _attend(*projected, 1 / math.sqrt(width), None, self.model.config.causal)
        return out @ attention.output.weight[:, rows].T

    def output_bias(self, layer):
        return self.model.blocks[layer].attention.output.bias

    def mlp(self, layer, x):
        mlp = self.model.blocks[layer].mlp
        return (x @ mlp.up.weight.T + mlp.up.bias).clamp(min=0) @ mlp.down.weight.T + mlp.down.bias

    def unembed(self, x):
        return x @ self.model.lm_head.weight.T + self.model.lm_head.bias
