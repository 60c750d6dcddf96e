"""Everything is in pyproject.toml; only that the wheel brings the recipes has to be said in code."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies `recipes/` into the package; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("recipes", Path(self.build_lib, "ceu_rl", "_recipes"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
