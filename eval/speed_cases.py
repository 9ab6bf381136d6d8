"""What `eval/speed.py` times: each case as a function for us and one for diffusers.

Both sides get the same random weights, inputs, dtype and threads. A side is run in a process of its
own that answers "run" with the seconds of one run, so that the two can take turns and neither sees
the other's settings; `python eval/speed_cases.py CASE SIDE` is that process.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.core.runtime import reuse_freed_memory

SIDES = ("ours", "eager", "compiled")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NUM_LAYERS = 4
VAE_SIDE = 256
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        title: what the table says.
        kind: which builder makes it.
        dtype: of weights and activations.
        wanted: the ratio that it has to reach, and the one to hope for.
        options: the builder's.
        flops: floating-point operations of a run, where a formula tells; see `count_flops`.
        repeats: rounds of the two sides, after one to warm up.
    """

    title: str
    kind: str
    dtype: str
    wanted: tuple[float, ...]
    options: dict[str, Any]
    flops: float | None = None
    repeats: int = 5


def _dit_flops(tokens: int, width: int, ffn: int, layers: int = NUM_LAYERS) -> float:
    """Products of the blocks: six square matrices, two of the feed-forward, and attention."""
    return layers * 2.0 * tokens * (6 * width**2 + 2 * width * ffn + 2 * tokens * width)


def _dit(title: str, dtype: str, frames: int, plane: tuple[int, int], wanted: tuple[float, ...],
         repeats: int = 5, **options: Any) -> Case:
    tokens = frames * plane[0] * plane[1] // 4
    wide = options.get("preset") == "wan22-5b"
    flops = _dit_flops(tokens, 3072, 14336) if wide else _dit_flops(tokens, 1536, 8960)
    shape = {"frames": frames, "plane": plane}
    return Case(title, "dit", dtype, wanted, shape | options, flops, repeats)


CASES = {
    "dit-1.5k": _dit("DiT, 1.3B width, 4 layers, 1,520 tokens", "bf16", 5, (38, 32), (1.45, 1.8)),
    "dit-4.4k": _dit("the same, 4,356 tokens", "bf16", 9, (44, 44), (1.6, 2.0)),
    "dit-10k": _dit("the same, 10,080 tokens", "bf16", 21, (40, 48), (1.8, 2.3), 3),
    "dit-fp32": _dit("DiT, 1,520 tokens", "fp32", 5, (38, 32), (2.0, 2.2)),
    "ti2v": _dit("TI2V-5B blocks, a time for each token, 1,520 tokens", "bf16", 5, (38, 32),
                 (2.3,), preset="wan22-5b", per_token=True),
    "decode-bf16": Case("VAE 2.1 decode, 256x256, 17 frames", "decode", "bf16", (1.5, 2.0),
                        {"frames": 17}),
    "decode-fp32": Case("the same", "decode", "fp32", (1.3, 1.6), {"frames": 17}),
    "encode-bf16": Case("VAE 2.1 encode, 256x256, 17 frames", "encode", "bf16", (1.4,),
                        {"frames": 17}),
    "encode-fp32": Case("the same", "encode", "fp32", (1.2,), {"frames": 17}),
    "whole": Case("text to video, guided, 1.3B width, 4 layers, 256x256, 17 frames, 8 steps",
                  "whole", "bf16", (1.5, 1.8), {}, repeats=3),
    "embedded": Case("the embedded model's clip in 25 steps", "embedded", "bf16", (1.5, 2.5), {}),
    "training": Case("training step, 1.3B width, 4 layers, 4,356 tokens, autocast", "training",
                     "bf16", (1.3,), {"frames": 9, "plane": (44, 44)},
                     3 * _dit_flops(4356, 1536, 8960), repeats=3),  # each product has two gradients
}
MEMORY = Case("decode memory, 128x128", "decode", "bf16", (), {"size": 128})


def count_flops(case: Case) -> float | None:
    """Floating-point operations of a run in diffusers; None for whole clips, which mix all kinds.

    Ours does fewer in a VAE: no zero taps, and upsampling folded into smaller kernels.
    """
    if case.kind not in ("decode", "encode"):
        return case.flops
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    frames, side = case.options["frames"], VAE_SIDE
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = AutoencoderKLWan()
        if case.kind == "decode":
            vae.decode(torch.empty(1, 16, 1 + (frames - 1) // 4, side // 8, side // 8))
        else:
            vae.encode(torch.empty(1, 3, frames, side, side))
    return float(counter.get_total_flops())


def build(case: Case, side: str, **changes: Any) -> Run:
    """What runs one case on one side, ready and loaded."""
    torch.manual_seed(0)
    if side == "ours":
        reuse_freed_memory()  # as `vidgen.load` does
    builders = {
        "dit": _build_dit, "decode": _build_vae, "encode": _build_vae, "whole": _build_whole,
        "embedded": _build_embedded, "training": _build_training,
    }
    return builders[case.kind](case, side, **(case.options | changes))


# --- transformers


def _reference_dit(preset: str) -> nn.Module:
    from diffusers import WanTransformer3DModel

    from vidgen.models.presets import DIT_PRESETS

    config = DIT_PRESETS[preset]
    return WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_channels, out_channels=config.out_channels,
        text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim,
        num_layers=NUM_LAYERS,
    ).eval()


def _our_dit(theirs: nn.Module, preset: str, dtype: torch.dtype) -> nn.Module:
    """Ours with the weights of `theirs`, each in the dtype that our loader would give it."""
    from dataclasses import replace

    from vidgen.models.dit import SpacetimeDiT
    from vidgen.models.presets import DIT_PRESETS
    from vidgen.weights.keymap import DIT_KEYS, renamed

    config = replace(DIT_PRESETS[preset], num_layers=NUM_LAYERS)
    with torch.device("meta"):
        ours = SpacetimeDiT(config).eval()
    state = theirs.state_dict()
    names = renamed(state, DIT_KEYS, "diffusers", "vidgen")
    own = {
        names[key]: value.to(
            torch.float32 if any(part in names[key] for part in ours.fp32_weights) else dtype
        )
        for key, value in state.items()
    }
    ours.load_state_dict(own, assign=True)
    return ours


def _dit_inputs(
    config: Any, frames: int, plane: tuple[int, int], per_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, frames, *plane, generator=draw)
    context = torch.zeros(1, 512, config.text_dim)
    context[:, :60] = torch.randn(1, 60, config.text_dim, generator=draw)
    times = torch.full((1, frames, plane[0] // 2, plane[1] // 2), 700.0)
    times[:, 0] = 0.0
    return latents, context, times if per_token else torch.tensor([700.0])


def _build_dit(
    case: Case, side: str, frames: int, plane: tuple[int, int], *, preset: str = "wan-1.3b",
    per_token: bool = False, logit_std: float = 1.0,
) -> Run:
    from vidgen.models.presets import DIT_PRESETS
    from vidgen.ops.linear import pack

    theirs, dtype = _reference_dit(preset), DTYPES.get(case.dtype, torch.float64)
    for name, parameter in theirs.named_parameters():
        if name.endswith("attn1.norm_q.weight"):
            parameter.data *= logit_std
    latents, context, times = _dit_inputs(DIT_PRESETS[preset], frames, plane, per_token)
    if side == "ours":
        model = _our_dit(theirs, preset, dtype).requires_grad_(requires_grad=False)
        del theirs
        pack(model)
        text, lengths = context[:, :60].to(dtype), torch.tensor([60])

        @torch.no_grad()
        def run() -> Tensor:
            return model(latents.to(dtype), times, text, context_lengths=lengths)

        return run
    theirs = _cast(theirs, dtype)
    if side == "compiled":
        theirs.compile_repeated_blocks()
    flat = times.flatten(1) if per_token else times

    @torch.no_grad()
    def run_theirs() -> Tensor:
        return theirs(latents.to(dtype), flat, context.to(dtype), return_dict=False)[0]

    return run_theirs


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As diffusers' own loader does: some parts stay float32."""
    keep = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        stays = dtype != torch.float64 and any(part in name.split(".") for part in keep)
        parameter.data = parameter.data.to(torch.float32 if stays else dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point() and dtype == torch.float64:
            buffer.data = buffer.data.double()
    return model


def _build_training(case: Case, side: str, frames: int, plane: tuple[int, int]) -> Run:
    from vidgen.models.presets import DIT_PRESETS

    del case
    model = _reference_dit("wan-1.3b")
    latents, context, _ = _dit_inputs(DIT_PRESETS["wan-1.3b"], frames, plane, False)
    if side == "ours":
        model = _our_dit(model, "wan-1.3b", torch.float32)
    elif side == "compiled":
        model.compile_repeated_blocks()
    model.train().requires_grad_(requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)
    times = torch.tensor([700.0])
    options: dict[str, Any] = {"context_lengths": torch.tensor([60])} if side == "ours" else {}

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            text = context[:, :60] if side == "ours" else context
            out = model(latents, times, text, **options)
            velocity = out if isinstance(out, Tensor) else out[0]
            loss = (velocity.float() - latents).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run


# --- VAEs


def _build_vae(case: Case, side: str, frames: int, size: int = VAE_SIDE) -> Run:
    from diffusers import AutoencoderKLWan

    from vidgen.models.presets import VAE_PRESETS
    from vidgen.models.vae import CausalVAE
    from vidgen.weights.keymap import renamed, vae_keys

    dtype, config = DTYPES.get(case.dtype, torch.float64), VAE_PRESETS["wan21"]
    theirs = AutoencoderKLWan().eval().requires_grad_(requires_grad=False)
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 1 + (frames - 1) // 4, size // 8, size // 8, generator=draw)
    video = torch.rand(1, 3, frames, size, size, generator=draw) * 2 - 1
    if side == "ours":
        ours = CausalVAE(config).eval().requires_grad_(requires_grad=False)
        state = theirs.state_dict()
        names = renamed(state, vae_keys(config), "diffusers", "vidgen")
        ours.load_state_dict({names[key]: value for key, value in state.items()})
        del theirs
        ours = ours.to(dtype)

        @torch.no_grad()
        def run() -> Any:
            if case.kind == "decode":  # as a writer takes them: chunk by chunk
                given = ours.normalize(latents).to(dtype)
                return _last([part.float() for part in ours.stream_decode(given)], frames)
            return torch.cat(list(ours.stream_encode([video.to(dtype)])), 2).float()

        return run
    theirs = theirs.to(dtype)
    if side == "compiled":
        theirs.encoder.compile()
        theirs.decoder.compile()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (theirs.config.latents_mean, theirs.config.latents_std)
    )

    @torch.no_grad()
    def run_theirs() -> Tensor:
        if case.kind == "decode":
            return theirs.decode(latents.to(dtype), return_dict=False)[0].float()
        return (theirs.encode(video.to(dtype)).latent_dist.mode().float() - mean) / std

    return run_theirs


def _last(parts: list[Tensor], frames: int) -> Tensor:
    """Chunks of video as a whole, clamped as diffusers does."""
    whole = torch.cat(parts, 2).clamp(-1, 1)
    assert whole.shape[2] == frames
    return whole


# --- pipelines


def _build_whole(case: Case, side: str) -> Run:
    del case
    folder = Path(tempfile.gettempdir()) / f"vidgen-speed-{NUM_LAYERS}"
    if not (folder / "model_index.json").is_file():
        _write_pipeline(folder)
    options = {"height": 256, "width": 256, "num_frames": 17, "steps": 8, "guidance": 5.0}
    return _pipeline_run(folder, side, "a red car bounces across the desert", **options)


def _write_pipeline(folder: Path) -> None:
    """A Wan pipeline with a shallow transformer and a one-layer text encoder of the true width."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "car", "bounces", "across", "the", "desert"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    text = UMT5EncoderModel(UMT5Config(
        vocab_size=len(words), d_model=4096, d_kv=64, d_ff=512, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu",
    ))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer, text.bfloat16(), AutoencoderKLWan(), scheduler,
        _cast(_reference_dit("wan-1.3b"), torch.bfloat16),
    )
    pipe.save_pretrained(folder)


def _build_embedded(case: Case, side: str) -> Run:
    del case
    if side == "ours":
        return _pipeline_run(None, side, "a red car moves left in the desert")
    from vidgen.weights.convert import convert
    from vidgen.weights.layouts import open_model

    model = open_model("toybox")
    folder = Path(tempfile.gettempdir()) / f"vidgen-speed-embedded-{model.content_hash[:12]}"
    if not (folder / "model_index.json").is_file():
        convert(model, folder, "diffusers")
    return _pipeline_run(folder, side, "a red car moves left in the desert", 33, 128, 128, 25, 4.0)


def _pipeline_run(
    folder: Path | None, side: str, prompt: str, num_frames: int = 33, height: int = 128,
    width: int = 128, steps: int = 25, guidance: float = 4.0,
) -> Run:
    """A whole clip as uint8 frames in memory, from the prompt on; models are loaded before."""
    if side == "ours":
        import vidgen

        engine = vidgen.load(str(folder) if folder else "toybox", dtype="bf16")
        size = (width, height)

        # the work of diffusers' pipeline: each step guided, one frame rate, one clip, no sound
        alone = {} if folder else {"temporal_upsampling": 1, "candidates": 1, "regional_prompts": 0}

        def run() -> Any:
            return engine.generate(
                prompt, seed=0, frames=num_frames, size=size, steps=steps, guidance=guidance,
                guidance_interval=(0.0, 1.0), shift=3.0, audio="none", settings=alone,
            ).frames

        return run
    from diffusers import AutoencoderKLWan, WanPipeline

    # the VAE of Wan in float32, as its page says and as ours runs; the embedded one's in bfloat16
    dtype = torch.float32 if width == 256 else torch.bfloat16
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
    pipe = WanPipeline.from_pretrained(folder, vae=vae, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    if side == "compiled":
        for dit in filter(None, (pipe.transformer, pipe.transformer_2)):
            dit.compile_repeated_blocks()

    def run_theirs() -> Any:
        frames = pipe(
            prompt, negative_prompt="", height=height, width=width, num_frames=num_frames,
            num_inference_steps=steps, guidance_scale=guidance, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).frames[0]
        return (frames * 255).round().astype("uint8")

    return run_theirs


# --- the process of one side


def serve(name: str, side: str, threads: int, changes: dict[str, Any]) -> None:
    """Answer "run" with seconds and peak memory; "run FILE" also writes the result there."""
    torch.set_num_threads(threads)
    case = MEMORY if name == "memory" else CASES[name]
    if "dtype" in changes:
        case = Case(case.title, case.kind, changes.pop("dtype"), (), case.options)
    run = build(case, side, **changes)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        _, _, path = line.strip().partition(" ")
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        if path:
            torch.save(result, path)
        print(json.dumps({"seconds": seconds, "peak_mb": _peak()}), flush=True)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
