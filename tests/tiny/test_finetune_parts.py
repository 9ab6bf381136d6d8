"""The pieces of fine-tuning against what they must equal: adapters, conditions, noise, tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.finetuning import build_clips, make_config
from tests.lora_models import I2V, TINY, WHOLE, make_dit
from tests.models import add_low_expert, build_tiny_model
from tests.wan_models import build_diffusers
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion.flow import draw_sigmas, share_below
from vidgen.media.clip import Clip
from vidgen.models.lora import Adapter, LowRank, attached
from vidgen.pipeline.engine import load
from vidgen.pipeline.loader import EXPERTS
from vidgen.training.config import LoraSettings
from vidgen.training.data.dataset import open_dataset
from vidgen.training.finetune.model import adapter_of, delta_norm, inject
from vidgen.training.finetune.plan import plan
from vidgen.training.finetune.task import (
    Conditions,
    FinetuneTask,
    possible_conditions,
    settle_conditions,
)
from vidgen.weights.layouts import open_model


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return build_clips(tmp_path_factory.mktemp("data") / "clips", count=2)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    made = {}

    def of(variant):
        if variant not in made:
            made[variant] = build_diffusers(tmp_path_factory.mktemp("wan") / variant, variant)
        return made[variant]

    return of


@pytest.mark.parametrize("config", [TINY, I2V, WHOLE], ids=["text", "image", "control"])
def test_what_is_trained_is_what_generate_attaches(config):
    """Velocities and gradients under PEFT equal those under our own adapters."""
    settings = LoraSettings(rank=3, alpha=4.5, targets="all")
    plain, trained = make_dit(config), make_dit(config)
    torch.manual_seed(5)
    count = inject(trained, settings)
    factors = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    assert len(factors) == 2 * count
    for name, parameter in factors.items():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    own = adapter_of(trained.state_dict(), settings, "a")
    low_rank = {path: LowRank(part.down.clone().requires_grad_(), part.up.clone().requires_grad_(),
                              part.scale) for path, part in own.low_rank.items()}  # fmt: skip
    assert len(low_rank) == count
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.in_channels, 3, 4, 4, generator=draw)
    options = {"context_lengths": [5, 3]}
    if config.image_dim:
        shape = (2, config.image_positions, config.image_dim)
        options["image_context"] = torch.randn(shape, generator=draw)
    if config.control_channels:
        options["control"] = torch.randn(2, config.control_channels, 3, 4, 4, generator=draw)
    given = latents, torch.tensor([300.0, 800.0]), torch.randn(2, 5, 16, generator=draw)
    velocity = trained(*given, **options)
    velocity.square().mean().backward()
    with attached(plain, [(Adapter("a", low_rank), 1.0)]):
        expected = plain(*given, **options)
        expected.square().mean().backward()
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    for path, part in low_rank.items():
        for factor, side in ((part.down, "A"), (part.up, "B")):
            learned = factors[f"{path}.lora_{side}.default.weight"].grad
            torch.testing.assert_close(learned, factor.grad, rtol=1e-3, atol=1e-6)
    whole = torch.cat([(p.up @ p.down * p.scale).flatten() for p in own.low_rank.values()])
    assert delta_norm(own) == pytest.approx(float(whole.norm()), rel=1e-5)


def test_factors_are_float32_over_frozen_bfloat16():
    dit = make_dit(dtype=torch.bfloat16)
    inject(dit, LoraSettings(rank=2))
    kinds = {(p.dtype, p.requires_grad) for p in dit.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}


def test_a_first_frame_is_shown_in_training_as_in_generation(wan, clips, tmp_path):
    """Wan's I2V and VACE: what the transformer reads beside its latents is the same."""
    for variant, field in (("i2v", "stacked"), ("i2v-a14b", "stacked"), ("vace", "control")):
        folder = open_model(str(wan(variant)))
        config = make_config(folder.path, clips, tmp_path, data={"fps": 12}).data
        dataset = open_dataset(config, folder, device="cpu")
        batch = dataset.item_batch([0])
        written = Conditions(folder, {"first": 1.0}).write(batch, torch.Generator())
        engine = load(str(folder.path), device="cpu")  # in the dtype that data are encoded in
        shown = Clip.from_file(dataset.items[0].path).frames[0]
        request = Request.of("a car", {"image": shown, "frames": 9, "size": "32x32", "seed": 1})
        request, inputs = engine.read(request)
        state = engine.prepare(engine.plan(request, inputs), request, inputs)
        torch.testing.assert_close(
            getattr(written, field), getattr(state, field), rtol=1e-4, atol=1e-4
        )
        if state.image_context is not None:
            difference = written.image_context - state.image_context.float()
            assert float(difference.abs().max()) < 0.1  # of values up to 4, maybe in bf16
        assert torch.equal(written.clean, batch["latents"])
        assert bool(written.denoise_mask.all())


def test_conditions_are_those_that_the_model_can_do(wan, tiny_model):
    expected = {
        "t2v": ("text",), "i2v": ("first",), "flf2v": ("both",), "vace": ("text", "first", "both"),
        "i2v-a14b": ("first", "both"), "ti2v-5b": ("text", "first", "prefix", "mask"),
    }  # fmt: skip
    for variant, kinds in expected.items():
        folder = open_model(str(wan(variant)))
        assert possible_conditions(folder) == kinds
        assert settle_conditions(None, folder).keys() <= set(kinds)
    toybox = open_model(str(tiny_model))
    assert possible_conditions(toybox)[:4] == ("text", "first", "last", "both")
    with pytest.raises(InputError, match=r"conditions\.both: t2v doesn't support this condition"):
        settle_conditions({"text": 1, "both": 0.5}, open_model(str(wan("t2v"))))


def test_conditions_come_as_often_as_asked(tiny_model):
    folder = open_model(str(tiny_model))
    conditions = Conditions(folder, {"text": 0.5, "first": 0.5})
    batch = {"latents": torch.zeros(400, 4, 3, 4, 4)}
    state = conditions.write(batch, torch.Generator().manual_seed(0))
    known = (~state.denoise_mask).flatten(1).any(1)
    assert 0.42 < float(known.float().mean()) < 0.58
    assert bool(state.denoise_mask[:, :, 1:].all())


def test_noise_levels_cut_in_two_are_the_whole():
    density = {"shift": 3.0, "mean": 0.2, "std": 1.1}
    boundary, generator = 0.7, torch.Generator().manual_seed(0)
    whole = draw_sigmas(20_000, generator, **density)
    low = draw_sigmas(20_000, generator, **density, between=(0.0, boundary))
    high = draw_sigmas(20_000, generator, **density, between=(boundary, 1.0))
    assert float(low.max()) <= boundary + 1e-6
    assert float(high.min()) >= boundary - 1e-6
    share = share_below(boundary, **density)
    assert share == pytest.approx(float((whole < boundary).float().mean()), abs=0.01)
    for level in (0.3, 0.6, 0.8, 0.95):
        mixed = share * (low < level).float().mean() + (1 - share) * (high < level).float().mean()
        assert float(mixed) == pytest.approx(float((whole < level).float().mean()), abs=0.01)
    uniform = {"shift": 2.0, "mean": None}
    assert share_below(0.5, **uniform) == pytest.approx(1 / 3)
    assert (share_below(0.0), share_below(1.0)) == (0.0, 1.0)


def test_each_expert_learns_its_noise_levels_as_often_as_they_come(wan, clips, tmp_path):
    folder = open_model(str(wan("t2v-a14b")))
    config = make_config(folder.path, clips, tmp_path, noise={"shift": 6.0})
    dataset = open_dataset(config.data, folder, device="cpu", batch_size=2)
    task = FinetuneTask(config, folder, dataset)
    boundary = folder.defaults.boundary
    roles = []
    for step in range(24):
        batch = task.batch(step, 0)
        high = batch.sigma >= boundary - 1e-6
        assert bool((high if batch.role == EXPERTS[0] else ~high).all())
        roles.append(batch.role)
    again = task.batch(step, 0)
    assert torch.equal(batch.noise, again.noise)
    assert torch.equal(batch.sigma, again.sigma)
    assert abs(roles.count(EXPERTS[1]) / 24 - share_below(boundary, shift=6.0)) < 0.25
    task.loss(batch, 0)[0].backward()
    for role, module in task.transformers.items():
        grads = [p.grad for p in module.parameters() if p.requires_grad]
        assert all((g is not None) == (role == batch.role) for g in grads)


@pytest.mark.parametrize("keep", [2.0, 0.0])
def test_others_than_the_subject_stay_as_they_are(tiny_model, clips, tmp_path, keep):
    config = make_config(
        tiny_model, clips, tmp_path,
        subject={"token": "<subject_2>", "like": "a cat", "keep_others": keep},
    )
    folder = open_model(str(tiny_model))
    dataset = open_dataset(config.data, folder, device="cpu", batch_size=2, with_context=False)
    task = FinetuneTask(config, folder, dataset)
    others = task.batch(0, 0)
    assert not (others.text == task.subject.token.index).any()
    assert (task.loss(others, 0)[0].item() < 1e-9) == bool(keep)  # nothing differs yet
    [dit] = task.transformers.values()
    with torch.no_grad():
        for name, factor in dit.named_parameters():
            if "lora_B" in name:
                factor.add_(0.1)
    loss, _ = task.loss(others, 0)
    assert loss.item() > 1e-6
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in dit.parameters())
    shown = replace(others, text=torch.full_like(others.text, task.subject.token.index))
    assert task.loss(shown, 0)[0].item() == pytest.approx(task._error(shown).item())
    assert (loss.item() == pytest.approx(task._error(others).item())) != bool(keep)
    assert loss.item() == pytest.approx((keep or 1) * task._error(others, bool(keep)).item())


def test_a_token_learns_through_the_text_encoder_alone(tiny_model, clips, tmp_path):
    config = make_config(
        tiny_model, clips, tmp_path, subject={"token": "<subject_2>", "like": "a cat"},
        data={"prefix": "<subject_2>", "caption_dropout": 0.0},
    )
    folder = open_model(str(tiny_model))
    dataset = open_dataset(config.data, folder, device="cpu", batch_size=2, with_context=False)
    task = FinetuneTask(config, folder, dataset)
    task.loss(task.batch(0, 0), 0)[0].backward()
    assert float(task.subject.token.row.grad.norm()) > 0
    assert all(p.grad is None for p in task.subject.encoder.parameters())
    groups = [group for each in task.optimizers() for group in each.param_groups]
    assert groups[-1]["peak_lr"] == config.subject.lr
    assert sum(len(group["params"]) for group in groups) == sum(
        p.requires_grad for m in task.modules.values() for p in m.parameters()
    )


def test_checkpointed_blocks_learn_the_same(tiny_model, clips, tmp_path):
    folder = open_model(str(tiny_model))
    config = make_config(tiny_model, clips, tmp_path, method="full")
    dataset = open_dataset(config.data, folder, device="cpu", batch_size=2)
    found = []
    for each in (config, replace(config, checkpointing=True)):
        task = FinetuneTask(each, folder, dataset)
        task.loss(task.batch(0, 0), 0)[0].backward()
        found.append({n: p.grad for n, p in task.transformers["transformer"].named_parameters()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_validation_is_the_same_each_time(tiny_model, clips, tmp_path):
    folder = open_model(str(tiny_model))
    config = make_config(tiny_model, clips, tmp_path, data={"held_out": 0.5})
    dataset = open_dataset(config.data, folder, device="cpu", batch_size=2)
    task = FinetuneTask(config, folder, dataset)
    first = task.validate(1, tmp_path)
    assert first == task.validate(2, tmp_path)
    assert set(first) == {"velocity_0.3", "velocity_0.95", "velocity_mean"}


def test_a_plan_needs_no_weights_of_a_published_model(tiny_model, clips, tmp_path):
    def planned(model, ranks=None, **changes):
        return plan(make_config(model, clips, tmp_path, **changes), ranks)

    large = {"data": {"sizes": ["832x480"], "frames": [81]}, "checkpointing": True}
    lora = planned("Wan-AI/Wan2.1-T2V-14B-Diffusers", 8, **large, run={"dtype": "bf16"})
    full = planned("Wan-AI/Wan2.1-T2V-14B-Diffusers", 8, **large, method="full")
    assert lora.ranks == full.ranks == 8
    assert 14.2e9 < full.trained < 14.4e9
    assert lora.frozen == full.trained
    assert full.peak > 3 * lora.peak
    both = planned("Wan-AI/Wan2.2-T2V-A14B-Diffusers", **large)
    one = planned("Wan-AI/Wan2.2-T2V-A14B-Diffusers", **large, experts="low")
    assert both.frozen == 2 * one.frozen
    here = planned(tiny_model)
    assert here.ranks == 1
    module = open_model(str(tiny_model)).components["transformer"].build()
    assert here.frozen == sum(p.numel() for p in module.parameters())
    for published in ("Wan2.1-I2V-14B-720P", "Wan2.1-FLF2V-14B-720P", "wan2.1-vace-1.3b",
                      "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B", "Wan2.1-VACE-14B"):  # fmt: skip
        assert planned(published, **large).flops > 1e14
    with pytest.raises(InputError, match="neither on this machine nor a published one"):
        planned("no/such-model")


def test_experts_that_differ_are_planned_as_each_is(clips, tmp_path):
    model = add_low_expert(build_tiny_model(tmp_path / "model", sound=True))
    parts = open_model(str(model)).components
    for experts, roles in (("high", EXPERTS[:1]), ("low", EXPERTS[1:]), ("both", EXPERTS)):
        planned = plan(make_config(model, clips, tmp_path, experts=experts))
        whole = sum(p.numel() for role in roles for p in parts[role].build().parameters())
        assert planned.frozen == whole
