"""Words that a model wasn't taught: what they are read as, what is left alone, who is told."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

from eval.toybox.suite.phrasings import read_phrasings
from train.toybox.world.captions import vocabulary
from train.toybox.world.synonyms import grammar_synonyms
from vidgen.core.errors import InputError, ModelError
from vidgen.core.request import Request
from vidgen.core.values import parse_word_normalisation
from vidgen.media.probe import read_recipe
from vidgen.models.tokenizer import PromptTokenizer, normalise_words
from vidgen.models.words import ENGLISH, WordReader, english_words, replace_words, synonyms
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.replay import request_from_recipe
from vidgen.weights.folder import embedded_folder

PROMPT = "a red car bounces across the desert"
SLIPPED = "a redd car bouncse across the dezert"
READ = (("redd", "red"), ("bouncse", "bounces"), ("dezert", "desert"))

#: Slips of the phrasings, and what was meant; of some the slip is a word of English itself.
MEANT = """
tracter=tractor drivng=driving volcanoe=volcano rihgt=right paning=panning airplne=airplane
spcae=space camra=camera crabb=crab biger=bigger snwo=snow bouncng=bouncing rigth=right
undewater=underwater driveing=driving raod=road lfet=left spining=spinning clokwise=clockwise
forrest=forest socer=soccer bouncign=bouncing beech=beach goign=going circels=circles
spase=space growwing=growing moutains=mountains trian=train fourth=forth undr=under dwon=down
mushrom=mushroom satys=stays zoomms=zooms umbrela=umbrella swining=swinging ocaen=ocean
bananna=banana hoping=hopping outter=outer inn=in roket=rocket leftt=left mountians=mountains
thik=thick fihs=fish cricle=circle anticlokwise=anticlockwise volcanno=volcano hourse=horse
frow=fro upp=up lyon=lion watre=water nihgt=night slowely=slowly waking=walking medow=meadow
rabit=rabbit spinnning=spinning sunsett=sunset tracktor=tractor thruogh=through donw=down
riseing=rising fram=farm aple=apple underwatr=underwater alram=alarm rigt=right
mountins=mountains standding=standing stil=still botom=bottom baloon=balloon dessert=desert
fogg=fog bunnny=bunny dunnes=dunes doun=down goast=ghost gras=grass nite=night tedy=teddy
forst=forest snwos=snows girafe=giraffe vulcano=volcano bleu=blue clockwize=clockwise
dezert=desert faling=falling cactuss=cactus highwy=highway carot=carrot smaler=smaller loin=lion
cirlce=circle ctiy=city camrea=camera baer=bear buterfly=butterfly montains=mountains zooom=zoom
"""


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(embedded_folder("toybox") / "tokenizer")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's tokenizer as `release.py` leaves it after loose captions."""
    folder = tmp_path_factory.mktemp("taught") / "tokenizer"
    shutil.copytree(embedded_folder("toybox") / "tokenizer", folder)
    (folder / "synonyms.json").write_text(json.dumps(grammar_synonyms()))
    return folder


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


def test_slips_are_read_as_what_was_meant(tokenizer: PromptTokenizer) -> None:
    meant = dict(pair.split("=") for pair in MEANT.split())
    texts = [p.text for p in read_phrasings(200) if p.kind == "typos"]
    unknown = {word for text in texts for word, _ in tokenizer.unknown_words(text)}
    assert meant.keys() == unknown
    right = sum(tokenizer.replacements(word).get(word) == known for word, known in meant.items())
    assert right >= 0.9 * len(meant)


def test_known_words_numbers_and_tokens_are_never_touched(tokenizer: PromptTokenizer) -> None:
    text = "A <subject_0> and THE king's 3 cars, 4k: <carr> it's in r2d2"
    known = tokenizer.words - tokenizer.rare_words.keys()
    assert tokenizer.replacements(" ".join([text, *known])) == {"cars": "car"}
    assert normalise_words("a <carr> carr", {"carr": "car"}) == "a <carr> car"


@pytest.mark.parametrize(
    "word",
    ["platypus", "zebra", "goat", "mouse", "sheep", "fox", "hen", "cart", "lamp", "moose", "newt",
     "she", "him", "zu", "кот"],
)
def test_what_is_unknown_but_no_slip_is_left_alone_and_reported(
    tokenizer: PromptTokenizer, word: str
) -> None:
    assert tokenizer.replacements(f"a {word} bounces") == {}
    (remark,) = tokenizer.remarks(f"a {word} bounces", {})
    assert remark.startswith(f"the model doesn't know the word {word!r}")


def test_names_are_no_slips(tokenizer: PromptTokenizer) -> None:
    names = (ENGLISH / "names.txt").read_text().split()
    assert names == sorted(set(names))
    # of a name that is a word, too, as hazel and wade are, the word is meant
    read = {name: tokenizer.replacements(name).get(name) for name in names
            if name not in tokenizer.words}
    meant = {name: known for name, known in read.items() if known is not None}
    assert meant.items() <= synonyms().items(), "mary isn't a mare"
    assert len(meant) < 10
    assert tokenizer.replacements("Mary and Eric bounce, as Tim's dog does") == {}


@pytest.mark.parametrize(
    ("word", "known"),
    [("taxi", "car"), ("taxis", "car"), ("boats", "boat"), ("jumped", "jumps"), ("fell", "falls"),
     ("galloping", "running"), ("goat's", None), ("inthe", "in the"), ("penguin's", "penguin"),
     ("jungle", "forest"), ("stared", None), ("fishing", None), ("puppies", "puppy")],
)  # fmt: skip
def test_synonyms_and_other_forms_are_read(
    tokenizer: PromptTokenizer, word: str, known: str | None
) -> None:
    assert tokenizer.replacements(word).get(word) == known


def test_synonyms_lead_to_known_words_and_each_to_one(tokenizer: PromptTokenizer) -> None:
    for word, known in synonyms().items():
        assert set(known.split()) <= tokenizer.words, (word, known)
        assert word not in tokenizer.words, word
        assert re.fullmatch("[a-z]+", word), word


def test_a_synonym_that_the_model_lacks_is_not_read() -> None:
    reader = WordReader({"cat", "falls"}, lambda _: 0.0, {})
    assert reader.read("taxi") is None
    assert reader.read("kat") == "cat"
    assert reader.read("catt") == "cat"
    assert "goat" in english_words()


@pytest.mark.parametrize(
    ("word", "known"),
    [("stallion", "horse"), ("Terrapin", "turtle"), ("sahara", "desert"), ("stalion", "horse"),
     ("stallions", "horse"), ("cruises", "moves"), ("trotting", "walking"), ("grey", "gray"),
     ("midnight", "night"), ("icecream", "ice cream"), ("poses", "stays still"), ("horse", None),
     ("revolves", None), ("downtown", None), ("seabed", None), ("hound's", "dog")],
)  # fmt: skip
def test_words_met_too_seldom_are_read_as_the_grammars(
    taught: Path, word: str, known: str | None
) -> None:
    assert PromptTokenizer(taught).replacements(word).get(word.lower()) == known


def test_synonyms_of_the_grammar_are_the_models_words_and_each_leads_to_one(
    tokenizer: PromptTokenizer,
) -> None:
    table = grammar_synonyms()
    words = [word for rare in table.values() for word in rare]
    assert len(words) == len(set(words)) > 250
    assert set(words) <= tokenizer.words - set(vocabulary())
    assert {part for known in table for part in known.split()} <= set(vocabulary())


def test_a_rare_word_is_reported_when_it_is_replaced(taught: Path) -> None:
    tokenizer = PromptTokenizer(taught)
    (told,) = tokenizer.remarks("a stallion", tokenizer.replacements("a stallion"))
    assert told == "the model reads 'stallion' as 'horse'"
    assert tokenizer.remarks("a stallion", {}) == []
    assert tokenizer.unknown_words("a stallion") == []


@pytest.mark.parametrize("text", ["[]", "{", '{"horse": 3}', '{"horse": [["colt"]]}'])
def test_a_damaged_table_of_synonyms_is_refused(taught: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(taught, tmp_path / "tokenizer")
    (folder / "synonyms.json").write_text(text)
    with pytest.raises(ModelError, match="is not a table of synonyms"):
        PromptTokenizer(folder)


def test_words_are_replaced_whatever_their_case() -> None:
    read = replace_words("A Redd, REDD <redd> redder", {"redd": "red"})
    assert read == "A red, red <redd> redder"


def test_a_clip_of_slips_is_that_of_the_words_meant(
    engine: Engine, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        slipped = engine.generate(SLIPPED, seed=1)
    assert "the model reads 'dezert' as 'desert'" in caplog.text
    assert torch.equal(slipped.latents, engine.generate(PROMPT, seed=1).latents)
    slipped.save(tmp_path / "slipped.mp4")
    recipe = read_recipe(tmp_path / "slipped.mp4")
    assert recipe["plan"]["prompt"] == SLIPPED
    assert recipe["plan"]["word_normalisation"] == [list(pair) for pair in READ]
    request = request_from_recipe(recipe, tmp_path)
    assert parse_word_normalisation(request.word_normalisation) == dict(READ)
    assert torch.equal(engine.generate(request).latents, slipped.latents)
    other = request_from_recipe(recipe, tmp_path, changes={"prompt": "a carr"})
    assert (other.prompt, other.word_normalisation) == ("a carr", "auto")


def test_a_recipe_from_before_readings_is_replayed_as_written(
    engine: Engine, tmp_path: Path
) -> None:
    written = engine.generate(SLIPPED, seed=1, word_normalisation="none")
    assert not torch.equal(written.latents, engine.generate(PROMPT, seed=1).latents)
    written.save(tmp_path / "written.mp4")
    recipe = read_recipe(tmp_path / "written.mp4")
    del recipe["plan"]["word_normalisation"], recipe["request"]["word_normalisation"]
    assert request_from_recipe(recipe, tmp_path).word_normalisation == "none"


def test_readings_can_be_given(engine: Engine) -> None:
    given = engine.generate("a rde zorb bounces", seed=1, word_normalisation="zorb=car, rde=red")
    plain = engine.generate("a red car bounces", seed=1, word_normalisation="none")
    assert torch.equal(given.latents, plain.latents)


@pytest.mark.parametrize("value", ["", "car", "a=b=c", "red car=bus", "=car", "car="])
def test_readings_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="give auto, none, or words"):
        Request(prompt=PROMPT, word_normalisation=value)


def test_a_model_of_all_language_gets_prompts_as_written(
    tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "words", frozenset())
    assert tokenizer.replacements(SLIPPED) == {}
    assert tokenizer.remarks(SLIPPED, {}) == []
    assert normalise_words("a&amp;b  c", {}) == "a&amp;b  c"
