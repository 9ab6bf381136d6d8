"""The documentation holds: links lead somewhere, commands parse, runs build, sizes are real."""

from __future__ import annotations

import ast
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest

from eval.toybox import __main__ as suites
from tests import reference
from tests.programs import load_program
from train.toybox.runs import load_run
from vidgen.cli.eval import SUFFIXES
from vidgen.cli.main import VERBS, parser_of, verb_parser
from vidgen.cli.options import given_options
from vidgen.cli.outputs import output_names
from vidgen.core.config import build
from vidgen.core.request import Request
from vidgen.story.script import Script

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNS = ("configs", "train/toybox/configs")
CONFIGS = sorted(path for folder in RUNS for path in (ROOT / folder).rglob("*.yaml"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LAUNCHERS = ("torchrun", "deepspeed")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name)
each_config = pytest.mark.parametrize("config", CONFIGS, ids=name)


def code(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(page.read_text()) if kind == language]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of a page's bash blocks, as words; continued lines joined, `&&` parted."""
    for block in code(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                end = words.index("&&")
                yield words[:end]
                words = words[end + 1 :]
            if words:
                yield words


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def run_type(program: str, settings: dict[str, object]) -> type:
    """The type of a program's YAML; a program that makes data reads the YAML of one that learns."""
    if program in ("cache", "trajectories"):
        learns = {"teacher": "distil", "tokenizer": "dit"}
        others = Path(str(settings["run"]["folder"])).name  # type: ignore[index]  # as programs are
        program = next((learns[key] for key in learns if key in settings), others)
    return read_by(program)


@lru_cache
def read_by(program: str) -> type:
    """The dataclass of a program's YAML."""
    module = load_program(f"train/toybox/{program}.py")
    kinds = [
        kind for kind in vars(module).values()
        if is_dataclass(kind) and "run" in {field.name for field in fields(kind)}
    ]
    (found,) = [kind for kind in kinds if kind.__module__ == module.__name__] or kinds
    return found


@each_page
def test_relative_links_resolve(page):
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if not re.match(r"\w+:", link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_can_be_reached_from_the_readme():
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        links = (link.partition("#")[0] for link in LINK.findall(page.read_text()))
        targets = {(page.parent / link).resolve() for link in links if link.endswith(".md")}
        ahead += targets - reached
    assert set(PAGES) <= reached


def test_pages_that_code_names_exist():
    named = re.compile(r"\bdocs/[\w/]+\.(?:md|json|webp|png)")
    folders = ("vidgen", "train", "eval", "configs", "tests", "scripts")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*")
               if path.suffix in (".py", ".yaml", ".js", ".html", "") and path.is_file()]
    missing = {(name(path), page) for path in sources for page in named.findall(path.read_text())
               if not (ROOT / page).exists()}
    assert missing == set()


@each_page
def test_command_lines_parse(page):
    for words in commands(page):
        if words[0] == "vidgen":
            assert words[1] in VERBS, words
            args = vars(verb_parser(words[1], words[2:])[1].parse(words[2:]))
            if words[1] == "generate":
                check_request(args)
            elif words[1] == "eval":
                check_evaluation(args)
            elif words[1] == "train":
                check_finetuning(args)
        elif words[0] in LAUNCHERS:
            start = next(i for i, word in enumerate(words) if word.startswith(("train/", "train.")))
            if words[start] == "train/finetune.py":
                check_finetuning(vars(verb_parser("train")[1].parse(words[start + 1 :])))
            else:
                check_program(words[start - 1 :])
        elif words[:3] == ["python", "-m", "eval.toybox"]:
            args = vars(parser_of(suites, "python -m eval.toybox").parse(words[3:]))
            suites.Benchmark(**{k: v for k, v in args.items() if k not in suites.NOT_OF_BENCHMARK})
        elif words[:1] == ["python"]:
            check_program(words[1:])
        elif words[:1] == ["bash"]:
            assert (ROOT / words[1]).is_file(), words


def check_finetuning(args):
    from vidgen.training.finetune.run import read_config

    if not args["config"].startswith("runs/"):
        read_config(str(ROOT / args["config"]), args["set"])


def check_evaluation(args):
    from vidgen.evaluation.scale import SuiteRun
    from vidgen.evaluation.temporal.run import TemporalRun

    if args["benchmark"] == "temporal":
        TemporalRun(args["videos"], args["network"], workers=args["workers"])
    elif args["benchmark"] != "leaderboard":
        assert args["benchmark"].endswith(SUFFIXES)
        SuiteRun(args["benchmark"], args["model"], args["seeds"], args["seed"])


def check_request(args):
    from vidgen.media.write import check_format

    request = Request(**given_options(Namespace(**args)))
    for path in output_names(args["output"], request):
        check_format(path, request.frames)


def check_program(words):
    """A program's words: its path, or -m and its module."""
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    assert (ROOT / words[0]).is_file(), words
    if "-c" in words:
        path = ROOT / words[words.index("-c") + 1]
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        settings = load_run(path, overrides)
        program = run_type(Path(words[0]).stem, settings)
        build(program, settings, str(path))


@each_page
def test_python_blocks_use_what_exists(page):
    keywords = set(Request.model_fields)
    keywords |= {"journal", "on_estimate", "on_event", "on_preview"}
    for block in code(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vidgen"):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr == "generate":
                assert {keyword.arg for keyword in node.keywords} <= keywords


@pytest.mark.parametrize(
    ("verb", "page"),
    [("generate", "reference/options"), ("plan", "reference/options"), ("sweep", "howto/resume"),
     ("jobs", "howto/resume"), ("eval", "howto/evaluate"), ("convert", "reference/models"),
     ("replay", "howto/resume"), ("extend", "howto/long_clips"), ("check", "reference/metrics"),
     ("script", "reference/script"), ("data", "howto/data"), ("serve", "reference/api"),
     ("train", "howto/finetune")],
)
def test_every_option_stands_on_the_verbs_page(verb, page):
    pages = {page}
    pages |= {"reference/options"} if verb == "sweep" else set()  # which takes generate's options
    pages |= {"reference/metrics"} if verb == "eval" else set()  # a suite with a page of its own
    text = "".join((ROOT / f"docs/{each}.md").read_text() for each in pages)
    words = set(re.findall(r"(?<![\w-])--?[\w-]+", text))
    general = {"--help", "--help-all", "--json"}
    suites = (["temporal"], ["prompts.txt"], ["leaderboard"]) if verb == "eval" else ([],)
    for action in (each for suite in suites for each in verb_parser(verb, suite)[1]._actions):
        flags = set(action.option_strings)
        assert not flags or flags & (words | general), flags


def test_every_field_of_a_request_stands_on_the_servers_page():
    from vidgen.server.schema import ExtraParams, VideoRequest

    page = (ROOT / "docs/reference/api.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert set(VideoRequest.model_fields) - named == set()
    row = next(line for line in page.splitlines() if line.startswith("| `extra_params`"))
    assert {"extra_params", *ExtraParams.model_fields} == set(re.findall(r"`(\w+)`", row))


def test_the_reference_tables_are_made_from_the_code():
    for page, text in reference.pages().items():
        assert page.read_text() == text, "python -m tests.reference"


def test_the_model_page_gives_the_real_sizes():
    import torch

    from eval.toybox.judge import Judge, JudgeConfig
    from eval.toybox.sound_judge import SoundJudge, SoundJudgeConfig
    from vidgen.models.audio import AudioVAE
    from vidgen.models.dit import SpacetimeDiT
    from vidgen.models.presets import AUDIO_VAE_PRESETS, DIT_PRESETS, TEXT_PRESETS, VAE_PRESETS
    from vidgen.models.text import UMT5Encoder
    from vidgen.models.vae import CausalVAE

    page = (ROOT / "docs/reference/models.md").read_text()
    with torch.device("meta"):
        vae, dit = CausalVAE(VAE_PRESETS["toybox"]), SpacetimeDiT(DIT_PRESETS["toybox"])
        parts = [vae, vae.encoder, vae.decoder, dit, UMT5Encoder(TEXT_PRESETS["toybox"])]
        parts += [Judge(JudgeConfig()), AudioVAE(AUDIO_VAE_PRESETS["toybox"])]
        parts.append(SoundJudge(SoundJudgeConfig()))
    for part in parts:
        assert f"{sum(p.numel() for p in part.parameters()):,}" in page
    sound = sum(p.numel() for key, p in dit.named_parameters() if "audio" in key)
    assert f"{sound:,}" in page


def test_the_toybox_page_names_all_there_is():
    from train.toybox.world.cast import SPRITES
    from train.toybox.world.scenes import MOTIONS, PLACES, RELATIONS, TIMES, WEATHERS
    from train.toybox.world.truth import Event

    page = (ROOT / "docs/lab/toybox.md").read_text()
    kinds = re.findall(r'"(\w+)"', Event.__doc__)
    named = [*SPRITES, *MOTIONS, *PLACES, *RELATIONS, *TIMES, *WEATHERS, *kinds]
    flat = " ".join(page.split())
    assert [what for what in named if what not in flat] == []


@each_config
def test_a_run_file_says_what_it_is_and_builds(config):
    header = []
    for line in config.read_text().splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    assert len(header) >= 3, "what, command, cost"
    assert not re.match(r"# \w+:", header[0]), "the first line says what it is"
    assert any(re.match(r"# Commands?: ", line) for line in header)
    assert any(line.startswith("# Cost: ") for line in header)
    if config.parent.name == "scripts":
        assert Script.read(config).shots
        assert any(f"vidgen script {name(config)}" in line for line in header)
        return
    programs = re.findall(r"python -m train\.toybox\.(\w+) +-c (\S+)", "\n".join(header))
    doors = r"(?:vidgen train|(?:torchrun|deepspeed) .*train/finetune\.py) +-c (\S+)"
    runs = re.findall(doors, "\n".join(header))
    assert programs or runs, "no command names its program"
    for program, path in programs:
        assert path == name(config)
        settings = load_run(config)
        build(run_type(program, settings), settings, name(config))
    for path in runs:
        assert path == name(config)
        check_finetuning({"config": path, "set": []})
