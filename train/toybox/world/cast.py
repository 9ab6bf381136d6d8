"""The cast of the Toybox world: every sprite, its emoji, manners and names."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Sprite(NamedTuple):
    """One drawable thing: its emoji, how it gets about, where the font lets it look, its words."""

    name: str
    codepoint: int
    kind: Literal["vehicle", "aircraft", "boat", "animal", "flyer", "swimmer", "thing"]
    faces: Literal["left", "right", "front"]
    color: str | None = None  # the one-word colour it has untinted
    synonyms: tuple[str, ...] = ()
    voice: str | None = None  # the sound it makes
    is_round: bool = False  # its spin can't be seen
    reserved: bool = False  # never in a sampled scene: for fine-tuning and reference-image tests


_CAST = (
    Sprite("car", 0x1F697, "vehicle", "left", "red", ("automobile", "auto"), "engine"),
    Sprite("bus", 0x1F68C, "vehicle", "left", None, ("coach", "motor bus"), "engine"),
    Sprite("tractor", 0x1F69C, "vehicle", "left", "green", ("farm tractor",), "engine"),
    Sprite("bicycle", 0x1F6B2, "vehicle", "left", None, ("bike", "cycle"), "bell"),
    Sprite("airplane", 0x2708, "aircraft", "right", None, ("plane", "aeroplane"), "engine"),
    Sprite("helicopter", 0x1F681, "aircraft", "left", "yellow", ("chopper",), "engine"),
    Sprite("rocket", 0x1F680, "aircraft", "right", None, ("space rocket", "rocket ship"), "roar"),
    Sprite("sailboat", 0x26F5, "boat", "left", "orange", ("sailing boat", "yacht")),
    Sprite("train", 0x1F682, "vehicle", "left", None, ("steam train", "locomotive"), "whistle"),
    Sprite("flying saucer", 0x1F6F8, "aircraft", "front", None, ("ufo", "spaceship"), "hum"),
    Sprite("cat", 0x1F408, "animal", "left", "orange", ("kitty", "kitten"), "meow"),
    Sprite("dog", 0x1F415, "animal", "front", None, ("puppy", "doggy"), "bark"),
    Sprite("horse", 0x1F40E, "animal", "left", "brown", ("pony",), "neigh"),
    Sprite("cow", 0x1F404, "animal", "left", None, ("spotted cow",), "moo"),
    Sprite("pig", 0x1F416, "animal", "left", "pink", ("piglet", "piggy"), "oink"),
    Sprite("elephant", 0x1F418, "animal", "left", "gray", (), "trumpeting"),
    Sprite("penguin", 0x1F427, "animal", "left"),
    Sprite("fish", 0x1F41F, "swimmer", "left", "blue"),
    Sprite("whale", 0x1F433, "swimmer", "left", "blue"),
    Sprite("octopus", 0x1F419, "swimmer", "front", None, ("squid",)),
    Sprite("turtle", 0x1F422, "animal", "left", "green", ("tortoise",)),
    Sprite("crab", 0x1F980, "animal", "front", "orange"),
    Sprite("frog", 0x1F438, "animal", "front", "green", ("toad",), "croak"),
    Sprite("rabbit", 0x1F407, "animal", "left", None, ("bunny", "hare")),
    Sprite("owl", 0x1F989, "flyer", "front", "brown", (), "hoot"),
    Sprite("butterfly", 0x1F98B, "flyer", "front", "orange", ("monarch butterfly",)),
    Sprite("bee", 0x1F41D, "flyer", "left", None, ("honeybee", "bumblebee"), "buzz"),
    Sprite("snail", 0x1F40C, "animal", "left", "brown"),
    Sprite("giraffe", 0x1F992, "animal", "left"),
    Sprite("dinosaur", 0x1F995, "animal", "left", "green", ("dino",), "roar"),
    Sprite("duck", 0x1F986, "animal", "left", None, ("mallard",), "quack"),
    Sprite("lion", 0x1F981, "animal", "front", None, ("lion head",), "roar"),
    Sprite("flamingo", 0x1F9A9, "animal", "left", "pink"),
    Sprite("apple", 0x1F34E, "thing", "front", "red"),
    Sprite("banana", 0x1F34C, "thing", "front", "yellow", ("peeled banana",)),
    Sprite("pizza", 0x1F355, "thing", "front", None, ("slice of pizza", "pizza slice")),
    Sprite("hamburger", 0x1F354, "thing", "front", None, ("burger", "cheeseburger")),
    Sprite("watermelon", 0x1F349, "thing", "front", None, ("slice of watermelon", "melon")),
    Sprite("strawberry", 0x1F353, "thing", "front", "red"),
    Sprite("ice cream", 0x1F366, "thing", "front", None, ("ice cream cone",)),
    Sprite("doughnut", 0x1F369, "thing", "front", None, ("donut",), is_round=True),
    Sprite("cake", 0x1F382, "thing", "front", None, ("birthday cake",)),
    Sprite("carrot", 0x1F955, "thing", "front", "orange"),
    Sprite("pineapple", 0x1F34D, "thing", "front"),
    Sprite("mushroom", 0x1F344, "thing", "front", None, ("toadstool",)),
    Sprite("soccer ball", 0x26BD, "thing", "front", None, ("ball", "football"), is_round=True),
    Sprite("balloon", 0x1F388, "thing", "front", "red", ("party balloon",)),
    Sprite("guitar", 0x1F3B8, "thing", "front", "red", ("electric guitar",), "strum"),
    Sprite("umbrella", 0x2602, "thing", "front", "purple", ("parasol",)),
    Sprite("alarm clock", 0x23F0, "thing", "front", "red", ("clock",), "ringing", is_round=True),
    Sprite("gift", 0x1F381, "thing", "front", None, ("present", "gift box")),
    Sprite("crown", 0x1F451, "thing", "front", "yellow", ("golden crown", "royal crown")),
    Sprite("teddy bear", 0x1F9F8, "thing", "front", "brown", ("teddy", "toy bear")),
    Sprite("robot", 0x1F916, "thing", "front", None, ("robot head",), "beep"),
    Sprite("ghost", 0x1F47B, "thing", "front", "white", ("spook",)),
    Sprite("snowman", 0x26C4, "thing", "front", "white"),
    Sprite("star", 0x2B50, "thing", "front", "yellow", ("golden star",)),
    Sprite("heart", 0x2764, "thing", "front", "red"),
    Sprite("sunflower", 0x1F33B, "thing", "front", "yellow", ("flower",)),
    Sprite("cactus", 0x1F335, "thing", "front", "green"),
    Sprite("unicorn", 0x1F984, "animal", "left", reserved=True),
    Sprite("scooter", 0x1F6F5, "vehicle", "left", "yellow", ("moped",), reserved=True),
    Sprite("trumpet", 0x1F3BA, "thing", "front", "yellow", reserved=True),
)
SPRITES: dict[str, Sprite] = {sprite.name: sprite for sprite in _CAST}
SPRITE_NAMES = tuple(s.name for s in _CAST if not s.reserved)
RESERVED_SPRITES = tuple(s.name for s in _CAST if s.reserved)
