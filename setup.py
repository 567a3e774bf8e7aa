"""The one native module, `vitscale._pixels`; everything else of the project is in pyproject.toml.

An installation never fails for it: without a C compiler it is left out, and without libjpeg-turbo's headers it only resizes.
`vitscale.pixels.path_in_use()` tells which it is.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildWithWhatThereIs(build_ext):
    """First with libjpeg-turbo, then without."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`; `optional` makes setuptools go on if the last try fails too."""
        try:
            super().build_extension(ext)
        except Exception as error:
            self.warn(f"{ext.name} is built without libjpeg-turbo: {error}")
            ext.define_macros, ext.libraries = [], []
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "vitscale._pixels",
            ["vitscale/_pixels.c"],
            define_macros=[("WITH_JPEG", "1")],
            libraries=["jpeg"],
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off"],  # fused sums would round weights otherwise than Pillow's
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildWithWhatThereIs},
)
