"""The outputs check: attention of each layer, with its own weights and layout, by every backend, against `reference`
in float64.

The bound is that of `verify.tolerance`: at most twice the error of plain PyTorch in the same dtype. Where the score
matrix would be too large, plain PyTorch computes some of its rows: a query of each block row, or of as many as the
budget allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsa_export.converted.checks import Check, Kind, result, skipped, worst
from bsa_export.converted.folder import ConvertedFolder
from bsa_export.errors import AttentionError
from bsa_export.ops.dispatch import backends, block_sparse_attention
from bsa_export.verify.attention_inputs import Projections, tensor
from bsa_export.verify.guard import stopped
from bsa_export.verify.tolerance import (
    FACTOR,
    ORDERS,
    Errors,
    errors,
    in_half,
    larger,
    plain_beside,
    reference,
    results,
)

# What each computes here; the first is that of every comparison.
DTYPES = {
    "cpu": {"torch": ["float32"]},
    "cuda": {"torch": ["float16"], "triton": ["float16", "bfloat16", "float32"], "deepspeed": ["float16"]},
}
# Floating-point operations that the longest length may take, over all layers.
BUDGET = {"cpu": 4e11, "cuda": 1e14}
WHOLE = 512  # tokens up to which plain PyTorch computes the whole score matrix

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Situation:
    """A kind of input that every backend is tried on.

    Attributes:
        name: for people.
        length: tokens.
        layers: those that it is computed for.
        batch: sequences; the second of two is padded.
        blocks: the blocks of the layout that are used, in order; None is the top-left slice, as in the model.
        gradients: whether the gradients of query, key and value are compared too, in the first dtype.
        every_dtype: whether all dtypes are compared, or only the first.
        rows: queries that plain PyTorch computes, None for all.
    """

    name: str
    length: int
    layers: tuple[int, ...]
    batch: int = 1
    blocks: tuple[int, ...] | None = None
    gradients: bool = False
    every_dtype: bool = False
    rows: int | None = None


def situations(folder: ConvertedFolder, device: str) -> list[Situation]:
    """One shorter than a block, padded (with gradients, on blocks picked so that the layout drops some), odd, and the
    longest."""
    block, longest = folder.block, folder.longest
    layers = tuple(range(folder.layers))
    found = []
    if block > 1:
        found.append(Situation("one shorter than a block", block - 1, layers))
    picked = pick(longest // block, max(4, 256 // block))
    found.append(
        Situation("padded", len(picked) * block, layers, batch=2, blocks=picked, gradients=True, every_dtype=True)
    )
    odd = min(longest, max(3 * block, min(2 * folder.source_length, 2048)))
    odd -= 1 - odd % 2
    found.append(Situation("odd", odd, layers, rows=_rows_for(folder, odd, folder.layers, device)))
    some = _affordable(folder, longest, device)
    if longest != odd:
        found.append(Situation("longest", longest, some, rows=_rows_for(folder, longest, len(some), device)))
    return found


def pick(n: int, count: int) -> tuple[int, ...]:
    """At most `count` of n blocks: pairs of neighbours, far apart, so that an excerpt of a sparse layout drops some."""
    if n <= count:
        return tuple(range(n))
    starts = np.linspace(0, n - 2, count // 2).round().astype(int)
    last = [n - 1] if count % 2 else []
    return tuple(int(block) for block in np.unique(np.concatenate([starts, starts + 1, last])))


def excerpt(layout: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """The rows and columns `blocks` of a layout `[heads, n, n]`; a row that would be empty keeps its diagonal."""
    part = layout[:, list(blocks)][:, :, list(blocks)].contiguous()
    empty = ~part.bool().any(-1)
    part[torch.diag_embed(empty)] = 1
    return part


def _work(folder: ConvertedFolder, length: int) -> float:
    """Operations of one layer at a length: projections and attention."""
    hidden = folder.encoder.sizes.hidden_size
    kept = folder.record.density if folder.record else 0.2
    return 6.0 * length * hidden**2 + 4.0 * length**2 * hidden * kept


def _affordable(folder: ConvertedFolder, length: int, device: str) -> tuple[int, ...]:
    """Layers that the budget allows at a length, evenly spread; one at least."""
    count = int(max(1, min(folder.layers, BUDGET[device] // _work(folder, length))))
    return tuple(sorted({int(layer) for layer in np.linspace(0, folder.layers - 1, count).round()}))


def _rows_for(folder: ConvertedFolder, length: int, layers: int, device: str) -> int | None:
    """How many queries plain PyTorch computes: None for all; else one of each block row, at least 64, or as many as the
    budget allows."""
    if length <= WHOLE:
        return None
    each = 16.0 * length * folder.encoder.sizes.hidden_size * layers  # float64, at a quarter of the speed of float32
    return int(max(8, min(max(64, -(-length // folder.block)), BUDGET[device] / 4 // each)))


@dataclass
class Call:
    """A call of attention, and what plain PyTorch makes of it, which all backends share.

    Attributes:
        inputs: the arguments of `block_sparse_attention`; query, key and value in float32. With `grad_output` the
            gradients are compared too.
        dtype: in which it is computed.
        rows: int64, the queries to compare, None for all.
    """

    inputs: dict[str, Any]
    dtype: torch.dtype
    rows: Tensor | None = None

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        """Plain PyTorch in the dtype: `output` and the gradients of `query`, `key` and `value`."""
        return self._plain(self.dtype)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The same in float64."""
        return self._plain(torch.float64)

    def computed(self, backend: str) -> dict[str, Tensor]:
        """What a backend makes of the call."""
        attention = partial(block_sparse_attention, backend=backend)
        found = results(attention, self._cast(), None)
        return found if self.rows is None else {name: x[:, :, self.rows] for name, x in found.items()}

    def not_finite(self, heads: slice = slice(None)) -> str | None:
        """`NaN` or `infinite values` if query, key or value of some heads hold them, else None. float64 cannot judge
        them."""
        taken = [self.inputs[name][:, heads] for name in ("query", "key", "value")]
        if any(x.isnan().any() for x in taken):
            return "NaN"
        return "infinite values" if any(x.isinf().any() for x in taken) else None

    @cached_property
    def plain_in_half(self) -> dict[str, Tensor]:
        """Plain PyTorch that keeps its probabilities in the dtype for the gradients too: `verify.tolerance.in_half`."""
        return self._plain(self.dtype, attention=in_half)

    def errors_of(
        self, actual: Mapping[str, Tensor], heads: slice = slice(None), backend: str | None = None
    ) -> dict[str, Errors]:
        """How far results of a backend are off in some heads, by name, compared with plain PyTorch.

        The error of plain PyTorch depends on the order in which it sums, and may be small by luck. So where the bound
        is exceeded, it is measured with more orders of head_dim, and the largest counts.
        """

        def beside(plain: Mapping[str, Tensor]) -> dict[str, Errors]:
            return {name: errors(*(x[name][:, heads] for x in (actual, plain, self.exact))) for name in actual}

        # The plain PyTorch that a backend is compared with differs in the gradients only.
        attention = plain_beside(backend) if "grad_output" in self.inputs else reference
        found = beside(self.plain_in_half if attention is in_half else self.plain)
        for seed in range(ORDERS):
            if all(error.passed for error in found.values()):
                break
            order = torch.Generator().manual_seed(seed)
            again = beside(self._plain(self.dtype, order, attention))
            found = {name: larger(error, again[name]) for name, error in found.items()}
        return found

    def worst_head(self, actual: Mapping[str, Tensor], heads: slice) -> int:
        """The one of these heads whose output is farthest from the exact one."""
        far = (actual["output"].double() - self.exact["output"]).abs().nan_to_num(float("inf"))
        return heads.start + int(far[:, heads].amax(dim=(0, 2, 3)).argmax())

    def _cast(self) -> dict[str, Any]:
        names = ("query", "key", "value", "grad_output")
        return {name: x.to(self.dtype) if name in names else x for name, x in self.inputs.items()}

    def _plain(
        self, dtype: torch.dtype, order: torch.Generator | None = None, attention: Callable[..., Tensor] = reference
    ) -> dict[str, Tensor]:
        inputs = self._cast()
        size = inputs["query"].shape[-1]
        places = torch.arange(size) if order is None else torch.randperm(size, generator=order)
        for name in ("query", "key", "value", "grad_output"):
            if name in inputs:
                inputs[name] = inputs[name].to(dtype)[..., places.to(inputs[name].device)]
        inputs["scale"] = inputs.get("scale") or size**-0.5
        if self.rows is not None:
            attention = partial(attend_rows, self.rows)
        return {name: x[..., places.argsort().to(x.device)] for name, x in results(attention, inputs).items()}


def attend_rows(
    rows: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Some rows of what `ops.reference` computes, head by head, by the same plain steps.

    Args:
        rows: int64 `[count]`, queries.
        key_padding_mask: bool `[batch, seq]`, True takes part.
        window: how many tokens before and after its own a query attends to.

    Returns:
        `[batch, heads, count, head_dim]`.
    """
    batch, heads, seq, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    output = query.new_empty(batch, heads, len(rows), head_dim)
    near = torch.ones(len(rows), seq, dtype=torch.bool, device=query.device)
    if window is not None:
        ahead = torch.arange(seq, device=query.device) - rows[:, None]
        near = (ahead >= -window[0]) & (ahead <= window[1])
    for head in range(heads):
        kept = layout[head % len(layout)].to(query.device)[rows // block].ne(0).repeat_interleave(block, 1)[:, :seq]
        kept = kept & near
        scores = (query[:, head, rows] @ key[:, head].mT) * scale  # [batch, count, seq]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~kept, float("-inf"))
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask[:, None], float("-inf"))
        empty = scores.isneginf().all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        output[:, head] = weights.to(value.dtype) @ value[:, head]
    return output


def make_call(
    folder: ConvertedFolder, projections: Projections, layer: int, situation: Situation, dtype: str, layout: Tensor
) -> Call:
    """The call of a situation with a layer's own weights.

    Args:
        layout: the layer's, uint8 `[heads, n, n]`.
    """
    query, key, value = projections(layer, situation.batch, situation.length)
    part = layout if situation.blocks is None else excerpt(layout, situation.blocks)
    inputs = {"query": query, "key": key, "value": value, "layout": part.to(query.device), "block": folder.block}
    inputs |= window_of(folder, layer)
    if situation.batch == 2:
        inputs["key_padding_mask"] = padding(situation.length, query.device)
    generator = torch.Generator().manual_seed(layer)
    if situation.gradients:
        inputs["grad_output"] = torch.randn(query.shape, generator=generator).to(query.device)
    rows = None
    if situation.rows is not None:
        rows = _picked_rows(situation, folder.block, generator).to(query.device)
    return Call(inputs, getattr(torch, dtype), rows)


def window_of(folder: ConvertedFolder, layer: int) -> dict[str, Any]:
    """The argument `window` of `block_sparse_attention`, for a local layer."""
    window = folder.windows[layer]
    return {} if window is None else {"window": (window, window)}


def padding(length: int, device: torch.device) -> Tensor:
    """Bool `[2, length]`: the first sequence has a hole, the second ends after two thirds."""
    kept = torch.ones(2, length, dtype=torch.bool)
    kept[0, length // 5] = False
    kept[1, 2 * length // 3 :] = False
    return kept.to(device)


def _picked_rows(situation: Situation, block: int, generator: torch.Generator) -> Tensor:
    """Random queries, equally many of each block row as far as that goes, and the last one."""
    assert situation.rows is not None
    count = -(-situation.length // block)
    order = torch.randperm(count, generator=generator)
    chosen = order.repeat(-(-situation.rows // count))[: situation.rows]
    rows = chosen * block + torch.randint(block, chosen.shape, generator=generator)
    rows = torch.cat([rows, torch.tensor([situation.length - 1])])
    return rows.clamp(max=situation.length - 1).unique()


def check_outputs(
    folder: ConvertedFolder, device: str, names: tuple[str, ...], progress: Progress | None = None
) -> Iterator[Check]:
    """Compares the backends that run on `device`, one check each. Triton's interpreter is left to `verify.interpreted`.

    Args:
        folder: the converted folder.
        device: `cpu` or `cuda`.
        names: the backends to compare.
        progress: called with (comparisons done, comparisons in all).
    """
    dtypes = DTYPES[device]
    reasons = backends()
    runnable = [name for name in names if name in dtypes and reasons[name] is None]
    ledger = {name: Ledger(name, device, folder.not_finite) for name in runnable}
    plan = situations(folder, device)
    total, done = sum(len(situation.layers) for situation in plan), 0
    projections = Projections(folder, torch.device(device))
    for layer in range(folder.layers):
        layout = tensor(folder.tensors[folder.layout_name(layer)])
        for situation in plan:
            if layer not in situation.layers or not runnable:
                continue
            compare(folder, projections, layer, layout, situation, ledger, {name: dtypes[name] for name in runnable})
            done += 1
            if progress:
                progress(done, total)
    for name in names:
        if name in ledger:
            yield ledger[name].check(plan)
        elif name in dtypes:
            yield skipped(Kind.OUTPUTS, reasons[name] or "", name)


def compare(
    folder: ConvertedFolder,
    projections: Projections,
    layer: int,
    layout: Tensor,
    situation: Situation,
    ledger: Mapping[str, Ledger],
    dtypes: Mapping[str, list[str]],
) -> None:
    """Compares backends in one situation of one layer and enters what was found; what plain PyTorch computes is
    shared."""
    calls = {}
    for name, of_backend in dtypes.items():
        for number, dtype in enumerate(of_backend if situation.every_dtype else of_backend[:1]):
            if dtype not in calls:
                gradients = situation.gradients and number == 0
                of_dtype = replace(situation, gradients=gradients)
                calls[dtype] = make_call(folder, projections, layer, of_dtype, dtype, layout)
            heads = [(layer, head) for head in range(folder.heads)]
            if ledger[name].stopped is None:
                ledger[name].enter(calls[dtype], heads, situation, dtype)


class Ledger:
    """What was found about one backend.

    Args:
        backend: its name.
        device: where it computes.
        known: the tensors that hold such values by conversion.json: name -> `NaN` or `infinite`.
    """

    def __init__(self, backend: str, device: str, known: Mapping[str, str]):
        self.backend, self.device, self.known = backend, device, known
        self.rows: list[dict] = []
        self.faults: list[str] = []
        self.broken: dict[int, str] = {}  # layer -> what its weights lead to instead of numbers
        self.refused: dict[tuple[str, str], list[int]] = {}  # (situation, reason) -> layers
        self.stopped: Check | None = None  # why nothing more can be computed here

    def enter(self, call: Call, heads: list[tuple[int, int]], situation: Situation, dtype: str) -> None:
        """Compares one call layer by layer; its heads are these (layer, head) of the model, a layer's one after the
        other."""
        parts, start = {}, 0
        for layer, members in groupby(heads, key=lambda pair: pair[0]):
            part = slice(start, start := start + len(list(members)))
            if what := call.not_finite(part):
                self._blame(layer, what)
            else:
                parts[layer] = part
        if not parts:
            return
        try:
            actual = call.computed(self.backend)
        except AttentionError as error:
            for layer in parts:
                self._refuse(layer, situation, str(error))
            return
        except Exception as error:  # inside Triton, numpy, a driver: the backend cannot run here, whatever the model is
            done = f" after {len(self.rows)} comparisons within the bound" if self.rows else ""
            self.stopped = stopped(Kind.OUTPUTS, self.backend, error, done)
            return
        for layer, part in parts.items():
            for what, measured in call.errors_of(actual, part, self.backend).items():
                if not call.plain[what][:, part].isfinite().all():
                    self._refuse(layer, situation, f"plain PyTorch overflows in {dtype}")
                    continue
                self._note(layer, situation, dtype, what, measured)
                if not measured.passed:
                    head = f", head {heads[call.worst_head(actual, part)][1]}" if what == "output" else ""
                    what = "output" if what == "output" else f"gradient of {what}"
                    self.faults.append(
                        f"layer {layer}{head}, {situation.length:,} tokens ({situation.name}), {dtype}, {what}: error"
                        f" {measured.largest:.3g} (rms {measured.rms:.3g}), the bound is"
                        f" {FACTOR * measured.plain_largest:.3g} (rms {FACTOR * measured.plain_rms:.3g})"
                    )

    def _blame(self, layer: int, what: str) -> None:
        """A layer whose weights lead to NaN or infinite values: reported once, however many inputs show it."""
        places = (f".layer.{layer}.", "embeddings.") if layer == 0 else (f".layer.{layer}.",)
        known = [f"{name} holds {kind}" for name, kind in self.known.items() if any(place in name for place in places)]
        if layer not in self.broken:
            self.broken[layer] = what
            self.faults.append(
                f"layer {layer}: its weights lead to {what}" + (f" ({known[0]}, by conversion.json)" if known else "")
            )

    def _refuse(self, layer: int, situation: Situation, reason: str) -> None:
        layers = self.refused.setdefault((situation.name, reason), [])
        if layer not in layers:
            layers.append(layer)

    def _note(self, layer: int, situation: Situation, dtype: str, what: str, error: Errors) -> None:
        self.rows.append(
            {
                "backend": self.backend, "layer": layer, "situation": situation.name, "length": situation.length,
                "dtype": dtype, "of": what, "largest": error.largest, "rms": error.rms,
                "plain_largest": error.plain_largest, "plain_rms": error.plain_rms,
                "ratio": error.ratio, "bound": FACTOR,
            }
        )  # fmt: skip

    def check(self, plan: list[Situation], how: str | None = None) -> Check:
        """The check of this backend."""
        if self.stopped is not None and not self.faults:
            return self.stopped
        if not self.rows and not self.faults:
            reason = next((reason for _, reason in self.refused), "nothing was compared")
            return skipped(Kind.OUTPUTS, reason, self.backend)
        ran = {row["situation"] for row in self.rows}
        figures: dict[str, Any] = {"device": how or self.device}
        if self.rows:
            figures |= {
                "error": worst(row["ratio"] for row in self.rows),
                "bound": FACTOR,
                "comparisons": len(self.rows),
                "lengths": [situation.length for situation in plan if situation.name in ran],
                "dtypes": sorted({row["dtype"] for row in self.rows}),
                "layers": len({row["layer"] for row in self.rows}),
            }
        longest = next((situation for situation in plan if situation.name == "longest" and situation.name in ran), None)
        if longest and len(longest.layers) < figures["layers"]:
            figures["layers at the longest"] = list(longest.layers)
        sampled = {
            f"{situation.length:,}": situation.rows for situation in plan if situation.rows and situation.name in ran
        }
        if sampled:
            figures["sampled queries"] = sampled
        if self.refused:
            figures["not computed"] = {
                f"{situation}, {_layers(layers)}": reason for (situation, reason), layers in self.refused.items()
            }
        broken = [{"backend": self.backend, "layer": layer, "gives": what} for layer, what in self.broken.items()]
        return result(Kind.OUTPUTS, self.faults, figures, [*self.rows, *broken], part=self.backend, numerical=True)


def _layers(layers: list[int]) -> str:
    """Layers in words; a few of many."""
    shown = ", ".join(map(str, layers[:4])) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
    return f"layer{'s' if len(layers) > 1 else ''} {shown}"
