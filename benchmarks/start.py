"""A second start: kernels that were compiled elsewhere are loaded, and a step of Flash's kinds of layers compiles none.

    dsv4 warm --config flash && dsv4 cache export flash.tar          # anywhere
    dsv4 cache import flash.tar && python -m benchmarks.start [--json FILE]

Seconds of: importing torch, importing CuTeDSL, loading every kernel of the cache, rewriting the graph of a decode step (its
generated code left out), the first step, which loads the kernels onto the GPU, and the next. Fails if a kernel is compiled.
"""

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

START = perf_counter()

import torch  # noqa: E402

TORCH = perf_counter()

from dsv4_compile import kernel  # noqa: E402

CUTEDSL = perf_counter()

from benchmarks.layer_model import model_of  # noqa: E402
from dsv4_compile.errors import JitAfterWarmUp  # noqa: E402
from dsv4_compile.reference_model import DSV4Config, Loop, decode_step  # noqa: E402
from dsv4_compile.warm import one_of_each  # noqa: E402


def load_all() -> int:
    """Every object of the cache, as launches load them."""
    count = 0
    for entry in list(kernel.STORE.entries()):
        if entry.key.kind == "object" and (data := kernel.STORE.load(entry.key)) is not None:
            kernel.load(data)
            count += 1
    return count


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-len", type=int, default=8192, help="positions of the state, as `dsv4 warm` was told")
    parser.add_argument("--small", action="store_true", help="nano's sizes")
    parser.add_argument("--json", type=Path)
    ask = parser.parse_args()
    kernel.MONITOR.mode = "error"
    found: dict[str, object] = {"import torch": TORCH - START, "import CuTeDSL": CUTEDSL - TORCH}
    start = perf_counter()
    found["kernels"] = load_all()
    found["load them"] = perf_counter() - start
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = DSV4Config.nano() if ask.small else DSV4Config.flash()
    model = model_of(one_of_each(config).replace(num_nextn_predict_layers=0), device)
    loop = Loop.start(model.new_state(1, min(ask.max_len, config.max_position_embeddings)), 0)
    step = torch.compile(decode_step, backend="dsv4", options={"inner": "eager"}, dynamic=False, fullgraph=True)
    missing = ""
    try:
        for name in ("rewrite, and the first step", "the next step"):
            start = perf_counter()
            step(model, loop)
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name] = perf_counter() - start
    except JitAfterWarmUp as error:
        missing = str(error)
    found["compiled"] = len(kernel.MONITOR.compiled)
    for name, value in found.items():
        print(f"{name}: {value:.3f} s" if isinstance(value, float) else f"{name}: {value}")
    print(f"not in the cache: {missing}" if missing else "nothing was compiled")
    if ask.json:
        ask.json.write_text(json.dumps(found | {"missing": missing}, indent=1) + "\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
