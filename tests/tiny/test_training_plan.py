"""The plan of a run: shipped configs fit their GPUs; what is counted is what autograd keeps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from tests.velocity import Velocity, make_run
from vidgen.core.errors import InputError
from vidgen.core.runtime import ATTENTION_VARIABLE
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.ops import native
from vidgen.training.engines.deepspeed import read_settings
from vidgen.training.finetune.plan import FULL_BYTES, LORA_BYTES, Sample, plan, plan_training
from vidgen.training.finetune.run import read_config

ROOT = Path(__file__).parents[2]
SHIPPED = {  # GPUs, and the bytes they are planned to need at least and at most
    "wan13b_lora_1gpu": (1, 10e9, 20e9), "wan14b_lora_8gpu": (8, 20e9, 72e9),
    "wan14b_full_8gpu_zero3": (8, 20e9, 72e9), "wan22_a14b_lora_8gpu": (8, 20e9, 72e9),
}  # of 80 GB; what is left is for fragments and the validation


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_fit_their_gpus(name):
    ranks, least, most = SHIPPED[name]
    planned = plan(read_config(str(ROOT / f"configs/train/{name}.yaml"), []), ranks=ranks)
    assert least < planned.peak < most
    assert planned.loading < planned.peak
    assert 1 < planned.step_s < 600
    assert json.loads(json.dumps(asdict(planned)))["peak"] == planned.peak


def test_ranks_that_cannot_share_samples_as_asked_are_refused():
    config = read_config(str(ROOT / "configs/train/wan14b_full_8gpu_zero3.yaml"), [])
    with pytest.raises(InputError, match=r"engine\.sequence is 4 on 1 rank; .* by --ranks\)"):
        plan(config)
    assert plan(config, ranks=4).ranks == 4


def test_two_experts_are_planned_one_after_the_other_as_they_are_trained():
    path = str(ROOT / "configs/train/wan22_a14b_lora_8gpu.yaml")
    high = plan(read_config(path, []), ranks=8)
    low = plan(read_config(path, ["experts=low", "run.folder=runs/low"]), ranks=8)
    assert low == high
    with pytest.raises(InputError, match="--set experts=high, then --set experts=low"):
        plan(read_config(path, ["experts=both"]), ranks=8)
    both = plan(read_config(path, ["experts=both", "run.engine.deepspeed=null"]), ranks=8)
    assert both.trained == 2 * high.trained


def test_zero_3_holds_an_eighth_and_reads_one_tensor_more():
    config = read_config(str(ROOT / "configs/train/wan14b_full_8gpu_zero3.yaml"), [])
    eight = plan(config, ranks=8)
    total = 4 * eight.trained + 4 * eight.frozen
    largest = 4 * 5120 * 5120 * 6  # the time embedding's projection
    assert eight.loading == pytest.approx(total / 8 + largest, rel=1e-6)
    for what in ("weights", "gradients", "averages"):
        assert eight.device[what] == pytest.approx(total / 8, rel=1e-6)
    assert eight.device["moments"] == pytest.approx(total / 4, rel=1e-6)


def test_offload_moves_state_to_the_cpu(tmp_path):
    run = make_run(tmp_path, deepspeed="zero3")
    away = make_run(tmp_path, deepspeed="zero3_offload")
    modules = Velocity(run).modules
    here, there = (plan_training(modules, each, Sample(2, 4, 3), ranks=2) for each in (run, away))
    assert "moments" in there.host
    assert there.host["moments"] == here.device["moments"]
    assert there.peak < here.peak


def kept_bytes(num_layers: int, *, lora: bool) -> float:
    """Bytes a token that autograd keeps of a transformer 512 wide; kernels of torch alone."""
    config = replace(
        DIT_PRESETS["wan-1.3b"], num_layers=num_layers, num_heads=4, ffn_dim=1024, text_dim=64
    )
    dit = SpacetimeDiT(config)
    if lora:
        dit.bfloat16().requires_grad_(requires_grad=False)
        targets = ["q", "k", "v", "out"]
        inject_adapter_in_model(LoraConfig(r=16, target_modules=targets), dit)
        for name, parameter in dit.named_parameters():
            if "lora_" in name or any(part in name for part in SpacetimeDiT.fp32_weights):
                parameter.data = parameter.data.float()
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    latents, num_tokens = torch.randn(1, 16, 5, 16, 16), 320
    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16)):
        dit(latents, torch.zeros(1), torch.randn(1, 32, 64))
    sizes = [t.untyped_storage().nbytes() for t in kept.values() if num_tokens in t.shape]
    return sum(sizes) / num_tokens


@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_what_autograd_keeps(monkeypatch, lora):
    monkeypatch.setattr(native, "kernels", lambda *_: None)
    monkeypatch.setenv(ATTENTION_VARIABLE, "sdpa")
    block = kept_bytes(2, lora=lora) - kept_bytes(1, lora=lora)
    by_width, by_hidden = LORA_BYTES if lora else FULL_BYTES
    assert block == pytest.approx(512 * by_width + 1024 * by_hidden, rel=0.03)


def test_settings_that_the_run_has_are_refused(tmp_path):
    path = tmp_path / "mine.json"
    for text, why in (
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}', "optim.grad_clip"),
        ('{"zero_optimization": {"stage": 4}}', "stage is 4"), ("[1]", "not a DeepSpeed JSON"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "'cpu' only"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=why):
            read_settings(make_run(tmp_path, deepspeed=str(path)))
    with pytest.raises(InputError, match="zero3"):
        read_settings(make_run(tmp_path, deepspeed="zero33"))
