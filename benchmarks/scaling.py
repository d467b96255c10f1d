"""Compile time against the number of layers: the tiny model's kinds of layer, in 6 layers and in 61.

    python -P benchmarks/scaling.py [--phase decode|prefill] [--layers 6,61] [--inner eager|inductor]

Each size compiles anew, past all caches. inner="eager": Dynamo, AOT and our passes, no generated code, in CPU seconds of
this process, so that other work on the machine does not count. inner="inductor": all of it, in seconds of the clock, as
compilers run beside. The first size runs once before it is measured; what the model itself takes is subtracted. At the end how
many times as long the last size took as the first: Dynamo and AOT, our passes among it, by torch's own clocks, and the whole.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch._inductor.config
from torch._dynamo.utils import compilation_time_metrics

from dsv4_compile.backend import backend
from dsv4_compile.reference_model import DSV4, DSV4Config

SHOWN = {
    "Dynamo": "bytecode_tracing",
    "AOT": "create_aot_dispatcher_function",
    "our passes": "pass.joint_graph_passes.joint_custom_pre_pass",
}


def model(layers: int) -> DSV4:
    """The kinds of tiny, over and over: 5 kinds of layer, of which 2 use the hash router."""
    tiny = DSV4Config.tiny()
    kinds = [tiny.layer_types[i % 6] for i in range(layers)]
    routers = ["hash_moe"] * 2 + ["moe"] * (layers - 2)
    config = tiny.replace(
        num_hidden_layers=layers,
        layer_types=tuple(kinds),
        mlp_layer_types=tuple(routers),
        hc_sinkhorn_iters=2,
        num_nextn_predict_layers=0,
    )
    torch.manual_seed(0)
    return DSV4(config).eval().requires_grad_(False)


def seconds_of(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def measure(layers: int, phase: str, inner: str = "eager") -> tuple[float, float]:
    """Seconds of Dynamo and AOT, and of the whole; prints them."""
    torch._dynamo.reset()
    compilation_time_metrics.clear()
    net, reports = model(layers), []
    how = partial(backend, options={"inner": inner}, observe=reports.append)
    compiled = torch.compile(net, backend=how, fullgraph=True, dynamic=False)
    tokens, state = torch.arange(19 if phase == "prefill" else 1).unsqueeze(0), net.new_state(1, 64)
    with torch.no_grad():
        clock = time.process_time if inner == "eager" else time.perf_counter
        first, run = (seconds_of(lambda: compiled(tokens, state), clock) for _ in range(2))
    seconds = first - run  # what is left of the first call without the model's own work
    clocks = {name: sum(compilation_time_metrics.get(key, [0])) for name, key in SHOWN.items()}
    parts = [f"{name} {t:.1f}" for name, t in clocks.items()]
    traced = len(compilation_time_metrics.get("invoke_subgraph_trace", []))
    graphs = ", ".join(f"{g.nodes_before} x {g.calls}" for g in reports[0].graphs)
    unit = "CPU s" if inner == "eager" else "s"
    print(
        f"{layers} layers: {seconds:.1f} {unit} ({', '.join(parts)} s wall; {traced} layers traced); graphs {graphs}",
        flush=True,
    )
    return clocks["Dynamo"] + clocks["AOT"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phase", choices=("prefill", "decode"), default="decode")
    parser.add_argument("--layers", default="6,61")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    sizes = [int(n) for n in asked.layers.split(",")]
    print(torch.__version__, asked.phase, asked.inner)
    measure(sizes[0], asked.phase, "eager")  # rules are traced on their first use
    found = [measure(layers, asked.phase, asked.inner) for layers in sizes]
    phases, whole = (last / first for first, last in zip(found[0], found[-1], strict=True))
    print(
        f"{sizes[-1]} layers take {phases:.2f} times as long as {sizes[0]} in Dynamo and AOT, {whole:.2f} times in all"
    )


if __name__ == "__main__":
    main()
