"""Makes transformers' auto classes find `prenorm_bert` by its `model_type`, without importing it before it is used.

`AutoModel.register` wants classes, and these subclass BERT's, which may be half imported when transformers imports
its tables. So the names go into the tables of names that transformers has for its own models, and the module that
they name is a stand-in.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from bsa_export.hf.prenorm_names import CLASSES, CONFIG_CLASS, MODEL_TYPE

_STAND_IN = f"transformers.models.{MODEL_TYPE}"
_AUTO = "transformers.models.auto"


def register() -> None:
    """Adds the names to the tables that are imported. Called again when the next table is."""
    stand_in = ModuleType(_STAND_IN)
    vars(stand_in)["__getattr__"] = _class_of_name
    sys.modules.setdefault(_STAND_IN, stand_in)
    configs: Any = sys.modules.get(f"{_AUTO}.configuration_auto")
    for name, value in (("CONFIG_MAPPING_NAMES", CONFIG_CLASS), ("MODEL_NAMES_MAPPING", "BsaBert")):
        if (names := getattr(configs, name, None)) is not None:
            names[MODEL_TYPE] = value
    for table, class_name in _tables():
        table._model_mapping[MODEL_TYPE] = class_name
        table._reverse_config_mapping[CONFIG_CLASS] = MODEL_TYPE


def unregister() -> None:
    """Undoes `register`."""
    sys.modules.pop(_STAND_IN, None)
    configs: Any = sys.modules.get(f"{_AUTO}.configuration_auto")
    for name in ("CONFIG_MAPPING_NAMES", "MODEL_NAMES_MAPPING"):
        getattr(configs, name, {}).pop(MODEL_TYPE, None)
    if configs is not None:
        configs.CONFIG_MAPPING._modules.pop(MODEL_TYPE, None)
    for table, _ in _tables():
        table._model_mapping.pop(MODEL_TYPE, None)
        table._reverse_config_mapping.pop(CONFIG_CLASS, None)
        table._modules.pop(MODEL_TYPE, None)


def _tables() -> list[tuple[Any, str]]:
    """The tables of models, as far as transformers has imported them."""
    models = sys.modules.get(f"{_AUTO}.modeling_auto")
    return [(getattr(models, table), name) for table, name in CLASSES.items() if hasattr(models, table)]


def _class_of_name(name: str) -> Any:
    if name == CONFIG_CLASS:
        return import_module("bsa_export.hf.prenorm_config").BsaBertConfig
    if name in CLASSES.values():
        return getattr(import_module("bsa_export.hf.prenorm_bert"), name)
    raise AttributeError(name)
