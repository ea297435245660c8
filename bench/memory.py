"""Peak memory of one case in its own process: ``python -m bench.memory fastcircuit`` prints bytes above the weights."""

import resource
import sys

from bench.cases.training_step import GPT2_SMALL, STEPS, random_model


def resident() -> int:
    """Resident bytes of this process now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Highest resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    model = random_model(GPT2_SMALL)
    with_weights = resident()
    step = STEPS[sys.argv[1]](model, GPT2_SMALL)
    for _ in range(2):
        step()
    print(peak() - with_weights)


if __name__ == "__main__":
    main()
