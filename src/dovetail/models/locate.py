"""Where a model is: a folder, a GGUF file, "playground", an installed package, or the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dovetail.errors import LoadError
from dovetail.models.packages import gguf_of_package

PLAYGROUND = "playground"
GGUF = ".gguf"
_LOCATIONS = "a model must be a folder, a .gguf file, a hub id, playground or package:NAME/FOLDER"


def resolve(name_or_dir: str | Path) -> str | Path:
    """Return the folder or the GGUF file that a name stands for, or the hub id itself (str).

    Raises LoadError where there is none. A GGUF file that a package holds in parts is joined in the user's cache.
    """
    text = str(name_or_dir)
    if name_or_dir == PLAYGROUND:
        from dovetail.tasks.playground import MODEL_DIR  # imported here, because other models do not need it

        return Path(MODEL_DIR)
    if text.startswith("package:"):
        return _in_package(text)
    if (folder := Path(text).expanduser()).is_dir() or _is_gguf(folder):
        return folder
    if folder.exists():
        rule = "a model must be a folder or a .gguf file"
        raise LoadError(f"model {text}", found="a file", rule=rule, fix=f"pass {folder.parent}")
    if isinstance(name_or_dir, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise LoadError(f"model {text}", found="no such folder", rule=_LOCATIONS, fix="check the path")
    if text.endswith(GGUF):
        raise LoadError(f"model {text}", found="no such file", rule=_LOCATIONS, fix="check the path")
    return text


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF and path.is_file()


def _in_package(text: str) -> Path:
    name, _, inside = text.removeprefix("package:").partition("/")
    rule = "package:NAME/FOLDER must name a folder or a .gguf file inside an installed top-level Python package"
    # Only top-level names: looking for a dotted one would import its parents.
    spec = importlib.util.find_spec(name) if name.isidentifier() and name != "__main__" else None
    if spec is None or not spec.submodule_search_locations:
        raise LoadError(f"model {text}", found=f"no package {name!r} installed", rule=rule, fix="install the package")
    for location in spec.submodule_search_locations:
        root = Path(location).resolve()
        found = (root / inside).resolve()
        if not found.is_relative_to(root):
            raise LoadError(f"model {text}", found="a path out of the package", rule=rule, fix="remove '..'")
        if not inside and not (root / "config.json").is_file():
            return gguf_of_package(text, name, root)
        if found.is_dir() or _is_gguf(found):
            return found
    raise LoadError(f"model {text}", found=f"no folder {inside!r} in the package", rule=rule, fix="check the folder")


def ask_hub(name: str) -> None:
    """Raise LoadError at once where the hub cannot be reached: transformers alone retries for half a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    where = f"model {name}"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except (RepositoryNotFoundError, HFValidationError):
        raise LoadError(where, found="no folder or hub model", rule=_LOCATIONS, fix="check the name") from None
    except HfHubHTTPError:
        return  # the hub is there; transformers says best what it answers
    except Exception as error:  # whichever class the hub's HTTP client of the day has for "unreachable"
        found = f"no folder of that name, not in the cache, hub not reachable ({error})"
        raise LoadError(where, found=found, rule=_LOCATIONS, fix=f"pass a folder, or {PLAYGROUND}") from None
