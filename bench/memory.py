"""Peak memory of one case in its own process: ``python -m bench.memory fastcircuit`` prints bytes above the weights."""

import sys

from bench.cases.training_step import GPT2_SMALL, STEPS, random_model


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status. Not getrusage: its peak begins with that of the process that started us."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    model = random_model(GPT2_SMALL)
    with_weights = status("VmRSS")
    step = STEPS[sys.argv[1]](model, GPT2_SMALL)
    for _ in range(2):
        step()
    print(status("VmHWM") - with_weights)


if __name__ == "__main__":
    main()
