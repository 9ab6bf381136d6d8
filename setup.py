"""pyproject.toml can't express this step: `configs` travels in the wheel as `vidgen/configs`.

So do DeepSpeed's settings in `train/deepspeed`, as `vidgen/configs/deepspeed`.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the YAML runs beside the modules; an editable install reads the checkout's instead."""

    def run(self) -> None:
        """Build the modules, then add the configs."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "vidgen", "configs")
            kinds = (("configs", "*.yaml"), ("configs", "scripts/sounds/*.opus"),
                     ("train", "deepspeed/*.json"))
            for source, kind in kinds:
                for path in sorted(Path(source).rglob(kind)):
                    copy = target / path.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithConfigs})
