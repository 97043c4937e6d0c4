"""The whole-model check: a converted folder in its stock transformers class, against its source and against
`reference`, end to end.

The bound is that of `verify.tolerance`: at most twice the error of the same model on plain attention in the same dtype,
both against float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bsa_export.bert.families import BUFFERS
from bsa_export.bert.recognition import encoder_prefix
from bsa_export.bert.structure import POSITIONS, STORED_LAYOUT
from bsa_export.checkpoint.dtypes import TORCH_NAMES
from bsa_export.checkpoint.table import Checkpoint
from bsa_export.converted.checks import Check, Kind, result, skipped, worst
from bsa_export.converted.folder import ConvertedFolder
from bsa_export.converted.records import ConversionRecord
from bsa_export.errors import BsaError, MissingLibraryError
from bsa_export.hf.prenorm_names import CLASSES, MODEL_TYPE
from bsa_export.ops.dispatch import AUTO, MODULES, backends, block_sparse_attention
from bsa_export.verify.attention_inputs import tensor
from bsa_export.verify.guard import guarded
from bsa_export.verify.names import ATTRIBUTES, expected_name
from bsa_export.verify.tolerance import FACTOR, ORDERS, errors, larger
from bsa_export.version import install_hint

REFERENCE = "bsa_export_reference"
KEPT, OWN = "every block kept", "its own layout"  # the parts of this check

_order: ContextVar[int | None] = ContextVar(
    "order", default=None
)  # a seed of the order in which REFERENCE sums over head_dim
FIRST_TOKEN = 5  # smaller ids are special in most vocabularies
# Floating-point operations of a run on a CPU, where float64 counts four times.
CPU_BUDGET = 3e11
CPU_USUAL, CPU_LONGEST, GPU_LONGEST = 768, 1536, 4096


@dataclass(frozen=True)
class Inputs:
    """Seeded texts: `input_ids` and `attention_mask`, int64 `[batch, length]`; the second text of two is padded."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def make_inputs(folder: ConvertedFolder, batch: int, length: int, device: str, seed: int = 0) -> Inputs:
    """Random tokens; of two texts the second ends after two thirds."""
    config = folder.config
    generator = torch.Generator().manual_seed(seed)
    first = min(FIRST_TOKEN, config["vocab_size"] - 1)
    ids = torch.randint(first, config["vocab_size"], (batch, length), generator=generator)
    kept = torch.ones_like(ids)
    if batch > 1:
        kept[1, 2 * length // 3 :] = 0
    ids[kept == 0] = config.get("pad_token_id") or 0
    return Inputs(ids.to(device), kept.to(device))


def load_model(folder: ConvertedFolder, device: str) -> Any:
    """The folder in the class that its config.json names, or its encoder alone where transformers has no such class;
    or why not.

    On a GPU in half precision (bfloat16 if it is stored so), on a CPU in float32.
    """
    try:
        import transformers

        from bsa_export.hf.load import load
        from bsa_export.hf.register import MIN_TRANSFORMERS, version_of
        from bsa_export.hf.stored_layout import NAME as SPARSE
    except ImportError as error:
        return f"transformers cannot be imported ({error}); {install_hint('run')}"
    if version_of(transformers) < MIN_TRANSFORMERS:
        return f"transformers {transformers.__version__} is older than 5.0; {install_hint('run')}"
    _register_reference()
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    stored = folder.tensors[f"{folder.encoder.projection_names(0)[0]}.weight"].dtype
    half = torch.bfloat16 if stored == "BF16" else torch.float16
    dtype = torch.float32 if device == "cpu" else half
    names = folder.config.get("architectures") or [None]
    try:
        if names[0] in CLASSES.values() or getattr(transformers, str(names[0]), None) is not None:
            return load(folder.path, device=device, dtype=dtype)
        model = transformers.AutoModel.from_pretrained(
            folder.path, attn_implementation=SPARSE, attention_probs_dropout_prob=0.0, dtype=dtype
        )
        return model.to(device).eval()
    finally:
        transformers.logging.set_verbosity(verbosity)


def _register_reference() -> None:
    """Makes `reference` an attention function of transformers, so that the same model runs on it. A model without
    stored layouts attends to all tokens."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from bsa_export.hf.attention import key_padding_mask

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        stored, order = getattr(module, "sparse_self_attention", None), torch.arange(query.shape[-1])
        if (seed := _order.get()) is not None:
            order = torch.randperm(query.shape[-1], generator=torch.Generator().manual_seed(seed))
        query, key, value = (x[..., order.to(x.device)] for x in (query, key, value))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        if stored is None:
            layout, block = torch.ones(query.shape[1], 1, 1, dtype=torch.uint8, device=query.device), query.shape[2]
        else:
            layout, block = stored.master_layout, stored.block
        context = block_sparse_attention(
            query, key, value, layout, block,
            key_padding_mask=attention_mask, scale=scaling, backend="reference", window=window,
        )  # fmt: skip
        return context[..., order.argsort().to(context.device)].transpose(1, 2), None

    AttentionInterface.register(REFERENCE, attention)
    AttentionMaskInterface.register(REFERENCE, key_padding_mask)


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[Any]:
    """The model with another attention function: `block_sparse`, REFERENCE, or a dense one of transformers."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@contextmanager
def every_block_kept(model: Any) -> Iterator[Any]:
    """The model with layouts that keep every block."""
    stored = [module for module in model.modules() if hasattr(module, "master_layout")]
    before = [module.master_layout for module in stored]
    for module in stored:
        module.master_layout = torch.ones_like(module.master_layout)
    try:
        yield model
    finally:
        for module, layout in zip(stored, before, strict=True):
            module.master_layout = layout


@torch.no_grad()
def outputs(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Last hidden states and, if the head returns logits for each token, these: of the real tokens, `[tokens,
    size]`."""
    kept: dict[str, Tensor] = {}
    handle = model.base_model.register_forward_hook(lambda *call: kept.update(hidden=call[-1][0]))
    try:
        output = model(**inputs.arguments)
    finally:
        handle.remove()
    logits = output.get("logits")
    if logits is not None and logits.shape[:2] == inputs.input_ids.shape:
        kept["logits"] = logits
    return {name: value[inputs.attention_mask.bool()] for name, value in kept.items()}


def _in_another_order(model: Any, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """What a model makes of the inputs on `reference`, which sums in the order of a seed."""
    token = _order.set(seed)
    try:
        with attending(model, REFERENCE):
            return outputs(model, inputs)
    finally:
        _order.reset(token)


class EndToEnd:
    """The runs of a folder's model.

    Args:
        folder: the converted folder.
        model: from `load_model`.
        device: `cpu` or `cuda`.
    """

    def __init__(self, folder: ConvertedFolder, model: Any, device: str):
        self.folder, self.model, self.device = folder, model, device
        self.exact = copy.deepcopy(model).double()
        parameters = sum(p.numel() for name, p in model.base_model.named_parameters() if "embeddings" not in name)
        reach = folder.source_length + 2 * folder.block  # where the default layout drops its first blocks
        if device == "cpu":
            affordable = int(CPU_BUDGET / (12 * parameters)) // 2
            longest = min(CPU_LONGEST, max(reach, min(affordable, CPU_USUAL)))
        else:
            affordable = longest = GPU_LONGEST
        self.short = min(folder.source_length, max(16, affordable // 2))
        self.long = min(folder.longest, longest)

    def against_source(self, checkpoint: Checkpoint | None) -> Check:
        """With every block kept, the sparse model's outputs are those of the dense one.

        Args:
            checkpoint: the source's weights, which then run in the source's own class; else the folder's run in its
                dense class.
        """
        inputs = make_inputs(self.folder, 2, self.short, self.device)
        with every_block_kept(self.model):
            actual = outputs(self.model, inputs)
        unused: list[str] = []
        dense, what = None, "the dense class with the same weights"
        if checkpoint is not None:
            dense = self._source_model(checkpoint)
            if isinstance(dense, str):
                what += f" ({dense})"
        if dense is None or isinstance(dense, str):
            model, in_float64 = self.model, self.exact
        else:
            model, unused = dense
            what, in_float64 = f"the source in {type(model).__name__}{self._rules()}", copy.deepcopy(model).double()
        with attending(model, "sdpa"), attending(in_float64, "sdpa"):
            plain, exact = outputs(model, inputs), outputs(in_float64, inputs)

        def again(seed: int) -> dict[str, Tensor]:
            with every_block_kept(model):
                return _in_another_order(model, inputs, seed)

        faults = [
            f"{name}: the source's class {type(model).__name__} does not compute with this tensor of the source,"
            " so the source's outputs are not those of its class"
            for name in unused
        ]
        return self._judged(KEPT, actual, plain, exact, again, self.short, {"against": what}, faults)

    def against_reference(self) -> Check:
        """With the real layout, the model's outputs are those of the same model on `reference`."""
        inputs = make_inputs(self.folder, 1, self.long, self.device, seed=1)
        actual = outputs(self.model, inputs)
        with attending(self.model, REFERENCE), attending(self.exact, REFERENCE):
            plain, exact = outputs(self.model, inputs), outputs(self.exact, inputs)
        again = partial(_in_another_order, self.model, inputs)
        return self._judged(OWN, actual, plain, exact, again, self.long, {"against": "reference"})

    def _judged(
        self,
        part: str,
        actual: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        again: Callable[[int], Mapping[str, Tensor]],
        length: int,
        figures: dict[str, Any],
        faults: Sequence[str] = (),
    ) -> Check:
        """The check of results. `again` returns those of the plain model in another order (see
        `outputs.Call.errors_of`): of the same model as `plain`, or the bound would grow with a fault of the folder."""
        faults = list(faults)
        details: list[dict[str, Any]] = []
        for what in actual:
            if what not in exact or actual[what].shape != exact[what].shape:
                continue
            if not exact[what].isfinite().all():
                faults.append(
                    f"{what}: the weights lead to values that are not finite, also on plain attention in float64"
                )
                continue
            found = errors(actual[what], plain[what], exact[what])
            for seed in range(ORDERS):
                if not found.passed:
                    found = larger(found, errors(actual[what], again(seed)[what], exact[what]))
            details.append(
                {
                    "of": what,
                    "length": length,
                    "largest": found.largest,
                    "plain_largest": found.plain_largest,
                    "ratio": found.ratio,
                }
            )
            if not found.passed:
                faults.append(
                    f"{what}: error {found.largest:.3g} (rms {found.rms:.3g}), the bound is"
                    f" {FACTOR * found.plain_largest:.3g} (rms {FACTOR * found.plain_rms:.3g})"
                )
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        error = {"error": worst(row["ratio"] for row in details), "bound": FACTOR} if details else {}
        compared = {
            "length": length,
            "compared tokens": len(actual["hidden"]),
            "dtype": dtype,
            "backend": self._backend(),
        }
        figures = error | compared | figures
        return result(Kind.WHOLE_MODEL, faults, figures, details, part=part, numerical=True)

    def _backend(self) -> str:
        """The backend that `auto` chooses for the model's attention here."""
        head = torch.empty(
            (1, 1, self.folder.block, self.folder.encoder.head_dim),
            dtype=next(self.model.parameters()).dtype, device=self.device,
        )  # fmt: skip
        layout = torch.ones(1, 1, 1, dtype=torch.uint8, device=self.device)
        masks = {"key_padding_mask": None, "attn_mask": None, "rpe": None}
        for name in AUTO if head.is_cuda else AUTO[1:]:
            if backends()[name] is None:
                module = import_module(MODULES[name])
                if module.refuses(head, head, head, layout, self.folder.block, **masks, scale=1.0) is None:
                    return name
        return "none"

    def _interpolated(self) -> bool:
        record = self.folder.record
        return record is not None and record.positions is not None and record.positions.interpolated

    @property
    def _record(self) -> ConversionRecord:
        """conversion.json, which is there wherever a source is compared."""
        assert self.folder.record is not None
        return self.folder.record

    def _rules(self) -> str:
        """What the conversion changed in the source, so that the source's model gets it too."""
        dtype = self._record.options.dtype
        rules = [f"rounded to {dtype}"] if dtype in TORCH_NAMES else []
        rules += ["with the interpolated positions"] if self._interpolated() else []
        return "".join(f", {rule}" for rule in rules)

    def _source_model(self, checkpoint: Checkpoint) -> tuple[Any, list[str]] | str:
        """The source's weights in the source's own class and the encoder's tensors that it has no place for; or why
        there is no such model. What conversion.json lists as left out is not among these tensors."""
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_MAPPING

        from bsa_export.hf import prenorm_bert

        record = self._record
        # What conversion.json says that a config.json leaves out comes from the class itself, where it has defaults.
        implied = record.implied_config
        if record.family != MODEL_TYPE:
            implied = {name: value for name, value in implied.items() if name == "vocab_size"}
        stated = {name: value for name, value in record.source.config.items() if name not in record.implied_config}
        config = stated | implied | {"model_type": record.family}
        kind = transformers.CONFIG_MAPPING[record.family]
        names = (config if record.family != MODEL_TYPE else self.folder.config).get("architectures") or [None]
        own = getattr(prenorm_bert, names[0]) if names[0] in CLASSES.values() else None
        model_class: Any = own or getattr(transformers, str(names[0]), None) or MODEL_MAPPING[kind]

        def class_name(name: str) -> str:
            """A tensor's name in the source's class; old code may have used another one."""
            own_class = ATTRIBUTES[record.family][0] == ATTRIBUTES[record.family][1]
            return expected_name(record.family, prefix, name) if own_class else name

        prefix = encoder_prefix(checkpoint.tensors, record.options.prefix)
        dropped = {class_name(name) for name in record.dropped}
        state = {
            class_name(name): tensor(row)
            for name, row in checkpoint.tensors.items()
            if not STORED_LAYOUT.fullmatch(name)
        }
        if record.options.dtype in TORCH_NAMES:
            rounded = getattr(torch, TORCH_NAMES[record.options.dtype])
            state = {name: x.to(rounded) if x.is_floating_point() else x for name, x in state.items()}
        if self._interpolated():
            table = self.folder.tensors[self.folder.prefix + POSITIONS]
            state[encoder_prefix(state) + POSITIONS] = tensor(table)
            config["max_position_embeddings"] = table.shape[0]
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            model, loaded = model_class.from_pretrained(
                None, config=kind.from_dict(config), state_dict=state, attn_implementation="sdpa",
                output_loading_info=True, dtype=next(self.model.parameters()).dtype,
            )  # fmt: skip
        finally:
            transformers.logging.set_verbosity(verbosity)
        start = f"{model_class.base_model_prefix}."
        inner = [name.removeprefix(start) for name in loaded["missing_keys"]]
        if missing := [
            name for name in inner if name.startswith(("embeddings.", "encoder.", "layers.", "embed_tokens."))
        ]:
            return f"the source lacks {missing[0]}"
        parts = ("embeddings.", "encoder.", "transformer.", "layers.")
        inside = tuple(encoder_prefix(state) + part for part in parts)
        unused = [
            name
            for name in sorted(loaded["unexpected_keys"])
            if name.startswith(inside) and not name.endswith(BUFFERS) and name not in dropped
        ]
        return model.to(self.device).eval(), unused


def check_whole_model(
    folder: ConvertedFolder, device: str, checkpoint: Checkpoint | None, ran: list[EndToEnd] | None = None
) -> Iterator[Check]:
    """Both comparisons: with every block kept against the source, and with the real layout against `reference`.

    Args:
        folder: the converted folder.
        device: `cpu` or `cuda`.
        checkpoint: the source's weights, None to compare with the folder's own weights in the dense class.
        ran: gets what the drift is measured with, where the model can run.
    """
    try:
        model = load_model(folder, device)
    except MissingLibraryError as error:
        model = str(error)
    except BsaError as error:
        yield result(Kind.WHOLE_MODEL, [str(error)])
        return
    if isinstance(model, str):
        yield skipped(Kind.WHOLE_MODEL, model)
        return
    runs = EndToEnd(folder, model, device)
    if ran is not None:
        ran.append(runs)
    yield from guarded(Kind.WHOLE_MODEL, KEPT, lambda: [runs.against_source(checkpoint)])
    yield from guarded(Kind.WHOLE_MODEL, OWN, lambda: [runs.against_reference()])
