"""The command line is a contract: a change of options must be meant, and shows in cli_options.txt.

After a change that is meant:
    python -m tests.contract.test_cli_options > tests/contract/cli_options.txt
"""

import argparse
import re
from pathlib import Path

from vidgen.cli.main import VERBS, main, verb_parser

COMMANDS = [*((verb,) for verb in VERBS),
            *(("eval", suite) for suite in ("temporal", "prompts.txt", "leaderboard"))]
FROZEN = Path(__file__).with_name("cli_options.txt")


def describe(action):
    flags = " ".join(action.option_strings) or action.dest
    facts = [action.__class__.__name__.strip("_").removesuffix("Action")]
    for name in ("nargs", "const", "default", "choices", "metavar", "required"):
        value = getattr(action, name)
        if value not in (None, False, argparse.SUPPRESS, []):
            facts.append(f"{name}={value}")
    if action.type:
        facts.append(f"type={action.type.__name__}")
    return f"    {flags}: {' '.join(facts)}"


def listing():
    lines = []
    for verb, *words in COMMANDS:
        lines.append(" ".join(["vidgen", verb, *words]))
        lines += [describe(action) for action in verb_parser(verb, words)[1]._actions]
    return "\n".join(lines) + "\n"


def test_the_options_of_every_verb_are_the_committed_ones():
    assert listing() == FROZEN.read_text()


def test_help_shows_the_basic_options_and_help_all_every_one(capsys):
    def shown(flag):
        assert main(["generate", flag]) == 0
        return set(re.findall(r"^  (?:-\w.*, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))

    every = set(verb_parser("generate")[1].options())
    basic = shown("--help")
    assert len(basic) <= 24
    assert {"--seed", "--image", "--seconds", "--audio", "--model", "--output"} <= basic < every
    assert shown("--help-all") == every


def test_every_option_has_help():
    for verb, *words in COMMANDS:
        assert all(action.help for action in verb_parser(verb, words)[1]._actions)


if __name__ == "__main__":
    print(listing(), end="")
