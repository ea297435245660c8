"""Whether Triton's interpreter works with the numpy that is installed: asked of a kernel, not of versions."""

import functools
import os

FAILS = "Triton's interpreter does not work with this numpy"


@functools.cache
def interpreter_fails() -> str | None:
    """Why kernels cannot be interpreted here; None: they can, or nobody wants that.

    Some releases (3.6, say) make an integer of an array of one number, which numpy refuses since 2.4. Anything else
    that is wrong with the interpreter is no reason to leave out a test.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        _probe()
    except ImportError:
        return None  # no Triton: its tests say so
    except Exception as error:
        if "0-dimensional arrays can be converted" not in str(error):
            raise
        return f"{FAILS}: {error}"
    return None


def _probe() -> None:
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def count(p_out, n):
        for i in range(n):
            tl.store(p_out + i, i)

    count[(1,)](torch.zeros(4, dtype=torch.int32), 4)
