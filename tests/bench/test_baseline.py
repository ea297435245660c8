"""The baseline we are timed against must compute the right thing: compared with Hugging Face and a slow oracle."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastcircuit.benchmarks.baselines.edge_pruning_step import PublishedEdgePruning, expected_mask, sample_mask
from fastcircuit.benchmarks.models import Shape
from fastcircuit.benchmarks.suites import step as step_suite

VOCABULARY, LENGTH = 19, 7


def tiny_model(architecture: str) -> Any:
    torch.manual_seed(0)
    model: Any
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=3, n_embd=12, vocab_size=VOCABULARY, n_positions=16))
    else:
        config = LlamaConfig(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)
        config.num_key_value_heads, config.vocab_size = 2, VOCABULARY
        model = LlamaForCausalLM(config)
    for p in model.parameters():  # the default initialisation leaves biases 0 and logits almost constant
        torch.nn.init.normal_(p, std=0.4)
    return model.double().eval()


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture(params=[True, False], ids=["masked embeddings", "kept embeddings"])
def step(request: pytest.FixtureRequest, model: Any) -> PublishedEdgePruning:
    return PublishedEdgePruning(model, embedding_nodes=request.param, steps=8, warmup_steps=2, sparsity_warmup_steps=4)


def masked_logits(
    step: PublishedEdgePruning, edge: torch.Tensor, node: torch.Tensor, clean: bool = True
) -> torch.Tensor:
    _, corrupted = step.full_model(tokens(2))
    return step.forward(tokens(1), step.masks_from(edge, node), corrupted)[0]


def constant_masks(step: PublishedEdgePruning, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = step.graph.num_edges, step.graph.num_writers
    return torch.full(sizes[:1], value).double(), torch.full(sizes[1:], value).double()


def test_masks_of_one_give_the_hugging_face_logits(model: Any, step: PublishedEdgePruning) -> None:
    expected = model(tokens(1)).logits
    torch.testing.assert_close(masked_logits(step, *constant_masks(step, 1.0)), expected)
    torch.testing.assert_close(step.full_model(tokens(1))[0], expected)


@pytest.mark.parametrize("zeroed", ["edges", "nodes"])
def test_masks_of_zero_give_the_corrupted_run(model: Any, zeroed: str) -> None:
    step = PublishedEdgePruning(model)
    ones, zeros = constant_masks(step, 1.0), constant_masks(step, 0.0)
    masks = (zeros[0], ones[1]) if zeroed == "edges" else (ones[0], zeros[1])
    torch.testing.assert_close(masked_logits(step, *masks), model(tokens(2)).logits)


def test_random_masks_match_the_oracle(model: Any, step: PublishedEdgePruning) -> None:
    graph, generator = step.graph, torch.Generator().manual_seed(3)
    edge = torch.rand(graph.num_edges, generator=generator, dtype=torch.float64)
    node = torch.rand(graph.num_writers, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(masked_logits(step, edge, node), Oracle(model, graph)(tokens(1), tokens(2), edge, node))


@pytest.mark.parametrize("node_loss", [True, False])
def test_training_steps_move_the_masks_towards_sparsity(model: Any, node_loss: bool) -> None:
    step = PublishedEdgePruning(model, steps=12, warmup_steps=1, sparsity_warmup_steps=4, node_loss=node_loss)
    positions = torch.tensor([3, 4])
    batch = {"input_ids": tokens(1), "corrupted_input_ids": tokens(2), "start": positions, "end": positions + 2}
    for p in step.log_alphas.values():  # near the middle, where a mask has a gradient
        torch.nn.init.normal_(p, mean=1.0)
    before = {name: p.detach().clone() for name, p in step.log_alphas.items()}
    losses = [step.training_step(batch).item() for _ in range(12)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all((p != before[name]).any() for name, p in step.log_alphas.items())
    valid = {name: rows.expand_as(before[name]) > 0 for name, rows in step.valid.items()}
    drift = torch.cat([(step.log_alphas[name] - before[name])[rows].flatten() for name, rows in valid.items()])
    assert drift.mean() < -0.5
    assert step.lambdas["edge_1"] < 0 < step.lambdas["edge_2"]
    assert (step.lambdas["node_2"] > 0) == node_loss


def test_samples_follow_the_hard_concrete_distribution() -> None:
    torch.manual_seed(0)
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 2.0]).repeat(100_000, 1)
    zeros = (sample_mask(log_alpha) == 0).double().mean(0)
    expected = torch.sigmoid(2 / 3 * torch.log(torch.tensor(1 / 11)) - log_alpha[0])
    torch.testing.assert_close(zeros, expected.double(), atol=5e-3, rtol=0)


def test_expected_mask_zeroes_the_expected_number_of_entries() -> None:
    log_alpha = torch.tensor([[5.0, -9.0], [-8.0, 3.0], [-7.0, 0.5]])
    mask = expected_mask(log_alpha)
    assert mask.eq(0).tolist() == [[False, True], [True, False], [True, False]]
    torch.testing.assert_close(mask[0, 0], torch.sigmoid(torch.tensor(6.0)))


class Oracle:
    """The equation read literally: one reader at a time, one writer at a time, one matrix product per head."""

    def __init__(self, model: Any, graph: Any) -> None:
        self.model, self.graph = model, graph
        self.llama = model.config.model_type == "llama"
        self.body = model.model if self.llama else model.transformer
        self.blocks = self.body.layers if self.llama else self.body.h

    def __call__(
        self, clean: torch.Tensor, corrupted: torch.Tensor, edge: torch.Tensor, node: torch.Tensor
    ) -> torch.Tensor:
        off, _ = self.run(corrupted, None, torch.ones_like(edge), torch.ones_like(node))
        return self.run(clean, off, edge, node)[1]

    def run(
        self, ids: torch.Tensor, off: list[torch.Tensor] | None, edge: torch.Tensor, node: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Outputs of all writers, and logits; ``off`` are the writers' outputs in the corrupted run."""
        graph = self.graph
        tokens = self.body.embed_tokens(ids) if self.llama else self.body.wte(ids)
        places = torch.arange(ids.shape[1])
        embeddings = [tokens] if self.llama else [tokens, self.body.wpe(places).expand_as(tokens)]
        on = embeddings if graph.num_embedding_writers else []
        kept = torch.zeros_like(tokens) if graph.num_embedding_writers else sum(embeddings)

        def read(reader: str) -> torch.Tensor:
            x = kept.clone()
            for j, writer in enumerate(graph.writers[: len(on)]):
                z = edge[graph.edge_id(writer, reader)] * node[j]
                x += z * on[j] + (0 if off is None else (1 - z) * off[j])
            return x

        on = list(on)
        for layer, block in enumerate(self.blocks):
            heads = [self.head(layer, head, read, places) for head in range(graph.num_heads)]
            on += heads
            if self.llama:
                on.append(block.mlp(block.post_attention_layernorm(read(f"m{layer}"))))
            else:
                on.append(block.mlp(block.ln_2(read(f"m{layer}"))))
        norm = self.body.norm if self.llama else self.body.ln_f
        return on, self.model.lm_head(norm(read("resid_post")))

    def head(self, layer: int, head: int, read: Any, places: torch.Tensor) -> torch.Tensor:
        block, config = self.blocks[layer], self.model.config
        kv = head * self.graph.num_kv_heads // self.graph.num_heads
        inputs = [read(f"a{layer}.h{i}.{kind}") for i, kind in ((head, "q"), (kv, "k"), (kv, "v"))]
        size = config.hidden_size // config.num_attention_heads
        rows = [slice(i * size, (i + 1) * size) for i in (head, kv, kv)]
        if self.llama:
            attn = block.self_attn
            projections = (attn.q_proj, attn.k_proj, attn.v_proj)
            q, k, v = (
                block.input_layernorm(x) @ p.weight[r].T for x, p, r in zip(inputs, projections, rows, strict=True)
            )
            q, k = (
                y[:, 0] for y in apply_rotary_pos_emb(q[:, None], k[:, None], *self.body.rotary_emb(v, places[None]))
            )
            out, bias = attn.o_proj.weight[:, rows[0]].T, 0
        else:
            attn, width = block.attn, config.hidden_size
            weights, biases = attn.c_attn.weight.split(width, 1), attn.c_attn.bias.split(width)
            q, k, v = (block.ln_1(x) @ w[:, r] + b[r] for x, w, b, r in zip(inputs, weights, biases, rows, strict=True))
            out, bias = attn.c_proj.weight[rows[0]], attn.c_proj.bias / config.num_attention_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) @ out + bias


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_plain_step_compiles_to_one_graph_and_learns_as_ours(architecture: str, monkeypatch: Any) -> None:
    compiled_with: list[dict[str, Any]] = []
    compiler = torch.compile

    def in_seconds(function: Any, **options: Any) -> Any:
        compiled_with.append(options)
        return compiler(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", in_seconds)
    operands = step_suite.Operands(Shape(2, 4, 32, 101, 2, 9, architecture, kv_heads=2), "cpu")
    variants = [step_suite.plain_step(operands, compiled) for compiled in (False, True)]
    assert [variant.check() for variant in variants] == [None, None]
    assert compiled_with == [{"fullgraph": True, "dynamic": False}]
    runs = [step_suite.edge_pruning(operands, backend="reference") for _ in range(2)]
    runs[1].stepper = step_suite.PlainStepper(runs[1], compiled=False)
    for run in runs:
        with torch.no_grad():
            run.parameters.edge -= 9.0
        for _ in range(3):
            run.step()
    torch.testing.assert_close(runs[0].parameters.edge, runs[1].parameters.edge, atol=1e-4, rtol=1e-4)
