"""The entry point: `torch.compile(model, backend="dsv4", options={...})` arrives here with a captured graph."""

import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import config as configuration
from .errors import FLOATS_ARE_INPUTS, GRADIENTS, NO_COMPILER, DSV4Warning, NoCompiler, SitesMissing

if TYPE_CHECKING:
    from .bodies import Apart, Piece
    from .passes import PassManager
    from .reporting.report import Report


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    observe: "Callable[[Report], None] | None" = None,
) -> Callable[..., Any]:
    """Compile one captured graph. `observe` gets the report when it is done.

    Raises UnknownName or BadValue for options that are not understood, NoCompiler where Inductor cannot work.
    """
    from .lowerings import OPS
    from .op import DEVICES
    from .passes import PassManager
    from .patterns import RULES

    config = configuration.resolve(options, mode, passes={r.name for r in RULES}, devices=DEVICES)
    return build(gm, example_inputs, PassManager(config, RULES, OPS), observe)


def build(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    manager: "PassManager",
    observe: "Callable[[Report], None] | None" = None,
) -> Callable[..., Any]:
    """Compile with the given passes."""
    from .bodies import taken_apart
    from .cudagraph import captured
    from .floats import hold_floats_of_modules
    from .graphs.instances import inline_regions
    from .reporting import sites
    from .reporting.report import HISTORY

    config, report = manager.config, manager.report
    if not config.regions:
        inline_regions(gm)
    eager = chosen_inner(config.inner, example_inputs) == "eager"
    example_inputs = hold_floats_of_modules(gm, example_inputs)
    if eager or config.explain or config.diff:
        keep_source_lines(gm)
    report.sites = sites.in_graph(gm)
    if needs_gradients(gm, example_inputs):
        report.skipped = GRADIENTS
        warnings.warn(GRADIENTS, DSV4Warning, stacklevel=2)
    report.hint = FLOATS_ARE_INPUTS if takes_floats(gm) else ""
    parts = None if report.skipped else taken_apart(gm, example_inputs)
    if parts is None:
        compiled = compile_graph(gm, example_inputs, manager, eager)
    else:
        compiled = compile_parts(parts, manager, eager)
    HISTORY.append(report)
    if config.explain:
        print(report, file=sys.stderr)
    if observe is not None:
        observe(report)
    if config.strict:
        check_sites(report, manager)
    return captured(compiled, gm, example_inputs) if config.captures else compiled


def compile_parts(parts: "Apart", manager: "PassManager", eager: bool) -> Callable[..., Any]:
    """Compile the pieces of a graph that was taken apart; bodies are reported as called by the graph around them."""
    from .graphs.instances import module_path
    from .reporting.report import GraphReport

    graphs = manager.report.graphs
    around: list[GraphReport] = []
    bodies: list[tuple[GraphReport, int]] = []

    def compile_piece(piece: "Piece") -> Callable[..., Any]:
        place = len(graphs)
        compiled = compile_graph(piece.gm, piece.inputs, manager, eager)
        if not piece.calls:
            around.extend(graphs[place:])
        elif len(graphs) > place:
            bodies.append((graphs[-1], len(piece.calls)))
            graphs[-1].layers = [module_path(call) for call in piece.calls]
        return compiled

    compiled = parts.compile(compile_piece)
    if not around:
        around.append(GraphReport())
        graphs.extend(around)
    around[0].bodies.update({graphs.index(body): count for body, count in bodies})
    manager.report.settle()
    return compiled


def compile_graph(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], manager: "PassManager", eager: bool
) -> Callable[..., Any]:
    """Compile one graph, or with `eager` rewrite it and run it op by op. The report gets what the passes did to it, or what
    was kept of that for warm starts."""
    from torch._inductor.compile_fx import compile_fx

    from .reporting import stored

    config, report, before = manager.config, manager.report, len(manager.report.graphs)
    graphs = config.inductor_captures
    patches: dict[str, Any] = {} if graphs is None else {"triton.cudagraphs": graphs}
    if eager or config.explain or config.diff:
        patches["force_disable_caches"] = True
    if any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in inputs):
        patches["joint_graph_constant_folding"] = (
            False  # it puts outputs that the graph reads itself behind their readers
        )
    file = None if "force_disable_caches" in patches else stored.place(gm, inputs, config)
    if not report.skipped:
        patches["joint_custom_pre_pass"] = manager
    extra: dict[str, Any] = {"inner_compile": run_op_by_op} if eager else {}
    compiled: Any = compile_fx(gm, inputs, config_patches=patches, **extra)
    manager.seen.clear()
    if file is not None and not report.skipped:
        stored.remember(report, before, file)
    return compiled


def check_sites(report: "Report", manager: "PassManager") -> None:
    """Raise SitesMissing if modules of the reference model were captured whose fusion did not match, although it and all
    that it is built on were to run everywhere."""
    if report.skipped or not report.graphs or manager.config.sites != ("*",):
        return
    whole = not any(name.startswith("raise.") for name in report.off)
    if whole and report.missing:
        raise SitesMissing(report.missing, [str(m) for m in report.misses if m.rule.startswith("fuse.")])


def needs_gradients(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the joint graph will hold a backward: something in it requires a gradient, and an output has one."""
    if not (torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)):
        return False
    outputs = [n.meta.get("example_value") for n in gm.graph.output_node().all_input_nodes]
    return any(o is None or (isinstance(o, torch.Tensor) and o.requires_grad) for o in outputs)


def takes_floats(gm: torch.fx.GraphModule) -> bool:
    """Whether Dynamo made a Python float an input, as dynamic=True has it."""
    given = (n.meta.get("grapharg") for n in gm.graph.find_nodes(op="placeholder"))
    values = (n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder"))
    floats = (isinstance(v, torch.Tensor) and v.dim() == 0 and v.dtype == torch.float64 for v in values)
    return any(f and getattr(g, "pass_arg_as_tensor", False) for f, g in zip(floats, given, strict=True))


def chosen_inner(asked: str | None, inputs: Sequence[Any]) -> str:
    """ "inductor" or "eager": what was asked for, else Inductor wherever it can work."""
    import torch._inductor.config as inductor

    looked_for = [c for c in ([inductor.cpp.cxx] if isinstance(inductor.cpp.cxx, str) else inductor.cpp.cxx) if c]
    on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))
    if asked == "eager" or not on_cpu or any(map(shutil.which, looked_for)):
        return asked or "inductor"
    if asked == "inductor":
        raise NoCompiler(looked_for)
    warnings.warn(NO_COMPILER.format(looked_for=", ".join(looked_for)), DSV4Warning, stacklevel=3)
    return "eager"


def run_op_by_op(gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """In Inductor's place: run the rewritten graph as it stands, but for prims, around which torch runs Python of its own,
    0.1 to 0.3 ms a call."""
    from functorch.compile import make_boxed_func

    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            without_prims(module.graph)
            module.recompile()
    return make_boxed_func(gm.forward)


def without_prims(graph: torch.fx.Graph) -> None:
    """ATen's own casts and counts."""
    from .graphs.graph import CAST, IOTA, aten

    for node in graph.find_nodes(op="call_function", target=CAST):
        x, dtype = node.args
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": dtype}
    for node in graph.find_nodes(op="call_function", target=IOTA):
        how = dict(node.kwargs)
        if (how.pop("start"), how.pop("step"), how.pop("requires_grad")) == (0, 1, False):
            node.target, node.kwargs = aten.arange.default, how


def keep_source_lines(gm: torch.fx.GraphModule) -> None:
    """Make region bodies run node by node while they are traced again, so that each node keeps its model source line
    instead of that of the region's call. The change of `forward` keeps a graph out of the caches: not for normal use."""
    for module in gm.modules():
        if module is not gm and isinstance(module, torch.fx.GraphModule):
            module.forward = torch.fx.Interpreter(module).run
