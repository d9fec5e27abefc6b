"""Exchange with other libraries' files. So far: peft's adapters, both ways. Imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.export.peft import export_peft
    from dovetail.export.peft_import import import_peft

_HOME = {"export_peft": "peft", "import_peft": "peft_import"}

__all__ = ["export_peft", "import_peft"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dovetail.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dovetail.export.{_HOME[name]}"), name)
