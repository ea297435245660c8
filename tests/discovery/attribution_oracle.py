"""Attribution the slow, obvious way: one example at a time, every edge an input of its own, autograd for the rest.

Reader r sees ``sum_j (y_j + t_rj D_j)``, with D held fixed; t is 0 everywhere, and scores are gradients in t.
"""

import torch

from tests.models.oracle import _Gpt2, _Llama, writer_outputs


class Oracle:
    """One prompt.

    Args:
        ablated: what removed edges carry: token ids (interchange), or a dict of writer outputs.
        loss: ``(logits, clean_logits) -> scalar``.
    """

    def __init__(self, model, graph, clean, ablated, loss):
        self.parts = _Gpt2(model) if model.config.model_type == "gpt2" else _Llama(model)
        self.model, self.graph, self.ids = model, graph, clean
        self.clean = writer_outputs(model, graph, clean)
        self.ablated = writer_outputs(model, graph, ablated) if isinstance(ablated, torch.Tensor) else ablated
        self.differences = {name: self.clean[name] - self.ablated[name] for name in graph.writers}
        self.embeddings = graph.writers[: graph.num_embedding_writers]
        self.clean_logits = self.logits(torch.zeros(graph.num_edges, dtype=model.dtype)).detach()
        self.loss = lambda logits: loss(logits, self.clean_logits)

    def logits(self, t, replaced=None):
        """Logits with nudges ``t`` ``[num_edges]`` and some writers' outputs replaced."""
        replaced = replaced or {}
        graph, parts = self.graph, self.parts
        written = dict(parts.embeds(self.ids, graph.embedding_nodes))
        written |= {name: replaced[name] for name in written if name in replaced}
        of_edge = {pair: t[index] for index, pair in enumerate(graph.edges)}

        def read(reader):
            seen = sum(written.values())
            for writer, to in graph.edges:
                if to == reader:
                    seen = seen + of_edge[writer, to] * self.differences[writer]
            return seen

        group = graph.num_heads // graph.num_kv_heads
        for layer in range(graph.num_layers):
            outputs = {}
            for head in range(graph.num_heads):
                name, kv = f"a{layer}.h{head}", head // group
                reads = read(f"{name}.q"), read(f"a{layer}.h{kv}.k"), read(f"a{layer}.h{kv}.v")
                outputs[name] = parts.head(layer, head, kv, *reads) + parts.output_bias(layer) / graph.num_heads
            written |= {name: replaced.get(name, out) for name, out in outputs.items()}
            written[f"m{layer}"] = replaced.get(f"m{layer}", parts.mlp(layer, read(f"m{layer}")))
        return parts.unembed(read("resid_post"))

    def gradient(self, replaced=None):
        """``-<D_j, g_r>`` of every edge: minus the gradient in t."""
        t = torch.zeros(self.graph.num_edges, dtype=self.model.dtype, requires_grad=True)
        return -torch.autograd.grad(self.loss(self.logits(t, replaced)), t)[0]

    def mixed(self, names, mix):
        """The outputs of some writers, ``mix`` of the way from ablated to clean."""
        return {name: mix * self.clean[name] + (1 - mix) * self.ablated[name] for name in names}

    def scores(self, method, steps):
        if method == "eap":
            return self.gradient()
        if method == "clean-corrupted":
            return (self.gradient() + self.gradient(self.mixed(self.embeddings, 0.0))) / 2
        if method == "eap-ig":
            zero = not any(bool(self.ablated[name].any()) for name in self.embeddings)
            mixes = [(k + zero) / steps for k in range(steps)]
            return sum(self.gradient(self.mixed(self.embeddings, mix)) for mix in mixes) / steps
        heads = [[f"a{i}.h{h}" for h in range(self.graph.num_heads)] for i in range(self.graph.num_layers)]
        groups = [self.embeddings, *heads, *([f"m{i}"] for i in range(self.graph.num_layers))]
        mixes = [k / steps for k in range(1, steps + 1)]
        total = sum(self.gradient(self.mixed(group, mix)) for group in groups for mix in mixes)
        return total / (len(groups) * steps)

    def rise(self, edges):
        """Rise of the loss when these edges (numbers) are removed."""
        t = torch.zeros(self.graph.num_edges, dtype=self.model.dtype)
        before = self.loss(self.logits(t))
        t[edges] = -1
        return self.loss(self.logits(t)) - before
