"""The engine alone: batches, positions, ends of text, failures."""

import queue

import pytest

from fastcircuit.models.loading import load_tokenizer
from fastcircuit.serving.completion import Completion
from fastcircuit.serving.engine import Engine
from fastcircuit.serving.sampling import Sampling
from fastcircuit.serving.text import TextStream
from fastcircuit.submodel.saving import load_submodel
from tests.serving.truth import generated


@pytest.fixture
def engine(request, directories):
    """An engine of its own, whose batches are noted."""
    path = directories[getattr(request, "param", "stories")]
    engine = Engine(load_submodel(path), load_tokenizer(str(path)), max_batch_size=4)
    engine.batches = []
    generate = engine._generate

    def note(batch):
        engine.batches.append([completion.index for completion in batch])
        generate(batch)

    engine._generate = note
    yield engine
    engine.close()


def ask(engine, prompts, stop=()):
    """Completions of (prompt ids, max_tokens) pairs, and the queue that gets their pieces."""
    pieces = queue.Queue()
    completions = [
        Completion(index, ids, size, Sampling(0, 1, None), TextStream(engine.tokenizer, ids, stop), pieces.put)
        for index, (ids, size) in enumerate(prompts)
    ]
    engine.submit(completions)
    return completions, pieces


def answers(completions, pieces):
    """Texts and reasons, when all is there."""
    texts, reasons = [""] * len(completions), [None] * len(completions)
    while None in reasons:
        piece = pieces.get(timeout=30)
        texts[piece.index] += piece.text
        reasons[piece.index] = piece.finish_reason or piece.error
    return texts, reasons


def test_batches_are_as_large_as_allowed(engine, models):
    asked = [([1, 403, 407 - at], 5) for at in range(9)]
    texts, _ = answers(*ask(engine, asked))
    assert texts == [generated(models, "stories", ids, size) for ids, size in asked]
    assert engine.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("engine", ["induction"], indirect=True)
def test_rows_that_would_outgrow_the_positions_together_are_apart(engine, models):
    asked = [([1, 2, 3] * 10, 3), ([4, 5], 31), ([5, 6, 5], 3), ([7, 8], 30)]  # of 32 positions
    texts, reasons = answers(*ask(engine, asked))
    assert texts == [generated(models, "induction", ids, size) for ids, size in asked]
    assert engine.batches == [[0, 2], [1, 3]]
    assert reasons == ["length"] * 4


def test_end_of_text(directories, models):
    path = directories["stories"]
    model, tokenizer = load_submodel(path), load_tokenizer(str(path))
    ids = tokenizer("Once upon a time").input_ids
    whole = generated(models, "stories", ids, 12)
    token = tokenizer(whole).input_ids[6]
    model.generation_config.eos_token_id = [2, token]
    engine = Engine(model, tokenizer)
    completions, pieces = ask(engine, [(ids, 40), (ids, 40), (tokenizer("He said").input_ids, 4)])
    texts, reasons = answers(completions, pieces)
    engine.close()
    assert texts[0] == texts[1]
    assert reasons[:2] == ["stop", "stop"]
    assert whole.startswith(texts[0])
    assert len(texts[0]) < len(whole)


def test_cancelled_work_is_not_done(engine):
    completions, pieces = ask(engine, [([1, 403], 100)] * 6)
    pieces.get(timeout=30)
    for completion in completions[1:]:
        completion.cancel()
    while (piece := pieces.get(timeout=30)).index != 0 or not piece.is_last:
        pass
    assert completions[0].generated == 100
    assert all(completion.generated < 100 for completion in completions[1:4])
    assert [completion.generated for completion in completions[4:]] == [0, 0]
    assert engine.batches == [[0, 1, 2, 3]]


def test_a_failure_ends_its_batch_only(engine, models, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.model), "forward", fail)
        _, reasons = answers(*ask(engine, [([1, 403], 4)] * 2))
    assert reasons == ["the model failed: out of memory"] * 2
    texts, _ = answers(*ask(engine, [([1, 403], 4)]))
    assert texts == [generated(models, "stories", [1, 403], 4)]


def test_close_ends_what_is_left(engine):
    completions, pieces = ask(engine, [([1, 403], 400)] * 5)
    pieces.get(timeout=30)
    engine.close()
    _, reasons = answers(completions, pieces)
    assert reasons == ["the server shuts down"] * 5
