"""What is trained on a target changes what the model computes; a layer that is read by its weight is no target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DebertaConfig,
    DebertaForSequenceClassification,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WavLMConfig,
    WavLMModel,
)

import dovetail
from dovetail.chains.layer.applied import applied
from dovetail.errors import ChainError, TargetError
from dovetail.models.probe import probe_batch
from families import FAMILIES, move

SMALL = {"hidden_size": 64, "num_hidden_layers": 1}
STATE = {**SMALL, "vocab_size": 128, "state_size": 8}
ATTENTION = {**SMALL, "num_attention_heads": 4, "intermediate_size": 128}
OTHERS = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**STATE)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**STATE, num_heads=4, head_dim=32, n_groups=1)),
    "falcon_mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**STATE)),
    "deberta": lambda: DebertaForSequenceClassification(DebertaConfig(**ATTENTION, vocab_size=128)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**ATTENTION, image_size=32, patch_size=8)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**ATTENTION, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)),
}
READ_BY_WEIGHT = [
    ("mamba", "dt_proj"),
    ("mamba", "x_proj"),
    ("mamba", "out_proj"),
    ("mamba", "conv1d"),
    ("mamba2", "out_proj"),
    ("falcon_mamba", "dt_proj"),
    ("deberta", "in_proj"),
    ("wavlm", "q_proj"),
    ("wavlm", "attention.out_proj"),
]


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(**probe_batch(model))
    return found.logits if "logits" in found else found[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, "lora(r=2)") for name in (*FAMILIES, *OTHERS)),
        *((name, "ia3") for name in ("llama", "gpt2", "bloom", "mixtral", "t5", "bert", *OTHERS)),
    ],
)
def test_each_layer_of_all_linear_moves_the_outputs(name: str, text: str) -> None:
    torch.manual_seed(0)
    model = dovetail.apply({**FAMILIES, **OTHERS}[name]().eval(), text)
    before = outputs(model)
    for path, layer in applied(model).layers.items():
        parameters = dict(layer.links.named_parameters())
        moved = [parameter for key, parameter in parameters.items() if not key.endswith("A")]
        with torch.no_grad():
            kept = [parameter.clone() for parameter in moved]
            for parameter in moved:
                parameter += torch.randn_like(parameter)
            assert not torch.equal(outputs(model), before), path
            for parameter, old in zip(moved, kept, strict=True):
                parameter.copy_(old)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "target"), READ_BY_WEIGHT)
def test_a_layer_that_is_read_by_its_weight_is_refused_by_name(name: str, target: str) -> None:
    with pytest.raises(TargetError, match=f"(?s){target}.*reads its weight"):
        dovetail.apply(OTHERS[name](), "lora(r=2)", targets=f"*{target}")


def test_a_read_in_a_branch_that_the_config_turns_off_does_not_count() -> None:
    """BLOOM slices its weights only where pretraining_tp > 1 and slow_but_exact."""
    model = FAMILIES["bloom"]()
    names = {name.rpartition(".")[2] for name in applied(dovetail.apply(model, "lora(r=2)")).layers}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    model = FAMILIES["bloom"]()
    for module in model.modules():
        if type(module).__name__ in ("BloomAttention", "BloomMLP"):
            module.pretraining_tp, module.slow_but_exact = 2, True
    with pytest.raises(TargetError, match="reads its weight"):
        dovetail.apply(model, "lora(r=2)", targets="down")


def rwkv(rescale_every: int) -> Any:
    torch.manual_seed(0)
    sizes = {**SMALL, "attention_hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 128}
    return RwkvForCausalLM(RwkvConfig.from_dict(sizes | {"rescale_every": rescale_every})).eval()


@pytest.mark.parametrize("text", ["lora(r=2)", "int(bits=4, group=32) >> ia3 >> regrid", "magnitude(0.5)"])
def test_a_model_that_changes_weights_in_its_forward_pass_is_refused(text: str, tmp_path: Path) -> None:
    """RWKV rescales weights for inference, so what is saved after that is not what was computed."""
    with pytest.raises(ChainError, match=r"weight\.div_ in its forward pass, if self\.config\.rescale_every > 0"):
        dovetail.apply(rwkv(rescale_every=1), text)
    model: Any = dovetail.apply(rwkv(rescale_every=0), text)
    move(model)
    wanted = outputs(model)
    dovetail.merge(model, lossy=True)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(RwkvForCausalLM.from_pretrained(tmp_path)), wanted, rtol=1e-5, atol=1e-5)
