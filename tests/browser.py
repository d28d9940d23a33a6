#!/usr/bin/python3
"""The web pages of the command `vlmnarrate` in Debian's Chromium, headless.

    tests/browser.py            all of it
    tests/browser.py Written    one class

The command is the one that VLMNARRATE names, by default that of `cargo build --release`. Screenshots go to the folder that SCREENSHOTS names, by default target/screenshots. The pages are served and opened
from this machine; the network log proves that they load nothing from elsewhere.
"""

import functools
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
import urllib.request

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCREENSHOTS = pathlib.Path(os.environ.get("SCREENSHOTS") or ROOT / "target/screenshots").resolve()
COMMAND = os.environ.get("VLMNARRATE") or str(pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target") / "release/vlmnarrate")
DESKTOP, PHONE = (1280, 800), (390, 844)

# Names, headings, language and contrast of what can be seen: what a machine can judge of accessibility.
FAULTS = r"""
const faults = [];
const seen = element => element.checkVisibility({ visibilityProperty: true });
const name = element => (element.getAttribute("aria-label")
  || (element.getAttribute("aria-labelledby") || "").split(" ").map(id => document.getElementById(id)?.textContent).join(" ").trim()
  || [...(element.labels || [])].map(label => label.textContent).join(" ")
  || element.textContent).trim();
if (!document.documentElement.lang) faults.push("no lang");
if (!document.title) faults.push("no title");
if (document.querySelectorAll("h1").length !== 1) faults.push("not one h1");
if (document.querySelectorAll("main").length !== 1) faults.push("not one main");
let level = 1;
for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
  const its = Number(heading.tagName[1]);
  if (its > level + 1) faults.push(`heading ${heading.textContent} skips a level`);
  level = its;
}
for (const control of document.querySelectorAll("a[href], button, input, video, section, [tabindex], progress")) {
  if (!seen(control)) continue;
  if (!name(control)) faults.push(`${control.outerHTML.slice(0, 80)} has no name`);
}
const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
if (new Set(ids).size !== ids.length) faults.push("an id twice");
const channels = colour => colour.match(/[\d.]+/g).map(Number);
const luminance = colour => {
  const [r, g, b] = channels(colour).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if ((channels(colour)[3] ?? 1) === 1) return colour;
  }
  return "rgb(255, 255, 255)";
};
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
  if (!own || !seen(element) || element.closest("script, video, .heard, .skip")) continue;
  const pair = [getComputedStyle(element).color, ground(element)].map(luminance).sort((a, b) => b - a);
  const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
  if (ratio < 4.5) faults.push(`${element.outerHTML.slice(0, 80)} has contrast ${ratio.toFixed(2)}`);
}
if (document.documentElement.scrollWidth > innerWidth) faults.push(`wider than the window: ${document.documentElement.scrollWidth}`);
return faults;
"""


class Browser(unittest.TestCase):
    def browser(self):
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(profile.cleanup)
        for argument in (
            "headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync", "lang=en",
            f"user-data-dir={profile.name}",
        ):  # fmt: skip
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        # Chromium may warn as it likes, our pipelines not: see .ci/run.
        env = {name: value for name, value in os.environ.items() if name != "G_DEBUG"}
        driver = webdriver.Chrome(service=Service("/usr/bin/chromedriver", env=env), options=options)
        self.addCleanup(driver.quit)
        driver.set_page_load_timeout(20)
        driver.set_script_timeout(10)
        self.resize(driver, DESKTOP)
        return driver

    def resize(self, driver, size, dark=False):
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def wait(self, driver, what, condition, seconds=20):
        waiting = WebDriverWait(driver, seconds, 0.1, [StaleElementReferenceException])
        return waiting.until(lambda driver: condition(), f"{what}, within {seconds} s")

    def look(self, driver, name):
        """Judges and pictures the page at both sizes, by day and by night."""
        for size, shape in ((DESKTOP, "desktop"), (PHONE, "phone")):
            for dark in (True, False):
                self.resize(driver, size, dark)
                self.assertEqual(driver.execute_script(FAULTS), [], f"{name}, {shape}, dark={dark}")
                SCREENSHOTS.mkdir(parents=True, exist_ok=True)
                driver.save_screenshot(str(SCREENSHOTS / f"{name}-{shape}{'-dark' * dark}.png"))
        self.resize(driver, DESKTOP)

    def tab_to(self, driver, condition):
        """Presses Tab until the focused element is the one; what it passed by shows where the focus is."""
        for _ in range(60):
            driver.switch_to.active_element.send_keys(Keys.TAB)
            focused = driver.switch_to.active_element
            outline = driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", focused)
            self.assertTrue(focused.tag_name in ("video", "body") or outline != "none", focused.get_attribute("outerHTML"))
            if condition(focused):
                return focused
        self.fail("Tab does not come there")

    def assert_quiet(self, driver, ours):
        """No console message, and no request but to addresses that begin so."""
        self.assertEqual([entry for entry in driver.get_log("browser")], [])
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        self.assertTrue(urls)
        # chrome: is the browser's own first page.
        own = (*ours, "data:", "blob:", "about:", "chrome:")
        self.assertEqual([url for url in urls if not url.startswith(own)], [])


def run(*command):
    subprocess.run(command, cwd=ROOT, check=True, timeout=600, stdout=subprocess.DEVNULL)


EVIL = '</script><img src=x onerror="document.title=1"> & --> done {{title}}'


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server(Browser):
    """Runs the command as a server."""

    def setUp(self):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"

    def start(self, *arguments):
        errors = tempfile.TemporaryFile("w+")
        self.addCleanup(errors.close)
        server = subprocess.Popen([COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=errors)
        server.errors = errors
        self.addCleanup(server.wait, 10)
        self.addCleanup(server.kill)
        return server

    def said(self, server):
        server.errors.seek(0)
        return server.errors.read()

    def open(self, server):
        driver = self.browser()
        self.wait(driver, "it serves", lambda: f"Serving {self.url[:-1]} for this machine only" in self.said(server), 60)
        driver.get(self.url)
        return driver

    def end(self, server, sign=signal.SIGINT):
        server.send_signal(sign)
        self.assertEqual(server.wait(10), 128 + sign)
        self.assertNotIn("panicked", self.said(server))


class Player:
    """What holds of the page of a recorded video, served or written."""

    TITLE = "Ball & snow.mp4"

    def video(self, driver, what):
        return driver.execute_script(f"const video = document.querySelector('video'); return {what}")

    def active(self, driver):
        return self.video(driver, "Array.from(video.textTracks[0].activeCues ?? [], cue => cue.text)")

    def current(self, driver):
        return [e.text for e in driver.find_elements(By.CSS_SELECTOR, "#transcript [aria-current] span")]

    def assert_text(self, driver, title):
        self.assertEqual((driver.title, driver.find_element(By.TAG_NAME, "h1").text), (title, title))
        self.assertEqual([e.text for e in driver.find_elements(By.CSS_SELECTOR, "li span")], [EVIL])
        self.wait(driver, "the cue is there", lambda: self.video(driver, "video.textTracks[0].cues?.length === 1"))
        text = self.video(driver, "video.textTracks[0].cues[0].getCueAsHTML().textContent")
        self.assertEqual(text, EVIL)
        self.assertEqual(driver.find_elements(By.TAG_NAME, "img"), [])

    def play_seek_and_search(self, driver):
        self.assertEqual(driver.title, self.TITLE)
        self.assertEqual(driver.find_element(By.TAG_NAME, "h1").text, self.TITLE)
        self.wait(driver, "the video is there", lambda: self.video(driver, "video.readyState >= 2 && !video.error"))
        self.assertAlmostEqual(self.video(driver, "video.duration"), 18, delta=0.2)

        # Played by keyboard, from its first caption into the next but one.
        self.tab_to(driver, lambda element: element.tag_name == "video").send_keys(Keys.SPACE)
        self.wait(driver, "it plays", lambda: self.video(driver, "!video.paused && video.currentTime > 0.2"))
        self.wait(driver, "the bars' caption is active", lambda: "colour bars" in "".join(self.active(driver)))
        self.wait(driver, "the ball's caption is active", lambda: "white ball" in "".join(self.active(driver)))
        self.wait(driver, "and marked in the transcript", lambda: "white ball" in "".join(self.current(driver)))
        driver.switch_to.active_element.send_keys(Keys.SPACE)
        self.wait(driver, "it pauses", lambda: self.video(driver, "video.paused"))

        # Sought by keyboard: Enter on one caption, Space on another.
        for words, key in (("blue", Keys.ENTER), ("ball", Keys.SPACE)):
            button = self.tab_to(driver, lambda element: element.tag_name == "button" and words in element.text)
            start = float(button.get_attribute("data-start"))
            button.send_keys(key)
            self.wait(driver, f"{words} is there", lambda: self.video(driver, "!video.seeking") and words in "".join(self.active(driver)))
            self.assertAlmostEqual(self.video(driver, "video.currentTime"), start, delta=0.05)
            self.wait(driver, f"{words} is current", lambda: words in "".join(self.current(driver)))
            self.assertEqual(self.current(driver), self.active(driver))
            self.assertEqual(driver.switch_to.active_element, button)
        button.send_keys(Keys.ARROW_DOWN)
        self.assertNotEqual(driver.switch_to.active_element, button)

        # Searched.
        items = driver.find_elements(By.CSS_SELECTOR, "#transcript li")
        found = driver.find_element(By.ID, "found")
        self.assertEqual(found.text, f"{len(items)} captions")
        search = driver.find_element(By.ID, "search")
        search.send_keys("SNOW tele")
        shown = [item.text for item in items if item.is_displayed()]
        self.assertTrue(shown and len(shown) < len(items) and all("television snow" in text for text in shown), shown)
        self.assertEqual(found.text, f"{len(shown)} of {len(items)} captions")
        search.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE)
        self.assertEqual(found.text, f"{len(items)} captions")


class Written(Player, Browser):
    @classmethod
    def setUpClass(cls):
        work = tempfile.TemporaryDirectory()
        cls.addClassCleanup(work.cleanup)
        cls.work = pathlib.Path(work.name)
        # A name that a page and a URI have to escape.
        cls.sample = cls.work / "Ball & snow.mp4"
        run("pipelines/make-sample.sh", cls.sample)
        cls.folder = cls.work / "a page"
        run(COMMAND, "serve", cls.sample, "--write", cls.folder)

    def test_from_disk(self):
        driver = self.browser()
        driver.get((self.folder / "index.html").as_uri())
        self.play_seek_and_search(driver)
        self.look(driver, "recorded")
        self.assert_quiet(driver, [self.folder.as_uri()])

    def test_from_a_server(self):
        """Python's own server knows no ranges, but a video this short comes whole."""
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=self.folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        handler.func.log_message = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        url = f"http://127.0.0.1:{server.server_port}/"
        driver = self.browser()
        driver.get(url)
        self.wait(driver, "captions are there", lambda: self.video(driver, "video.textTracks[0].cues?.length"))
        self.wait(driver, "the video is there", lambda: self.video(driver, "video.readyState >= 2"))
        self.assert_quiet(driver, [url])

    def test_nothing_of_the_text_is_markup(self):
        """A caption that is a program stays text, in the page, its track and the file."""
        sample = self.work / "<i>{{cues}}.mp4"
        sample.symlink_to(self.sample)
        folder = self.work / "evil"
        run(COMMAND, "serve", sample, "--write", folder, "--choices", EVIL + "|b", "--interval", "20s")
        driver = self.browser()
        driver.get((folder / "index.html").as_uri())
        self.assert_text(driver, "<i>{{cues}}.mp4")
        self.assert_quiet(driver, [folder.as_uri()])


class Served(Player, Server):
    @classmethod
    def setUpClass(cls):
        work = tempfile.TemporaryDirectory()
        cls.addClassCleanup(work.cleanup)
        cls.work = pathlib.Path(work.name)
        cls.sample = cls.work / "Ball & snow.mp4"
        run("pipelines/make-sample.sh", cls.sample)

    def serve(self, sample, *arguments):
        return self.start("serve", sample, "--listen", f"127.0.0.1:{self.port}", *arguments)

    def stage(self, driver):
        return driver.find_element(By.ID, "stage").text

    def test_it_grows_while_it_is_narrated(self):
        # Long enough to look at it meanwhile.
        server = self.serve(self.sample, "--interval", "0", "--image-splitting")
        driver = self.open(server)
        self.wait(driver, "the video is there", lambda: self.video(driver, "video.readyState >= 2 && !video.error"))
        self.wait(driver, "a caption", lambda: driver.find_elements(By.CSS_SELECTOR, "#transcript li"))
        self.assertEqual(self.stage(driver), "Narrating")
        self.assertRegex(driver.find_element(By.ID, "position").text, r"0:\d\d of 0:18")
        self.assertRegex(driver.find_element(By.CSS_SELECTOR, "footer").text, r"The model demo \d")
        count = lambda: len(driver.find_elements(By.CSS_SELECTOR, "#transcript li"))
        before = count()
        self.wait(driver, "more captions", lambda: count() > before, 120)
        # Nothing is claimed of what is not described yet.
        end = self.video(driver, "video.textTracks[0].cues[video.textTracks[0].cues.length - 1].endTime")
        self.assertLess(end, 17)
        self.look(driver, "narrating")
        self.end(server)
        self.wait(driver, "it to be lost", lambda: "lost" in self.stage(driver))

    def test_whole(self):
        server = self.serve(self.sample)
        driver = self.open(server)
        self.wait(driver, "the end of the narration", lambda: self.stage(driver) == "Narrated", 300)
        self.play_seek_and_search(driver)
        self.look(driver, "served")
        # Who comes late gets all of it.
        texts = [item.text for item in driver.find_elements(By.CSS_SELECTOR, "#transcript li")]
        driver.refresh()
        self.wait(driver, "all captions", lambda: [i.text for i in driver.find_elements(By.CSS_SELECTOR, "#transcript li")] == texts)
        self.assert_quiet(driver, [self.url])
        self.end(server, signal.SIGTERM)

    def test_what_browsers_cannot_play_is_converted(self):
        odd = self.work / "odd.mkv"
        scene = "testsrc2=size=321x241:rate=10:duration=20"
        run("ffmpeg", "-v", "error", "-f", "lavfi", "-i", scene, "-c:v", "ffv1", odd)
        server = self.serve(odd, "--interval", "5s")
        driver = self.open(server)
        self.wait(driver, "the video is there", lambda: self.video(driver, "video.readyState >= 2 && !video.error"), 60)
        self.assertAlmostEqual(self.video(driver, "video.duration"), 20, delta=0.3)
        self.assertFalse(driver.find_element(By.ID, "missing").is_displayed())
        self.assert_quiet(driver, [self.url])
        self.end(server)

    def test_nothing_of_the_text_is_markup(self):
        sample = self.work / "<i>{{cues}}.mp4"
        sample.symlink_to(self.sample)
        server = self.serve(sample, "--choices", EVIL + "|b", "--interval", "20s")
        driver = self.open(server)
        self.wait(driver, "the end of the narration", lambda: self.stage(driver) == "Narrated", 60)
        self.assert_text(driver, "<i>{{cues}}.mp4")
        self.assert_quiet(driver, [self.url])
        self.end(server)


class Live(Server):
    def setUp(self):
        super().setUp()
        self.server = self.watch()

    def watch(self):
        return self.start("live", "test", f"--serve=127.0.0.1:{self.port}")

    def state(self, driver):
        return driver.find_element(By.ID, "connection").text

    def caption(self, driver):
        return driver.find_element(By.ID, "caption").get_attribute("textContent")

    def time(self, driver):
        return driver.execute_script("const video = document.querySelector('video'); return video.readyState > 2 && video.currentTime")

    def assert_live(self, driver):
        self.wait(driver, "a caption of the ball", lambda: "ball" in self.caption(driver))
        self.wait(driver, "its words to be seen", lambda: "ball" in driver.find_element(By.ID, "words").text)
        self.wait(driver, "it to be live", lambda: self.state(driver) == "Live")
        start = self.wait(driver, "the video", lambda: self.time(driver))
        self.wait(driver, "the video to go on", lambda: self.time(driver) > start + 1)
        self.wait(driver, "the video to be of now", lambda: self.behind(driver) < 2)

    def behind(self, driver):
        return driver.execute_script(
            "const video = document.querySelector('video'); return video.buffered.end(video.buffered.length - 1) - video.currentTime"
        )

    def test_clients_come_and_go(self):
        driver = self.open(self.server)
        # All that the live region ever says: whole captions, never half of one.
        driver.execute_script(
            "window.heard = []; const caption = document.getElementById('caption');"
            "new MutationObserver(() => heard.push(caption.textContent)).observe(caption, { childList: true })"
        )
        self.assert_live(driver)
        second = self.browser()
        second.get(self.url)
        self.assert_live(second)
        second.quit()
        self.wait(driver, "captions to go on", lambda: len(driver.find_elements(By.CSS_SELECTOR, "#earlier li")) > 2)
        heard = driver.execute_script("return heard")
        self.assertTrue(heard and all(text.endswith(".") for text in heard), heard)
        self.assert_live(driver)

        # Everything by keyboard. After a pause the video goes on with what is now.
        video = self.tab_to(driver, lambda element: element.tag_name == "video")
        video.send_keys(Keys.SPACE)
        self.wait(driver, "the pause", lambda: self.behind(driver) > 3)
        driver.switch_to.active_element.send_keys(Keys.SPACE)
        self.wait(driver, "the end of the pause", lambda: self.behind(driver) < 2)
        box = self.tab_to(driver, lambda element: element.get_attribute("id") == "announce")
        box.send_keys(Keys.SPACE)
        self.assertEqual(driver.find_element(By.ID, "caption").get_attribute("aria-live"), "off")
        box.send_keys(Keys.SPACE)
        self.assertEqual(driver.find_element(By.ID, "caption").get_attribute("aria-live"), "polite")
        self.tab_to(driver, lambda element: element.get_attribute("id") == "earlier")
        driver.execute_script("document.activeElement.blur()")
        self.look(driver, "live")
        self.assert_quiet(driver, [self.url])
        self.end(self.server)

        # Gone, and back.
        self.wait(driver, "it to be lost", lambda: "lost" in self.state(driver))
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(SCREENSHOTS / "live-lost.png"))
        self.server = self.watch()
        self.wait(driver, "it to be back", lambda: self.state(driver) == "Live", 60)
        self.assert_live(driver)
        self.end(self.server, signal.SIGTERM)

    def test_a_client_that_reads_nothing_holds_up_nobody(self):
        self.wait(None, "it serves", lambda: "Serving" in self.said(self.server), 60)
        with socket.create_connection(("127.0.0.1", self.port)) as asleep:
            asleep.sendall(b"GET /video.webm HTTP/1.0\r\nHost: localhost\r\n\r\n")
            with urllib.request.urlopen(self.url + "captions", timeout=10) as captions:
                lines = (line.decode() for line in captions)
                ids = [re.fullmatch(r"id: \w+-(\d+)\n", line) for line in lines_until(lines, 4)]
        self.assertEqual(len([id for id in ids if id]), 4)
        self.end(self.server)


def lines_until(lines, count):
    """The lines up to so many ids."""
    for line in lines:
        yield line
        count -= line.startswith("id:")
        if not count:
            return


if __name__ == "__main__":
    unittest.main(verbosity=2)
