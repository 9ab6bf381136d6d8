"""Fine-tune a model on several ranks: the same door as `vidgen train`, for launchers.

    torchrun --nproc-per-node 8 train/finetune.py -c configs/train/wan14b_lora_8gpu.yaml
    deepspeed train/finetune.py -c configs/train/wan14b_full_8gpu_zero3.yaml

Options are those of `vidgen train`; see docs/howto/finetune.md.
"""

from __future__ import annotations

import sys

from vidgen.cli.main import main

if __name__ == "__main__":
    # DeepSpeed's launcher gives each process its --local_rank, which the environment tells, too.
    given = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    raise SystemExit(main(["train", *given]))
