"""Render and encode the Toybox clips that `dit.py` learns from; goes on where it stopped.

    python -m train.toybox.cache -c train/toybox/configs/dit.yaml [--set caches.0.shards=64]...
    torchrun --nproc-per-node 2 -m train.toybox.cache -c ...
        each process makes its share of them

A folder holds clips of one kind, numbered shards of them; see
`train.toybox.tasks.toybox_data`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import track

from train.toybox.redrawing import Redrawer
from train.toybox.runs import load_run
from train.toybox.sound_vae import load_sound_vae
from train.toybox.tasks.sound_cache import SoundCache, SoundMix
from train.toybox.tasks.toybox_data import CacheConfig, ToyboxCache, load_vae
from vidgen.core.config import build
from vidgen.core.errors import InputError, exit_code
from vidgen.core.runtime import reuse_freed_memory
from vidgen.training.engines.distributed import own_device


def main() -> int:
    """Make every shard that is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", required=True, metavar="RUN.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    def work() -> None:
        reuse_freed_memory(1 << 30)  # rendering makes and frees whole clips of float32
        settings = load_run(options.config, options.set)
        device = own_device(options.device)
        if not settings.get("caches"):
            raise InputError(f"{options.config} has no caches; a run of train.toybox.dit "
                             "names them")
        dealt = 0
        for entry in settings["caches"]:
            cache = ToyboxCache(build(CacheConfig, entry, options.config))
            vae = load_vae(cache.config.vae, device)
            missing, model = cache.missing(dealt), cache.config.drawn_by
            redrawer = Redrawer(model, str(device)) if model and missing else None
            for index in track(missing, cache.config.folder):
                cache.make(index, vae, device, redrawer)
            if settings.get("sound") and not cache.config.stills_only:
                mix = build(SoundMix, settings["sound"], options.config)
                sound = SoundCache(mix, cache)
                heard_by = load_sound_vae(Path(mix.vae), device=device)
                for index in track(sound.missing(dealt), str(sound.shards.folder)):
                    sound.make(index, heard_by, device)
            dealt += cache.config.shards

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
