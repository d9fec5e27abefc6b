"""The engines that serve a model, and which formats each of them reads."""

from __future__ import annotations

from collections.abc import Mapping

from dovetail.errors import ExportError

READS: Mapping[str, tuple[str, ...]] = {
    "vllm": ("compressed-tensors", "gptq", "gptq_v2", "awq", "peft"),
    "transformers": ("compressed-tensors", "bitsandbytes", "gptq", "gptq_v2", "awq", "peft"),
    "ollama": ("gguf",),
    "openvino": ("gguf",),
}
"""Engine -> formats, the best first. GPTQ and AWQ in transformers need gptqmodel and optimum."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank`."""


def check_engine(engine: str | None, to: str) -> None:
    """Raise ExportError for an engine that is unknown or does not read the format."""
    if engine is None:
        return
    if engine not in READS:
        rule = "engines: " + ", ".join(READS)
        raise ExportError("export", found=f"engine={engine[:60]}", rule=rule, fix="use one of them, or none")
    if to not in READS[engine]:
        rule, fix = f"{engine} reads " + ", ".join(READS[engine]), f"export to {READS[engine][0]}"
        raise ExportError(f"export to {to}", found=f"engine={engine}", rule=rule, fix=fix)


def command_line(engine: str | None, folder: str, dtype: str) -> list[str]:
    """Return what starts the engine on a folder with a whole model, as one note or none."""
    return [f"start it: vllm serve {folder} --dtype {dtype}"] if engine == "vllm" else []
