"""Puts `configs/`, which lies at the top of the repository, into the package that is built."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CONFIGS = "configs"


class BuildWithConfigs(build_py):
    """Copies `configs/` to `patcher_pl/configs/`; an editable install uses the folder as it is."""

    def run(self) -> None:
        super().run()
        for source, target in self._copies():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target, preserve_mode=False)

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold."""
        return [*super().get_source_files(), *(source for source, _ in self._copies())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What a wheel holds."""
        return [*super().get_outputs(include_bytecode), *(target for _, target in self._copies())]

    def _copies(self) -> list[tuple[str, str]]:
        if self.editable_mode:
            return []
        files = sorted(path for path in (ROOT / CONFIGS).rglob("*") if path.is_file())
        names = [str(path.relative_to(ROOT)) for path in files]
        return [(name, str(Path(self.build_lib) / "patcher_pl" / name)) for name in names]


setup(cmdclass={"build_py": BuildWithConfigs})
