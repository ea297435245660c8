"""``fastcircuit bench``."""


def test_a_submodel_of_few_positions_is_timed_on_as_many(shelf, run, answer):
    arguments = ("--data", shelf / "pairs.jsonl", "--ablation", "mean-positional", "--threshold", "1e-7")
    found = answer("extract", shelf / "gpt2", *arguments, "--out", "sub")
    assert {row["tokens"] for row in found["extract"]["speed"]} == {5}
    found = answer("bench", "submodel", "sub", "--rounds", "2")
    assert [(row["phase"], row["batch"], row["tokens"]) for row in found["rows"]] == [
        ("prefill", batch, 5) for batch in (1, 8, 32)
    ]
