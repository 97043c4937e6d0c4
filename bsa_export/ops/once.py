"""What the backends that write their own backward pass answer to a second derivative."""

from __future__ import annotations

from bsa_export.errors import AttentionError


def second_derivative(ctx, *gradients):
    """The backward pass of a backward pass: refuses, where silence would leave a term out.

    Raises:
        AttentionError: always.
    """
    raise AttentionError(
        "block-sparse attention is differentiable once", hint='backend="reference" has second derivatives'
    )
