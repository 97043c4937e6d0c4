"""What a backend is: the functions of its module, and the error for a second derivative."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

from torch import Tensor

from bsa_export.errors import AttentionError


class Backend(Protocol):
    """A module that computes attention. `dispatch.py` has checked the arguments: masks are float32 and added to the
    scores, with values of -inf or at least `dispatch.LOWEST`, and the layout is sliced to the sequence."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, or None."""
        ...

    def clear_cache(self) -> None:
        """Frees what is kept between calls; the next call computes it again."""
        ...

    def refuses(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Tensor,
        block: int,
        *,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        rpe: Tensor | None,
        scale: float,
        window: tuple[int, int] | None = None,
    ) -> str | None:
        """Why this backend cannot compute the call, or None."""
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Tensor,
        block: int,
        *,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        rpe: Tensor | None,
        scale: float,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attention `[batch, heads, seq, head_dim]`, differentiable in query, key and value.

        Args:
            query, key, value: `[batch, heads, seq, head_dim]` of one floating dtype and device, in any strides.
            layout: `[heads or 1, n, n]` integer or bool, `n = ceil(seq / block)`.
            key_padding_mask: float32 `[batch, seq]`.
            attn_mask, rpe: float32, broadcast to `[batch, heads, seq, seq]`.
            window: tokens to the left and to the right of a query, at least 0, that it attends to; None: no limit.
        """
        ...


class VarlenBackend(Backend, Protocol):
    """A backend that computes packed sequences in one call."""

    def attend_varlen(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Tensor,
        block: int,
        cu_seqlens: Tensor,
        longest: int,
        scale: float,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attention `[1, heads, tokens, head_dim]` of sequences that begin at `cu_seqlens`, int32 `[sequences + 1]`."""
        ...


def second_derivative(ctx: Any, *gradients: Tensor) -> NoReturn:
    """The backward pass of a backward pass: refuses, because leaving a term out silently would be wrong.

    Raises:
        AttentionError: always.
    """
    raise AttentionError(
        "block-sparse attention is differentiable once", hint='backend="reference" has second derivatives'
    )
