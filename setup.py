"""The build. Metadata lives in pyproject.toml; this file is where the C++ operators join the build."""

from setuptools import setup

setup()
