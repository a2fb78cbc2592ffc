"""Takes the studies and the files of clusters, which lie beside the package, into the wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithFiles(build_py):
    """Copies `sweeps/` and `cluster/` into the package; an editable install finds them where they are."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if not self.editable_mode:
            for folder in ("sweeps", "cluster"):
                for file in sorted(path for path in Path(folder).glob("*") if path.is_file()):
                    target = Path(self.build_lib, "mowe_ray", file)
                    self.mkpath(str(target.parent))
                    self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithFiles})
