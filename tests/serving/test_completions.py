"""The server as the openai client sees it, over a socket: answers are those of ``generate``."""

import copy
import http.client
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
import torch

from fastcircuit.serving.engine import Engine
from tests.serving.conftest import ANSWERS, start_server
from tests.serving.truth import generated, token_ids

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

PROMPTS = ["Once upon a time", "Lily", "One day, a little girl went to the park and", "He said"]
LETTERS = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 9, 8]]


def greedy(client, model, prompt, **options):
    return client.completions.create(model=model, prompt=prompt, temperature=0, **options)


def texts(answer):
    return [choice.text for choice in answer.choices]


def post(url, body):
    """Status and body of a raw request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request("POST", "/v1/completions", body=body)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def health(url):
    return json.load(urlopen(f"{url}/health"))


def wait_until_idle(url, name, seconds=30):
    end = time.monotonic() + seconds
    while health(url)["models"][name] != {"waiting": 0, "running": 0}:
        assert time.monotonic() < end, "the work of a client that hung up was not given up"
        time.sleep(0.02)


def test_models_and_health(client, url, directories):
    assert [model.id for model in client.models.list()] == list(directories)
    assert client.models.retrieve("stories").id == "stories"
    assert health(url)["status"] == "ok"


@pytest.mark.parametrize("name", ["stories", "headless"])
def test_greedy_equals_generate(client, models, name):
    answer = greedy(client, name, PROMPTS[0], max_tokens=24)
    assert texts(answer) == [generated(models, name, PROMPTS[0], 24)]
    assert answer.usage.prompt_tokens == len(token_ids(models, name, PROMPTS[0]))
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("name", ["induction", "positional"])
def test_token_ids(client, models, name):
    expected = [generated(models, name, ids, 1) for ids in LETTERS]
    assert texts(greedy(client, name, LETTERS, max_tokens=1)) == expected
    assert texts(greedy(client, name, LETTERS[0], max_tokens=1)) == expected[:1]


def test_prompts_of_many_lengths_in_one_request(client, models):
    answer = greedy(client, "stories", PROMPTS)
    assert texts(answer) == [generated(models, "stories", prompt) for prompt in PROMPTS]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_many_requests_to_two_models_at_once(client, models):
    asked = [
        (name, prompt, max_tokens)
        for name, prompts in (("stories", PROMPTS), ("induction", LETTERS))
        for prompt in prompts
        for max_tokens in (3, 9, 20)
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: texts(greedy(client, one[0], one[1], max_tokens=one[2])), asked))
    assert answers == [[generated(models, name, prompt, size)] for name, prompt, size in asked]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampling_equals_generate_with_the_same_seed(client, models, top_p):
    def ask(prompt, seed):
        answer = client.completions.create(model="stories", prompt=prompt, temperature=0.9, top_p=top_p, seed=seed, n=2)
        return texts(answer)

    asked = [(prompt, seed) for prompt in PROMPTS for seed in (5, 77)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(*one), asked))
    assert answers == [
        [generated(models, "stories", prompt, 16, 0.9, top_p, seed + choice) for choice in range(2)]
        for prompt, seed in asked
    ]


def test_without_a_seed_answers_differ(client):
    answer = client.completions.create(model="stories", prompt=PROMPTS[0], n=4, max_tokens=24)
    assert len(set(texts(answer))) == 4


def test_stream_equals_whole(client, models):
    stream = greedy(client, "stories", PROMPTS, stream=True, stream_options={"include_usage": True}, echo=True)
    streamed, reasons, usage = [""] * len(PROMPTS), [None] * len(PROMPTS), None
    chunks = 0
    for chunk in stream:
        chunks += 1
        usage = chunk.usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert chunks > 2 * len(PROMPTS)
    assert streamed == [prompt + generated(models, "stories", prompt) for prompt in PROMPTS]
    assert reasons == ["length"] * len(PROMPTS)
    assert usage.completion_tokens == 16 * len(PROMPTS)


def test_stream_on_the_wire(url):
    status, body = post(url, json.dumps({"model": "stories", "prompt": "Lily", "temperature": 0, "stream": True}))
    events = body.split("\n\n")
    assert status == 200
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


def test_echo(client, models):
    assert texts(greedy(client, "stories", "Lily", echo=True)) == ["Lily" + generated(models, "stories", "Lily")]
    letters = models["induction"][1].decode(LETTERS[0])
    answer = greedy(client, "induction", LETTERS[0], max_tokens=2, echo=True)
    assert texts(answer) == [letters + generated(models, "induction", LETTERS[0], 2)]


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, models, stream):
    whole = generated(models, "stories", PROMPTS[0], 40)
    stop = whole[20:24]
    answer = greedy(client, "stories", PROMPTS[0], max_tokens=40, stop=["never there", stop], stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_default_length_is_what_fits(client, models):
    ids = list(range(1, 21)) + list(range(1, 10))  # 29 of 32 positions: room for 4 tokens, the last one not read again
    answer = greedy(client, "induction", ids)
    assert answer.usage.completion_tokens == 4
    assert texts(answer) == [generated(models, "induction", ids, 4)]


def test_answers_only_circuits_answer_with_an_answer(client, models):
    model, tokenizer = models["answers"]
    answer = greedy(client, "answers", PROMPTS)
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        ids = tokenizer(prompt).input_ids
        best = ANSWERS[model(torch.tensor([ids])).logits[0, -1].argmax()]
        assert choice.text == tokenizer.decode([*ids, best])[len(tokenizer.decode(ids)) :]
    assert answer.usage.completion_tokens == len(PROMPTS)


BAD = {
    "unknown model": ({"model": "gpt-5"}, 404, "model", r"'gpt-5' does not exist; served here: stories, headless"),
    "empty prompt": ({"prompt": ""}, 400, "prompt", "prompt is empty"),
    "no prompts": ({"prompt": []}, 400, "prompt", "prompt is empty"),
    "one empty prompt": ({"prompt": ["a", ""]}, 400, "prompt", r"empty \(number 2 of 2\)"),
    "prompt of another kind": ({"prompt": {"text": "a"}}, 400, "prompt", "must be a string, a list of strings"),
    "mixed prompt": ({"prompt": ["a", 3]}, 400, "prompt", "must be a string, a list of strings"),
    "long prompt": ({"prompt": "a " * 600}, 400, "prompt", "601 tokens; this circuit takes at most 512"),
    "unknown token": ({"prompt": [3, 512]}, 400, "prompt", "512 is outside the model's vocabulary of 512"),
    "unreadable": ({"model": "induction", "prompt": "?"}, 400, "prompt", "tokenizer cannot read the prompt"),
    "long constants": ({"model": "positional", "prompt": [1] * 12}, 400, "prompt", "12 tokens; .* at most 11"),
    "long answer": ({"max_tokens": 600}, 400, "max_tokens", "at most 512 tokens and the prompt has 2: .* at most 511"),
    "no answer": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "two answers": ({"model": "answers", "max_tokens": 2}, 400, "max_tokens", "only has the logits of its 3 answer"),
    "text for a number": ({"temperature": "hot"}, 400, "temperature", "'hot': Input should be a valid number"),
    "too hot": ({"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
    "too cold": ({"temperature": 1e-9}, 400, "temperature", "must be 0 .greedy. or between"),
    "top_p": ({"top_p": 0}, 400, "top_p", "greater than 0"),
    "n": ({"n": 1.5}, 400, "n", "1.5: Input should be a valid integer"),
    "empty stop": ({"stop": ["."] * 5}, 400, "stop", "at most 4 strings"),
    "logprobs": ({"logprobs": 2}, 400, "logprobs", "not supported"),
    "suffix": ({"suffix": "the end"}, 400, "suffix", "not supported"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
    "stray parameter": ({"top_k": 5}, 400, "top_k", "no parameter of this server"),
    "stream options": ({"stream_options": {"include_usage": True}}, 400, "stream_options", "only for stream"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(url, case):
    changes, status, param, message = BAD[case]
    got, body = post(url, json.dumps({"model": "stories", "prompt": "a", **changes}))
    error = json.loads(body)["error"]
    assert (got, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(message, error["message"]), error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_missing_parameter(url, missing):
    body = {"model": "stories", "prompt": "a"}
    del body[missing]
    status, answer = post(url, json.dumps(body))
    assert (status, json.loads(answer)["error"]["message"]) == (400, f"{missing} is missing")


@pytest.mark.parametrize("body", ['{"model": "stories", ', "", "\xff", "[" * 100_000])
def test_malformed_json(url, body):
    status, answer = post(url, body.encode("latin-1"))
    assert status == 400
    assert "not valid JSON" in json.loads(answer)["error"]["message"]


def test_json_that_is_no_object(url):
    status, answer = post(url, "[1]")
    assert (status, json.loads(answer)["error"]["message"]) == (400, "the body must be a JSON object, not list")


def test_unknown_route(url):
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/v1/chat/completions", body="{}")
    answer = connection.getresponse()
    assert answer.status == 404
    assert "served: /v1/models, /v1/completions" in json.loads(answer.read())["error"]["message"]


@pytest.fixture
def slow(models):
    """A server in this process whose model takes 30 ms a step, and the number of its steps."""
    from fastcircuit.serving.app import create_app

    model, tokenizer = copy.deepcopy(models["stories"])
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.03)))
    server = uvicorn.Server(uvicorn.Config(create_app({"slow": Engine(model, tokenizer)}), log_level="warning"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", steps
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_hang_up_gives_up_the_work(slow, models, stream):
    url, steps = slow
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    body = {"model": "slow", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 400, "n": 3, "stream": stream}
    connection.request("POST", "/v1/completions", body=json.dumps(body))
    while len(steps) < 3:
        time.sleep(0.01)
    assert health(url)["models"]["slow"] == {"waiting": 0, "running": 3}
    if stream:
        answer = connection.getresponse()
        answer.read(1)
        answer.close()
    connection.close()
    wait_until_idle(url, "slow")
    assert len(steps) < 200
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert texts(greedy(client, "slow", "Lily")) == [generated(models, "stories", "Lily")]


def test_shut_down_in_the_middle_of_an_answer(directories):
    process, url = start_server(directories["stories"])
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = iter(greedy(client, "stories", PROMPTS[0], max_tokens=8, stream=True))
    next(stream)
    process.send_signal(signal.SIGINT)
    assert sum(len(chunk.choices[0].text) > 0 for chunk in stream) == 7  # what is under way is answered
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
