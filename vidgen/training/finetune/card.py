"""The model card of a fine-tuning run, and its curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vidgen.core.config import dump
from vidgen.core.pages import Chart, page
from vidgen.core.runtime import atomic_write
from vidgen.training.finetune.config import FinetuneConfig
from vidgen.training.finetune.output import Made
from vidgen.weights.folder import ModelFolder

_NOT_STATED = "not stated"
_STATEMENTS = {
    "author": "Author", "license": "Licence", "data_license": "Licence of the clips",
    "consent": "Consent of people in the clips",
}


def unstated(config: FinetuneConfig) -> list[str]:
    """Keys of `output` that a card should state and the run leaves out."""
    return [name for name in _STATEMENTS if not getattr(config.output, name).strip()]


def write_card(
    config: FinetuneConfig, base: ModelFolder, facts: Mapping[str, Any], made: Made, folder: Path
) -> Path:
    """Write `README.md`, as the hub shows it, and `curves.html` beside it.

    Args:
        config: the run.
        base: what it began with.
        facts: of the data and the run: what `finetune.facts_of` gives.
        made: what came out.
        folder: where.
    """
    curve = read_curve(Path(config.run.folder) / "curve.jsonl")
    atomic_write(folder / "curves.html", _curves(config.output.name, curve).encode())
    path = folder / "README.md"
    atomic_write(path, _card(config, base, facts, made, curve).encode())
    return path


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's curve; what a resumed run did again counts as it was done last."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    latest = {(line["step"], "validation" in line, "event" in line): line for line in lines}
    return sorted(latest.values(), key=lambda line: line["step"])


def _card(
    config: FinetuneConfig, base: ModelFolder, facts: Mapping[str, Any], made: Made,
    curve: Sequence[Mapping[str, Any]],
) -> str:
    output, kind = config.output, "LoRA" if config.method == "lora" else "fine-tuned model"
    stated = {title: getattr(output, name).strip() or _NOT_STATED
              for name, title in _STATEMENTS.items()}
    header: dict[str, Any] = {
        "base_model": base.given or base.name, "license": output.license or "other",
        "pipeline_tag": "text-to-video", "tags": ["vidgen", "video", config.method],
    }
    if config.subject is not None:
        header["instance_prompt"] = config.subject.token
    use = "".join(f" --lora {Path(path).name}" for path in made.use)
    model = base.given or base.name
    if config.method == "full":
        use, model = "", Path(made.use[0]).name
    scores = [line["validation"] for line in curve if "validation" in line]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {output.name}",
        f"A {kind} of {base.name}. {output.description}".strip(),
        _prompted(config),
        f'```bash\nvidgen generate "..." --model {model}{use}\n```',
        "## What it may be used for",
        _list(stated | {"Licence of the base model": base.license}),
        "## Data", _list(facts["data"]),
        "## Training",
        _list(facts["training"] | {"weights of step": f"{made.chosen.step}, {made.chosen.reason}"}),
        _scores(scores),
        "What it changes, as a share of the weights that it changes: "
        + ", ".join(f"{role} {share:.3%}" for role, share in made.relative.items()) + ".",
        "Curves: [curves.html](curves.html). With and without it, same seeds: [ab.png](ab.png)."
        if facts.get("effect") is not None else "Curves: [curves.html](curves.html).",
        "## Config", f"```yaml\n{yaml.safe_dump(dump(config), sort_keys=False)}```",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _prompted(config: FinetuneConfig) -> str:
    if config.subject is None:
        return ""
    return f"Prompts have `{config.subject.token}` where the subject is to be."


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"* {name}: {value}" for name, value in facts.items())


def _scores(scores: Sequence[Mapping[str, float]]) -> str:
    """First and last scores of the validation."""
    if not scores:
        return ""
    rows = [f"| {name} | {scores[0].get(name, float('nan')):.4f} | {value:.4f} |"
            for name, value in scores[-1].items()]
    return "\n".join(["| validation | first | last |", "|---|---|---|", *rows])


def _curves(title: str, curve: Sequence[Mapping[str, Any]]) -> str:
    """Return a page with the loss and the validation's mean by step."""
    loss = [(line["step"], line["loss"]) for line in curve if "seconds_per_step" in line]
    scores = [(line["step"], line["validation"]["velocity_mean"])
              for line in curve if "validation" in line]
    charts = [Chart(f"{name} by step", [(name, points)], 640, 240)
              for name, points in (("loss", loss), ("validation", scores))]
    return page("charts", title=title, intro="", sections=[("", charts)])
