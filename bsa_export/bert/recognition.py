"""Which family a checkpoint is of, and the prefix of its encoder: by config.json and the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bsa_export.bert.families import FAMILIES, Family, class_names, family_list
from bsa_export.bert.other_models import appearance
from bsa_export.bert.structure import BERT, WORDS
from bsa_export.errors import FamilyError


def encoder_prefixes(names: Collection[str]) -> list[str]:
    """What stands before each encoder's word embeddings, such as `bert.`; `""` for an encoder alone.

    BERT's name of the word embeddings counts where it is there: others stand in parts that are no encoders too.
    """
    for words in dict.fromkeys(one.words for family in FAMILIES.values() for one in family.structures):
        if found := sorted(name.removesuffix(words) for name in names if name == words or name.endswith(f".{words}")):
            return found
    return []


def encoder_prefix(names: Collection[str], chosen: str | None = None) -> str:
    """The prefix of the encoder that is meant, with its dot.

    Args:
        names: those of the tensors.
        chosen: the prefix that the user names, with or without the dot at its end; needed where there are several.

    Raises:
        FamilyError: an encoder is missing, or there are several and `chosen` names none of them.
    """
    found = encoder_prefixes(names)
    what = ", ".join(repr(prefix.removesuffix(".")) for prefix in found)
    if chosen is not None:
        match = [prefix for prefix in found if prefix.removesuffix(".") == chosen.removesuffix(".")]
        if not match:
            raise FamilyError(
                f"no encoder has the prefix {chosen!r}", found=f"the prefixes {what}" if found else "no encoder"
            )
        return match[0]
    if len(found) == 1:
        return found[0]
    if found:
        raise FamilyError(
            "expected one encoder", found=f"{len(found)}, with the prefixes {what}", hint="choose one with --prefix"
        )
    some = ", ".join(sorted(names)[:4])
    raise FamilyError(
        f"expected a checkpoint of a BERT family ({family_list()}), with a tensor ...{WORDS}",
        found=f"tensors such as {some}",
    )


def refuse_other_type(config: Mapping) -> None:
    """Raises FamilyError where config.json has a `model_type` that is not one of the families'."""
    kind = config.get("model_type")
    if kind is not None and not (isinstance(kind, str) and kind in FAMILIES):
        raise FamilyError(
            f"expected a model_type of a BERT family ({family_list()})", found=repr(kind), where="config.json"
        )


def find_family(
    config: Mapping, names: Collection[str], position_rows: int | None = None, prefix: str | None = None
) -> Family:
    """The family of a checkpoint: by `model_type`; without one by `architectures` or the names of its tensors.

    Args:
        config: content of config.json.
        names: those of the tensors.
        position_rows: of the position embeddings; without a prefix they identify RoBERTa (two more than a round
            number).
        prefix: the encoder's, if it is known.

    Raises:
        FamilyError: it is of none of the families.
    """
    refuse_other_type(config)
    kind = config.get("model_type")
    families = FAMILIES.values()
    if others := [family for family in families if kind is None or kind in family.stated_as]:
        prefix = encoder_prefix(names) if prefix is None else prefix
        inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if marked := next((family for family in others if family.stated_as and family.is_marked(inner)), None):
        return marked
    if kind is not None:
        return FAMILIES[kind]
    assert prefix is not None
    class_name = next(iter(class_names(config)), "")
    if other := appearance(config, prefix):
        model, sign = other
        raise FamilyError(
            f"expected a model of a BERT family ({family_list()})",
            found=f"{model} ({sign})",
            hint="if it is one of them, state its model_type in config.json",
        )
    if marked := next(
        (family for family in families if family.structures != (BERT,) and family.is_marked(inner)), None
    ):
        return marked
    last = prefix.rstrip(".").rpartition(".")[2]
    if found := (
        next((one for one in families if one.prefix == last and one.structures[0].words == WORDS), None)
        or next((family for family in families if family.has_class(class_name)), None)
        or next((family for family in families if family.is_marked(inner)), None)
    ):
        return found
    if WORDS not in inner:  # names that decoders have too
        raise FamilyError(
            f"expected a model_type of a BERT family ({family_list()})",
            found=f"none, and tensors such as {min(names)}",
            where="config.json",
        )
    roberta = position_rows is not None and position_rows % 16 == 2 and config.get("pad_token_id") == 1
    return FAMILIES["roberta" if roberta else "bert"]
