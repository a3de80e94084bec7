"""Hand-made records, so that views and formats are tested apart from the compiler that fills them."""

from __future__ import annotations

from lbi_compile.plan import Decision, Part, PassRecord, Plan, Point, RegionPlan
from lbi_compile.report import Check, Report


def point(module: str, index: int = 1) -> Point:
    return Point(module, "aten.add.Tensor", index, ("B", "T", 64), "float32")


def region(k: int, modules: tuple[str, ...], *, finish: Point | None, own_finish: bool = False) -> RegionPlan:
    end = point(modules[-1])
    why = Decision("boundary", end.name, "the one-lane separator nearest to an equal share of the FLOPs")
    return RegionPlan(
        index=k,
        part=Part(modules, 58, 99_968, 25_690_112, 0.3173),
        start=point(f"blocks.{2 * k - 1}") if k else point("embed", 0),
        end=end,
        finish=finish,
        own_finish=own_finish,
        forward_bytes=16_384,
        backward_bytes=512,
        residual=True,
        batch_independent=None if own_finish else True,
        why=(why,),
    )


def plan() -> Plan:
    """Three regions: an even one, one with a long list of layers, one that needs a finish of its own."""
    mixed = (
        "blocks.2",
        "blocks.3.norm_attention",
        "blocks.3.attention",
        "blocks.3.norm_mlp",
        "blocks.3.mlp",
        "extra.3",
    )
    return Plan(
        model="zoo.CausalTransformer",
        regions=(
            region(0, ("blocks.0", "blocks.1"), finish=point("blocks.1", 0)),
            region(1, mixed, finish=point("blocks.3", 0)),
            region(2, ("blocks.4", "blocks.5"), finish=None, own_finish=True),
        ),
        prologue=Part((), 6, 0, 0, 0.0),
        stem=Part(("embed", "position"), 5, 24_576, 16_384, 0.0002),
        head=Part(("norm", "head"), 4, 16_640, 3_888_888, 0.0479),
        canvas=point("embed", 0),
        interface="token",
        cell="gru",
        readout="sum",
        r=16,
        chunk=None,
        causal=True,
        dynamic=("batch", "sequence"),
        inputs=(("tokens", (2, 128)),),
        why=(
            Decision("interface", "token", "the output has a position axis"),
            Decision("readout", "sum", "every region has a proven identity path from its input to its output"),
        ),
        passes=(PassRecord("capture", 1.234, "312 nodes"), PassRecord("partition", 0.012, "3 regions")),
    )


def report() -> Report:
    return Report(
        ok=True,
        max_rel_error=3.1e-13,
        tolerance=1e-10,
        engine="scan",
        worst=(("blocks.3.attention.qkv.weight", 3.1e-13), ("lbi.encoders.1.weight", 2.04e-13)),
        leak=False,
        batch_independent=True,
        lanes=(("blocks.1:add[1]", 1), ("extra.3:add[1]", 2)),
        jacobian_norms=(0.93, 1.21),
        product_norms=(1.21, 0.85),
        first_boundary=1,
        checks=(
            Check("gradients", True, "84 parameters and 1 input; the largest relative error is 3.1e-13"),
            Check("future leak", True, "no output position sees later inputs, in 3 probes each of train and eval mode"),
            Check("batch independence", None, "the model has no batch axis"),
        ),
    )
