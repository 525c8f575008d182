"""What is installed; the metadata is in pyproject.toml.

The folder `kernels/` becomes the package `fastnabla.kernels`. Extensions in C++ and CUDA belong here too, as
`ext_modules`; there is none yet.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastnabla", "fastnabla.*"]), "fastnabla.kernels"],
    package_dir={"fastnabla.kernels": "kernels"},
    include_package_data=False,
    package_data={"fastnabla.objective": ["README.md"], "fastnabla.testbed": ["data/**"]},
)
